"""A server that is killed, and how long its runs are nobody's."""

from __future__ import annotations

import asyncio
import statistics
from contextlib import suppress
from typing import NamedTuple

import httpx
import pytest
from sqlalchemy import select

from harness.events import RunResumed
from mrsa_server.runs import tables
from mrsa_server.runs.store import RunFilter, RunStore
from tests.helpers.postgres import Postgres
from tests.helpers.processes import Replica, wait_ready
from tests.helpers.serving import CHAT, ask

pytestmark = pytest.mark.e2e

RUNS = 20
SIZES = {"population": 4, "rounds": 32, "set_size": 2, "tail_tokens": 64, "rollout_tokens": 400, "final_tokens": 400}
# So that runs take half a minute: all are in flight when their server is killed.
FLAGS = ("--max-inflight-calls", "8")


class Lease(NamedTuple):
    """What the table says of a run."""

    run_id: str
    owner: str
    until: float
    last: int


async def leases(store: RunStore) -> list[Lease]:
    found = tables.runs.c
    query = select(found.run_id, found.owner, found.lease_until, found.events).where(found.ended_at.is_(None))
    async with store._database.reading() as connection:
        return [Lease(*row) for row in await connection.execute(query)]


async def ask_for(url: str, seed: int) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        with suppress(httpx.TransportError):
            await client.post(url + CHAT, json=ask(mrsa={**SIZES, "seed": seed}, stream=True))


@pytest.mark.parametrize("lease_s", [2.0, 10.0])
async def test_the_runs_of_a_killed_server_are_taken_up_soon_after_their_lease(
    postgres: Postgres, template: str, lease_s: float
) -> None:
    url = postgres.url(postgres.make(template))
    replicas = [Replica(url, lease_s, *FLAGS) for _ in range(2)]
    store = RunStore(url, owner="test", lease_s=lease_s)
    await store.open()
    try:
        for replica in replicas:
            await asyncio.to_thread(wait_ready, replica.url)
        asking = [asyncio.create_task(ask_for(replicas[0].url, seed)) for seed in range(RUNS)]
        async with asyncio.timeout(30):
            begun = 0
            while begun < RUNS:
                await asyncio.sleep(0.05)
                begun = sum(run.last > 2 for run in await store.list_runs(RunFilter(status=("running",))))
        await asyncio.sleep(lease_s / 2)  # into the middle of things
        replicas[0].kill()
        await asyncio.wait(asking)
        left = await leases(store)
        assert len(left) == RUNS, "all are in flight"
        assert len({lease.owner for lease in left}) == 1, "and nobody has one of them yet"
        waited = []
        for lease in left:
            await store.wait(lease.run_id, lease.last, lease_s + 30)
            (taken,) = await store.events(lease.run_id, lease.last, 1)
            assert isinstance(taken.event, RunResumed)
            waited.append(taken.at - lease.until)
        assert min(waited) > 0, "its lease was heeded"
        assert max(waited) < 2, waited
        print(
            f"lease {lease_s:g} s, {RUNS} runs: taken up {min(waited):.2f} to {max(waited):.2f} s after its end "
            f"(median {statistics.median(waited):.2f})"
        )
    finally:
        for replica in replicas:
            replica.kill()
        await store.aclose()
