"""Many runs at once, and more connections than there are file descriptors."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter

import aiohttp
import httpx
import pytest

from tests.bench.load import load
from tests.helpers.ports import free_port
from tests.helpers.processes import serving, wait_ready
from tests.helpers.serving import CHAT, SMALL, ask

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("flags", [(), ("--max-inflight-tokens", "20000")], ids=["roomy", "tight"])
async def test_a_hundred_runs_at_once_all_end_and_lose_nothing(flags: tuple[str, ...]) -> None:
    """In the tight one rollouts wait for one another: some 30 of 1,500 are in the engine at once."""
    with serving("--engine", "scripted", *flags) as (server, url):
        await load(url, server.pid, runs=100, population=16)


async def burst(url: str, users: int) -> Counter[tuple[int, str | None]]:
    """Statuses and `Retry-After` of so many requests at the same moment."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one() -> tuple[int, str | None]:
            async with session.post(url + CHAT, json=ask(mrsa=SMALL)) as answer:
                body = await answer.json()
            if answer.status == 503:
                assert body["error"]["code"] == "server_overloaded"
                assert answer.headers["connection"] == "close"
                assert answer.headers["x-request-id"]
            return answer.status, answer.headers.get("retry-after")

        found = Counter(await asyncio.gather(*(one() for _ in range(users))))
        async with session.get(f"{url}/health/live") as answer:
            assert answer.status == 200
    return found


def test_connections_beyond_the_descriptors_are_told_so_and_the_server_lives() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    serve = f"ulimit -n 256; exec {sys.executable} -m mrsa_server serve --engine scripted --log-level warning"
    with subprocess.Popen(["sh", "-c", f"{serve} --port {port}"]) as server:
        try:
            wait_ready(url)
            found = asyncio.run(burst(url, 170))
            assert set(found) == {(200, None), (503, "5")}
            assert found[200, None] >= 100
            text = httpx.get(f"{url}/metrics").text
            assert f'mrsa_admission_rejections_total{{reason="connections"}} {found[503, "5"]:.1f}' in text
            assert httpx.post(url + CHAT, json=ask(mrsa=SMALL), timeout=30).status_code == 200
        finally:
            server.terminate()
