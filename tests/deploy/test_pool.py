"""A pool from zero and back: our server, vLLM's own router as the chart starts it, and engines that come and go."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import orjson
import pytest

from mrsa_server.app import create_app
from mrsa_server.settings import Settings
from tests.deploy.conftest import Document, folder
from tests.deploy.kube_api import NAMESPACE, KubeApi, kube_api
from tests.helpers.fake_upstream import FakeUpstream, Script
from tests.helpers.ports import free_port
from tests.helpers.processes import serving, wait_ready
from tests.helpers.serving import CHAT, QUESTION, RESPONSES, chunks, joined

pytestmark = pytest.mark.deploy
SIZES = {"population": 4, "rounds": 1, "set_size": 2, "tail_tokens": 32, "final_tokens": 64, "rollout_tokens": 64}
ANSWER = "The answer is \\boxed{42}."
Objects = Callable[..., dict[tuple[str, str], Document]]


@asynccontextmanager
async def pool(objects: Objects, tmp_path: Path, engine_port: int) -> AsyncIterator[tuple[KubeApi, str]]:
    """Kubernetes' API without a pod, and the router's URL; engines are on one port of different addresses."""
    found = objects("cuda-pool")
    labels = found["Deployment", "mrsa-engine"]["spec"]["template"]["metadata"]["labels"]
    words = found["Deployment", "mrsa-router"]["spec"]["template"]["spec"]["containers"][0]["args"]
    port = free_port()
    here = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--prometheus-host": "127.0.0.1",
        "--prometheus-port": str(free_port()),
        "--service-discovery-port": str(engine_port),
        "--health-check-interval-secs": "1",
    }
    words = [f"{name}={here[name]}" if (name := word.partition("=")[0]) in here else word for word in words]
    async with kube_api(labels) as api:
        api.kubeconfig(tmp_path / "config")
        log = (tmp_path / "router.log").open("wb")
        router = await asyncio.create_subprocess_exec(
            folder() / "vllm-router",
            *words,
            env=os.environ | {"KUBECONFIG": str(tmp_path / "config")},
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            yield api, f"http://127.0.0.1:{port}"
        finally:
            router.terminate()
            await router.wait()
            log.close()


@asynccontextmanager
async def server(router: str) -> AsyncIterator[httpx.AsyncClient]:
    """As the chart sets it, before the router."""
    settings = Settings(
        engine="openai",
        engine_url=f"{router}/v1",
        model="fake",
        engine_priority=True,
        engine_sleeps=True,
        engine_wait_s=30,
        state_dir="none",
    )
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
            yield client


async def metric(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(name + " ")))


async def until(client: httpx.AsyncClient, name: str, wanted: float) -> None:
    found = None
    async with asyncio.timeout(30):
        while found != wanted:
            await asyncio.sleep(0.05)
            found = await metric(client, name)


@contextmanager
def engine_process(address: str, port: int, delay_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """An engine in a process of its own, that answers."""
    words = ["--host", address, "--port", str(port), "--level", "1", "--delay", str(delay_s), "--writes", "0"]
    words += ["--answers", ANSWER]
    command = [sys.executable, "-m", "tests.helpers.fake_upstream", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_ready(f"http://{address}:{port}", "/health")
            yield process
        finally:
            process.kill()


def flags(router: str, tmp_path: Path) -> tuple[str, ...]:
    """Of a server as the chart starts it before the router, but with a store in a file, and no silence."""
    words = ("--engine", "openai", "--engine-url", f"{router}/v1", "--model", "fake", "--engine-priority")
    return (*words, "--engine-sleeps", "--engine-wait-s", "30", "--keep-alive-s", "0.3", "--state-dir", str(tmp_path))


async def opened(address: str, port: int) -> int:
    """Generations that an engine's process has open."""
    async with httpx.AsyncClient() as client:
        found: int = (await client.get(f"http://{address}:{port}/stats")).json()["open"]
        return found


async def asked(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post(CHAT, json={"model": "fake-mrsa", "messages": QUESTION, "mrsa": SIZES})


async def test_a_pool_is_woken_from_zero_goes_back_and_is_woken_again(objects: Objects, tmp_path: Path) -> None:
    assert NAMESPACE == "ai"  # as the chart is rendered
    async with (
        FakeUpstream(Script(level=1, delay_s=0.2)) as engine,
        pool(objects, tmp_path, engine.port) as (api, router),
    ):
        async with server(router) as client:
            for turn in range(2):
                assert (await client.get("/health/ready")).status_code == 200, "nobody could wake the engine"
                asking = asyncio.create_task(asked(client))
                await until(client, "mrsa_runs_queued", 1)  # by which KEDA starts an engine
                assert await metric(client, "mrsa_engine_up") == 0
                assert not asking.done()
                api.add(f"engine-{turn}", "127.0.0.1")
                answer = await asking
                assert answer.status_code == 200, answer.text
                assert answer.json()["mrsa"]["tails"] == "exact"  # the router hands token ids through
                assert await metric(client, "mrsa_runs_queued") == await metric(client, "mrsa_runs_running") == 0
                api.remove(f"engine-{turn}")
                async with asyncio.timeout(30):
                    while await metric(client, "mrsa_engine_up"):
                        await asyncio.sleep(0.1)
                        await client.get("/health/ready")  # as the kubelet asks


async def test_a_run_outlives_the_only_engine_of_its_pool(objects: Objects, tmp_path: Path) -> None:
    async with (
        FakeUpstream(Script(level=1, delay_s=0.3)) as engine,
        pool(objects, tmp_path, engine.port) as (api, router),
    ):
        async with server(router) as client:
            api.add("engine-0", "127.0.0.1")
            await until(client, "mrsa_engine_up", 1)
            engine.change(delay_s=60.0, writes=0)
            asking = asyncio.create_task(asked(client))
            async with asyncio.timeout(10):
                while engine.stats.open < 2:  # noqa: ASYNC110 (the engine counts and tells nobody)
                    await asyncio.sleep(0.02)
            api.remove("engine-0")
            engine.change(delay_s=0.2, writes=1, empty=True)
            for protocol in list(engine.protocols):
                protocol.transport.abort()
            await until(client, "mrsa_engine_up", 0)
            assert await metric(client, "mrsa_runs_running") == 1
            engine.change(empty=False)
            api.add("engine-1", "127.0.0.1")
            body = (await asking).json()
            assert [stage["failed"] for stage in body["mrsa"]["rounds"]] == [0, 0]
            assert body["choices"][0]["message"]["content"]


async def test_whoever_asks_a_pool_at_zero_is_held_and_told_that_he_waits_until_an_engine_has_started(
    objects: Objects, tmp_path: Path
) -> None:
    """Server, router and engine in processes of their own: one streams, one asks in the background."""
    port, lines = free_port(), []

    async def read(client: httpx.AsyncClient) -> None:
        body = {"model": "fake-mrsa", "messages": QUESTION, "mrsa": SIZES, "stream": True}
        async with client.stream("POST", CHAT, json=body) as response:
            assert response.status_code == 200
            lines.extend([line async for line in response.aiter_lines() if line])

    async with pool(objects, tmp_path, port) as (api, router):
        with serving(*flags(router, tmp_path / "state")) as (_, url):  # it is ready, since it could wake an engine
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                reading = asyncio.create_task(read(client))
                body = {"model": "fake-mrsa", "input": "6*7?", "mrsa": SIZES, "background": True}
                made = (await client.post(RESPONSES, json=body)).json()
                assert made["status"] == "queued"
                await until(client, "mrsa_runs_queued", 2)  # by which KEDA starts an engine
                await asyncio.sleep(1.5)
                assert not reading.done()
                assert await metric(client, "mrsa_engine_up") == await metric(client, "mrsa_runs_running") == 0
                (queued,) = (await client.get("/v1/runs", params={"status": "queued"})).json()["data"]
                assert queued["background"]
                with engine_process("127.0.0.1", port, 0.3):
                    api.add("engine-0", "127.0.0.1")
                    async with asyncio.timeout(30):
                        await reading
                        found = made
                        while found["status"] in ("queued", "in_progress"):
                            await asyncio.sleep(0.1)
                            found = (await client.get(f"{RESPONSES}/{made['id']}")).json()
    alive = next(at for at, line in enumerate(lines) if not line.startswith(":"))
    assert alive >= 4, "it said that it lives while it waited"
    assert lines[-1] == "data: [DONE]"
    assert joined(chunks("\n\n".join(lines[alive:]))) == found["output"][-1]["content"][0]["text"] == ANSWER


async def test_a_run_ends_though_one_of_two_engines_is_killed_and_its_log_says_what_was_lost(
    objects: Objects, tmp_path: Path
) -> None:
    """Nobody takes the dead one from the pool: its router finds out by itself."""
    port, addresses = free_port(), ("127.0.0.1", "127.0.0.2")
    async with pool(objects, tmp_path, port) as (api, router):
        with (
            engine_process(addresses[0], port, 2.0) as first,
            engine_process(addresses[1], port, 2.0) as second,
            serving(*flags(router, tmp_path / "state")) as (_, url),
        ):
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                for name, address in zip(("engine-0", "engine-1"), addresses, strict=True):
                    api.add(name, address)
                await until(client, "mrsa_engine_up", 1)
                sizes = {**SIZES, "population": 8, "final_candidates": 8}
                body = {"model": "fake-mrsa", "messages": QUESTION, "mrsa": sizes}
                asking = asyncio.create_task(client.post(CHAT, json=body))
                lost = [0, 0]
                async with asyncio.timeout(20):
                    while sum(lost) < 8:
                        lost = [await opened(address, port) for address in addresses]
                victim = first if lost[0] > lost[1] else second  # for its cache, a router sends a run to one of them
                victim.kill()
                answer = await asking
                assert answer.status_code == 200, answer.text
                run_id = answer.json()["mrsa"]["run_id"]
                log = (await client.get(f"/v1/runs/{run_id}/export")).text.splitlines()
                async with asyncio.timeout(20):
                    while (ready := await client.get("/health/ready")).status_code != 200:
                        assert ready.json()["error"]["code"] == "not_ready"
                        await asyncio.sleep(0.2)
    assert answer.json()["choices"][0]["message"]["content"] == ANSWER
    stored = [orjson.loads(line) for line in log]
    kinds = [one["kind"] for one in stored]
    again = [len(one["event"]["slots"]) for one in stored if one["kind"] == "run_resumed"]
    assert again
    assert sum(again) + kinds.count("rollout_failed") >= max(lost)
    assert kinds[-1] == "run_finished"
