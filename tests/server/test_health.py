"""Probes, metrics and the list of models."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness.engine import EngineError
from harness.events import DeadlineReached
from harness.scripted import Script, ScriptedEngine
from harness.types import RolloutRequest
from mrsa_server.metrics import Metrics
from mrsa_server.runs.journal import Journal
from mrsa_server.runs.store import Claim, RunStore
from mrsa_server.runs.store_errors import Fenced
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
        assert value(text, 'mrsa_store_seconds_count{operation="write"}') > 2
        assert value(text, 'mrsa_store_seconds_count{operation="claim"}') >= 1
        assert value(text, "mrsa_fenced_writes_total") >= 1
        assert value(text, "mrsa_lease_takeovers_total") == 0
        await store.release(taken)
        await until_ended(store, run_id)
        assert value((await client.get("/metrics")).text, "mrsa_lease_takeovers_total") == 1


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
