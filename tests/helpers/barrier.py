"""The plain loop that every public implementation runs: round by round, every rollout, all of a round before the next.

The reference that lazy evaluation is held against, on the same draws. It shares the draws and the prompts with the
harness, and nothing of its evaluation.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field

from harness.engine import Engine, EngineError
from harness.lineage import draw_sets, seed_of, spare_set
from harness.prompts import Templates, aggregation_messages
from harness.types import Carry, Params, Problem, RolloutRequest, Slot, Tail


@dataclass
class Result:
    """What the loop computed: tails of every round, answers of the last, tokens of all."""

    tails: dict[Slot, Tail] = field(default_factory=dict)
    answers: dict[Slot, str] = field(default_factory=dict)
    tokens: int = 0
    rollouts: int = 0
    failed: bool = False


async def barrier_loop(problem: Problem, params: Params, templates: Templates, engine: Engine) -> Result:
    """Run the method behind a barrier; a lost set is replaced by its spares, a lost last round by the next F."""
    result = Result()
    for round in range(params.rounds + 1):
        last = round == params.rounds
        sets = draw_sets(seed_of(params.seed, "sets", round), params.population, params.set_size, params.population)
        first = 0
        while first < params.population and not (first and (result.answers or not last)):
            indices = range(
                first, min(first + (params.final_candidates if last else params.population), params.population)
            )
            async with asyncio.TaskGroup() as tasks:
                for index in indices:
                    slot = Slot(round, index)
                    read = _read(params, result, slot, sets[index]) if round else ()
                    if read is None:
                        result.failed = True
                        continue
                    tasks.create_task(_generate(engine, problem, params, templates, slot, read, result))
            first = indices.stop
        if not any(slot.round == round for slot in (result.answers if last else result.tails)):
            result.failed = True
        if result.failed:
            return result
    return result


def _read(params: Params, result: Result, slot: Slot, drawn: tuple[int, ...]) -> tuple[Tail, ...] | None:
    members, attempt = tuple(drawn), 0
    while members:
        tails = tuple(
            result.tails[found] for found in (Slot(slot.round - 1, at) for at in members) if found in result.tails
        )
        if tails:
            return tails
        attempt += 1
        members = spare_set(seed_of(params.seed, "spare", *slot), params.population, drawn, attempt)
    return None


async def _generate(
    engine: Engine,
    problem: Problem,
    params: Params,
    templates: Templates,
    slot: Slot,
    read: tuple[Tail, ...],
    result: Result,
) -> None:
    last = slot.round == params.rounds
    close = engine.vocabulary.think_close
    request = RolloutRequest(
        run_id="barrier",
        slot=slot,
        messages=aggregation_messages(templates, problem, read, params.seed, slot.round) if read else problem.messages,
        max_tokens=params.final_tokens if last else params.rollout_tokens,
        stop_ids=close if not last and params.carry is Carry.REASONING else (),
        seed=seed_of(params.seed, "rollout", *slot) if params.sampling.seeded else None,
    )
    ids: list[int] = []
    result.rollouts += 1
    try:
        async with aclosing(engine.generate(request)) as deltas:
            async for delta in deltas:
                ids += delta.token_ids
    except EngineError:
        return
    finally:
        result.tokens += len(ids)
    at = ids.index(close[0]) if close and close[0] in ids else len(ids)
    reasoning, answer = (ids[1:at], ids[at + 1 :]) if close else (ids, ids)
    if last:
        result.answers[slot] = (await engine.decode(answer)).strip()
    else:
        tail = reasoning if params.carry is Carry.REASONING or (params.carry is Carry.HYBRID and not answer) else answer
        if params.carry is not Carry.ANSWER and not tail:
            tail = answer
        if tail := tail[-params.tail_tokens :]:
            result.tails[slot] = Tail(tuple(tail), await engine.decode(tail))
