"""Runs that outlive their server: two replicas on one store, in one process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import orjson
import pytest
from structlog.testing import capture_logs

from harness.events import (
    RunFinished,
)
from harness.markovian_rsa import replay
from harness.scripted import ScriptedEngine
from mrsa_server.runs import tables
from mrsa_server.runs.record import NewRun
from mrsa_server.runs.store import Claim, RunStore
from tests.helpers.postgres import Postgres
from tests.helpers.replicas import (
    LEASE_S,
    SIZES,
    TEMPLATES,
    check_log,
    log_of,
    only_run,
    replica,
    running,
    slow,
    stolen,
    until_ended,
)
from tests.helpers.serving import CHAT, ask, in_memory

MODEL = "scripted-mrsa"


async def test_a_run_is_written_down_and_its_log_gives_its_answer(store: RunStore, store_url: str) -> None:
    async with replica(ScriptedEngine(), store_url) as client:
        answer = (await client.post(CHAT, json=ask(mrsa=SIZES))).json()
        run_id = answer["mrsa"]["run_id"]
        run = await until_ended(store, run_id)
    assert run.status == "finished"
    assert run.kind == "chat.completion"
    assert run.owner is None
    state = check_log(await log_of(store, run_id))
    assert isinstance(state.outcome, RunFinished)
    assert state.rollouts[state.outcome.candidates[0]].answer == answer["choices"][0]["message"]["content"]
    assert state.usage.completion_tokens == answer["usage"]["completion_tokens"]
    traces = await store.traces(run_id)
    assert traces.keys() == state.rollouts.keys()


async def test_a_run_whose_client_leaves_is_cancelled_and_stays_so(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.01), store_url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask(mrsa=SIZES)))
        run_id = await only_run(store, events=3)
        client.app.state.runner._runs.copy().pop().cancel()  # type: ignore[attr-defined]  # as its last reader does
        run = await until_ended(store, run_id)
        asking.cancel()
    assert run.status == "cancelled"
    assert await store.claim_lost(9, [MODEL]) == []


async def test_a_server_that_leaves_hands_its_runs_on(store: RunStore, store_url: str) -> None:
    with capture_logs() as lines:
        async with replica(slow(0.02), store_url) as client:
            asking = asyncio.create_task(client.post(CHAT, json=ask(mrsa={**SIZES, "seed": 3})))
            run_id = await only_run(store, events=9)
            await client.app.state.runner.drain(0)  # type: ignore[attr-defined]
            response = await asking
            assert response.status_code == 503
            assert f"GET /v1/runs/{run_id}" in response.json()["error"]["message"]
            text = (await client.get("/metrics")).text
    handed_on = await store.get(run_id)
    assert [line["event"] for line in lines if line.get("run_id") == run_id] == ["run handed on"]
    assert "mrsa_runs_total{" not in text, "it has not ended"
    assert handed_on is not None
    assert handed_on.ended_at is None
    assert handed_on.owner is None
    before = await log_of(store, run_id)
    async with replica(slow(), store_url):
        run = await until_ended(store, run_id)
    assert run.status == "finished"
    after = await log_of(store, run_id)
    assert after[: len(before)] == before
    check_log(after)


async def test_a_server_that_freezes_is_fenced_and_its_run_ends_once(store: RunStore, store_url: str) -> None:
    with capture_logs() as lines:
        async with replica(slow(0.01), store_url) as frozen:
            asking = asyncio.create_task(frozen.post(CHAT, json=ask(mrsa={**SIZES, "seed": 3})))
            run_id = await only_run(store, events=8)
            (claim,) = frozen.app.state.runner._journal._books  # type: ignore[attr-defined]
            async with asyncio.timeout(20):
                taken = await stolen(store)
            assert taken.run_id == run_id
            response = await asking
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "run_taken_over"
            assert response.headers["x-should-retry"] == "false"
            assert claim.fence < taken.fence
            assert any(line["event"] == "run taken over" and line["run_id"] == run_id for line in lines)
            assert not any(line["event"] == "run cancelled" for line in lines)
            await store.release(taken)
            run = await until_ended(store, run_id)  # the same server may have it back
    assert run.status == "finished"
    check_log(await log_of(store, run_id))


async def test_what_is_claimed_while_a_server_leaves_is_left_to_others(
    store: RunStore, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claiming, leaving = asyncio.Event(), asyncio.Event()
    claim_lost = RunStore.claim_lost

    async def slowly(self: RunStore, *given: Any) -> list[Claim]:
        found = await claim_lost(self, *given)
        if found:
            claiming.set()
            await leaving.wait()
        return found

    async with replica(slow(), store_url, lease_s=60.0) as client:
        monkeypatch.setattr(RunStore, "claim_lost", slowly)
        body = orjson.dumps(ask(mrsa=SIZES))
        claim = await store.create(NewRun("run_1", "chat.completion", body, MODEL, created_at=time.time()))
        await store.release(claim)
        await asyncio.wait_for(claiming.wait(), 10)
        draining = asyncio.create_task(client.app.state.runner.drain(0))  # type: ignore[attr-defined]
        await asyncio.sleep(0.05)
        leaving.set()
        await draining
        run = await store.get("run_1")
    assert run is not None
    assert run.owner is None, "and not for a minute more this server's"
    assert run.status == "queued"


async def test_a_run_is_cancelled_from_another_replica(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.02), store_url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask(mrsa=SIZES)))
        run_id = await only_run(store, events=3)
        assert await store.request_cancel(run_id)
        response = await asking
        assert response.status_code == 409
        assert response.json()["error"]["code"] == "run_cancelled"
        run = await until_ended(store, run_id)
    assert run.status == "cancelled"


async def test_a_cancel_takes_no_renewal_to_be_heard(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.05), store_url, lease_s=60.0) as client, replica(slow(), store_url) as other:
        for elsewhere in (False, True) if store._database.postgres else (False,):
            asking = asyncio.create_task(client.post(CHAT, json=ask(mrsa=SIZES)))
            run_id = await only_run(store, events=3)
            began = time.perf_counter()
            for _ in range(3):  # once is enough, and more do no harm
                await (other if elsewhere else client).delete(f"/v1/runs/{run_id}")
            assert (await asking).status_code == 409
            assert time.perf_counter() - began < 5  # of the 20 to its next renewal
            assert (await until_ended(store, run_id)).status == "cancelled"


async def left_behind(store: RunStore, store_url: str, **settings: Any) -> str:
    """The id of a run whose server has left in the midst of it."""
    async with replica(slow(0.02), store_url, **settings) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask(f"{settings['served_model']}-mrsa", mrsa=SIZES)))
        run_id = await only_run(store, events=3)
        await client.app.state.runner.drain(0)  # type: ignore[attr-defined]
        await asking
    return run_id


async def test_a_run_goes_on_only_where_its_model_is_served(store: RunStore, store_url: str) -> None:
    first = await left_behind(store, store_url, served_model="one")
    async with replica(slow(), store_url, served_model="other"):
        await asyncio.sleep(3 * LEASE_S)
        run = await store.get(first)
        assert run is not None
        assert run.ended_at is None
        assert run.owner is None
        async with replica(slow(), store_url, served_model="one"):
            assert (await until_ended(store, first)).status == "finished"


async def test_a_run_of_a_model_that_nobody_serves_can_be_cancelled(store: RunStore, store_url: str) -> None:
    first = await left_behind(store, store_url, served_model="one")
    async with replica(slow(), store_url, served_model="other") as client:
        assert (await client.delete(f"/v1/runs/{first}")).json()["cancel_requested"]
        assert (await until_ended(store, first)).status == "cancelled"
        shown = (await client.get(f"/v1/runs/{first}")).json()
        assert shown["error"]["code"] == "run_cancelled"


async def test_budgets_hold_over_a_takeover(store: RunStore, store_url: str) -> None:
    budget = 2600
    engines = [slow(0.02), slow(0.001)]
    async with replica(engines[0], store_url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask(mrsa={**SIZES, "budget_tokens": budget})))
        run_id = await only_run(store, events=9)
        await client.app.state.runner.drain(0)  # type: ignore[attr-defined]
        await asking
    async with replica(engines[1], store_url):
        await until_ended(store, run_id)
    state = replay(await log_of(store, run_id), TEMPLATES)
    assert state.outcome is not None
    assert state.usage.completion_tokens + state.charged_tokens <= budget


async def test_a_run_that_a_newer_version_wrote_is_left_to_it(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.02), store_url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask(mrsa=SIZES)))
        run_id = await only_run(store, events=3)
        await client.app.state.runner.drain(0)  # type: ignore[attr-defined]
        await asking
    async with store._database.writing() as connection:
        await connection.execute(tables.events.update().where(tables.events.c.number == 2).values(kind="of_tomorrow"))
    async with replica(slow(), store_url):
        await asyncio.sleep(3 * LEASE_S)
    run = await store.get(run_id)
    assert run is not None
    assert run.ended_at is None


async def test_runs_stand_still_while_their_store_is_away_and_then_go_on(postgres: Postgres, template: str) -> None:
    url = postgres.url(postgres.make(template))
    async with replica(slow(0.01), url) as client, replica(slow(0.01), url) as other:
        asking = [asyncio.create_task(one.post(CHAT, json=ask(mrsa=SIZES))) for one in (client, other)]
        runs = await running(client, 2)
        await asyncio.to_thread(postgres.stop)
        assert (await client.get("/v1/runs")).json()["error"]["code"] == "store_unavailable"
        await asyncio.sleep(3 * LEASE_S)
        await asyncio.to_thread(postgres.start)
        async with asyncio.timeout(30):
            for one in asking:
                response = await one
                assert response.status_code == 200, response.text
        for run in runs:
            export = await client.get(f"/v1/runs/{run['id']}/export")
            lines = [json.loads(line) for line in export.text.splitlines()]
            assert [line["number"] for line in lines] == list(range(1, len(lines) + 1))
            assert lines[-1]["kind"] == "run_finished"
            assert not any(line["kind"] == "run_resumed" for line in lines), "their owners had them back"


async def test_without_a_store_nothing_is_written(tmp_path: object) -> None:
    async with in_memory(ScriptedEngine()) as client:
        assert client.app.state.runner._journal is None  # type: ignore[attr-defined]
        assert (await client.post(CHAT, json=ask(mrsa=SIZES))).status_code == 200


def test_a_server_without_a_store_loads_no_database() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import sys, mrsa_server.app; print('sqlalchemy' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "False\n"
