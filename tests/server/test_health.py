"""Probes, metrics and the list of models."""

from __future__ import annotations

import asyncio
import time
from typing import cast

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness.engine import EngineDead, EngineError
from harness.events import DeadlineReached
from harness.scripted import Script, ScriptedEngine
from harness.types import RolloutRequest
from mrsa_server.metrics import Metrics
from mrsa_server.runs.journal import Journal
from mrsa_server.runs.pulse import Pulse
from mrsa_server.runs.store import Claim, RunStore
from mrsa_server.runs.store_errors import Fenced
from tests.helpers.postgres import Postgres
from tests.helpers.replicas import SIZES, only_run, replica, slow, stolen, until_ended
from tests.helpers.serving import CHAT, SMALL, ask, in_memory

NAMES = {
    "mrsa_runs_queued",
    "mrsa_runs_running",
    "mrsa_runs",
    "mrsa_run_duration_seconds",
    "mrsa_round_duration_seconds",
    "mrsa_rollouts",
    "mrsa_rollouts_skipped",
    "mrsa_tokens",
    "mrsa_answer_agreement",
    "mrsa_admission_rejections",
    "mrsa_engine_up",
    "mrsa_tasks",
    "process_resident_memory_bytes",
}


async def test_metrics_say_what_runs_did() -> None:
    def script(request: RolloutRequest) -> Script:
        lost = request.slot.round == 0 and request.slot.index == 2
        return Script("hm", "42", EngineError("out of luck") if lost else None)

    async with in_memory(ScriptedEngine(script)) as client:
        body = (await client.post(CHAT, json=ask(mrsa={**SMALL, "final_candidates": 4, "set_size": 4}))).json()
        await client.post(CHAT, json=ask(mrsa={"population": 0}))
        text = (await client.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert NAMES <= set(families)
    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families.values()
        for sample in family.samples
        if "le" not in sample.labels
    }
    assert values["mrsa_engine_up",] == 1
    assert values["mrsa_runs_running",] == values["mrsa_runs_queued",] == 0
    assert values["mrsa_runs_total", "finished"] == 1
    assert values["mrsa_rollouts_total", "thought"] == 3
    assert values["mrsa_rollouts_total", "stop"] == 4
    assert values["mrsa_rollouts_total", "failed"] == 1
    assert values["mrsa_tokens_total", "prompt"] == body["usage"]["prompt_tokens"]
    assert (
        values["mrsa_tokens_total", "reasoning"] + values["mrsa_tokens_total", "answer"]
        == body["usage"]["completion_tokens"]
    )
    assert values["mrsa_answer_agreement_sum",] == 1


def value(text: str, line: str) -> float:
    """What a line of Prometheus' text says."""
    return float(next(found.rpartition(" ")[2] for found in text.splitlines() if found.startswith(line + " ")))


async def until(client: httpx.AsyncClient, line: str, wanted: float) -> None:
    """Wait until a metric has a value."""
    found = None
    async with asyncio.timeout(5):
        while found != wanted:
            await asyncio.sleep(0.01)
            found = value((await client.get("/metrics")).text, line)


async def test_metrics_say_what_the_store_does(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.02), store_url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask(mrsa=SIZES)))
        run_id = await only_run(store, events=3)
        taken = await stolen(store)
        assert (await asking).status_code == 503
        journal: Journal = client.app.state.runner._journal  # type: ignore[attr-defined]
        with pytest.raises(Fenced):  # it may have learnt of it by its renewal
            await journal.store.append(Claim(run_id, 1, 0), [DeadlineReached()])
        text = (await client.get("/metrics")).text
        assert value(text, "mrsa_store_up") == 1
        assert value(text, 'mrsa_store_seconds_count{operation="write"}') > 2
        assert value(text, 'mrsa_store_seconds_count{operation="claim"}') >= 1
        assert value(text, "mrsa_fenced_writes_total") >= 1
        assert value(text, "mrsa_lease_takeovers_total") == 0
        await store.release(taken)
        await until_ended(store, run_id)
        assert value((await client.get("/metrics")).text, "mrsa_lease_takeovers_total") == 1


async def test_a_server_is_not_ready_while_its_store_is_away_and_lives_all_the_same(
    postgres: Postgres, template: str
) -> None:
    async with replica(slow(), postgres.url(postgres.make(template))) as client:
        assert (await client.get("/health/ready")).status_code == 200
        await asyncio.to_thread(postgres.stop)
        try:
            await asyncio.sleep(1)  # as long as an answer counts
            ready = await client.get("/health/ready")
            assert ready.status_code == 503
            assert ready.json()["error"]["code"] == "not_ready"
            assert "store is away" in ready.json()["error"]["message"]
            assert (await client.get("/health/live")).status_code == 200
            assert value((await client.get("/metrics")).text, "mrsa_store_up") == 0
        finally:
            await asyncio.to_thread(postgres.start)
        async with asyncio.timeout(20):
            status = 503
            while status != 200:
                await asyncio.sleep(0.2)
                status = (await client.get("/health/ready")).status_code
        assert value((await client.get("/metrics")).text, "mrsa_store_up") == 1


class Asleep(ScriptedEngine):
    """Scaled to zero until it is woken."""

    awake = False

    async def start(self) -> None:
        if not self.awake:
            raise EngineDead("No available workers")

    async def healthy(self) -> bool:
        return self.awake


@pytest.mark.parametrize("sleeps", [True, False])
async def test_a_server_is_ready_without_an_engine_that_sleeps_alone(sleeps: bool) -> None:
    engine = Asleep()
    async with in_memory(engine, up=False, engine_sleeps=sleeps) as client:
        assert (await client.get("/health/ready")).status_code == (200 if sleeps else 503)
        assert value((await client.get("/metrics")).text, "mrsa_engine_up") == 0
        engine.awake = True
        await client.app.state.runner.host.wait_up(5)  # type: ignore[attr-defined]
        assert (await client.get("/health/ready")).status_code == 200
        engine.awake = False
        assert (await client.get("/health/ready")).status_code == (200 if sleeps else 503)
        assert value((await client.get("/metrics")).text, "mrsa_engine_up") == 0


async def test_who_waits_for_the_engine_counts_as_queued() -> None:
    engine = Asleep()
    async with in_memory(engine, up=False, engine_sleeps=True) as client:
        asking = [asyncio.create_task(client.post(CHAT, json=ask(mrsa=SMALL))) for _ in range(3)]
        await until(client, "mrsa_runs_queued", 3)
        engine.awake = True
        assert [answer.status_code for answer in await asyncio.gather(*asking)] == [200] * 3
        assert value((await client.get("/metrics")).text, "mrsa_runs_queued") == 0


async def test_runs_that_nobody_has_are_counted_while_the_engine_is_away(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.05), store_url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask(mrsa=SIZES)))
        run_id = await only_run(store, events=3)
        taken = await stolen(store)
        assert (await asking).status_code == 503
    await store.release(taken)
    engine = Asleep()
    async with replica(engine, store_url, up=False) as client:
        await until(client, "mrsa_runs_left_behind", 1)
        engine.awake = True
        await until_ended(store, run_id)
        assert value((await client.get("/metrics")).text, "mrsa_runs_left_behind") == 0


class Silent:
    """A store that never answers."""

    def __init__(self) -> None:
        self.asked = 0

    async def ping(self) -> None:
        self.asked += 1
        await asyncio.Event().wait()


async def test_a_store_that_says_nothing_is_asked_once_and_found_out_in_time() -> None:
    store = Silent()
    pulse = Pulse(cast("RunStore", store), wait_s=0.2)
    began = time.perf_counter()
    found = [*await asyncio.gather(*(pulse.check() for _ in range(50))), await pulse.check()]
    assert time.perf_counter() - began < 2
    assert found == ["no answer within 0.2 s"] * 51
    assert store.asked == 1
    await pulse.aclose()


async def test_a_store_that_has_just_answered_is_not_asked_again() -> None:
    class Counting(Silent):
        async def ping(self) -> None:
            self.asked += 1

    store = Counting()
    pulse = Pulse(cast("RunStore", store))
    assert [await pulse.check() for _ in range(20)] == [None] * 20
    assert store.asked == 1


async def test_a_server_without_a_store_has_no_metrics_of_it() -> None:
    async with in_memory() as client:
        text = (await client.get("/metrics")).text
    assert "mrsa_store" not in text
    assert "mrsa_lease" not in text


def test_two_servers_of_one_process_share_no_metrics() -> None:
    first, second = Metrics(), Metrics()
    first.count_run("finished")
    assert b'status="finished"' in first.text()
    assert b'status="finished"' not in second.text()


@pytest.mark.parametrize(("served", "names"), [(None, ["scripted"]), ("Zyphra/ZAYA1-8B", ["Zyphra/ZAYA1-8B"])])
async def test_each_model_and_its_alias_are_listed(served: str | None, names: list[str]) -> None:
    async with in_memory(served_model=served) as client:
        listed = (await client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert [model["id"] for model in listed["data"]] == [*names, f"{names[0]}-mrsa"]
        for model in listed["data"]:
            assert (await client.get(f"/v1/models/{model['id']}")).json() == model
            assert (await client.post(CHAT, json=ask(model["id"], mrsa=SMALL))).status_code == 200
        missing = await client.get("/v1/models/other")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
