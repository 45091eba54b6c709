"""Probes, metrics and the list of models."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from harness.engine import EngineError
from harness.scripted import Script, ScriptedEngine
from harness.types import RolloutRequest
from mrsa_server.metrics import Metrics
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
