"""The store keeps what it is given, lets one owner write at a time and wakes those who wait, on SQLite and Postgres."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import stat
import subprocess
import sys
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect, text

from harness.events import DeadlineReached, Event, RolloutFinished, RunFailed, RunFinished
from harness.markovian_rsa import replay
from harness.prompts import load_templates
from harness.types import Finish, Rollout, Slot, Tail, Trace, Usage
from mrsa_server import migrations
from mrsa_server.cli import main
from mrsa_server.runs import tables
from mrsa_server.runs.bells import Progress
from mrsa_server.runs.database import Database, _upgrade
from mrsa_server.runs.store import Claim, Cursor, Entry, NewRun, RunFilter, RunStore
from mrsa_server.runs.store_errors import Fenced, KeyTaken, NoSuchRun, RunExists, SchemaMismatch, StoreUnavailable
from mrsa_server.settings import Settings
from tests.helpers.postgres import Postgres
from tests.helpers.writer import LEASE_S, whole_log

SHORT_S = 0.15
EVENT = DeadlineReached()
MODELS = ("m",)


def new(run_id: str = "run", key: str | None = None, digest: bytes = b"", created_at: float = 1.0) -> NewRun:
    return NewRun(
        run_id, "response", b'{"input": "?"}', "m", created_at=created_at, idempotency_key=key, body_digest=digest
    )


def finished(index: int, ids: int = 50) -> RolloutFinished:
    tail = Tail(array("I", range(ids)), "text " * ids)
    rollout = Rollout(Slot(0, index), tail, "", Finish.STOP, Usage(1, 2, 3, 4), 0.5)
    return RolloutFinished(rollout, Trace(array("I", range(2 * ids)), (0, ids), (ids, 2 * ids)))


@asynccontextmanager
async def opened(url: str, *owners: str, lease_s: float = 30.0) -> AsyncIterator[list[RunStore]]:
    """A store each for these owners, as in as many replicas."""
    async with AsyncExitStack() as stack:
        stores = []
        for owner in owners or ("owner",):
            store = RunStore(url, owner=owner, lease_s=lease_s)
            stack.push_async_callback(store.aclose)
            await store.open()
            stores.append(store)
        yield stores


async def numbers(store: RunStore, run_id: str = "run") -> list[int]:
    return [stored.number for stored in await store.events(run_id)]


async def test_a_run_is_kept_as_it_was_given(store_url: str) -> None:
    record = NewRun(
        "run",
        "chat.completion",
        b'{"messages": "' + b"long " * 999 + b'"}',
        "zaya-mrsa",
        effort="high",
        priority=1_700_000_000_000,
        background=True,
        created_at=1_700_000_000.25,
        deadline_at=1_700_000_060.5,
        idempotency_key="key",
        body_digest=b"\x00digest",
        metadata={"topic": "ünï\u0000code"},
    )
    async with opened(store_url, "a") as (store,):
        claim = await store.create(record)
        assert claim == Claim("run", 1, 0)
        run = await store.get("run")
        assert run is not None
        for name in (
            "run_id",
            "kind",
            "body",
            "model",
            "effort",
            "priority",
            "background",
            "created_at",
            "deadline_at",
        ):
            assert getattr(run, name) == getattr(record, name)
        assert (run.idempotency_key, run.body_digest, run.metadata) == ("key", record.body_digest, record.metadata)
        assert run.deadline_at == record.deadline_at
        assert (run.status, run.owner, run.last, run.cancel_requested) == ("queued", "a", 0, False)
        assert (run.result, run.error, run.ended_at) == (None, None, None)
        assert await store.append(claim, [EVENT]) == 1
        assert await store.finish(claim, "failed", [RunFailed("why")], result=b"x" * 999, error=b"no") == 2
        run = await store.get("run")
        assert run is not None
        assert (run.status, run.owner, run.last, run.result, run.error) == ("failed", None, 2, b"x" * 999, b"no")
        assert run.ended_at is not None
        assert abs(run.ended_at - time.time()) < 5
        assert await store.find_key("key") == run
        assert await store.get("other") is await store.find_key("other") is None


async def test_events_and_traces_come_back(store_url: str) -> None:
    log: list[Event] = [finished(0), finished(1, ids=9000), EVENT]
    async with opened(store_url) as (store,):
        claim = await store.create(new(), log[:1])
        assert claim.last == 1
        assert await store.append(claim, log[1:]) == 3
        bare = [RolloutFinished(event.rollout) if isinstance(event, RolloutFinished) else event for event in log]
        assert [stored.event for stored in await store.events("run")] == bare
        assert [stored.number for stored in await store.events("run", after=1, limit=1)] == [2]
        assert all(abs(stored.at - time.time()) < 5 for stored in await store.events("run"))
        traces = {event.rollout.slot: event.trace for event in log if isinstance(event, RolloutFinished)}
        assert await store.traces("run") == traces
        assert await store.traces("run", round=1) == {}
        assert await store.trace("run", Slot(0, 1)) == traces[Slot(0, 1)]
        assert await store.trace("run", Slot(1, 1)) is None


async def test_traces_are_not_kept_where_nobody_wants_them(store_url: str) -> None:
    store = RunStore(store_url, owner="a", lease_s=9, keep_traces=False)
    await store.open()
    await store.create(new(), [finished(0)])
    assert await store.traces("run") == {}
    await store.aclose()


async def test_numbers_have_no_gap_and_no_double_under_concurrent_appenders(store_url: str) -> None:
    async with opened(store_url) as (store,):
        claims = [await store.create(new(f"run {run}")) for run in range(3)]

        async def write(claim: Claim, name: int) -> list[int]:
            rng = random.Random(name)
            return [
                await store.append(claim, [RunFailed(f"{name} {i}")] * count)
                for i, count in enumerate(rng.choices([1, 2, 3], k=8))
            ]

        async with asyncio.TaskGroup() as tasks:
            for claim in claims:
                for name in range(6):
                    tasks.create_task(write(claim, name))
        for claim in claims:
            found = await store.events(claim.run_id)
            assert [stored.number for stored in found] == list(range(1, len(found) + 1))
            reasons = [stored.event.reason for stored in found if isinstance(stored.event, RunFailed)]
            for name in range(6):
                counts = random.Random(name).choices([1, 2, 3], k=8)
                own = [reason for reason in reasons if reason.startswith(f"{name} ")]
                assert own == [f"{name} {i}" for i, count in enumerate(counts) for _ in range(count)]


async def test_an_append_that_is_repeated_is_written_once(store_url: str) -> None:
    async with opened(store_url) as (store,):
        claim = await store.create(new(), [EVENT])
        for _ in range(3):
            assert await store.append(claim, [EVENT, EVENT], after=1) == 3
        with pytest.raises(ValueError, match="ends at 3, not at 2"):
            await store.append(claim, [EVENT, EVENT], after=2)
        for _ in range(2):
            assert await store.finish(claim, "finished", [RunFinished((), ())], after=3) == 4
        assert await numbers(store) == [1, 2, 3, 4]


async def test_a_creation_that_is_repeated_is_written_once(store_url: str) -> None:
    async with opened(store_url, "a", "b") as (store, other):
        for key in (None, "key"):
            first = await store.create(new(f"run {key}", key), [EVENT])
            assert await store.create(new(f"run {key}", key), [EVENT]) == first
            with pytest.raises(RunExists if key is None else KeyTaken):
                await other.create(new(f"run {key}", key), [EVENT])
            assert await numbers(store, f"run {key}") == [1]


async def test_an_append_that_fails_leaves_nothing(store_url: str) -> None:
    async with opened(store_url) as (store,):
        claim = await store.create(new(), [finished(0)])
        with pytest.raises(Exception, match=r"(?i)unique|duplicate"):
            await store.append(claim, [EVENT, finished(0)])  # its trace is there already
        assert await store.append(claim, [EVENT]) == 2
        assert await numbers(store) == [1, 2]


async def test_a_frozen_owner_is_fenced(store_url: str) -> None:
    async with opened(store_url, "frozen", lease_s=SHORT_S) as (frozen,), opened(store_url, "taker") as (taker,):
        claim = await frozen.create(new(), [EVENT])
        await asyncio.sleep(SHORT_S * 1.3)
        assert await frozen.append(claim, [EVENT]) == 2  # late, but nobody has taken it
        await asyncio.sleep(SHORT_S * 1.3)
        assert await taker.claim_lost(9, MODELS) == [taken := Claim("run", 2, 2)]
        for write in (
            frozen.append(claim, [EVENT]),
            frozen.append(claim, [EVENT], after=1),
            frozen.append(claim, [EVENT], after=2),
            frozen.finish(claim, "finished"),
        ):
            with pytest.raises(Fenced):
                await write
        assert (await frozen.renew([claim])).lost == (claim,)
        await frozen.release(claim)
        assert await taker.append(taken, [EVENT]) == 3
        assert await numbers(taker) == [1, 2, 3]


async def test_an_owner_that_takes_its_own_run_again_has_one_claim(store_url: str) -> None:
    async with opened(store_url, lease_s=SHORT_S) as (store,):
        old = await store.create(new())
        await asyncio.sleep(SHORT_S * 1.3)
        (again,) = await store.claim_lost(1, MODELS)
        with pytest.raises(Fenced):
            await store.append(old, [EVENT])
        assert await store.renew([old, again]) == ((old,), ())


async def test_nobody_writes_to_a_run_that_has_ended_or_is_gone(store_url: str) -> None:
    async with opened(store_url) as (store,):
        ended = await store.create(new("ended"))
        await store.finish(ended, "finished")
        gone = await store.create(new("gone"))
        assert await store.delete("gone")
        assert not await store.delete("gone")
        for claim in (ended, gone):
            with pytest.raises(Fenced):
                await store.append(claim, [EVENT])
        with pytest.raises(Fenced):
            await store.finish(ended, "failed")
        assert (await store.renew([ended, gone])).lost == (ended, gone)
        assert await store.claim_lost(9, MODELS) == []


async def test_a_lease_that_is_renewed_is_not_lost(store_url: str) -> None:
    async with opened(store_url, "a", lease_s=1.0) as (store,), opened(store_url, "b") as (other,):
        claims = [await store.create(new(f"run {run}")) for run in range(3)]
        for _ in range(5):
            await asyncio.sleep(0.25)
            assert await store.renew(claims) == ((), ())
            assert await other.claim_lost(9, MODELS) == []


async def test_a_run_that_is_given_back_is_anybodys_at_once(store_url: str) -> None:
    async with opened(store_url, "a", "b") as (store, other):
        claim = await store.create(new(), [EVENT])
        await store.release(claim)
        with pytest.raises(Fenced):
            await store.append(claim, [EVENT])
        assert await other.claim_lost(9, MODELS) == [Claim("run", 3, 1)]


async def test_each_lost_run_is_taken_once_and_the_oldest_first(store_url: str) -> None:
    async with opened(store_url, "gone") as (gone,), opened(store_url, *"abc") as takers:
        for age in range(30):
            await gone.release(await gone.create(new(f"run {age:02}", created_at=1000.0 - age)))
        assert [claim.run_id for claim in await takers[0].claim_lost(2, MODELS)] == ["run 29", "run 28"]
        found: list[str] = []

        async def take(store: RunStore) -> None:
            misses = 0
            while misses < 3:  # what another is about to take is passed over
                claims = await store.claim_lost(3, MODELS)
                misses = 0 if claims else misses + 1
                found.extend(claim.run_id for claim in claims)

        async with asyncio.TaskGroup() as tasks:
            for store in takers:
                tasks.create_task(take(store))
        assert sorted(found) == [f"run {age:02}" for age in range(28)]


async def test_a_lost_run_is_taken_by_who_serves_its_model_or_where_it_is_only_to_be_ended(store_url: str) -> None:
    async with opened(store_url, "gone", "taker") as (gone, taker):
        for name in ("one", "other", "cancelled"):
            await gone.release(await gone.create(NewRun(name, "response", b"", name, created_at=1.0)))
        await taker.request_cancel("cancelled")
        assert [claim.run_id for claim in await taker.claim_lost(9, ["other", "none"])] == ["cancelled", "other"]
        assert await taker.claim_lost(9, []) == []
        assert [claim.run_id for claim in await taker.claim_lost(9, ["one"])] == ["one"]


async def test_a_cancel_reaches_the_owner_in_another_replica(store_url: str) -> None:
    async with opened(store_url, "a", "b") as (store, other):
        claim, others = await store.create(new(key="key")), await store.create(new("other"))
        assert await other.request_cancel("run")
        assert await store.renew([claim, others]) == ((), (claim,))
        run = await other.get("run")
        assert run is not None
        assert run.cancel_requested
        await store.create(new("again", key="key"))  # who has cancelled may ask again
        await store.finish(claim, "cancelled")
        assert not await other.request_cancel("run")
        assert not await other.request_cancel("nothing")


@pytest.mark.parametrize("replicas", ["a", "ab"])
async def test_a_cancel_is_heard_at_once(store_url: str, replicas: str) -> None:
    async with opened(store_url, *replicas) as stores:
        heard = asyncio.Queue[str]()
        stores[0].hear_cancels(heard.put_nowait)
        await stores[0].create(new())
        await asyncio.sleep(0.1)  # until it listens
        began = time.perf_counter()
        assert await stores[-1].request_cancel("run")
        if len(replicas) == 2 and not stores[0]._database.postgres:
            with pytest.raises(TimeoutError):  # another process on the same file has only `renew`
                await asyncio.wait_for(heard.get(), 0.1)
            return
        assert await asyncio.wait_for(heard.get(), 5) == "run"
        assert time.perf_counter() - began < 2
        assert not await stores[-1].request_cancel("other")
        assert "other" not in [heard.get_nowait() for _ in range(heard.qsize())]


async def test_a_key_stands_for_one_run(store_url: str) -> None:
    async with opened(store_url, "a", "b") as (store, other):
        claim = await store.create(new("first", "key", b"digest"))
        with pytest.raises(KeyTaken) as caught:
            await other.create(new("second", "key", b"another"))
        assert (caught.value.run_id, caught.value.digest) == ("first", b"digest")
        assert await other.get("second") is None
        await store.finish(claim, "failed", keep_key=False)
        await other.create(new("second", "key"))


async def test_of_requests_at_once_with_one_key_one_makes_a_run(store_url: str) -> None:
    async with opened(store_url, "a", "b") as stores:

        async def create(number: int) -> str:
            try:
                return (await stores[number % 2].create(new(f"run {number}", "key"), [EVENT])).run_id
            except KeyTaken as error:
                return error.run_id

        assert len(set(await asyncio.gather(*map(create, range(12))))) == 1
        assert len(await stores[0].list_runs()) == 1


async def test_the_list_is_read_in_pages_and_by_filters(store_url: str) -> None:
    async with opened(store_url) as (store,):
        for number in range(7):  # some of the same age
            claim = await store.create(new(f"run {number}", created_at=10.0 + number // 2))
            if number % 2:
                await store.finish(claim, "finished")
        await store.create(NewRun("chat", "chat.completion", b"", "another", created_at=5.0))
        found, before = [], None
        while page := await store.list_runs(before=before, limit=3):
            found += page
            before = page[-1].cursor
        assert [run.run_id for run in found] == [*(f"run {number}" for number in range(6, -1, -1)), "chat"]
        for which, names in (
            (RunFilter(status=("finished",)), ["run 5", "run 3", "run 1"]),
            (RunFilter(status=("queued", "running"), kind="response"), ["run 6", "run 4", "run 2", "run 0"]),
            (RunFilter(model="another"), ["chat"]),
            (RunFilter(kind="chat.completion"), ["chat"]),
            (RunFilter(since=12.0), ["run 6", "run 5", "run 4"]),
            (RunFilter(since=5.0, until=11.0), ["run 1", "run 0", "chat"]),
        ):
            assert [run.run_id for run in await store.list_runs(which)] == names
        assert await store.list_runs(before=Cursor(5.0, "")) == []


async def test_hostile_names_are_data(store_url: str) -> None:
    name = "'; DROP TABLE runs; -- %s :x {0} \\"
    async with opened(store_url) as (store,):
        claim = await store.create(new(name, key=name))
        await store.append(claim, [RunFailed(name)])
        assert (await store.get(name)) == (await store.find_key(name))
        assert [run.run_id for run in await store.list_runs(RunFilter(model=name))] == []
        assert (await store.wait(name, 0, 1)).last == 1


async def test_what_was_kept_long_enough_is_forgotten(store_url: str) -> None:
    async with opened(store_url) as (store,):
        for name in ("ended", "alive"):
            claim = await store.create(new(name, key=name), [finished(0), EVENT])
            if name == "ended":
                await store.finish(claim, "finished")
        assert await store.prune() == (0, 0, 0)
        assert await store.prune(traces_older_than_s=60, runs_older_than_s=60, keys_older_than_s=60) == (0, 0, 0)
        await asyncio.sleep(0.02)
        assert await store.prune(traces_older_than_s=0.01, runs_older_than_s=60, keys_older_than_s=0.01) == (0, 1, 1)
        assert await store.traces("ended") == {}
        assert await numbers(store, "ended") == [1, 2]
        assert await store.find_key("ended") is None
        assert await store.prune(runs_older_than_s=0.01) == (1, 0, 0)
        assert await store.get("ended") is None
        assert await store.events("ended") == []
        assert len(await store.traces("alive")) == 1
        assert await store.find_key("alive") is not None


@pytest.mark.parametrize("replicas", ["a", "ab"])
async def test_a_reader_is_woken(store_url: str, replicas: str) -> None:
    async with opened(store_url, *replicas) as stores:
        writer, reader = stores[0], stores[-1]
        await asyncio.sleep(0.1)  # until it listens
        claim = await writer.create(new())
        waiting = [asyncio.create_task(reader.wait("run", after, 10)) for after in (0, 0, 1)]
        await asyncio.sleep(0.1)
        began = time.perf_counter()
        await writer.append(claim, [EVENT])
        assert await waiting[0] == await waiting[1] == Progress(1, False)
        assert time.perf_counter() - began < 3
        assert not waiting[2].done()
        await writer.finish(claim, "finished")
        assert await waiting[2] == Progress(1, True)
        assert time.perf_counter() - began < 3
        assert await reader.wait("run", 9, 10) == Progress(1, True)


async def test_a_reader_waits_no_longer_than_it_wants_to_nor_for_what_is_gone(store_url: str) -> None:
    async with opened(store_url, "a", "b") as (store, other):
        await store.create(new(), [EVENT])
        assert await store.wait("run", 0, 0) == await store.wait("run", 1, 0.05) == Progress(1, False)
        with pytest.raises(NoSuchRun):
            await store.wait("nothing", 0, 1)
        waiting = asyncio.create_task(store.wait("run", 1, 10))
        await asyncio.sleep(0.1)
        await other.delete("run")
        with pytest.raises(NoSuchRun):
            await waiting


async def test_a_store_that_is_closed_says_so(store_url: str) -> None:
    async with opened(store_url) as (store,):
        claim = await store.create(new())
        waiting = asyncio.create_task(store.wait("run", 0, 10))
        written = asyncio.create_task(store.append(claim, [], after=0))
        await asyncio.sleep(0.01)
        await store.aclose()
        assert await written == 0
        for call in (waiting, store.get("run"), store.append(claim, [EVENT]), store.wait("run", 0, 10)):
            with pytest.raises(StoreUnavailable, match="closed"):
                await call


async def test_many_readers_cost_one_look(store_url: str) -> None:
    async with opened(store_url, "a", "b") as (store, other):
        claims = [await store.create(new(f"run {run}")) for run in range(50)]
        waiting = [asyncio.create_task(other.wait(claim.run_id, 0, 10)) for claim in claims]
        await asyncio.sleep(0.3)
        for claim in claims:
            await store.append(claim, [EVENT])
        assert {progress.last for progress in await asyncio.gather(*waiting)} == {1}


async def test_a_write_that_is_cancelled_is_whole_and_holds_nobody_up(store_url: str) -> None:
    # A driver that was cancelled left its transaction open, and SQLite locked for every writer.
    async with opened(store_url, "a", "b") as (store, other):
        claim = await store.create(new())
        began = time.perf_counter()
        for delay_ms in range(24):
            for call in (store.append(claim, [EVENT, EVENT]), store.events("run")):
                task = asyncio.create_task(call)
                await asyncio.sleep(delay_ms / 8000)
                task.cancel()
                await asyncio.wait((task,))
            await other.create(new(f"run {delay_ms}"))
        assert await store.append(claim, [EVENT]) == 24 * 2 + 1
        assert time.perf_counter() - began < 8
        assert await numbers(store) == list(range(1, 24 * 2 + 2))


def test_a_writer_that_is_killed_leaves_logs_that_replay(store_url: str) -> None:
    log, rng, templates = whole_log(), random.Random(), load_templates()

    async def check() -> int:
        async with opened(store_url) as (store,):
            runs = await store.list_runs(limit=9999)
            for run in runs:
                found = await store.events(run.run_id)
                assert [stored.number for stored in found] == list(range(1, run.last + 1))
                bare = [RolloutFinished(e.rollout) if isinstance(e, RolloutFinished) else e for e in log[: run.last]]
                assert [stored.event for stored in found] == bare
                assert replay([stored.event for stored in found], templates) == replay(bare, templates)
                traces = {e.rollout.slot: e.trace for e in log[: run.last] if isinstance(e, RolloutFinished)}
                assert await store.traces(run.run_id) == traces
                assert run.status != "finished" or run.last == len(log)
            # One writer after the other: nobody begins a run while another is to be gone on with.
            assert sum(run.status != "finished" for run in runs) <= 1
            return len(runs)

    asyncio.run(check())  # makes the tables of SQLite
    for _ in range(3):
        command = [sys.executable, "-m", "tests.helpers.writer", store_url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
            time.sleep(rng.random() * 0.3)
            writer.kill()
        runs = asyncio.run(check())
        time.sleep(LEASE_S)
    assert runs


async def test_a_store_that_comes_back_works_again(postgres: Postgres, template: str) -> None:
    url = postgres.url(postgres.make(template))
    async with opened(url, "a", "b") as (store, other):
        claim = await store.create(new(), [EVENT])
        waiting = asyncio.create_task(other.wait("run", 1, 30))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(postgres.stop)
        try:
            for call in (
                store.append(claim, [EVENT], after=1),
                store.get("run"),
                store.renew([claim]),
                store.claim_lost(1, MODELS),
                RunStore(url, owner="c", lease_s=1).open(),
                waiting,
            ):
                with pytest.raises(StoreUnavailable):
                    await call
        finally:
            await asyncio.to_thread(postgres.start)
        assert await store.append(claim, [EVENT], after=1) == 2
        assert await other.wait("run", 1, 1) == Progress(2, False)
        waiting = asyncio.create_task(other.wait("run", 2, 10))
        await asyncio.sleep(1.5)  # until it listens again
        began = time.perf_counter()
        await store.append(claim, [EVENT])
        assert await waiting == Progress(3, False)
        assert time.perf_counter() - began < 3


async def test_a_file_that_another_process_locks_is_unavailable_until_it_is_free(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    store = RunStore(f"sqlite:///{path}", owner="a", lease_s=9, wait_s=0.1)
    await store.open()
    claim = await store.create(new())
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        await store.append(claim, [EVENT])
    assert await store.get("run") is not None  # readers are not held up
    blocker.execute("ROLLBACK")
    blocker.close()
    assert await store.append(claim, [EVENT]) == 1
    await store.aclose()


async def test_a_file_is_safe_from_a_power_cut_and_from_other_users(tmp_path: Path) -> None:
    path = tmp_path / "state" / "runs.db"
    async with opened(f"sqlite:///{path}") as (store,):
        async with store._database.writing() as connection:
            found = [
                (await connection.execute(text(f"PRAGMA {name}"))).scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys")
            ]
        assert found == ["wal", 2, 1]
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


async def test_the_tables_that_migrations_make_are_those_that_queries_see(store_url: str) -> None:
    def differences(connection: Connection) -> list[object]:
        return compare_metadata(MigrationContext.configure(connection), tables.metadata)

    async with opened(store_url) as (store,), store._database.reading() as connection:
        assert await connection.run_sync(differences) == []


def test_the_head_is_the_last_step_of_the_migrations() -> None:
    assert ScriptDirectory.from_config(migrations._config()).get_current_head() == migrations.HEAD


def test_a_new_file_has_the_tables_that_migrations_would_make(tmp_path: Path) -> None:
    def made(make: Callable[[Connection], None], name: str) -> dict[str, object]:
        engine = create_engine(f"sqlite:///{tmp_path / name}")
        with engine.begin() as connection:
            make(connection)
            found = inspect(connection)
            tables: dict[str, object] = {
                table: (
                    sorted(({**column, "type": str(column["type"])} for column in found.get_columns(table)), key=str),
                    found.get_pk_constraint(table),
                    found.get_foreign_keys(table),
                    found.get_unique_constraints(table),
                )
                for table in found.get_table_names()
            }
            for index in connection.execute(text("SELECT name, sql FROM sqlite_master WHERE type = 'index'")):
                tables[index.name] = index.sql
            assert migrations.current(connection) == migrations.HEAD
        engine.dispose()
        return tables

    assert made(_upgrade, "new.db") == made(migrations.upgrade, "migrated.db")


def test_a_server_on_a_file_loads_no_orm_no_alembic_and_no_driver_of_another_database(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys\n"
        "from mrsa_server.app import open_journal\n"
        "from mrsa_server.settings import Settings\n"
        "async def main():\n"
        "    journal = await open_journal(Settings(engine='scripted'))\n"
        "    await journal.store.list_runs()\n"
        "    await journal.store.aclose()\n"
        "asyncio.run(main())\n"
        "print([name for name in ('sqlalchemy.orm', 'alembic', 'asyncpg', 'sqlalchemy.dialects.postgresql')"
        " if name in sys.modules])\n"
    )
    for _ in ("new", "there already"):
        environment = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
        said = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
        )
        assert said.stdout.splitlines()[-1] == "[]"


async def test_servers_may_make_a_file_at_once(tmp_path: Path) -> None:
    # They locked one another out, some time in ten, while each put the file into WAL mode.
    for round in range(6):
        stores = [RunStore(f"sqlite:///{tmp_path / f'{round}.db'}", owner=name, lease_s=9, wait_s=3) for name in "abcd"]
        await asyncio.gather(*(store.open() for store in stores))
        await stores[0].create(new())
        assert await stores[1].get("run") is not None
        for store in stores:
            await store.aclose()


async def test_tables_of_another_version_are_refused(postgres: Postgres, template: str) -> None:
    store = RunStore(postgres.url(postgres.make()), owner="a", lease_s=9)
    with pytest.raises(SchemaMismatch, match=r"no tables yet.*mrsa db upgrade"):
        await store.open()
    await store.aclose()
    name = postgres.make(template)
    postgres.sql("UPDATE alembic_version SET version_num = '9999'", name)
    store = RunStore(postgres.url(name), owner="a", lease_s=9)
    with pytest.raises(SchemaMismatch, match="newer version"):
        await store.open()
    await store.aclose()


def test_db_makes_the_tables(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MRSA_DATABASE_URL", postgres.url(postgres.make()))
    for words, status, said in (
        ("current", 1, "no tables"),
        ("upgrade", 0, migrations.HEAD),
        ("upgrade", 0, migrations.HEAD),
        ("current", 0, migrations.HEAD),
    ):
        assert main(["db", words]) == status
        assert said in capsys.readouterr().out


def test_db_says_where_the_file_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["db", "current", "--state-dir", str(tmp_path)]) == 1
    assert list(tmp_path.iterdir()) == []
    assert main(["db", "upgrade", "--state-dir", str(tmp_path)]) == 0
    assert str(tmp_path / "runs.db") in capsys.readouterr().out


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@localhost:1/runs",
        "postgresql+asyncpg://me@localhost:1/runs?password=hunter2",
        "mysql://me:hunter2@localhost/runs",
        "hunter2",
    ],
)
def test_a_password_is_never_told(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MRSA_DATABASE_URL", url)
    assert "hunter2" not in repr(Settings()) + str(Settings().store_url)
    assert main(["db", "current"]) == 3
    said = capsys.readouterr()
    assert said.err
    assert "hunter2" not in said.out + said.err


async def test_many_runs_are_written_in_one_transaction_and_each_is_judged_by_itself(store_url: str) -> None:
    async with opened(store_url, "a", "b", lease_s=0.01) as (store, other):
        claims = {name: await store.create(new(name)) for name in ("going", "ends", "ended", "taken", "wrong", "again")}
        await store.finish(claims["ended"], "failed")
        await store.append(claims["again"], [EVENT], after=0)
        await asyncio.sleep(0.05)
        gone = {claim.run_id: claim for claim in await other.claim_lost(9, MODELS)}
        for name in ("going", "ends", "wrong", "again"):  # it has them back
            await other.release(gone[name])
        back = {
            claim.run_id: claim for claim in await store.claim_lost(9, MODELS)
        }  # the taken one too, where time flies
        claims |= {name: claim for name, claim in back.items() if name != "taken"}
        entries = [
            Entry(claims["going"], [finished(0), EVENT], after=0),
            Entry(claims["ends"], [EVENT], 0, "failed", b"why"),
            Entry(claims["ended"], [EVENT], 0),
            Entry(claims["taken"], [EVENT], 0),
            Entry(claims["wrong"], [EVENT], after=3),
            Entry(claims["again"], [EVENT], after=0),
            Entry(Claim("never", 1, 0), [EVENT], 0),
        ]
        found = await store.write_many(entries)
        assert [one if isinstance(one, int) else type(one) for one in found] == [
            2, 1, Fenced, Fenced, ValueError, 1, Fenced,
        ]  # fmt: skip
        assert await store.write_many(entries[:2]) == [2, 1], "the same again is safe"
        assert {name: await numbers(store, name) for name in claims} == {
            "going": [1, 2], "ends": [1], "ended": [], "taken": [], "wrong": [], "again": [1],
        }  # fmt: skip
        assert (await store.traces("going")).keys() == {Slot(0, 0)}
        runs = {run.run_id: run for run in await store.list_runs()}
        assert {name: run.status for name, run in runs.items()} == {
            "going": "running", "ends": "failed", "ended": "failed", "taken": "queued", "wrong": "queued",
            "again": "running",
        }  # fmt: skip
        assert runs["ends"].ended_at is not None
        assert runs["ends"].owner is None
        ended = await store.get("ends")
        assert ended is not None
        assert ended.error == b"why"


async def test_a_store_in_memory_is_refused() -> None:
    for url in ("sqlite://", "sqlite:///:memory:"):
        with pytest.raises(ValueError, match="is a file"):
            Database(url)
