"""A pool from zero and back: our server, vLLM's own router as the chart starts it, and engines that come and go."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from mrsa_server.app import create_app
from mrsa_server.settings import Settings
from tests.deploy.conftest import Document, folder
from tests.deploy.kube_api import NAMESPACE, KubeApi, kube_api
from tests.helpers.fake_upstream import FakeUpstream, Script
from tests.helpers.ports import free_port
from tests.helpers.serving import CHAT, QUESTION

pytestmark = pytest.mark.deploy
SIZES = {"population": 4, "rounds": 1, "set_size": 2, "tail_tokens": 32, "final_tokens": 64, "rollout_tokens": 64}
Objects = Callable[..., dict[tuple[str, str], Document]]


@asynccontextmanager
async def pool(objects: Objects, tmp_path: Path, engines: int) -> AsyncIterator[tuple[KubeApi, str]]:
    """Kubernetes' API without a pod, and the router's URL; all engines listen on the port `engines`."""
    found = objects("cuda-pool")
    labels = found["Deployment", "mrsa-engine"]["spec"]["template"]["metadata"]["labels"]
    words = found["Deployment", "mrsa-router"]["spec"]["template"]["spec"]["containers"][0]["args"]
    port = free_port()
    here = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--prometheus-host": "127.0.0.1",
        "--prometheus-port": str(free_port()),
        "--service-discovery-port": str(engines),
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
