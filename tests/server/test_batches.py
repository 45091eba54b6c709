"""`/v1/files` and `/v1/batches` of a server with the scripted engine, on both stores."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest

from harness.scripted import Script, ScriptedEngine, Speed
from mrsa_server.runs import batch_keeper
from mrsa_server.runs.file_store import FileStore
from mrsa_server.runs.store import RunStore
from tests.helpers.replicas import SIZES, check_log, log_of, replica, slow
from tests.helpers.serving import CHAT, RESPONSES, ask, in_memory

FORM = {"purpose": "batch"}


def line(number: int, url: str = CHAT, **body: Any) -> dict[str, Any]:
    if url == CHAT:
        body = ask(mrsa=SIZES, seed=number) | body
    else:
        body = {"model": "scripted-mrsa", "input": "What is six times seven?", "mrsa": {**SIZES, "seed": number}} | body
    return {"custom_id": f"id {number}", "method": "POST", "url": url, "body": body}


def jsonl(*lines: object) -> bytes:
    return b"".join(orjson.dumps(one) + b"\n" for one in lines)


async def upload(client: httpx.AsyncClient, data: bytes, **fields: str) -> httpx.Response:
    return await client.post("/v1/files", files={"file": ("in.jsonl", data)}, data=FORM | fields)


async def begin(client: httpx.AsyncClient, data: bytes, **fields: Any) -> dict[str, Any]:
    file = (await upload(client, data)).json()
    body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"} | fields
    response = await client.post("/v1/batches", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


async def until(client: httpx.AsyncClient, batch: dict[str, Any], *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(40):
        while True:
            found: dict[str, Any] = (await client.get(f"/v1/batches/{batch['id']}")).json()
            if found["status"] in statuses:
                return found
            await asyncio.sleep(0.05)


async def content(client: httpx.AsyncClient, file_id: str) -> list[dict[str, Any]]:
    response = await client.get(f"/v1/files/{file_id}/content")
    assert response.status_code == 200
    return [orjson.loads(found) for found in response.content.splitlines()]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_keeper, "_POLL_S", 0.05)


@pytest.fixture
async def client(store: RunStore, store_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with replica(ScriptedEngine(), store_url) as found:
        yield found


async def test_a_batch_of_chats_is_answered_as_its_lines_would_be(client: httpx.AsyncClient, store: RunStore) -> None:
    lines = [line(number) for number in range(1, 8)]
    lines[2]["body"]["stream"] = True
    lines[3]["body"]["model"] = "gpt-6"
    lines[4]["body"]["mrsa"] = {"population": 9999}
    lines[5]["body"]["messages"] = []
    batch = await begin(client, jsonl(*lines), metadata={"a": "b"})
    assert batch["object"] == "batch"
    assert batch["status"] == "validating"
    assert batch["expires_at"] - batch["created_at"] == 86_400
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    done = await until(client, batch, "completed")
    assert done["request_counts"] == {"total": 7, "completed": 3, "failed": 4}
    assert done["metadata"] == {"a": "b"}
    assert done["created_at"] <= done["in_progress_at"] <= done["finalizing_at"] <= done["completed_at"]
    output = await content(client, done["output_file_id"])
    assert [one["custom_id"] for one in output] == ["id 1", "id 2", "id 7"]
    for one, sent in zip(output, (lines[0], lines[1], lines[6]), strict=True):
        assert (one["error"], one["response"]["status_code"]) == (None, 200)
        body = one["response"]["body"]
        alone = (await client.post(CHAT, json=sent["body"])).json()
        assert body["choices"] == alone["choices"]
        assert body["usage"] == alone["usage"]
        assert body["mrsa"]["params"] == alone["mrsa"]["params"]
        run = await store.get(one["response"]["request_id"])
        assert run is not None
        assert (run.batch_id, run.custom_id, run.background) == (batch["id"], one["custom_id"], True)
        state = check_log(await log_of(store, run.run_id))
        assert state.started.priority == run.priority > time.time() * 1000 + 1e10
    assert done["usage"]["output_tokens"] == sum(
        one["response"]["body"]["usage"]["completion_tokens"] for one in output
    )
    failed = await content(client, done["error_file_id"])
    told = [(one["custom_id"], one["response"]["status_code"]) for one in failed]
    assert told == [("id 3", 400), ("id 4", 404), ("id 5", 400), ("id 6", 400)]
    for one, sent in zip(failed[1:], lines[3:6], strict=True):
        alone = await client.post(CHAT, json=sent["body"])
        assert one["response"]["body"] == alone.json()
        assert alone.status_code == one["response"]["status_code"]
    assert failed[0]["response"]["body"]["error"]["param"] == "stream"


async def test_a_batch_of_responses_is_answered_as_its_lines_would_be(client: httpx.AsyncClient) -> None:
    first = (await client.post(RESPONSES, json=line(0, RESPONSES)["body"])).json()
    lines = [
        line(1, RESPONSES),
        line(2, RESPONSES, previous_response_id=first["id"]),
        line(3, RESPONSES, previous_response_id="resp_none"),
    ]
    batch = await begin(client, jsonl(*lines), endpoint=RESPONSES, completion_window="7d")
    done = await until(client, batch, "completed")
    assert done["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    output = [one["response"]["body"] for one in await content(client, done["output_file_id"])]
    for body, sent in zip(output, lines, strict=False):
        alone = (await client.post(RESPONSES, json=sent["body"])).json()
        assert body["object"] == "response"
        assert body["status"] == alone["status"] == "completed"
        assert [item.get("content") for item in body["output"]] == [item.get("content") for item in alone["output"]]
        assert (await client.get(f"/v1/responses/{body['id']}")).json()["output"] == body["output"]
    (failed,) = await content(client, done["error_file_id"])
    assert failed["response"]["body"]["error"]["code"] == "previous_response_not_found"


async def test_runs_of_a_batch_are_listed_with_it(client: httpx.AsyncClient) -> None:
    await client.post(CHAT, json=ask(mrsa=SIZES))
    batch = await begin(client, jsonl(*map(line, range(3))))
    await until(client, batch, "completed")
    found = (await client.get("/v1/runs", params={"batch": batch["id"]})).json()["data"]
    assert {run["custom_id"] for run in found} == {"id 0", "id 1", "id 2"}
    assert {run["batch_id"] for run in found} == {batch["id"]}
    assert len((await client.get("/v1/runs")).json()["data"]) == 4
    assert (await client.get("/v1/runs", params={"batch": "a\0"})).json()["error"]["param"] == "batch"


async def test_more_lines_than_places_are_answered_a_few_at_a_time(store: RunStore, store_url: str) -> None:
    engine, most = slow(0.0005), 0
    async with replica(engine, store_url, max_batch_runs=3) as client:
        batch = await begin(client, jsonl(*map(line, range(20))))
        runner = client.app.state.runner  # type: ignore[attr-defined]
        began = time.monotonic()
        while (found := await until(client, batch, "validating", "in_progress", "finalizing", "completed"))[
            "status"
        ] != "completed":
            most = max(most, found["mrsa"]["running"], runner._batch_runs)
        assert time.monotonic() - began < 20
    assert most == 3
    assert len(await store.runs_of_batch(batch["id"])) == 20


async def test_a_run_for_which_somebody_waits_has_a_place_beside_a_batch(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.01), store_url, max_batch_runs=8, max_runs=1, max_queued=0) as client:
        batch = await begin(client, jsonl(*map(line, range(40))))
        await until(client, batch, "in_progress")
        async with asyncio.timeout(20):
            while True:
                await asyncio.sleep(0.01)
                if client.app.state.runner._batch_runs == 8:  # type: ignore[attr-defined]
                    break
        response = await client.post(CHAT, json=ask(mrsa=SIZES))
        assert response.status_code == 200
        assert (await until(client, batch, "in_progress"))["request_counts"]["completed"] < 40


async def test_a_deadline_of_a_line_begins_with_its_turn(store: RunStore, store_url: str) -> None:
    engine = ScriptedEngine(lambda request: Script("x" * 40, "\\boxed{42}"), speed=Speed(0.002), chunk_tokens=10)
    async with replica(engine, store_url, max_batch_runs=1) as client:
        lines = [line(number, mrsa={**SIZES, "deadline_s": 1.5}) for number in range(6)]
        done = await until(client, await begin(client, jsonl(*lines)), "completed")
        assert done["request_counts"]["completed"] == 6
        for one in await content(client, done["output_file_id"]):
            assert one["response"]["body"]["mrsa"]["stopped"] is None


async def test_a_line_may_take_longer_than_a_client_waits_for_its_first_byte(client: httpx.AsyncClient) -> None:
    client.app.state.runner.tokens_per_s = 0.001  # type: ignore[attr-defined]
    alone = await client.post(CHAT, json=line(1)["body"])
    assert alone.json()["error"]["code"] == "stream_required"
    done = await until(client, await begin(client, jsonl(line(1))), "completed")
    assert done["request_counts"]["completed"] == 1


async def test_a_run_of_a_batch_that_is_cancelled_alone_is_an_error_of_its_line(
    store: RunStore, store_url: str
) -> None:
    async with replica(slow(0.02), store_url, max_batch_runs=1) as client:
        batch = await begin(client, jsonl(*map(line, range(3))))
        await until(client, batch, "in_progress")
        runs = (await client.get("/v1/runs", params={"batch": batch["id"]})).json()["data"]
        for run in runs:
            if run["custom_id"] != "id 1":
                await client.delete(f"/v1/runs/{run['id']}")
        done = await until(client, batch, "completed")
        assert done["request_counts"] == {"total": 3, "completed": 1, "failed": 2}
        failed = await content(client, done["error_file_id"])
        assert [one["custom_id"] for one in failed] == ["id 0", "id 2"]
        assert {one["response"]["body"]["error"]["code"] for one in failed} == {"run_cancelled"}


async def test_a_batch_is_cancelled(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.02), store_url, max_batch_runs=2) as client:
        batch = await begin(client, jsonl(*map(line, range(30))))
        await until(client, batch, "in_progress")
        await asyncio.sleep(0.5)
        response = await client.post(f"/v1/batches/{batch['id']}/cancel")
        assert response.json()["status"] == "cancelling"
        done = await until(client, batch, "cancelled")
        assert done["request_counts"]["total"] == 30
        failed = await content(client, done["error_file_id"])
        assert {one["error"]["code"] for one in failed} == {"batch_cancelled"}
        assert len(failed) == done["request_counts"]["failed"] >= 28
        again = await client.post(f"/v1/batches/{batch['id']}/cancel")
        assert again.json()["status"] == "cancelled"
    assert not [run for run in await store.list_runs(limit=50) if run.ended_at is None]


async def test_a_batch_that_has_ended_is_not_cancelled(client: httpx.AsyncClient) -> None:
    batch = await begin(client, jsonl(line(1)))
    await until(client, batch, "completed")
    response = await client.post(f"/v1/batches/{batch['id']}/cancel")
    assert (response.status_code, response.json()["error"]["code"]) == (409, "batch_ended")
    assert response.headers["x-should-retry"] == "false"


async def test_a_batch_with_bad_lines_says_which(client: httpx.AsyncClient) -> None:
    batch = await begin(client, jsonl(line(1), line(1), line(2, RESPONSES)) + b"{\n")
    failed = await until(client, batch, "failed")
    assert failed["errors"]["object"] == "list"
    assert [(error["line"], error["code"]) for error in failed["errors"]["data"]] == [
        (2, "duplicate_custom_id"),
        (3, "invalid_url"),
        (4, "invalid_json_line"),
    ]
    assert failed["failed_at"] is not None
    assert failed["request_counts"] == {"total": 0, "completed": 0, "failed": 0}


async def test_a_key_of_idempotency_stands_for_one_batch(client: httpx.AsyncClient) -> None:
    file = (await upload(client, jsonl(line(1)))).json()
    body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    headers = {"idempotency-key": "k"}
    made = await asyncio.gather(*(client.post("/v1/batches", json=body, headers=headers) for _ in range(4)))
    assert len({response.json()["id"] for response in made}) == 1
    other = await client.post("/v1/batches", json=body | {"completion_window": "48h"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_key_in_use")
    assert len((await client.get("/v1/batches")).json()["data"]) == 1


async def test_batches_are_listed_in_pages(client: httpx.AsyncClient) -> None:
    ids = [(await begin(client, jsonl(line(number))))["id"] for number in range(3)][::-1]
    page = (await client.get("/v1/batches", params={"limit": 2})).json()
    assert [batch["id"] for batch in page["data"]] == ids[:2]
    assert page["has_more"]
    page = (await client.get("/v1/batches", params={"after": page["last_id"]})).json()
    assert [batch["id"] for batch in page["data"]] == ids[2:]
    assert not page["has_more"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"input_file_id": "a\0"}, "input_file_id"),
        ({"input_file_id": None}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "1w"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
        ({"unknown": 1}, "unknown"),
    ],
)
async def test_a_bad_batch_is_named(fields: dict[str, Any], param: str, store_url: str, store: RunStore) -> None:
    async with replica(ScriptedEngine(), store_url) as client:
        file = (await upload(client, jsonl(line(1)))).json()
        body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"} | fields
        response = await client.post("/v1/batches", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert response.json()["error"]["message"].startswith(param)


async def test_files_come_back_and_are_listed_and_deleted(client: httpx.AsyncClient) -> None:
    data = os.urandom(3 << 20)
    made = (await upload(client, data)).json()
    assert made["bytes"] == len(data)
    assert (made["object"], made["filename"], made["purpose"], made["status"]) == (
        "file",
        "in.jsonl",
        "batch",
        "processed",
    )
    assert made["expires_at"] - made["created_at"] == 30 * 86_400
    assert (await client.get(f"/v1/files/{made['id']}")).json() == made
    got = await client.get(f"/v1/files/{made['id']}/content")
    assert got.content == data
    assert got.headers["x-content-type-options"] == "nosniff"
    other = (
        await upload(client, b"", **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
    ).json()
    assert other["expires_at"] - other["created_at"] == 3600
    assert (await client.get(f"/v1/files/{other['id']}/content")).content == b""
    listed = (await client.get("/v1/files", params={"limit": 1})).json()
    assert (listed["data"], listed["has_more"]) == ([other], True)
    listed = (await client.get("/v1/files", params={"after": other["id"]})).json()
    assert (listed["data"], listed["has_more"]) == ([made], False)
    assert (await client.get("/v1/files", params={"order": "asc", "purpose": "batch"})).json()["data"] == [made, other]
    assert (await client.get("/v1/files", params={"purpose": "vision"})).json()["data"] == []
    deleted = await client.delete(f"/v1/files/{made['id']}")
    assert deleted.json() == {"id": made["id"], "object": "file", "deleted": True}
    for response in (
        await client.get(f"/v1/files/{made['id']}"),
        await client.get(f"/v1/files/{made['id']}/content"),
        await client.delete(f"/v1/files/{made['id']}"),
        await client.get("/v1/files/file-none"),
        await client.get("/v1/batches/batch_none"),
        await client.get("/v1/batches/x"),
        await client.post("/v1/batches/batch_none/cancel"),
    ):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "not_found"


async def test_a_bad_upload_is_named_and_leaves_nothing(store: RunStore, store_url: str) -> None:
    async with replica(ScriptedEngine(), store_url, max_file_bytes=100_000, body_timeout_s=0.5) as client:

        async def sent(status: int, param: str | None, **parts: Any) -> None:
            response = await client.post("/v1/files", **parts)
            assert response.status_code == status, response.text
            assert response.json()["error"]["param"] == param

        file = {"file": ("a", b"x")}
        await sent(400, "purpose", files=file)
        await sent(400, "purpose", files=file, data={"purpose": "vision"})
        await sent(400, "file", files={"file": (None, "x")}, data=FORM)
        await sent(400, "x", files=file, data=FORM | {"x": "1"})
        await sent(400, "file", files={"file": ("a" * 256, b"x")}, data=FORM)
        await sent(400, "expires_after.anchor", files=file, data=FORM | {"expires_after[seconds]": "3600"})
        bad = FORM | {"expires_after[anchor]": "created_at", "expires_after[seconds]": "1"}
        await sent(400, "expires_after.seconds", files=file, data=bad)
        await sent(400, None, files=[("file", ("a", b"x")), ("file", ("b", b"x"))], data=FORM)
        await sent(400, None, files=file, data={"purpose": "x" * 5000})
        await sent(400, None, json={})
        await sent(400, None, content=b"x", headers={"content-type": "multipart/form-data"})
        await sent(400, None, content=b"x", headers={"content-type": "multipart/form-data; boundary=b"})
        await sent(413, "file", files={"file": ("a", b"x" * 100_001)}, data=FORM)
        await sent(413, "file", files={"file": ("a", b"x" * 200_000)}, data=FORM)

        async def slowly() -> AsyncIterator[bytes]:
            yield b"--b\r\n"
            await asyncio.sleep(2)
            yield b"--b--"

        await sent(408, None, content=slowly(), headers={"content-type": "multipart/form-data; boundary=b"})
        assert (await upload(client, b"x" * 100_000)).status_code == 200
        assert len(await FileStore(store).list_files()) == 1


@pytest.mark.parametrize(
    ("query", "param"),
    [({"limit": "0"}, "limit"), ({"order": "x"}, "order"), ({"after": "x"}, "after"), ({"x": ""}, "x")],
)
async def test_a_bad_query_of_files_is_named(query: dict[str, str], param: str, store_url: str, store: Any) -> None:
    async with replica(ScriptedEngine(), store_url) as client:
        response = await client.get("/v1/files", params=query)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_without_a_store_there_are_no_files_and_no_batches() -> None:
    async with in_memory(ScriptedEngine()) as client:
        for response in (
            await upload(client, b"{}"),
            await client.get("/v1/files"),
            await client.get("/v1/files/file-1/content"),
            await client.get("/v1/batches"),
            await client.post("/v1/batches", json={}),
            await client.post("/v1/batches/batch_1/cancel"),
        ):
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "runs_not_stored"
            assert "--state-dir" in response.json()["error"]["message"]


async def test_two_replicas_share_the_work_of_a_batch(store: RunStore, store_url: str) -> None:
    async with (
        replica(slow(), store_url, max_batch_runs=4) as one,
        replica(slow(), store_url, max_batch_runs=4) as other,
    ):
        batch = await begin(one, jsonl(*map(line, range(30))))
        done = await until(other, batch, "completed")
        assert done["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
        output = await content(other, done["output_file_id"])
        assert [found["custom_id"] for found in output] == [f"id {number}" for number in range(30)]
        shares = [client.app.state.metrics.text() for client in (one, other)]  # type: ignore[attr-defined]
        counts = [text.decode().split('mrsa_runs_total{status="finished"} ')[-1].split("\n")[0] for text in shares]
        assert sum(map(float, counts)) == 30
        assert min(map(float, counts)) > 0
    for run in await store.runs_of_batch(batch["id"], limit=50):
        check_log(await log_of(store, run.run_id))


async def test_a_batch_goes_on_after_its_server(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.01), store_url, max_batch_runs=4) as client:
        batch = await begin(client, jsonl(*map(line, range(12))))
        await until(client, batch, "in_progress")
        await asyncio.sleep(0.5)
        await client.app.state.runner.drain(0)  # type: ignore[attr-defined]
    async with replica(slow(), store_url) as client:
        done = await until(client, batch, "completed")
        assert done["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
