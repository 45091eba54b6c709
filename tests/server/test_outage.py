"""What a client and the log are told while the store is away, and that nothing of it begins later."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from harness.scripted import ScriptedEngine
from mrsa_server.runs import outage, patience
from mrsa_server.runs.batch_store import BatchStore
from mrsa_server.runs.database import Database
from mrsa_server.runs.outage import Outage
from mrsa_server.runs.store import Claim, RunStore
from mrsa_server.runs.store_errors import StoreUnavailable
from tests.helpers.postgres import Postgres
from tests.helpers.replicas import LEASE_S, SIZES, replica, running, slow, until_ended
from tests.helpers.serving import CHAT, RESPONSES, ask, in_memory

NEW_S = 0.6
BATCH = {"endpoint": CHAT, "completion_window": "24h"}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "NEW_S", NEW_S)


@contextmanager
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[asyncio.Event]:
    """No transaction of any store gets further than its beginning, until the event."""
    free = asyncio.Event()
    begun = {name: getattr(Database, name) for name in ("writing", "reading")}

    def held(name: str) -> Any:
        def transaction(self: Database) -> Any:
            inner = begun[name](self)

            class Held:
                async def __aenter__(self) -> object:
                    await free.wait()
                    return await inner.__aenter__()

                async def __aexit__(self, *error: Any) -> object:
                    return await inner.__aexit__(*error)

            return Held()

        return transaction

    with monkeypatch.context() as patch:
        for name in begun:
            patch.setattr(Database, name, held(name))
        yield free
        free.set()


async def refused(asked: httpx.Response, began: float) -> None:
    assert asked.status_code == 503, asked.text
    assert asked.json()["error"]["code"] == "store_unavailable"
    assert asked.headers["retry-after"] == "5"
    assert time.monotonic() - began < NEW_S + 2


def background(**fields: Any) -> dict[str, Any]:
    return {"model": "scripted-mrsa", "input": "?", "background": True, "mrsa": SIZES, **fields}


async def file_of(client: httpx.AsyncClient) -> str:
    form: Any = {"data": {"purpose": "batch"}, "files": {"file": ("a.jsonl", b"{}\n")}}
    found: str = (await client.post("/v1/files", **form)).json()["id"]
    return found


@pytest.mark.parametrize("key", [{}, {"idempotency-key": "one"}])
async def test_what_is_new_is_refused_in_time_where_the_store_hangs_and_never_begins(
    store: RunStore, store_url: str, monkeypatch: pytest.MonkeyPatch, key: dict[str, str]
) -> None:
    async with replica(ScriptedEngine(), store_url) as client:
        file_id = await file_of(client)
        with stuck(monkeypatch) as free:
            began = time.monotonic()
            form: Any = {"data": {"purpose": "batch"}, "files": {"file": ("b.jsonl", b"{}\n")}}
            for response in await asyncio.gather(
                client.post(RESPONSES, json=background(), headers=key),
                client.post(RESPONSES, json=background(stream=True)),
                client.post(RESPONSES, json=background(background=False)),
                client.post(RESPONSES, json=background(previous_response_id="resp_1")),
                client.post(CHAT, json=ask(mrsa=SIZES)),
                client.post("/v1/batches", json={**BATCH, "input_file_id": file_id}, headers=key),
                client.post("/v1/files", **form),
            ):
                await refused(response, began)
            assert not client.app.state.runner._runs  # type: ignore[attr-defined]
            free.set()
        await asyncio.sleep(3 * LEASE_S)
        assert await store.list_runs() == []
        assert await BatchStore(store).list_batches() == []
        again = await client.post(RESPONSES, json=background(), headers=key)
        assert again.status_code == 200
        await until_ended(store, "run_" + again.json()["id"].removeprefix("resp_"))


async def test_a_file_that_somebody_has_locked_is_away_though_it_can_be_read(tmp_path: Path) -> None:
    async with in_memory(state_dir=tmp_path, lease_s=LEASE_S) as client:
        with closing(sqlite3.connect(tmp_path / "runs.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            async with asyncio.timeout(8):
                for _ in range(2):
                    await refused(await client.post(RESPONSES, json=background()), began)
                    began = time.monotonic()
            other.execute("ROLLBACK")
        await asyncio.sleep(2 * LEASE_S)
        assert (await client.get("/v1/runs")).json()["data"] == []


async def test_a_store_that_many_write_to_at_once_is_not_taken_to_be_away(
    store: RunStore, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = RunStore.create

    async def queued(self: RunStore, *given: Any, **options: Any) -> Claim:
        turn = 0
        while turn < 3 * NEW_S:
            await asyncio.sleep(NEW_S / 3)
            turn += NEW_S / 3
            self.transactions.written_at = asyncio.get_running_loop().time()  # others' turns
        return await create(self, *given, **options)

    async with replica(slow(), store_url) as client:
        monkeypatch.setattr(RunStore, "create", queued)
        assert (await client.post(RESPONSES, json=background())).status_code == 200


async def test_a_run_that_was_stored_after_its_client_was_refused_is_forgotten(
    store: RunStore, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = RunStore.create

    async def lost(self: RunStore, *given: Any, **options: Any) -> object:
        await create(self, *given)
        raise StoreUnavailable("its answer was lost")

    async with replica(slow(), store_url) as client:
        with monkeypatch.context() as patch:
            patch.setattr(RunStore, "create", lost)
            began = time.monotonic()
            response = await client.post(RESPONSES, json=background())
        await refused(response, began)
        assert "its answer was lost" in response.json()["error"]["message"]
        async with asyncio.timeout(10):
            left = await store.list_runs()
            while left:
                await asyncio.sleep(0.02)
                left = await store.list_runs()


async def test_a_response_whose_client_left_before_it_was_stored_is_not_made(
    store: RunStore, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replica(slow(), store_url) as client:
        with stuck(monkeypatch):
            asking = asyncio.create_task(client.post(RESPONSES, json=background()))
            await asyncio.sleep(NEW_S / 4)
            asking.cancel()
            await asyncio.wait((asking,))
        await asyncio.sleep(3 * LEASE_S)
        assert await store.list_runs() == []


async def test_the_log_says_once_that_the_store_is_away_and_once_that_it_is_back(
    postgres: Postgres, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outage, "_QUIET_S", 2.0)
    url = postgres.url(postgres.make(template))
    with capture_logs() as lines:
        async with replica(slow(0.01), url) as client:
            asking = asyncio.create_task(client.post(CHAT, json=ask(mrsa=SIZES)))
            await running(client, 1)
            await asyncio.to_thread(postgres.stop)
            try:
                began = time.monotonic()
                await refused(await client.post(RESPONSES, json=background()), began)
                await asyncio.sleep(2)
            finally:
                await asyncio.to_thread(postgres.start)
            assert (await asyncio.wait_for(asking, 30)).status_code == 200
            async with asyncio.timeout(10):
                back = False
                while not back:
                    await asyncio.sleep(0.05)
                    back = any(line["event"] == "store is back" for line in lines)
    told = [line for line in lines if line["log_level"] == "warning" and line["event"] != "no notifications"]
    assert [line["event"] for line in told] == ["store is away", "store is back"]
    assert str(postgres._folder) in told[0]["reason"], "where it is"
    assert "postgres@" not in told[0]["reason"], "and not who asks it"
    assert 1 < told[1]["seconds"] < 20


def test_an_outage_is_told_at_its_begin_now_and_then_and_at_its_end() -> None:
    now = 0.0
    with capture_logs() as lines:
        store = Outage("store", "test", lambda: now)
        store.missed("nobody knows it yet")
        store.met()
        for tick in range(150):  # who reads gets through, and who writes finds out after ten seconds
            now += 1
            if tick % 10 == 0:
                store.missed("locked")
            store.met()
        for _ in range(30):
            now += 1
            store.met()
        store.missed("again")
    assert [line["event"] for line in lines] == [
        "store is away",
        "store is still away",
        "store is still away",
        "store is back",
        "store is away",
    ]
    assert lines[3]["seconds"] == pytest.approx(140, abs=2), "as long as it was away, and not until that was told"


def test_a_place_names_neither_user_nor_password() -> None:
    for url, place in (
        ("postgresql://ann:secret@db.example:5433/runs", "db.example:5433/runs"),
        ("postgresql://ann:secret@/runs?host=/run/pg&password=secret", "/run/pg/runs"),
        ("sqlite:////srv/state/runs.db", "/srv/state/runs.db"),
    ):
        assert Database(url).place == place
