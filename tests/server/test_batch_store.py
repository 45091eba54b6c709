"""Files in pieces, batches and their runs, on SQLite and Postgres: what is kept, who may write, what comes first."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import Connection, text

from mrsa_server import migrations
from mrsa_server.runs import tables
from mrsa_server.runs.batch_store import BatchClaim, BatchStore, Counts, LineError, NewBatch, NewLine, Written
from mrsa_server.runs.database import Database
from mrsa_server.runs.file_store import PIECE_BYTES, FileStore, Writing
from mrsa_server.runs.record import NewRun, Spent
from mrsa_server.runs.store import RunFilter, RunStore
from mrsa_server.runs.store_errors import BatchLost, Fenced, NoSuchFile

LEASE_S = 30.0


def batch(name: str = "batch_1", **fields: object) -> NewBatch:
    return replace(
        NewBatch(name, "/v1/chat/completions", "file-1", "24h", time.time(), time.time() + 86_400),
        **fields,  # type: ignore[arg-type]
    )


def lines(count: int, name: str = "batch_1", refused: tuple[int, ...] = ()) -> list[NewLine]:
    return [
        NewLine(
            NewRun(
                f"run_{name}_{line:05}",
                "chat.completion",
                b"{}",
                "m",
                background=True,
                created_at=5.0,
                batch_id=name,
                batch_line=line,
                custom_id=f"line {line}",
            ),
            b'{"error": {}}' if line in refused else None,
        )
        for line in range(1, count + 1)
    ]


async def begun(batches: BatchStore, count: int, name: str = "batch_1") -> None:
    """A batch whose runs wait."""
    await batches.create(batch(name))
    claim = await batches.claim_due()
    assert claim is not None
    await batches.expand(claim, lines(count, name))
    await batches.start(claim, count)
    await batches.release(claim)


async def other(url: str) -> RunStore:
    store = RunStore(url, owner="other", lease_s=LEASE_S)
    await store.open()
    return store


@pytest.fixture
async def batches(store: RunStore) -> BatchStore:
    store.lease_s = LEASE_S
    return BatchStore(store)


@pytest.fixture
def files(store: RunStore) -> FileStore:
    return FileStore(store)


async def content(files: FileStore, file_id: str) -> bytes:
    return b"".join([piece async for piece in files.pieces(file_id)])


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 7])
async def test_a_file_comes_back_as_it_was_written(files: FileStore, size: int) -> None:
    data = os.urandom(size // 2) + b"x" * (size - size // 2)
    writing = await files.begin("a.jsonl", "batch", 7.0, None)
    for start in range(0, size, 300_000):
        await writing.write(data[start : start + 300_000])
    assert await files.get(writing.file_id) is None, "it is not whole"
    assert await content(files, writing.file_id) == b""
    done = await writing.close()
    assert await writing.close() == done == await files.get(writing.file_id)
    assert (done.bytes, done.filename, done.purpose, done.created_at, done.expires_at) == (
        size,
        "a.jsonl",
        "batch",
        7.0,
        None,
    )
    assert await content(files, writing.file_id) == data


async def test_files_are_listed_by_age_in_pages_and_by_purpose(files: FileStore) -> None:
    names = []
    for number in range(5):  # some of the same age
        writing = await files.begin(f"{number}", "batch_output" if number == 2 else "batch", 10.0 + number // 2, None)
        names.append((await writing.close()).file_id)
    await files.begin("half", "batch", 99.0, None)
    newest = sorted(names[:2])[::-1]
    for order in ("desc", "asc"):
        found, after = [], None
        while page := await files.list_files(after=after, order=order, limit=2):  # type: ignore[arg-type]
            found += [file.file_id for file in page]
            after = page[-1]
        assert set(found) == set(names)
        assert len(found) == 5
        assert (found if order == "desc" else found[::-1])[-2:] == newest
    assert [file.file_id for file in await files.list_files("batch_output")] == [names[2]]


async def test_a_file_that_is_deleted_is_gone_with_its_pieces(files: FileStore, store: RunStore) -> None:
    writing = await files.begin("a", "batch", 7.0, None)
    await writing.write(b"y" * 3 * PIECE_BYTES)
    await writing.close()
    reading = files.pieces(writing.file_id)
    await anext(reading)
    assert await files.delete(writing.file_id)
    assert not await files.delete(writing.file_id)
    assert await files.get(writing.file_id) is None
    with pytest.raises(NoSuchFile):
        await anext(reading)
    for late in (writing.write(b"z" * PIECE_BYTES), writing.close()):
        with pytest.raises(NoSuchFile):
            await late
    async with store.database.reading() as connection:
        assert not (await connection.execute(tables.file_chunks.select())).all()


async def test_files_whose_time_is_over_are_not_there_and_are_swept(files: FileStore) -> None:
    async def made(created_at: float, expires_at: float | None) -> Writing:
        return await files.begin("a", "batch", created_at, expires_at)

    now = time.time()
    over, kept = await made(now, now - 1), await made(now, now + 99)
    old, young = await made(now - 86_400, None), await made(now, None)  # neither is written to its end
    await over.close()
    await kept.close()
    assert await files.get(over.file_id) is None
    assert [file.file_id for file in await files.list_files()] == [kept.file_id]
    assert await files.sweep() == 2
    assert await files.sweep() == 0
    await young.close()
    with pytest.raises(NoSuchFile):
        await old.close()


async def test_a_batch_is_kept_as_it_was_given(batches: BatchStore) -> None:
    record = batch(output_expires_s=3600.0, metadata={"a": "ü\u0000"}, idempotency_key="key", body_digest=b"\0d")
    found = await batches.create(record)
    for name in NewBatch.__slots__:
        assert getattr(found, name) == getattr(record, name)
    assert (found.status, found.total, found.errors, found.usage) == ("validating", 0, (), None)
    assert await batches.create(record) == found == await batches.get("batch_1")
    again = await batches.create(batch("batch_2", idempotency_key="key", body_digest=b"other"))
    assert again == found
    assert await batches.get("batch_2") is None


async def test_batches_are_listed_the_newest_first(batches: BatchStore) -> None:
    for number in range(5):
        await batches.create(batch(f"batch_{number}"))
    assert [one.batch_id for one in await batches.list_batches(limit=2)] == ["batch_4", "batch_3"]
    assert [one.batch_id for one in await batches.list_batches(after="batch_2")] == ["batch_1", "batch_0"]


async def test_an_expansion_that_is_repeated_makes_each_run_once(batches: BatchStore, store: RunStore) -> None:
    await batches.create(batch())
    claim = await batches.claim_due()
    assert claim == BatchClaim("batch_1", 1)
    await batches.expand(claim, lines(3, refused=(2,)))
    taken = await store.claim_lost(1, ["m"])
    await batches.expand(claim, lines(7, refused=(2,)))
    await batches.start(claim, 7)
    runs = await store.runs_of_batch("batch_1")
    assert [(run.batch_line, run.custom_id) for run in runs] == [(line, f"line {line}") for line in range(1, 8)]
    assert [run.run_id for run in runs if run.owner] == [taken[0].run_id] == [runs[0].run_id]
    assert (runs[1].status, runs[1].error) == ("refused", b'{"error": {}}')
    assert runs[1].ended_at is not None
    assert await batches.counts(["batch_1", "batch_0"]) == {"batch_1": Counts(6, 0, 0, 1)}
    assert [run.batch_line for run in await store.runs_of_batch("batch_1", after=5, limit=1)] == [6]
    assert len(await store.list_runs(RunFilter(batch_id="batch_1"))) == 7


async def test_one_keeper_at_a_time_does_something_for_a_batch(batches: BatchStore, store_url: str) -> None:
    second = await other(store_url)
    try:
        others = BatchStore(second)
        for name in ("batch_1", "batch_2"):
            await batches.create(batch(name))
        claims = await asyncio.gather(*(one.claim_due() for one in (batches, others, batches, others)))
        held = [claim for claim in claims if claim]
        assert sorted(claim.batch_id for claim in held) == ["batch_1", "batch_2"]
        for claim in held:
            for one in (batches, others):
                await one.release(claim)  # that of the other does nothing
        assert await batches.claim_due() == BatchClaim("batch_1", 2)
    finally:
        await second.aclose()


async def test_a_keeper_that_froze_writes_nothing_more(batches: BatchStore, store_url: str, store: RunStore) -> None:
    await batches.create(batch())
    batches.lease_s = 0.1
    frozen = await batches.claim_due()
    assert frozen is not None
    await asyncio.sleep(0.2)
    second = await other(store_url)
    try:
        taken = await BatchStore(second).claim_due()
        assert taken == BatchClaim("batch_1", 2)
        for late in (
            batches.expand(frozen, lines(1)),
            batches.start(frozen, 1),
            batches.fail(frozen, []),
            batches.renew(frozen),
            batches.expire(frozen),
            batches.finalize(frozen),
            batches.end(frozen, "completed", output=None, error=None, completed=0, failed=0, usage=Spent()),
        ):
            with pytest.raises(BatchLost):
                await late
        await batches.release(frozen)
        await BatchStore(second).renew(taken)
        assert await store.runs_of_batch("batch_1") == []
    finally:
        await second.aclose()


async def test_a_batch_is_due_when_its_runs_have_ended_or_its_window_is_over(
    batches: BatchStore, store: RunStore
) -> None:
    await begun(batches, 2)
    assert await batches.claim_due() is None
    for claim in await store.claim_lost(9, ["m"]):
        assert await batches.claim_due() is None
        await store.finish(claim, "finished")
    claim = await batches.claim_due()
    assert claim is not None
    await batches.release(claim, pause_s=60)
    await batches.create(batch("batch_2", expires_at=time.time() - 1))
    due = await batches.claim_due()
    assert due is not None
    await batches.expand(due, lines(1, "batch_2"))
    await batches.start(due, 1)
    await batches.release(due)
    assert await batches.claim_due() == BatchClaim("batch_2", 2)


async def test_a_batch_that_fails_says_why(batches: BatchStore) -> None:
    await batches.create(batch())
    claim = await batches.claim_due()
    assert claim is not None
    errors = (LineError("invalid_json", "no", 3), LineError("x", "y", None, "url"))
    await batches.fail(claim, errors)
    found = await batches.get("batch_1")
    assert found is not None
    assert (found.status, found.errors) == ("failed", errors)
    assert found.failed_at is not None
    assert await batches.claim_due() is None


async def test_a_batch_that_is_cancelled_is_expanded_no_further_and_its_runs_are_ended(
    batches: BatchStore, store: RunStore
) -> None:
    await batches.create(batch())
    claim = await batches.claim_due()
    assert claim is not None
    await batches.expand(claim, lines(600))
    (mine,) = await store.claim_lost(1, ["m"])
    cancelling = await batches.request_cancel("batch_1")
    assert cancelling is not None
    assert cancelling.status == "cancelling"
    assert await batches.request_cancel("batch_1") == cancelling
    with pytest.raises(BatchLost):
        await batches.expand(claim, lines(601))
    assert await batches.cut("batch_1", b'{"error": 1}') == 1
    assert (await store.renew([mine])).cancelled == (mine,)
    await store.finish(mine, "finished")
    assert await batches.cut("batch_1", b'{"error": 1}') == 0
    assert await batches.counts(["batch_1"]) == {"batch_1": Counts(0, 0, 1, 599)}
    assert (await store.runs_of_batch("batch_1"))[1].error == b'{"error": 1}'
    assert await store.claim_lost(9, ["m"]) == []
    assert await batches.request_cancel("batch_none") is None


async def test_a_run_that_is_cut_is_fenced(batches: BatchStore, store: RunStore) -> None:
    await begun(batches, 1)
    store.lease_s = 0.05
    (mine,) = await store.claim_lost(1, ["m"])
    await asyncio.sleep(0.15)
    assert await batches.cut("batch_1", b"{}") == 0
    with pytest.raises(Fenced):
        await store.finish(mine, "finished")


async def test_a_batch_ends_once_and_its_files_are_there_at_that_moment(
    batches: BatchStore, files: FileStore, store: RunStore
) -> None:
    await begun(batches, 1)
    (run,) = await store.claim_lost(1, ["m"])
    await store.finish(run, "finished")
    claim = await batches.claim_due()
    assert claim is not None
    await batches.finalize(claim)
    writing = await files.begin("out", "batch_output", 1.0, None)
    await writing.write(b"line\n")
    await writing.flush()
    assert await files.list_files() == []
    written, spent = Written(writing.file_id, writing.bytes), Spent(1, 2, 3, 4)
    await batches.end(claim, "completed", output=written, error=None, completed=1, failed=0, usage=spent + spent)
    assert await content(files, writing.file_id) == b"line\n"
    found = await batches.get("batch_1")
    assert found is not None
    assert (found.status, found.output_file_id, found.error_file_id) == ("completed", writing.file_id, None)
    assert (found.completed, found.failed, found.usage) == (1, 0, Spent(2, 4, 6, 8))
    assert found.finalizing_at is not None
    assert found.completed_at is not None
    with pytest.raises(BatchLost):
        await batches.end(claim, "completed", output=None, error=None, completed=1, failed=0, usage=spent)
    cancelled = await batches.request_cancel("batch_1")
    assert cancelled is not None
    assert cancelled.status == "completed"


async def test_runs_for_whom_somebody_waits_are_taken_before_those_of_batches(
    batches: BatchStore, store: RunStore
) -> None:
    await begun(batches, 5, "batch_2")
    await begun(batches, 1, "batch_3")
    for name in ("a", "b"):
        await store.release(await store.create(NewRun(name, "response", b"{}", "m", created_at=9e9)))
    assert [claim.run_id for claim in await store.claim_lost(1, ["m"], 0)] == ["a"]
    assert [claim.run_id for claim in await store.claim_lost(2, ["m"])] == ["b", "run_batch_2_00001"]
    assert [claim.run_id for claim in await store.claim_lost(9, ["m"], 2)] == ["run_batch_2_00002", "run_batch_2_00003"]
    assert await store.claim_lost(9, ["m"], 0) == []
    assert [claim.run_id for claim in await store.claim_lost(0, ["m"], 1)] == ["run_batch_2_00004"]
    assert [claim.run_id for claim in await store.claim_lost(9, ["m"])] == ["run_batch_2_00005", "run_batch_3_00001"]


async def test_runs_of_a_batch_that_goes_on_are_not_pruned(batches: BatchStore, store: RunStore) -> None:
    await begun(batches, 1)
    (run,) = await store.claim_lost(1, ["m"])
    await store.finish(run, "finished")
    await asyncio.sleep(0.02)
    assert await store.prune(runs_older_than_s=0.01) == (0, 0, 0)
    claim = await batches.claim_due()
    assert claim is not None
    await batches.end(claim, "completed", output=None, error=None, completed=1, failed=0, usage=Spent())
    assert await store.prune(runs_older_than_s=0.01) == (1, 0, 0)


@pytest.fixture
async def before(request: pytest.FixtureRequest, store_url: str) -> AsyncIterator[tuple[Database, str]]:
    """A database as the first version left it."""
    if store_url.startswith("sqlite"):
        Path(store_url.removeprefix("sqlite:///")).parent.mkdir()
    else:
        server = request.getfixturevalue("postgres")
        store_url = server.url(server.make())
    database = Database(store_url)

    def first(connection: Connection) -> None:
        config = migrations._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(
            text(
                "INSERT INTO runs (run_id, kind, status, model, priority, background, created_at, body_digest, body,"
                " metadata, events, fence, lease_until, cancel_requested) VALUES ('old', 'response', 'running', 'm', 1,"
                " :no, 1.0, :empty, :empty, '{}', 0, 1, 0.0, :no)"
            ),
            {"no": False, "empty": b""},
        )

    async with database.writing() as connection:
        await connection.run_sync(first)
    yield database, store_url
    await database.aclose()


async def test_a_store_of_the_first_version_is_upgraded_with_its_runs(before: tuple[Database, str]) -> None:
    database, url = before
    await database.upgrade()
    assert await database.current() == migrations.HEAD
    store = await other(url)
    try:
        found = await store.get("old")
        assert found is not None
        assert (found.batch_id, found.batch_line, found.custom_id) == (None, None, None)
        assert [claim.run_id for claim in await store.claim_lost(9, ["m"])] == ["old"]
    finally:
        await store.aclose()
