"""What tests of several rooms share: the stores, each on SQLite and on a real Postgres."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mrsa_server.runs.store import RunStore
from tests.helpers.postgres import WANTED, Postgres, running
from tests.helpers.replicas import LEASE_S, upgrade


@pytest.fixture(scope="session", autouse=True)
def _nobodys_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a server stores unasked is none of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with running() as server:
        if server is None and os.environ.get("MRSA_REQUIRE_POSTGRES"):
            pytest.fail(WANTED)
        if server is None:
            pytest.skip(WANTED)
        yield server


@pytest.fixture(scope="session")
def template(postgres: Postgres) -> str:
    """A database with this version's tables, to be copied."""
    name = postgres.make()

    asyncio.run(upgrade(postgres.url(name)))
    return name


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state' / 'runs.db'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.url(server.make(request.getfixturevalue("template")))


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[RunStore]:
    """The test's own view of it, beside those of the servers that it starts."""
    await upgrade(store_url)
    found = RunStore(store_url, owner="test", lease_s=LEASE_S)
    await found.open()
    yield found
    await found.aclose()
