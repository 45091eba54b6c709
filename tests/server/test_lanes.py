"""Connections of SQLite keep their transactions apart, and come back from what breaks them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

from mrsa_server.runs.lanes import Lanes
from mrsa_server.runs.store_errors import StoreUnavailable


@pytest.fixture
async def writer(tmp_path: Path) -> AsyncIterator[Lanes]:
    lanes = Lanes(make_url(f"sqlite:///{tmp_path / 'x.db'}"), 1, writes=True, lock_s=0.1, queue_s=0.2)
    async with lanes.transaction() as lane:
        await lane.execute(text("CREATE TABLE t (x INTEGER)"))
    yield lanes
    await lanes.aclose()
    await lanes.aclose()


async def run(lanes: Lanes, *statements: str) -> None:
    async with lanes.transaction() as lane:
        for statement in statements:
            await lane.execute(text(statement))


async def count(lanes: Lanes) -> int:
    async with lanes.transaction() as lane:
        found = (await lane.execute(text("SELECT count(*) FROM t"))).scalar_one()
        assert isinstance(found, int)
        return found


async def test_a_transaction_is_whole_or_not_there(writer: Lanes) -> None:
    with pytest.raises(OperationalError, match="no such table"):
        await run(writer, "INSERT INTO t VALUES (1)", "INSERT INTO elsewhere VALUES (1)")
    assert await count(writer) == 0
    await run(writer, "INSERT INTO t VALUES (1)", "INSERT INTO t VALUES (2)")
    assert await count(writer) == 2


async def test_one_that_is_cancelled_is_undone_and_holds_nobody_up(writer: Lanes) -> None:
    async def stay() -> None:
        async with writer.transaction() as lane:
            await lane.execute(text("INSERT INTO t VALUES (1)"))
            await asyncio.sleep(60)

    staying = asyncio.create_task(stay())
    await asyncio.sleep(0.05)
    with pytest.raises(StoreUnavailable, match="no connection came free"):
        await count(writer)
    staying.cancel()
    await asyncio.wait((staying,))
    assert await count(writer) == 0


async def test_a_connection_that_broke_is_replaced(writer: Lanes) -> None:
    def break_it(connection: Connection) -> None:
        driver = connection.connection.dbapi_connection
        assert driver is not None
        driver.close()

    async def go() -> None:
        async with writer.transaction() as lane:
            await lane.run_sync(break_it)
            await lane.execute(text("SELECT 1"))

    with pytest.raises(ProgrammingError, match="closed"):
        await go()
    assert await count(writer) == 0


async def test_a_commit_that_fails_leaves_nothing(writer: Lanes) -> None:
    await run(writer, "CREATE TABLE v (x INTEGER PRIMARY KEY)")
    await run(writer, "CREATE TABLE u (x REFERENCES v (x) DEFERRABLE INITIALLY DEFERRED)")  # judged at the end
    with pytest.raises(IntegrityError, match="FOREIGN KEY"):
        await run(writer, "INSERT INTO t VALUES (1)", "INSERT INTO u VALUES (1)")
    assert await count(writer) == 0
