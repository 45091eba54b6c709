"""What has been kept long enough is forgotten while the server lives, and nothing else."""

from __future__ import annotations

import asyncio
from dataclasses import astuple
from typing import cast

import pytest
from pydantic import ValidationError

from harness.scripted import ScriptedEngine
from mrsa_server.app import kept
from mrsa_server.runs import tables
from mrsa_server.runs.retention import Keep, forget
from mrsa_server.runs.store import NewRun, Pruned, RunFilter, RunStore
from mrsa_server.runs.store_errors import StoreUnavailable
from mrsa_server.settings import Settings
from tests.helpers.postgres import Postgres
from tests.helpers.replicas import SIZES, replica, until_ended
from tests.helpers.serving import CHAT, ask

DAY_S = 86_400.0


async def test_a_server_forgets_ended_runs_and_no_others(store: RunStore, store_url: str) -> None:
    async with replica(ScriptedEngine(), store_url) as client:
        ids = [(await client.post(CHAT, json=ask(mrsa=SIZES))).json()["mrsa"]["run_id"] for _ in range(3)]
        for run_id in ids:
            await until_ended(store, run_id)
    await store.create(NewRun("alive", "response", b"{}", "m", created_at=1.0))
    async with store._database.writing() as connection:  # one ended a month ago, another a week ago
        for run_id, days in zip(ids, (31, 8, 1), strict=False):
            aged = tables.runs.update().where(tables.runs.c.run_id == run_id)
            await connection.execute(aged.values(ended_at=tables.runs.c.ended_at - days * DAY_S))
    forgetting = asyncio.create_task(forget(store, kept(Settings(engine="scripted")), every_s=0.2))
    async with asyncio.timeout(20):
        left = 4
        while left > 3:
            await asyncio.sleep(0.02)
            left = len(await store.list_runs())
        traces = True
        while traces:
            await asyncio.sleep(0.02)
            traces = bool(await store.traces(ids[1]))
    await asyncio.sleep(0.5)
    forgetting.cancel()
    assert {run.run_id for run in await store.list_runs()} == {"alive", *ids[1:]}
    assert await store.events(ids[0]) == []
    assert await store.events(ids[1])
    assert await store.traces(ids[2])


async def test_many_runs_are_forgotten_in_small_transactions(store: RunStore) -> None:
    for number in range(60):
        claim = await store.create(NewRun(f"run {number}", "response", b"{}", "m", created_at=1.0))
        await store.finish(claim, "finished")
    async with store._database.writing() as connection:
        await connection.execute(tables.runs.update().values(events=90, ended_at=tables.runs.c.ended_at - 60))
    sizes = [len(batch) async for batch in store._ended_before(30)]
    assert sizes == [4] * 15
    assert await store.prune(runs_older_than_s=30) == (60, 0, 0)


async def test_pruning_goes_on_after_the_store_was_away(postgres: Postgres, template: str) -> None:
    store = RunStore(postgres.url(postgres.make(template)), owner="a", lease_s=9)
    await store.open()
    await store.finish(await store.create(NewRun("run", "response", b"", "m", created_at=1.0)), "finished")
    await asyncio.to_thread(postgres.stop)
    forgetting = asyncio.create_task(forget(store, Keep(0.001, None, None), every_s=0.2))
    await asyncio.sleep(0.5)
    await asyncio.to_thread(postgres.start)
    async with asyncio.timeout(20):
        left = 1
        while left:
            await asyncio.sleep(0.05)
            left = len(await store.list_runs(RunFilter()))
    forgetting.cancel()
    await store.aclose()


async def test_what_breaks_is_tried_again() -> None:
    class Breaking:
        tries = 0

        async def prune(self, **_: object) -> Pruned:
            self.tries += 1
            raise (StoreUnavailable("it is gone"), RuntimeError("a mistake of ours"))[self.tries % 2]

    store = Breaking()
    forgetting = asyncio.create_task(forget(cast("RunStore", store), Keep(1, 1, 1), every_s=0.01))
    async with asyncio.timeout(10):
        tries = 0
        while tries < 5:
            await asyncio.sleep(0.01)
            tries = store.tries
    forgetting.cancel()


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({}, (30 * DAY_S, 7 * DAY_S, DAY_S)),
        ({"keep_runs_days": "inf", "keep_traces_days": "0"}, (None, 0, DAY_S)),
        ({"keep_runs_days": "0.5", "keep_traces_days": "inf"}, (DAY_S / 2, None, DAY_S)),
    ],
)
def test_days_are_given_as_numbers_and_for_ever_as_inf(
    given: dict[str, str], seconds: tuple[float | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(f"MRSA_{name.upper()}", value)
    assert astuple(kept(Settings(engine="scripted"))) == seconds


@pytest.mark.parametrize("given", [{"keep_runs_days": 0}, {"keep_runs_days": "nan"}, {"keep_traces_days": "nan"}])
def test_days_that_are_none_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(given))):
        Settings(engine="scripted", **given)  # type: ignore[arg-type]


async def test_traces_that_nobody_wants_are_not_stored(store: RunStore, store_url: str) -> None:
    async with replica(ScriptedEngine(), store_url, keep_traces_days=0) as client:
        run_id = (await client.post(CHAT, json=ask(mrsa=SIZES))).json()["mrsa"]["run_id"]
        await until_ended(store, run_id)
        assert await store.traces(run_id) == {}
