"""`mrsa serve` with a collector: what arrives there, and what a server does whose collector is away."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import httpx
import pytest

from tests.helpers.collector import Collector, attributes
from tests.helpers.ports import free_port
from tests.helpers.processes import start_server, wait_ready
from tests.helpers.serving import CHAT, SMALL, ask

pytestmark = pytest.mark.e2e

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


def serve(monkeypatch: pytest.MonkeyPatch, collector: str) -> tuple[subprocess.Popen[str], str]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector)
    return start_server("--engine", "scripted", "--log-format", "json", stderr=subprocess.PIPE)


def test_the_tree_of_a_run_arrives_at_the_latest_when_the_server_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=mrsa-0")
    with Collector() as collector:
        server, url = serve(monkeypatch, collector.url)
        with server:
            wait_ready(url)
            answer = httpx.post(url + CHAT, json=ask(mrsa=SMALL), headers=HEADERS, timeout=30).json()
            server.send_signal(signal.SIGTERM)
            _, log = server.communicate(timeout=20)
    spans = {span.span_id: span for span in collector.spans}
    (run,) = [span for span in collector.spans if span.name == "invoke_workflow markovian-rsa"]
    rounds = [span for span in collector.spans if span.name.startswith("round ")]
    rollouts = [span for span in collector.spans if span.name == "chat scripted"]
    assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
    assert run.parent_span_id.hex() == PARENT
    assert {span.parent_span_id for span in rounds} == {run.span_id}
    assert [attributes(span.attributes)["mrsa.round"] for span in rounds] == [0, 1]
    for span in rollouts:
        parent = attributes(spans[span.parent_span_id].attributes)
        assert parent["mrsa.round"] == attributes(span.attributes)["mrsa.round"]
        assert run.start_time_unix_nano <= span.start_time_unix_nano < span.end_time_unix_nano
        assert span.end_time_unix_nano <= run.end_time_unix_nano
    assert len(rollouts) == sum(number["rollouts"] for number in answer["mrsa"]["rounds"])
    assert attributes(run.attributes)["mrsa.run_id"] == answer["mrsa"]["run_id"]
    assert collector.resource["service.name"] == "mrsa-server"
    assert collector.resource["k8s.pod.name"] == "mrsa-0"
    ended = next(line for line in map(json.loads, log.splitlines()) if line["event"] == "run finished")
    assert (ended["trace_id"], ended["span_id"]) == (TRACE, run.span_id.hex())


def test_a_collector_that_is_away_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    server, url = serve(monkeypatch, f"http://127.0.0.1:{free_port()}")
    with server:
        wait_ready(url)
        for _ in range(5):
            assert httpx.post(url + CHAT, json=ask(mrsa=SMALL), timeout=30).status_code == 200
        time.sleep(1)
        server.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, log = server.communicate(timeout=20)
    assert time.monotonic() - began < 8  # of the 30 s that OpenTelemetry would wait
    assert server.returncode in (0, -signal.SIGTERM)
    told = [line for line in map(json.loads, log.splitlines()) if line.get("logger", "").startswith("opentelemetry")]
    assert len(told) == 1
