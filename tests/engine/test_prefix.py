"""What the prompts of one run share on a real engine: every whole block of every prefix is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from harness.events import SetsDrawn
from harness.markovian_rsa import State, decide, init
from harness.prompts import aggregation_messages, load_templates
from harness.run import Watch, open_run
from harness.types import Message, Params, Problem, Sampling, Selection, Slot, Usage
from mrsa_server.engines.embedded import EmbeddedEngine
from tests.bench.prefix import computed_tokens, question

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

TEMPLATES = load_templates()


async def go(engine: EmbeddedEngine, problem: Problem, params: Params) -> State:
    """A run on a cold cache."""
    assert engine._llm is not None
    assert await engine._llm.reset_prefix_cache()
    async with open_run(init("run", problem, params, TEMPLATES), engine, watch=Watch.NONE) as events:
        async for _ in events:
            pass
        return events.state


def block_tokens(engine: EmbeddedEngine) -> int:
    assert engine._llm is not None
    size = engine._llm.vllm_config.cache_config.block_size
    assert isinstance(size, int)
    return size


def used(state: State, round: int) -> list[Usage]:
    return [rollout.usage for slot, rollout in sorted(state.rollouts.items()) if slot.round == round]


def common(left: Sequence[int], right: Sequence[int]) -> int:
    """Ids that two prompts begin with alike."""
    return next(
        (place for place, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


async def test_a_first_round_is_prefilled_once(engine: EmbeddedEngine) -> None:
    params = Params(
        population=16,
        rounds=0,
        final_candidates=16,
        final_tokens=8,
        sampling=Sampling(temperature=0),
        selection=Selection.FIRST,
    )
    words = question(1)[0].text
    problem = Problem((Message("user", (f"{words}\n\nTell a long story in which all of these words occur.",)),))
    state = await go(engine, problem, params)
    usages, block = used(state, 0), block_tokens(engine)
    prompt = usages[0].prompt_tokens
    assert prompt > 2 * 512  # so that it takes several steps, in each of which the others wait
    assert [usage.prompt_tokens for usage in usages] == [prompt] * 16
    computed = sorted(prompt - usage.cached_tokens for usage in usages)
    assert computed == [(prompt - 1) % block + 1] * 15 + [prompt]
    # What was shared is what each would have computed by itself.
    alone = await go(engine, problem, replace(params, population=1, final_candidates=1))
    assert {rollout.answer for rollout in state.rollouts.values()} == {alone.rollouts[Slot(0, 0)].answer} != {""}


async def test_sets_with_the_same_first_members_share_their_prefix(engine: EmbeddedEngine) -> None:
    params = Params(
        population=6,
        set_size=3,
        rounds=1,
        rollout_tokens=96,
        tail_tokens=64,
        final_tokens=1,
        final_candidates=6,
        selection=Selection.FIRST,
    )
    problem = Problem((Message("user", ("Write a long essay on the history of one trade, with its dates.",)),))
    params = next(with_seed for seed in range(100) if _alike(_drawn(problem, with_seed := replace(params, seed=seed))))
    state = await go(engine, problem, params)
    prompts = []
    for members in state.sets[0]:
        tails = [state.rollouts[Slot(0, member)].tail for member in members]
        prompts.append(
            await engine._prompts.render(aggregation_messages(TEMPLATES, problem, tails, params.seed, round=1))
        )
    usages, block = used(state, 1), block_tokens(engine)
    assert [usage.prompt_tokens for usage in usages] == [len(prompt) for prompt in prompts]
    # The whole round: every distinct prefix of blocks once, whichever prompt came first.
    assert sum(usage.prompt_tokens - usage.cached_tokens for usage in usages) == computed_tokens(prompts, block)
    # One pair: of the two that begin with the same members, the later found those in the cache.
    pair = _alike(state.sets[0])
    assert pair is not None
    left, right = pair
    alike = common(prompts[left], prompts[right]) // block * block
    first_two = sum(len(state.rollouts[Slot(0, member)].tail.token_ids) for member in state.sets[0][left][:2])
    assert alike > first_two
    assert max(usages[left].cached_tokens, usages[right].cached_tokens) >= alike


def _drawn(problem: Problem, params: Params) -> Sequence[Sequence[int]]:
    """The sets of round 1 as the run will read them."""
    drawn = decide(init("run", problem, params, TEMPLATES))
    assert isinstance(drawn, SetsDrawn)
    return drawn.sets[0]


def _alike(sets: Sequence[Sequence[int]]) -> tuple[int, int] | None:
    """Two different sets with the same first two members."""
    for right, members in enumerate(sets):
        for left in range(right):
            if sets[left] != members and sets[left][:2] == members[:2]:
                return left, right
    return None
