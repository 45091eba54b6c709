"""Lines become runs and runs become lines, each once, whatever breaks in between; on both stores."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mrsa_server.api.errors import ApiError, BadRequest, EngineFailed
from mrsa_server.runs import batch_keeper, batch_lines
from mrsa_server.runs.batch_keeper import BatchKeeper
from mrsa_server.runs.batch_lines import LineReader, Validation
from mrsa_server.runs.batch_store import BatchStore, Counts, LineError, NewBatch, StoredBatch
from mrsa_server.runs.file_store import FileStore, StoredFile
from mrsa_server.runs.record import Spent
from mrsa_server.runs.requests import Answered, Checked, Requests
from mrsa_server.runs.store import Entry, RunStore, StoredRun
from mrsa_server.runs.store_errors import StoreUnavailable

CHAT = "/v1/chat/completions"
MOST = 1000


@given(st.lists(st.binary(max_size=40) | st.just(b"\n") | st.just(b"\r\n\r\n")), st.booleans())
@example([b"\xef\xbb\xbf{}\n"], True)
@example([b"x" * 30_000, b"y\nz"], False)
def test_lines_are_the_same_wherever_a_file_is_cut(pieces: list[bytes], ended: bool) -> None:
    data = b"".join(pieces) + (b"\n" if ended else b"")
    reader = LineReader(MOST)
    found = [line for piece in (*pieces, b"\n" if ended else b"") for line in reader.feed(piece)] + reader.end()
    whole = [line.strip() for line in data.split(b"\n")]
    whole[0] = whole[0].removeprefix(b"\xef\xbb\xbf")
    expected = [(number, line if len(line) < 17_000 else None) for number, line in enumerate(whole, 1) if line]
    assert found == expected


def line(number: int, **fields: Any) -> dict[str, Any]:
    return {"custom_id": f"id {number}", "method": "POST", "url": CHAT, "body": {"number": number}} | fields


def jsonl(*found: object) -> bytes:
    return b"".join(one if isinstance(one, bytes) else orjson.dumps(one) + b"\n" for one in found)


def errors_of(data: bytes) -> list[LineError]:
    reader, found = LineReader(MOST), Validation(CHAT, MOST)
    found.take([*reader.feed(data), *reader.end()])
    found.end()
    return found.errors


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"{\n", "invalid_json_line", None),
        (b"\xff\n", "invalid_json_line", None),
        ([1], "invalid_json_line", None),
        ({"custom_id": "a"}, "missing_required_parameter", "method"),
        ({"method": "POST", "url": CHAT, "body": {}}, "missing_required_parameter", "custom_id"),
        (line(9, custom_id=7), "invalid_value", "custom_id"),
        (line(9, custom_id=""), "invalid_value", "custom_id"),
        (line(9, custom_id="a\0"), "invalid_value", "custom_id"),
        (line(9, custom_id="x" * 513), "invalid_value", "custom_id"),
        (line(1), "duplicate_custom_id", "custom_id"),
        (line(9, method="GET"), "invalid_method", "method"),
        (line(9, url="/v1/responses"), "invalid_url", "url"),
        (line(9, body="{}"), "invalid_value", "body"),
        (line(9, body={"x": "y" * MOST}), "line_too_long", "body"),
        (b'"' + b"x" * 30_000 + b'"\n', "line_too_long", "body"),
    ],
)
def test_a_line_that_is_no_request_is_named(bad: object, code: str, param: str | None) -> None:
    (error,) = errors_of(jsonl(line(1), b"\n", bad, line(2)))
    assert (error.code, error.param, error.line) == (code, param, 3)


def test_a_file_without_lines_or_with_too_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [error.code for error in errors_of(b"\n \n")] == ["empty_file"]
    monkeypatch.setattr(batch_lines, "MOST_LINES", 3)
    assert errors_of(jsonl(*map(line, range(3)))) == []
    assert [(error.code, error.line) for error in errors_of(jsonl(*map(line, range(9))))] == [("too_many_lines", 4)]
    assert len(errors_of(b"{\n" * 3)) == 3


def test_of_many_errors_a_hundred_are_told() -> None:
    assert len(errors_of(b"{\n" * 500)) == 100


async def check(endpoint: str, body: bytes) -> Checked:
    assert endpoint == CHAT
    if orjson.loads(body).get("bad"):
        return Checked("chat.completion", body, "m\0", error=BadRequest("bad: is bad", "bad"))
    return Checked("chat.completion", body, "m", "low")


async def ready() -> None:
    pass


async def answer(run: StoredRun) -> Answered:
    if run.error is not None:
        raise ApiError(400 if run.status == "refused" else 502, None, orjson.loads(run.error)["error"]["message"])
    return Answered(orjson.dumps({"to": orjson.loads(run.body)}), Spent(1, 0, 2, 1))


class Site:
    """A store with a client's hand and a keeper's."""

    def __init__(self, store: RunStore) -> None:
        self.store, self.batches, self.files = store, BatchStore(store), FileStore(store)

    def keeper(self, answer: Callable[[StoredRun], Awaitable[Answered]] = answer) -> BatchKeeper:
        return BatchKeeper(self.store, self.batches, self.files, Requests(ready, check, answer, MOST), lambda: None)

    async def uploaded(self, data: bytes) -> StoredFile:
        writing = await self.files.begin("in.jsonl", "batch", time.time(), None)
        await writing.write(data)
        return await writing.close()

    async def created(self, data: bytes, window_s: float = 600, name: str = "batch_1") -> str:
        file = await self.uploaded(data)
        now = time.time()
        await self.batches.create(NewBatch(name, CHAT, file.file_id, "24h", now, now + window_s))
        return name

    async def until(self, *statuses: str, name: str = "batch_1") -> StoredBatch:
        async with asyncio.timeout(20):
            while True:
                found = await self.batches.get(name)
                assert found is not None
                if found.status in statuses:
                    return found
                await asyncio.sleep(0.02)

    async def work(self, most: int = 1000) -> int:
        """Answer runs as servers would."""
        claims = await self.store.claim_lost(most, ["m"])
        await self.store.write_many([Entry(claim, status="finished") for claim in claims])
        return len(claims)

    async def read(self, file_id: str | None) -> list[dict[str, Any]]:
        assert file_id is not None
        data = b"".join([piece async for piece in self.files.pieces(file_id)])
        return [orjson.loads(found) for found in data.splitlines()]


@pytest.fixture
def site(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(batch_keeper, "_POLL_S", 0.02)
    monkeypatch.setattr(batch_keeper, "_AFTER_ERROR_S", 0.1)
    return Site(store)


@asynccontextmanager
async def kept(*keepers: BatchKeeper) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(keeper.run()) for keeper in keepers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_lines_become_runs_and_runs_become_lines_in_their_order(site: Site) -> None:
    await site.created(jsonl(*(line(number, body={"number": number, "bad": number == 3}) for number in range(1, 501))))
    async with kept(site.keeper()):
        begun = await site.until("in_progress")
        assert begun.total == 500
        assert begun.in_progress_at is not None
        runs = await site.store.runs_of_batch("batch_1", limit=1000)
        assert [run.custom_id for run in runs] == [f"id {number}" for number in range(1, 501)]
        assert all(run.background and run.kind == "chat.completion" for run in runs)
        assert (runs[2].status, runs[2].model, runs[0].effort) == ("refused", "m\ufffd", "low")
        priorities = [run.priority for run in runs]
        assert priorities == sorted(set(priorities))
        assert time.time() * 1000 < priorities[0]
        assert priorities[-1] * 4096 < 2**53
        while await site.work():
            pass
        done = await site.until("completed")
    assert (done.completed, done.failed, done.total) == (499, 1, 500)
    assert done.usage == Spent(499, 0, 998, 499)
    assert done.finalizing_at is not None
    output, failed = await site.read(done.output_file_id), await site.read(done.error_file_id)
    assert [found["custom_id"] for found in output] == [f"id {number}" for number in range(1, 501) if number != 3]
    assert output[0] == {
        "id": "batch_req_1_00001",
        "custom_id": "id 1",
        "response": {
            "status_code": 200,
            "request_id": "run_1_00001",
            "body": {"to": {"number": 1, "bad": False}},
        },
        "error": None,
    }
    assert failed == [
        {
            "id": "batch_req_1_00003",
            "custom_id": "id 3",
            "response": {
                "status_code": 400,
                "request_id": "run_1_00003",
                "body": BadRequest("bad: is bad", code=None).body(),
            },
            "error": None,
        }
    ]
    assert {file.purpose for file in await site.files.list_files()} == {"batch", "batch_output"}


async def test_a_batch_without_answers_has_no_output_file(site: Site) -> None:
    await site.created(jsonl(line(1, body={"bad": True})))
    async with kept(site.keeper()):
        done = await site.until("completed")
    assert done.output_file_id is None
    assert len(await site.read(done.error_file_id)) == 1


async def test_a_batch_with_bad_lines_fails_and_begins_nothing(site: Site) -> None:
    await site.created(jsonl(line(1), line(2, url="/v1/embeddings")))
    async with kept(site.keeper()):
        failed = await site.until("failed")
    assert [(error.line, error.param) for error in failed.errors] == [(2, "url")]
    assert await site.batches.counts(["batch_1"]) == {}


async def test_a_batch_whose_file_is_gone_fails(site: Site) -> None:
    await site.created(jsonl(line(1)))
    (file,) = await site.files.list_files()
    await site.files.delete(file.file_id)
    async with kept(site.keeper()):
        failed = await site.until("failed")
    assert failed.errors[0].code == "input_file_missing"


async def test_a_batch_that_is_cancelled_tells_what_it_has(site: Site) -> None:
    await site.created(jsonl(*map(line, range(1, 31))))
    async with kept(site.keeper()):
        await site.until("in_progress")
        assert await site.work(10) == 10
        (held,) = await site.store.claim_lost(1, ["m"])
        await site.batches.request_cancel("batch_1")
        async with asyncio.timeout(10):
            while True:
                await asyncio.sleep(0.02)
                if (await site.store.renew([held])).cancelled:
                    break
        await site.until("cancelling")
        await site.store.finish(held, "cancelled", error=b'{"error": {"message": "x"}}')
        done = await site.until("cancelled")
    assert (done.completed, done.failed, done.total) == (10, 20, 30)
    assert done.cancelled_at is not None
    failed = await site.read(done.error_file_id)
    assert [found["custom_id"] for found in failed] == [f"id {number}" for number in range(11, 31)]
    assert {(found["response"], found["error"]["code"]) for found in failed} == {(None, "batch_cancelled")}


async def test_a_batch_whose_window_is_over_tells_what_it_has(site: Site) -> None:
    await site.created(jsonl(*map(line, range(1, 4))), window_s=0.5)
    async with kept(site.keeper()):
        await site.until("in_progress")
        assert await site.work(1) == 1
        done = await site.until("expired")
    assert (done.completed, done.failed) == (1, 2)
    assert {found["error"]["code"] for found in await site.read(done.error_file_id)} == {"batch_expired"}


async def test_two_keepers_do_nothing_twice(site: Site, store_url: str) -> None:
    names = [f"batch_{number}" for number in range(6)]
    for name in names:
        await site.created(jsonl(*map(line, range(1, 21))), name=name)
    second = RunStore(store_url, owner="second", lease_s=site.store.lease_s)
    await second.open()
    try:
        async with kept(site.keeper(), Site(second).keeper()):
            async with asyncio.timeout(20):
                while sum([counts.completed for counts in (await site.batches.counts(names)).values()]) < 120:
                    await site.work(7)
            for name in names:
                done = await site.until("completed", name=name)
                assert len(await site.read(done.output_file_id)) == 20
    finally:
        await second.aclose()
    assert len(await site.files.list_files("batch_output")) == 6


@pytest.mark.parametrize("writes", range(0, 9, 2))
async def test_a_keeper_that_is_killed_anywhere_is_followed_by_another(
    site: Site, writes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After so many of its transactions; the next one never comes, nor does it give anything back."""
    await site.created(jsonl(*map(line, range(1, 701))))
    real = type(site.store.database).writing
    left, dead = writes, asyncio.Event()
    monkeypatch.setattr(batch_keeper, "_AT_ONCE", 1)

    def writing(database: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            dead.set()
            raise StoreUnavailable("it was killed")
        return real(database)

    async def killed(within_s: float) -> None:
        nonlocal left
        left = writes + 1
        dead.clear()
        keeper = site.keeper()
        with monkeypatch.context() as patch:
            patch.setattr(type(site.store.database), "writing", writing)
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s), kept(keeper):
                    await dead.wait()

    await killed(5)
    async with kept(site.keeper()):
        await site.until("in_progress")
    assert await site.batches.counts(["batch_1"]) == {"batch_1": Counts(700, 0, 0, 0)}
    while await site.work():
        pass
    await killed(5)
    async with kept(site.keeper()):
        done = await site.until("completed")
    output = await site.read(done.output_file_id)
    assert [found["custom_id"] for found in output] == [f"id {number}" for number in range(1, 701)]
    assert len(await site.files.list_files("batch_output")) == 1


async def test_a_line_that_cannot_be_told_is_an_error_and_a_store_that_is_away_is_waited_for(site: Site) -> None:
    away = 3

    async def odd(run: StoredRun) -> Answered:
        nonlocal away
        if run.batch_line == 1:
            raise RuntimeError("broken")
        if run.batch_line == 2:
            raise EngineFailed("it failed")
        if run.batch_line == 3 and away:
            away -= 1
            raise StoreUnavailable("for a moment")
        return await answer(run)

    await site.created(jsonl(*map(line, range(1, 5))))
    async with kept(site.keeper(odd)):
        await site.until("in_progress")
        await site.work()
        done = await site.until("completed")
    assert not away
    failed = await site.read(done.error_file_id)
    assert [found["response"]["status_code"] for found in failed] == [500, 502]
    assert len(await site.read(done.output_file_id)) == 2
    assert len(await site.files.list_files("batch_output")) == 2
