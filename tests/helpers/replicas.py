"""Servers that share a store, and what has to hold of the logs that they leave."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from harness.events import Event, RolloutAborted, RolloutFailed, RolloutFinished, RolloutStarted, RunResumed
from harness.markovian_rsa import State, replay
from harness.prompts import load_templates
from harness.scripted import Script, ScriptedEngine, Speed
from harness.types import Slot
from mrsa_server.runs import tables
from mrsa_server.runs.database import Database
from mrsa_server.runs.store import Claim, RunStore, RunSummary
from tests.helpers.serving import in_memory

SIZES = {"population": 4, "rounds": 2, "set_size": 2, "tail_tokens": 32, "rollout_tokens": 300, "final_tokens": 300}
TEMPLATES = load_templates()
LEASE_S = 0.4


@asynccontextmanager
async def replica(engine: ScriptedEngine, url: str, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with in_memory(engine, **{"database_url": url, "lease_s": LEASE_S} | settings) as client:
        yield client


def slow(step_s: float = 0.002) -> ScriptedEngine:
    return ScriptedEngine(
        lambda request: Script("x" * (60 + 40 * (request.slot.index % 3)), "\\boxed{42}"),
        speed=Speed(step_s=step_s),
        chunk_tokens=10,
    )


async def log_of(store: RunStore, run_id: str) -> list[Event]:
    found = await store.events(run_id)
    assert [stored.number for stored in found] == list(range(1, len(found) + 1)), "no gap and no double"
    return [stored.event for stored in found]


def check_log(events: Sequence[Event], *, whole: bool = True) -> State:
    """Nothing that had ended is asked for again; in a whole log all that was asked for has ended or was lost."""
    ended, running = Counter[Slot](), set[Slot]()
    for event in events:
        match event:
            case RolloutStarted(slot):
                assert not ended[slot]
                assert slot not in running
                running.add(slot)
            case RolloutFinished(rollout) | RolloutAborted(rollout):
                ended[rollout.slot] += 1
                running.remove(rollout.slot)
            case RolloutFailed(slot):
                ended[slot] += 1
                running.remove(slot)
            case RunResumed(slots):
                assert running == set(slots)
                running.clear()
    assert set(ended.values()) <= {1}
    state = replay(events, TEMPLATES)
    if whole:
        assert not running
        assert state.outcome is not None
    return state


async def until_ended(store: RunStore, run_id: str, timeout_s: float = 20) -> RunSummary:
    async with asyncio.timeout(timeout_s):
        while True:
            run = await store.get(run_id)
            if run is not None and run.ended_at is not None:
                return run
            await asyncio.sleep(0.05)


async def running(client: httpx.AsyncClient, count: int) -> list[dict[str, Any]]:
    """So many runs, once they are under way."""
    async with asyncio.timeout(10):
        while True:
            found: list[dict[str, Any]] = (await client.get("/v1/runs", params={"status": "running"})).json()["data"]
            if len(found) == count:
                return found
            await asyncio.sleep(0.01)


async def only_run(store: RunStore, events: int = 1) -> str:
    """The id of the one run that goes on, once its log has so many events."""
    async with asyncio.timeout(10):
        while True:
            for run in await store.list_runs():
                if run.last >= events and run.ended_at is None:
                    return run.run_id
            await asyncio.sleep(0.01)


async def stolen(store: RunStore) -> Claim:
    """The run, taken from its owner as if that had not renewed its lease for long enough."""
    while True:
        async with store._database.writing() as connection:
            await connection.execute(tables.runs.update().values(lease_until=0.0))
        if found := await store.claim_lost(1, ["scripted-mrsa"]):  # unless the owner was faster
            return found[0]


async def upgrade(store_url: str) -> None:
    database = Database(store_url)
    await database.upgrade()
    await database.aclose()
