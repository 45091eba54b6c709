"""The engine over a real `vllm serve` (its CPU build, SmolLM2): what the fake only claims to be like."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from harness.engine import Delta
from harness.types import AnswerRules, Finish, Message, RolloutRequest, Sampling, Slot, Tail
from mrsa_server.engines.embedded import cache_dir, model_folder
from mrsa_server.engines.openai_http import Level, OpenAIEngine
from tests.helpers.ports import free_port

pytestmark = pytest.mark.engine

QUESTION = (Message("user", ("Name three colours.",)),)
_CONVERT = "from mrsa_server.engines.embedded import *; convert(model_folder(cache_dir()))"
_FLAGS = (
    "--dtype float32 --enforce-eager --distributed-executor-backend uni --kv-cache-memory-bytes 300000000 "
    "--max-model-len 4096 --max-num-batched-tokens 512 --block-size 32 --enable-prompt-tokens-details "
    "--scheduling-policy priority --served-model-name smol"
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    folder, port = model_folder(cache_dir()), free_port()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    if not folder.exists():
        subprocess.run([sys.executable, "-c", _CONVERT], check=True, env=environment)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--port", str(port), "--host", "127.0.0.1", *_FLAGS.split()]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(300):
                assert server.poll() is None, "the server ended"
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


@pytest.fixture
async def engine(url: str) -> AsyncIterator[OpenAIEngine]:
    engine = OpenAIEngine(url, priority=True)
    await engine.start()
    yield engine
    await engine.aclose()


def request(**changes: Any) -> RolloutRequest:
    values: dict[str, Any] = {"run_id": "r", "slot": Slot(0, 0), "messages": QUESTION, "max_tokens": 16}
    return RolloutRequest(**values | {"sampling": Sampling(temperature=0.0)} | changes)


async def collect(engine: OpenAIEngine, asked: RolloutRequest) -> list[Delta]:
    async with aclosing(engine.generate(asked)) as deltas:
        return [delta async for delta in deltas]


async def ids_of(engine: OpenAIEngine, asked: RolloutRequest) -> list[int]:
    return [token for delta in await collect(engine, asked) for token in delta.token_ids]


async def test_ids_text_and_counts_agree(engine: OpenAIEngine) -> None:
    assert (engine.level, engine.model, engine.vocabulary.context_tokens) == (Level.IDS, "smol", 4096)
    assert engine.vocabulary.think_open == ()  # `<think>` is several of its tokens
    deltas = await collect(engine, request())
    ids = [token for delta in deltas for token in delta.token_ids]
    assert len(ids) == 16
    assert await engine.decode(ids) == "".join(delta.text for delta in deltas)
    assert deltas[0].prompt_tokens == await engine.count(QUESTION)
    assert (deltas[-1].finish, deltas[-1].cached_tokens is not None) == (Finish.LENGTH, True)


async def test_a_continuation_goes_on_as_if_nothing_had_been_cut(engine: OpenAIEngine) -> None:
    whole = await ids_of(engine, request())
    half = await ids_of(engine, request(max_tokens=8))
    assert [*half, *await ids_of(engine, request(max_tokens=8, continuation=tuple(half)))] == whole


async def test_a_prefix_is_computed_again_for_another_key(engine: OpenAIEngine) -> None:
    question = (Message("user", ("A prompt of one key, and long enough for some blocks. " * 8,)),)
    cached = []
    for salt in ("one", "other", "one", None, "other"):
        deltas = await collect(engine, request(messages=question, cache_salt=salt, max_tokens=2))
        cached.append(bool(deltas[-1].cached_tokens))
    assert cached == [False, False, True, False, True]


async def test_joined_deltas_hold_the_same_ids(engine: OpenAIEngine) -> None:
    assert await ids_of(engine, request(watched=False)) == await ids_of(engine, request())


async def test_a_stop_id_ends_it_and_is_kept(engine: OpenAIEngine) -> None:
    whole = await ids_of(engine, request())
    end = whole.index(whole[5]) + 1
    deltas = await collect(engine, request(stop_ids=(whole[5],)))
    assert [token for delta in deltas for token in delta.token_ids] == whole[:end]
    assert deltas[-1].finish is Finish.STOP


async def test_a_seed_repeats_itself(engine: OpenAIEngine) -> None:
    asked = request(sampling=Sampling(temperature=1.0), seed=7, priority=-1)
    assert await ids_of(engine, asked) == await ids_of(engine, asked)


async def test_rules_of_the_answer_hold(engine: OpenAIEngine) -> None:
    schema = '{"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]}'
    rules = AnswerRules(json_schema=schema)
    deltas = await collect(engine, request(answer=rules, max_tokens=64))
    assert "".join(delta.text for delta in deltas).lstrip().startswith("{")
    text = "".join(delta.text for delta in await collect(engine, request(max_tokens=64)))
    stop = text.split()[3]
    deltas = await collect(engine, request(answer=AnswerRules(stop=(stop,)), max_tokens=64))
    assert "".join(delta.text for delta in deltas) == text.partition(stop)[0]


async def test_a_candidate_costs_its_own_ids_and_loses_its_control_tokens(engine: OpenAIEngine) -> None:
    def around(tail: Tail) -> tuple[Message, ...]:
        return (Message("user", ("Read this:\n", tail, "\nand that:\n", tail, "\nNow answer.")),)

    ids = await ids_of(engine, request())
    said = await collect(engine, request(messages=(Message("user", ("Say hi.",)),), max_tokens=200))
    assert said[-1].finish is Finish.STOP
    assert "<|" not in "".join(delta.text for delta in said)
    end = [token for delta in said for token in delta.token_ids][-1]
    counts = [
        await engine.count(around(Tail(tuple(some), await engine.decode(some)))) for some in (ids, ids[:3], [end, *ids])
    ]
    assert counts[0] is not None
    assert counts[1] is not None
    assert (counts[0] - counts[1], counts[2]) == (2 * (len(ids) - 3), counts[0])
    assert await engine.decode([end, *ids, end]) == await engine.decode(ids)


async def test_closing_aborts_within_a_second(engine: OpenAIEngine, url: str) -> None:
    async def running() -> float:
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(url.removesuffix("/v1") + "/metrics")).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_requests_r"))

    async def consume() -> None:
        await collect(engine, request(max_tokens=3000, sampling=Sampling(temperature=1.5)))

    tasks = [asyncio.create_task(consume()) for _ in range(8)]
    async with asyncio.timeout(30):
        while await running() < 8:  # noqa: ASYNC110 (a gauge can only be asked)
            await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    async with asyncio.timeout(3):  # the gauge is only set with the step after the abort
        while await running() > 0:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
