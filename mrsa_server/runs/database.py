"""A database as the store sees it: connections, transactions, its clock. SQLite or Postgres, one SQL for both.

SQLite has one connection that writes, so that writers of this process queue here and those of others at `BEGIN
IMMEDIATE`; each commit is synced to the disk. SQLAlchemy's asyncio extension, which brings its ORM along, and Alembic
are imported where they are needed: for Postgres, and for tables of an older version.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sqlalchemy import ColumnElement, Connection, Double, Table, cast, extract, func, literal
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, NotSupportedError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from mrsa_server import migrations
from mrsa_server.runs import tables
from mrsa_server.runs.lanes import Lane, Lanes
from mrsa_server.runs.store_errors import SchemaMismatch, StoreUnavailable

if TYPE_CHECKING:
    from sqlalchemy.dialects import postgresql, sqlite
    from sqlalchemy.ext.asyncio import AsyncConnection

Transaction: TypeAlias = "AsyncConnection | Lane"

_READERS = 4
# How much longer to queue for a connection than for an answer: many before us may have one each, of milliseconds.
_QUEUE = 3
_CONNECTIONS = 8
_BAD_DATA = "22"  # the class of Postgres' errors for what no column can hold
_DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+aiosqlite": "sqlite",
    "postgres": "postgresql+asyncpg",
    "postgresql": "postgresql+asyncpg",
    "postgresql+asyncpg": "postgresql+asyncpg",
}
# Of a URL's query, as texts; asyncpg knows more, which are no texts.
_OPTIONS = {
    *("host", "port", "user", "password", "passfile", "service", "servicefile", "ssl"),
    *("target_session_attrs", "prepared_statement_cache_size"),
}


def parse_url(url: str) -> URL:
    """The URL of a database with the driver that is used here.

    Raises:
        ValueError: It is for no database that the store knows; nothing of the URL is repeated.
    """
    try:
        parsed = make_url(url)
    except Exception:
        raise ValueError("the database URL cannot be read: sqlite:///PATH or postgresql://USER@HOST/NAME") from None
    driver = _DRIVERS.get(parsed.drivername)
    if driver is None:
        raise ValueError(f"runs are stored in sqlite or postgresql, not in {parsed.drivername}")
    if driver.startswith("sqlite") and parsed.database in (None, "", ":memory:"):
        raise ValueError("a SQLite store is a file: sqlite:///PATH")
    if parsed.port is not None and not 0 < parsed.port < 65_536:
        raise ValueError("the port of the database URL must be between 1 and 65535")
    query = dict(parsed.query)
    if "sslmode" in query:  # as libpq has it, and those who hand URLs out
        query.setdefault("ssl", query.pop("sslmode"))
    known: set[str] = set() if driver.startswith("sqlite") else _OPTIONS
    if unknown := sorted(set(query) - known):
        options = f"must be one of {', '.join(sorted(known))}" if known else "SQLite has none"
        raise ValueError(f"the database URL has the option {unknown[0][:64]!r}: {options}")
    return parsed.set(drivername=driver, query=query)


class Database:
    """Connections to one database.

    Args:
        url: As `parse_url`.
        wait_s: Seconds to wait for a lock, a connection or an answer.

    Attributes:
        postgres: Which of the two it is.
        name: Its URL without anything secret.
        place: Its host or its file, and nothing of who asks it.

    Raises:
        ValueError: As `parse_url`.
        StoreUnavailable: The driver is not installed.
    """

    def __init__(self, url: str, wait_s: float = 10.0) -> None:
        parsed = parse_url(url)
        self.postgres = parsed.drivername.startswith("postgresql")
        self.name = parsed.set(query={}).render_as_string(hide_password=True)  # a query can hold a password too
        self.place = _place(parsed)
        self._wait_s = wait_s
        self._path = None if self.postgres else Path(parsed.database or "")
        self._errors: tuple[type[Exception], ...] = (OSError, sqlite3.Error)
        try:
            if self.postgres:
                import_module("greenlet")  # or SQLAlchemy misses it in many words, and where it pleases
                driver = import_module("asyncpg")  # SQLAlchemy lets its errors through where it connects
                from sqlalchemy.ext.asyncio import create_async_engine  # it brings the ORM along

                self._errors = (OSError, driver.PostgresError, driver.InterfaceError)
                self._engine = create_async_engine(
                    parsed,
                    hide_parameters=True,
                    pool_pre_ping=True,
                    pool_size=_CONNECTIONS,
                    pool_timeout=_QUEUE * wait_s,
                    connect_args={"timeout": wait_s, "command_timeout": wait_s},
                )
            else:
                self._writer = Lanes(parsed, 1, writes=True, lock_s=wait_s, queue_s=_QUEUE * wait_s)
                self._readers = Lanes(parsed, _READERS, writes=False, lock_s=wait_s, queue_s=_QUEUE * wait_s)
        except ImportError as error:
            missed = f"Postgres needs {error.name or 'more than is installed'}"
            raise StoreUnavailable(f'{missed}: pip install "mrsa-server[postgres]"') from error

    @property
    def now(self) -> ColumnElement[float]:
        """The time by which leases are measured: the server's own where there is one, so that replicas agree."""
        if self.postgres:
            return cast(extract("epoch", func.clock_timestamp()), Double)
        return literal(time.time(), Double)

    @property
    def insert(self) -> Callable[[Table], postgresql.Insert | sqlite.Insert]:
        """An INSERT that may meet what is there already."""
        module = import_module(f"sqlalchemy.dialects.{'postgresql' if self.postgres else 'sqlite'}")
        found: Callable[[Table], postgresql.Insert | sqlite.Insert] = module.insert
        return found

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Transaction]:
        """A transaction, committed at the block's end and undone where an error leaves it.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        writing = self._engine.begin() if self.postgres else self._writer.transaction()
        async with self._translated(), writing as connection:
            yield connection

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Transaction]:
        """A connection to read from.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        reading = self._engine.connect() if self.postgres else self._readers.transaction()
        async with self._translated(), reading as connection:
            yield connection

    @asynccontextmanager
    async def listening(self, heard: Mapping[str, Callable[[str], None]]) -> AsyncIterator[asyncio.Event]:
        """Hear the notifications of Postgres: by channel, what is called with the payload of each.

        Yields:
            Set once the connection is lost, and nothing more will be heard.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        lost = asyncio.Event()
        async with self._translated(), self._engine.connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            driver.add_termination_listener(lambda _: lost.set())
            for channel in heard:
                await driver.add_listener(channel, lambda *found: heard[found[2]](found[3]))
            try:
                yield lost
            finally:
                await connection.invalidate()  # nobody else is to get a connection that listens

    async def check(self) -> None:
        """See that the tables are those of this version; a SQLite file is made and upgraded.

        Raises:
            SchemaMismatch: They are not.
            StoreUnavailable: The database does not answer.
        """
        if self._path is not None:
            await self.upgrade()
            return
        async with self.reading() as connection:
            _check(await connection.run_sync(migrations.current), exact=True)

    async def current(self) -> str | None:
        """The revision of the tables; None where there are none.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        if self._path is not None and not self._path.exists():
            return None
        async with self.reading() as connection:
            return await connection.run_sync(migrations.current)

    async def upgrade(self) -> None:
        """Bring the tables to this version.

        Raises:
            SchemaMismatch: They are newer.
            StoreUnavailable: The database does not answer.
        """
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as error:
                raise StoreUnavailable(f"{self._path.parent}: {error.strerror}") from error
            for place in (self._path.parent, self._path):  # SQLite would try for long
                if place.exists() and not os.access(place, os.W_OK):
                    raise StoreUnavailable(f"{place} cannot be written")
            try:
                await asyncio.to_thread(_write_ahead, self._path, self._wait_s)
            except sqlite3.Error as error:
                raise StoreUnavailable(f"{self._path}: {error}") from error
        async with self.writing() as connection:
            await connection.run_sync(_upgrade)

    async def aclose(self) -> None:
        """Close every connection."""
        if self.postgres:
            await self._engine.dispose()
        else:
            await self._writer.aclose()
            await self._readers.aclose()

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        """What a database or the way to it can do wrong, as one error; what we did wrong stays as it is."""
        try:
            yield
        except (IntegrityError, ProgrammingError, DataError, NotSupportedError):
            raise
        except DBAPIError as error:
            if str(getattr(error.orig, "sqlstate", "")).startswith(_BAD_DATA):
                raise  # to repeat it changes nothing
            raise StoreUnavailable(str(error.orig), self.place) from error
        except StoreUnavailable as error:
            raise StoreUnavailable(error.reason, self.place) from error
        except PoolTimeout as error:
            raise StoreUnavailable("no connection came free in time", self.place) from error
        except TimeoutError as error:
            raise StoreUnavailable(f"no answer within {self._wait_s:g} s", self.place) from error
        except self._errors as error:
            raise StoreUnavailable(f"{type(error).__name__}: {error}", self.place) from error


def _place(url: URL) -> str:
    """Where a database is, without the user and the password."""
    if url.drivername == "sqlite":
        return url.database or ""
    given = url.query.get("host", url.host or "localhost")
    host = given if isinstance(given, str) else ",".join(given)
    return f"{host}{'' if url.port is None else f':{url.port}'}/{url.database or ''}"


def _upgrade(connection: Connection) -> None:
    current = migrations.current(connection)
    _check(current, exact=False)
    if current is None and connection.dialect.name == "sqlite":
        tables.metadata.create_all(connection)  # as Alembic would make them, which takes 8 MB more
        migrations.stamp(connection)
    elif current != migrations.HEAD:
        migrations.upgrade(connection)


def _check(current: str | None, *, exact: bool) -> None:
    known = migrations.knows(current)
    if not known or (exact and current != migrations.HEAD):
        raise SchemaMismatch(current, migrations.HEAD, known)


def _write_ahead(path: Path, wait_s: float) -> None:
    """Put a file into WAL mode, where it stays; before any transaction, and again as long as another is about it.

    Two that each hold a lock and want the other's wait in vain: so nobody waits here, and all try again.
    """
    until = time.monotonic() + wait_s
    while True:
        try:
            with closing(sqlite3.connect(path, timeout=0)) as connection:
                if connection.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",):
                    return
                raise sqlite3.OperationalError("its file system has no WAL mode")
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
        time.sleep(0.02)
