"""Connections of SQLite, each with a thread of its own: the event loop never waits for the disk.

SQLAlchemy's own asyncio extension would bring its ORM along (7 MB), and its driver some four turns of a thread for each
statement; here it is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, CursorResult, Engine, Executable, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from mrsa_server.runs.store_errors import StoreUnavailable

T = TypeVar("T")
_Parameters = Mapping[str, object] | Sequence[Mapping[str, object]] | None


class Lane:
    """A connection and its thread. It is one user's at a time, who gets it from `Lanes`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        self._connection: Connection | None = None  # of the thread alone

    async def execute(self, statement: Executable, parameters: _Parameters = None) -> CursorResult[Any]:
        """Run a statement; all its rows are read."""
        return await self.run_sync(lambda connection: _whole(connection.execute(statement, parameters)))

    async def run_sync(self, work: Callable[[Connection], T]) -> T:
        """Work with the connection, in its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    def _run(self, work: Callable[[Connection], T]) -> T:
        if self._connection is None:
            self._connection = self._engine.connect()
        return work(self._connection)

    async def undo(self) -> None:
        """Leave a transaction for good: the connection is ended, and the next one to come begins another."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)

    async def aclose(self) -> None:
        """End the connection and the thread."""
        await self.undo()
        self._thread.shutdown(wait=False)

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            # SQLAlchemy takes a commit that failed for an end, SQLite does not: closing is what both understand.
            connection.close()


def _whole(result: CursorResult[Any]) -> CursorResult[Any]:
    # The cursor is the thread's; what it holds is read where it lives.
    return cast("CursorResult[Any]", result.freeze()()) if result.returns_rows else result


class Lanes:
    """Some lanes to one file.

    Args:
        url: The file.
        count: How many.
        writes: Whether their transactions write. Then each has the lock from its begin on, and is synced at its end.
        lock_s: Seconds to wait for the lock.
        queue_s: Seconds to wait for a lane.
    """

    def __init__(self, url: URL, count: int, *, writes: bool, lock_s: float, queue_s: float) -> None:
        connect_args = {"timeout": lock_s, "check_same_thread": False}
        self._engine = create_engine(url, hide_parameters=True, poolclass=NullPool, connect_args=connect_args)
        self._queue_s = queue_s
        self._lanes = [Lane(self._engine) for _ in range(count)]
        self._free: asyncio.LifoQueue[Lane] = asyncio.LifoQueue()  # the last one is warm: others stay without a cache
        for lane in self._lanes:
            self._free.put_nowait(lane)
        pragmas = ("synchronous=FULL", "foreign_keys=ON") if writes else ("query_only=ON",)

        @event.listens_for(self._engine, "connect")
        def _connected(connection: Any, _: object) -> None:
            connection.isolation_level = None  # transactions are begun below, and not by the driver when it sees fit
            for pragma in pragmas:
                connection.execute(f"PRAGMA {pragma}").close()

        if writes:

            @event.listens_for(self._engine, "begin")
            def _begun(connection: Connection) -> None:
                connection.exec_driver_sql("BEGIN IMMEDIATE")

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Lane]:
        """A lane, in a transaction that is committed at the block's end and undone where an error leaves it.

        Raises:
            StoreUnavailable: No lane came free.
        """
        try:
            async with asyncio.timeout(self._queue_s):
                lane = await self._free.get()
        except TimeoutError:
            raise StoreUnavailable("no connection came free in time") from None
        try:
            await lane.run_sync(Connection.begin)
            yield lane
            await lane.run_sync(Connection.commit)
        except BaseException:
            await lane.undo()
            raise
        finally:
            self._free.put_nowait(lane)

    async def aclose(self) -> None:
        """End every connection."""
        lanes, self._lanes = self._lanes, []
        for lane in lanes:
            await lane.aclose()
        self._engine.dispose()
