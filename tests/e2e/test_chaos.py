"""Servers that are killed at random: every run ends, nothing that has ended is asked for again, and budgets hold."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness.events import RunResumed
from mrsa_server.runs.store import RunFilter, RunStore
from tests.helpers.processes import Replica, wait_ready
from tests.helpers.replicas import check_log, log_of, upgrade
from tests.helpers.serving import CHAT, ask

pytestmark = pytest.mark.e2e

RUNS = 200
KILLS = 6
BUDGET = 9_000
LEASE_S = 1.0
SIZES = {
    "population": 4,
    "rounds": 2,
    "set_size": 2,
    "rollout_tokens": 400,
    "tail_tokens": 64,
    "final_tokens": 400,
    "budget_tokens": BUDGET,
}


async def submit(replicas: list[Replica], stream: random.Random) -> None:
    """Every run is asked for until a server has answered or has broken off: then it is the servers' to end it."""
    async with (
        httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client,
        asyncio.TaskGroup() as tasks,
    ):

        async def one(number: int) -> None:
            await asyncio.sleep(stream.random() * 8)
            body = ask(mrsa={**SIZES, "seed": number}, stream=True)
            for _ in range(200):
                replica = stream.choice(replicas)
                with suppress(httpx.TransportError):
                    async with client.stream("POST", replica.url + CHAT, json=body) as response:
                        if response.status_code == 200:
                            async for line in response.aiter_lines():
                                if "run.started" in line:
                                    started.add(number)
                        elif response.status_code != 503:
                            raise AssertionError(await response.aread())
                if number in started:
                    return
                await asyncio.sleep(0.1)
            raise AssertionError("no server let the run in")

        started: set[int] = set()
        for number in range(RUNS):
            tasks.create_task(one(number))


async def chaos(store_url: str, count: int, seed: int) -> None:
    stream = random.Random(seed)
    replicas = [Replica(store_url, LEASE_S) for _ in range(count)]
    store = RunStore(store_url, owner="test", lease_s=LEASE_S)
    try:
        for replica in replicas:
            await asyncio.to_thread(wait_ready, replica.url)
        await store.open()

        async def kill() -> None:
            for _ in range(KILLS):
                await asyncio.sleep(0.5 + stream.random() * 1.5)
                victim = stream.choice(replicas)
                victim.kill()
                await asyncio.sleep(stream.random() * 0.5)
                victim.start()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(kill())
            tasks.create_task(submit(replicas, stream))
        async with asyncio.timeout(180):
            while left := await store.list_runs(RunFilter(status=("queued", "running")), limit=1):
                await store.wait(left[0].run_id, left[0].last, 1)
        await check(store)
    finally:
        for replica in replicas:
            replica.process.kill()
            replica.process.wait()
        await store.aclose()


async def check(store: RunStore) -> None:
    """Read every log, as whoever takes a run up would."""
    runs = await store.list_runs(limit=10 * RUNS)
    assert len(runs) >= RUNS
    statuses, resumed = Counter(run.status for run in runs), 0
    for run in runs:
        log = await log_of(store, run.run_id)
        state = check_log(log, whole=run.status != "cancelled")
        assert len(log) == run.last
        resumed += sum(isinstance(event, RunResumed) for event in log)
        assert state.usage.completion_tokens + state.charged_tokens <= BUDGET
    print(f"{len(runs)} runs {dict(statuses)}, taken up {resumed} times")
    assert resumed > 0, "somebody was killed at his work"
    assert statuses["finished"] + statuses["stopped"] >= 0.9 * RUNS


def test_runs_outlive_servers_that_are_killed_at_random(store_url: str) -> None:
    """Two replicas on one Postgres; on SQLite one process that comes back."""
    asyncio.run(upgrade(store_url))
    replicas = 1 if store_url.startswith("sqlite") else 2
    asyncio.run(chaos(store_url, replicas, seed=1))


async def read(url: str, number: int, stream: random.Random) -> list[dict[str, Any]]:
    """Every event of one response in the background, over however many connections it takes."""
    seen: list[dict[str, Any]] = []
    body = {"model": "scripted-mrsa", "input": f"What is {number} times seven?", "background": True}
    body |= {"reasoning": {"summary": "detailed"}, "mrsa": {**SIZES, "population": 6, "rounds": 8, "seed": number}}
    async with httpx.AsyncClient(base_url=url, timeout=60) as client, asyncio.timeout(120):
        response_id = None
        while not seen or seen[-1]["type"] != "response.completed":
            try:
                if response_id is None:  # the key makes one response of however many requests
                    created = await client.post("/v1/responses", json=body, headers={"idempotency-key": f"n{number}"})
                    response_id = created.json()["id"]
                query = {"stream": "true"} | ({"starting_after": str(seen[-1]["sequence_number"])} if seen else {})
                async with client.stream("GET", f"/v1/responses/{response_id}", params=query) as response:
                    if response.status_code == 503:
                        await asyncio.sleep(0.2)
                        continue
                    assert response.status_code == 200, await response.aread()
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            event = json.loads(line.removeprefix("data: "))
                            if event["type"] == "error":
                                break
                            seen.append(event)
                        if stream.random() < 0.02:
                            break
            except (httpx.TransportError, KeyError):
                await asyncio.sleep(0.1)
        done = (await client.get(f"/v1/responses/{response_id}")).json()
    assert seen[-1]["response"] == done
    return seen


async def test_streams_in_the_background_are_whole_over_killed_servers(tmp_path: Path) -> None:
    stream = random.Random(11)
    replica = Replica(f"sqlite:///{tmp_path / 'runs.db'}", LEASE_S)
    try:
        await asyncio.to_thread(wait_ready, replica.url)
        async with asyncio.TaskGroup() as tasks:
            reading = [tasks.create_task(read(replica.url, number, random.Random(number))) for number in range(12)]
            kills = 0
            while kills < 4:
                await asyncio.sleep(0.3 + stream.random())
                if not all(task.done() for task in reading):
                    replica.kill()
                    replica.start()
                kills += 1
        for task in reading:
            seen = task.result()
            assert [event["sequence_number"] for event in seen] == list(range(len(seen)))
            text = "".join(event["delta"] for event in seen if event["type"] == "response.output_text.delta")
            assert text == seen[-1]["response"]["output"][-1]["content"][0]["text"]
        store = RunStore(f"sqlite:///{tmp_path / 'runs.db'}", owner="test", lease_s=LEASE_S)
        await store.open()
        logs = [await log_of(store, run.run_id) for run in await store.list_runs()]
        await store.aclose()
        assert len(logs) == 12, "one for each key"
        for log in logs:
            check_log(log)
        assert any(isinstance(event, RunResumed) for log in logs for event in log)
    finally:
        replica.kill()
