"""The leases of a server: it keeps its own runs, and takes those of others when their time has come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mrsa_server.runs import tables
from mrsa_server.runs.journal import Journal
from mrsa_server.runs.record import NewRun
from mrsa_server.runs.store import RunStore

LEASE_S = 0.4


@asynccontextmanager
async def journal(url: str, owner: str) -> AsyncIterator[Journal]:
    store = RunStore(url, owner=owner, lease_s=LEASE_S)
    try:
        await store.open()
        yield Journal(store)
    finally:
        await store.aclose()


async def begin(journal: Journal, run_id: str) -> list[str]:
    """A run; what becomes of it is told in the list."""
    told: list[str] = []
    record = NewRun(run_id, "response", b"{}", "m", created_at=time.time())
    await journal.open(record, (), lambda: told.append("lost"), lambda: told.append("cancelled"))
    return told


async def end_leases(journal: Journal) -> None:
    async with journal.store._database.writing() as connection:
        await connection.execute(tables.runs.update().values(lease_until=1.0))


async def test_after_a_time_without_renewals_a_server_keeps_its_runs_and_others_come_first(store_url: str) -> None:
    async with journal(store_url, "a") as one, journal(store_url, "b") as other:
        own = await begin(one, "own")
        others = await begin(other, "other's")
        await asyncio.sleep(1.1 * LEASE_S)
        await end_leases(one)
        assert await one.claim_lost(9, ["m"]) == []
        assert await one.claim_lost(9, ["m"]) == [], "its own is renewed, the other may still come"
        began = time.monotonic()
        async with asyncio.timeout(10):
            claims = []
            while not claims:
                await asyncio.sleep(LEASE_S / 8)
                claims = await one.claim_lost(9, ["m"])
        assert time.monotonic() - began > 0.9 * LEASE_S
        assert [claim.run_id for claim in claims] == ["other's"]
        await other.renew()
        assert (own, others) == ([], ["lost"])


async def test_runs_are_taken_at_the_next_look_where_nothing_was_missed(store_url: str) -> None:
    async with journal(store_url, "a") as one, journal(store_url, "b") as other:
        await begin(other, "run")
        await end_leases(one)
        await one.renew()
        assert [claim.run_id for claim in await one.claim_lost(9, ["m"])] == ["run"]
