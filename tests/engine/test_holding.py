"""Tokens wait in vLLM's scheduler: none is lost, none is late that somebody waits for, and ends are told at once."""

from __future__ import annotations

import asyncio
import json
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from harness.types import AnswerRules, Finish, RolloutRequest, Sampling
from mrsa_server.engines import UNWATCHED_INTERVAL
from mrsa_server.engines.embedded import EmbeddedEngine
from mrsa_server.engines.vllm import VllmEngine
from tests.engine.conftest import ask, busy, generate, running
from tests.helpers.tiny_model import write_tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

COLD = Sampling(temperature=0)
STORY = "Tell me a very long story about a ship, with every detail."


async def outputs(engine: EmbeddedEngine, request: RolloutRequest, stock: bool = False) -> AsyncIterator[list[int]]:
    """The ids of each of vLLM's outputs; with `stock`, of a request that says nothing of how it may wait."""
    llm = engine._running()
    params = engine._vllm.sampling_params(request)
    assert params.extra_args is not None, "the scheduler is not in place"
    if stock:
        params.extra_args = None
    prompt = {"type": "token", "prompt_token_ids": list(await engine._prompts.render(request.messages))}
    made = llm.generate(prompt, params, f"{'stock' if stock else 'ours'}-{time.monotonic_ns()}")
    async with aclosing(made) as found:
        async for output in found:
            yield list(output.outputs[0].token_ids)


@pytest.mark.parametrize("sampling", [COLD, Sampling(temperature=1.0)])
@pytest.mark.parametrize("watched", [True, False])
async def test_the_tokens_are_those_of_stock_vllm(engine: EmbeddedEngine, sampling: Sampling, watched: bool) -> None:
    request = ask(STORY, max_tokens=150, sampling=sampling, seed=7, watched=watched)
    stock = [ids async for ids in outputs(engine, request, stock=True)]
    ours = [ids async for ids in outputs(engine, request)]
    assert [i for ids in ours for i in ids] == [i for ids in stock for i in ids]
    assert (len(ours) < 4, len(stock) > 100) == (not watched, True)


async def test_unwatched_tokens_come_in_steps_after_the_first(engine: EmbeddedEngine) -> None:
    made = [len(ids) async for ids in outputs(engine, ask(STORY, max_tokens=300, sampling=COLD, watched=False))]
    assert made == [1, UNWATCHED_INTERVAL, UNWATCHED_INTERVAL, 300 - 1 - 2 * UNWATCHED_INTERVAL]


async def test_a_watched_token_comes_alone_and_at_once(engine: EmbeddedEngine) -> None:
    """Beside an unwatched crowd: only those that are watched count."""
    crowd = [asyncio.create_task(generate(engine, ask(f"{STORY} {i}", 200, watched=False))) for i in range(6)]
    made = [len(ids) async for ids in outputs(engine, ask(STORY, max_tokens=40, sampling=COLD))]
    assert sum(made) == 40
    assert len(made) > 30  # vLLM joins what comes while this process has no core
    for one in await asyncio.gather(*crowd):
        assert one.finish


async def test_a_short_generation_waits_for_no_step(engine: EmbeddedEngine) -> None:
    for tokens in (1, 2, 20):
        made = await generate(engine, ask(STORY, max_tokens=tokens, sampling=COLD, watched=False))
        assert (len(made.ids), made.finish) == (tokens, Finish.LENGTH)
        assert made.deltas[0].cached_tokens is not None
        assert made.deltas[0].prompt_tokens == await engine.count(ask(STORY).messages)


async def test_a_stop_id_ends_a_generation_whose_tokens_wait(engine: EmbeddedEngine) -> None:
    free = await generate(engine, ask(STORY, max_tokens=100, sampling=COLD))
    stop = next(i for at, i in enumerate(free.ids) if at > 20 and i not in free.ids[:at])
    made = await generate(engine, ask(STORY, max_tokens=100, sampling=COLD, stop_ids=(stop,), watched=False))
    assert made.ids == free.ids[: free.ids.index(stop) + 1]
    assert (made.finish, made.text) == (Finish.STOP, await engine.decode(made.ids))


async def test_a_stop_string_is_not_waited_past(engine: EmbeddedEngine) -> None:
    """It is found behind the scheduler: tokens that wait there would be generated in vain."""
    free = await generate(engine, ask(STORY, max_tokens=60, sampling=COLD))
    stop = free.text[60:68]
    rules = AnswerRules(stop=(stop,))
    made = await generate(engine, ask(STORY, max_tokens=200, sampling=COLD, answer=rules, watched=False))
    assert (made.text, made.finish) == (free.text[: free.text.index(stop)], Finish.STOP)
    assert engine._vllm.sampling_params(ask(answer=rules, watched=False)).extra_args is None


async def test_an_unwatched_answer_matches_its_schema(engine: EmbeddedEngine) -> None:
    schema = json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    rules = AnswerRules(json_schema=schema)
    made = await generate(engine, ask("What is 6 times 7?", max_tokens=90, answer=rules, sampling=COLD, watched=False))
    watched = await generate(engine, ask("What is 6 times 7?", max_tokens=90, answer=rules, sampling=COLD))
    assert (made.ids, made.finish) == (watched.ids, watched.finish)


async def test_an_aborted_request_leaves_with_what_waited(engine: EmbeddedEngine) -> None:
    generations = [engine.generate(ask(f"{STORY} {i}", max_tokens=4000, watched=False)) for i in range(4)]
    for generation in generations:
        await anext(generation)
    await asyncio.sleep(0.3)  # some tokens wait
    begun = time.monotonic()
    for generation in generations:
        await generation.aclose()
    while await busy(engine):
        assert time.monotonic() - begun < 1
    made = [len(ids) async for ids in outputs(engine, ask(STORY, max_tokens=140, sampling=COLD, watched=False))]
    assert made == [1, UNWATCHED_INTERVAL, 11]


async def test_requests_that_are_preempted_lose_nothing(tmp_path: Path) -> None:
    """Eight of 215 tokens where 640 have room: some are put back again and again, with tokens that wait."""
    with warnings.catch_warnings(action="ignore"):
        write_tiny_model(tmp_path)
    extra = {
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "kv_cache_memory_bytes": 20 * 32 * 512,
        "block_size": 32,
    }
    async with running(VllmEngine(str(tmp_path), dtype="float32", max_model_len=512, extra=extra)) as tiny:
        asked = [ask(f"Ship {i}", 200, sampling=COLD, watched=bool(i % 2)) for i in range(8)]
        alone = [await generate(tiny, request) for request in asked]
        crowd = await asyncio.gather(*(generate(tiny, request) for request in asked))
        assert [made.ids for made in crowd] == [made.ids for made in alone]
        assert [made.finish for made in crowd] == [Finish.LENGTH] * 8


async def test_a_scheduler_that_was_asked_for_stands(engine: EmbeddedEngine) -> None:
    from vllm.config import SchedulerConfig

    asked = SchedulerConfig.default_factory(scheduler_cls="vllm.v1.core.sched.scheduler.Scheduler")
    reason = engine._vllm._hold_back(asked)
    assert reason == "the scheduler vllm.v1.core.sched.scheduler.Scheduler was asked for"
    assert asked.scheduler_cls == "vllm.v1.core.sched.scheduler.Scheduler"


async def test_both_of_vllms_schedulers_are_known(engine: EmbeddedEngine) -> None:
    from vllm.config import SchedulerConfig

    for asynchronous, name in ((False, "HoldingScheduler"), (True, "HoldingAsyncScheduler")):
        config = SchedulerConfig.default_factory(async_scheduling=asynchronous)
        assert engine._vllm._hold_back(config) is None
        assert config.get_scheduler_cls().__name__ == name
