"""Batches as OpenAI's own client makes them, and over servers that are killed at random."""

from __future__ import annotations

import asyncio
import io
import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from mrsa_server.runs import tables
from mrsa_server.runs.batch_store import BatchStore
from mrsa_server.runs.store import RunStore
from tests.helpers.processes import Replica, wait_ready
from tests.helpers.replicas import check_log, log_of, upgrade
from tests.helpers.serving import CHAT, RESPONSES, ask

pytestmark = pytest.mark.e2e

BATCHES = 4
LINES = 120
KILLS = 8
LEASE_S = 1.0
SIZES = {"population": 4, "rounds": 1, "set_size": 2, "tail_tokens": 64, "rollout_tokens": 400, "final_tokens": 400}


def jsonl(count: int, url: str = CHAT) -> bytes:
    body: dict[str, Any] = {"model": "scripted-mrsa", "input": "?", "mrsa": SIZES}
    return b"".join(
        orjson.dumps(
            {
                "custom_id": f"line {number}",
                "method": "POST",
                "url": url,
                "body": ask(mrsa={**SIZES, "seed": number}) if url == CHAT else body,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
        for number in range(count)
    )


@pytest.fixture
def client(scripted_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=scripted_url, api_key="none", max_retries=0)


def until_ended(client: openai.OpenAI, batch_id: str) -> openai.types.Batch:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch
        time.sleep(0.1)
    raise AssertionError("it does not end")


@pytest.mark.parametrize("endpoint", [CHAT, RESPONSES])
def test_the_official_client_makes_a_batch_and_reads_its_results(
    client: openai.OpenAI, tmp_path: Path, endpoint: Any
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(jsonl(5, endpoint))
    with path.open("rb") as source:
        file = client.files.create(
            file=source, purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
        )
    assert (file.filename, file.purpose, file.bytes) == ("requests.jsonl", "batch", path.stat().st_size)
    assert file.expires_at == file.created_at + 7200
    assert client.files.wait_for_processing(file.id).status == "processed"
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,
        completion_window="24h",
        metadata={"which": "first"},
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert batch.status == "validating"
    done = until_ended(client, batch.id)
    assert done.status == "completed"
    assert done.metadata == {"which": "first"}
    assert done.model == "scripted-mrsa"
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (5, 5, 0)
    assert done.usage is not None
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens > 0
    assert done.error_file_id is None
    assert done.output_file_id is not None
    output = client.files.retrieve(done.output_file_id)
    assert output.purpose == "batch_output"
    assert output.expires_at is not None
    content = client.files.content(done.output_file_id)
    assert len(content.content) == output.bytes
    for number, text in enumerate(content.text.splitlines()):
        line = orjson.loads(text)
        assert line["custom_id"] == f"line {number}"
        if endpoint == CHAT:
            answer = openai.types.chat.ChatCompletion.model_validate(line["response"]["body"])
            assert answer.choices[0].message.content
        else:
            assert openai.types.responses.Response.construct(**line["response"]["body"]).output_text
    assert done.output_file_id in {found.id for found in client.files.list(purpose="batch_output")}
    assert file.id in {found.id for found in client.files.list(limit=1, order="asc")}
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_the_official_client_lists_and_cancels_batches(client: openai.OpenAI) -> None:
    file = client.files.create(file=("many.jsonl", io.BytesIO(jsonl(1000))), purpose="batch")
    first, second = (
        client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h") for _ in range(2)
    )
    assert [found.id for found in client.batches.list(limit=1).data] == [second.id]
    assert first.id in {found.id for found in client.batches.list(limit=1)}, "it reads on by itself"
    for batch in (first, second):
        assert client.batches.cancel(batch.id).status == "cancelling"
    for batch in (first, second):
        assert until_ended(client, batch.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
    assert caught.value.param == "input_file_id"


async def asked(replicas: list[Replica], stream: random.Random, method: str, path: str, **what: Any) -> httpx.Response:
    """Of one server after the other, until one answers."""
    async with httpx.AsyncClient(timeout=60) as client:
        for _ in range(400):
            with suppress(httpx.TransportError):
                response = await client.request(method, stream.choice(replicas).url + path, **what)
                if response.status_code == 200:
                    return response
                assert response.status_code == 503, response.text
            await asyncio.sleep(0.1)
    raise AssertionError("no server answers")


async def chaos(store_url: str, count: int, seed: int) -> None:
    stream = random.Random(seed)
    replicas = [Replica(store_url, LEASE_S, "--max-batch-runs", "8") for _ in range(count)]
    store = RunStore(store_url, owner="test", lease_s=LEASE_S)
    try:
        for replica in replicas:
            await asyncio.to_thread(wait_ready, replica.url)
        await store.open()

        async def one(number: int) -> None:
            await asyncio.sleep(stream.random() * 4)
            file = await asked(
                replicas, stream, "POST", "/v1/files", files={"file": jsonl(LINES)}, data={"purpose": "batch"}
            )
            body = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "1h"}
            key = {"idempotency-key": f"batch {number}"}
            made = (await asked(replicas, stream, "POST", "/v1/batches", json=body, headers=key)).json()
            while made["status"] != "completed":
                await asyncio.sleep(0.2)
                made = (await asked(replicas, stream, "GET", f"/v1/batches/{made['id']}")).json()
                assert made["status"] in ("validating", "in_progress", "finalizing", "completed"), made
            assert made["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
            assert made["error_file_id"] is None
            content = await asked(replicas, stream, "GET", f"/v1/files/{made['output_file_id']}/content")
            ids = [orjson.loads(line)["custom_id"] for line in content.content.splitlines()]
            assert ids == [f"line {line}" for line in range(LINES)]
            for run in await store.runs_of_batch(made["id"], limit=LINES + 1):
                check_log(await log_of(store, run.run_id))

        async def kill() -> None:
            for _ in range(KILLS):
                await asyncio.sleep(0.2 + stream.random() * 2)
                victim = stream.choice(replicas)
                victim.kill()
                await asyncio.sleep(stream.random() * 0.5)
                victim.start()

        async with asyncio.timeout(240), asyncio.TaskGroup() as tasks:
            tasks.create_task(kill())
            for number in range(BATCHES):
                tasks.create_task(one(number))
        files = (await asked(replicas, stream, "GET", "/v1/files?purpose=batch_output")).json()["data"]
        batches = (await asked(replicas, stream, "GET", "/v1/batches")).json()["data"]
        assert len(files) == len(batches) == BATCHES, "nothing is there twice"
    finally:
        for replica in replicas:
            replica.process.kill()
            replica.process.wait()
        await store.aclose()


def test_batches_outlive_servers_that_are_killed_at_random(store_url: str) -> None:
    """Two replicas on one Postgres; on SQLite one process that comes back."""
    asyncio.run(upgrade(store_url))
    asyncio.run(chaos(store_url, 1 if store_url.startswith("sqlite") else 2, seed=2))


async def killed_in_each_step(store_url: str, lines: int) -> None:
    replica = Replica(store_url, LEASE_S, "--max-batch-runs", "1")
    store = RunStore(store_url, owner="test", lease_s=LEASE_S)
    batches = BatchStore(store)
    try:
        await asyncio.to_thread(wait_ready, replica.url)
        await store.open()
        file = (
            await asked([replica], random.Random(1), "POST", "/v1/files", files={"file": jsonl(lines)}, data=_FORM)
        ).json()
        body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "1h"}
        made = (await asked([replica], random.Random(1), "POST", "/v1/batches", json=body)).json()

        async def count() -> int:
            found = (await batches.counts([made["id"]])).get(made["id"])
            return 0 if found is None else found.queued + found.running + found.completed + found.failed

        async def until(reached: Any) -> None:
            async with asyncio.timeout(60):
                while True:
                    if await reached():
                        return
                    await asyncio.sleep(0.002)

        async def some() -> bool:
            return await count() > 0

        async def begun() -> bool:
            return (await batch()).status == "in_progress"

        async def writing() -> bool:
            half = tables.files.select().where(tables.files.c.status == "uploading")
            async with store.database.reading() as connection:
                return (await connection.execute(half)).first() is not None

        async def over() -> bool:
            return (await batch()).status == "cancelled"

        async def batch() -> Any:
            return await batches.get(made["id"])

        await until(some)
        replica.kill()
        assert (await batch()).status == "validating"
        assert 0 < await count() < lines, "it was killed in the middle"
        replica.start()
        await until(begun)
        assert await count() == (await batch()).total == lines
        await asked([replica], random.Random(1), "POST", f"/v1/batches/{made['id']}/cancel")
        await until(writing)
        replica.kill()
        assert (await batch()).status == "cancelling"
        replica.start()
        await until(over)
        found: list[str] = []
        listed = (await asked([replica], random.Random(1), "GET", "/v1/files?purpose=batch_output")).json()["data"]
        for file in listed:
            content = await asked([replica], random.Random(1), "GET", f"/v1/files/{file['id']}/content")
            found += [orjson.loads(line)["custom_id"] for line in content.content.splitlines()]
        assert sorted(found) == sorted(f"line {line}" for line in range(lines))
    finally:
        replica.process.kill()
        replica.process.wait()
        await store.aclose()


_FORM = {"purpose": "batch"}


def test_a_server_that_is_killed_in_each_step_of_a_batch_goes_on_with_it(store_url: str) -> None:
    asyncio.run(upgrade(store_url))
    asyncio.run(killed_in_each_step(store_url, lines=6_000))
