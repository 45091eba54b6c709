"""The method on the real small model, in process: rounds, aborts, the budget, the deadline."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest

from harness.events import Event, QuorumReached, RolloutDelta, RolloutFinished, RolloutStarted, RunFinished, Stopped
from harness.markovian_rsa import State, init
from harness.prompts import load_templates
from harness.run import Watch, open_run
from harness.types import Finish, Message, Params, Problem, Sampling, Slot
from mrsa_server.engines.embedded import EmbeddedEngine
from tests.engine.conftest import busy

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

PROBLEM = Problem(
    (
        Message("system", ("You solve problems step by step.",)),
        Message("user", ("A pen costs 3 coins. What do 4 cost?",)),
    )
)
PARAMS = Params(
    population=4,
    rounds=2,
    set_size=2,
    rollout_tokens=64,
    tail_tokens=32,
    final_tokens=64,
    seed=11,
    sampling=Sampling(seeded=True),
)


async def go(params: Params, engine: EmbeddedEngine) -> tuple[State, list[Event | RolloutDelta]]:
    events: list[Event | RolloutDelta] = []
    async with open_run(init("run", PROBLEM, params, load_templates()), engine) as stream:
        async for event in stream:
            events.append(event)
        return stream.state, events


async def freed_within_a_second(engine: EmbeddedEngine) -> None:
    left = time.monotonic()
    while await busy(engine):
        assert time.monotonic() - left < 1
        await asyncio.sleep(0.02)


async def test_a_run_reads_true_tokens_round_by_round(engine: EmbeddedEngine) -> None:
    state, events = await go(PARAMS, engine)
    assert isinstance(state.outcome, RunFinished)
    answer = state.rollouts[state.outcome.candidates[0]]
    assert answer.slot == Slot(2, 0)
    assert answer.answer
    shown = "".join(event.text for event in events if isinstance(event, RolloutDelta))
    assert shown.strip() == answer.answer
    started = {event.slot: event for event in events if isinstance(event, RolloutStarted)}
    assert set(started) == set(state.needed)
    for event in events:
        if isinstance(event, RolloutFinished) and event.rollout.slot.round < 2:
            assert event.trace is not None
            tail = event.rollout.tail
            assert list(tail.token_ids) == list(event.trace.token_ids)[-len(tail.token_ids) :]
            assert len(tail.token_ids) == min(32, event.rollout.usage.completion_tokens)
            assert await engine.decode(tail.token_ids) == tail.text
    for slot, event in started.items():
        if slot.round:
            assert event.members == state.sets[slot.round - 1][slot.index]
    assert not await busy(engine)


async def test_a_seeded_run_repeats_itself(engine: EmbeddedEngine) -> None:
    first, _ = await go(replace(PARAMS, rounds=0), engine)
    second, _ = await go(replace(PARAMS, rounds=0), engine)
    assert first.rollouts[Slot(0, 0)].answer == second.rollouts[Slot(0, 0)].answer


async def test_leaving_a_run_frees_the_engine_within_a_second(engine: EmbeddedEngine) -> None:
    params = replace(PARAMS, rollout_tokens=2000, final_tokens=2000)
    async with open_run(init("run", PROBLEM, params, load_templates()), engine, watch=Watch.ALL) as events:
        async for event in events:
            if isinstance(event, RolloutDelta):
                break
        assert await busy(engine)
    await freed_within_a_second(engine)


async def test_a_deadline_cuts_the_engine_and_answers(engine: EmbeddedEngine) -> None:
    params = replace(PARAMS, rollout_tokens=4000, final_tokens=2000, deadline_s=4.0)
    began = time.monotonic()
    state, _ = await go(params, engine)
    assert time.monotonic() - began < 6
    assert isinstance(state.outcome, RunFinished)
    assert state.outcome.stopped is Stopped.DEADLINE
    assert state.rollouts[state.outcome.candidates[0]].answer
    await freed_within_a_second(engine)


async def test_the_engine_is_held_to_the_budget(engine: EmbeddedEngine) -> None:
    params = replace(PARAMS, rollout_tokens=400, budget_tokens=64 + 6 * 40)
    state, events = await go(params, engine)
    assert isinstance(state.outcome, RunFinished)
    assert state.usage.completion_tokens <= 64 + 6 * 40
    assert all(event.grant < 400 for event in events if isinstance(event, RolloutStarted))


async def test_a_quorum_aborts_the_stragglers_and_reads_them_where_they_stand(engine: EmbeddedEngine) -> None:
    params = replace(PARAMS, population=8, set_size=6, rounds=1, rollout_tokens=600, quorum=1)
    problem = Problem((Message("user", ("Tell me a story about a lighthouse.",)),))
    async with open_run(init("run", problem, params, load_templates()), engine) as events:
        reached = False
        async for event in events:
            reached = reached or isinstance(event, QuorumReached)
            if isinstance(event, RolloutStarted) and event.slot.round == 1:
                assert reached
        state = events.state
    assert isinstance(state.outcome, RunFinished)
    cut = [rollout for rollout in state.rollouts.values() if rollout.finish is Finish.ABORTED]
    assert cut
    for rollout in cut:
        assert len(rollout.tail.token_ids) == params.tail_tokens
        assert params.tail_tokens <= rollout.usage.completion_tokens < 600
    await freed_within_a_second(engine)
