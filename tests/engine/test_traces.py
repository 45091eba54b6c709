"""vLLM's own spans, of an engine in the server's process: they join the trace of the run."""

from __future__ import annotations

import json
import time

import httpx
import pytest

from mrsa_server.engines.embedded import cache_dir, convert, model_folder
from tests.helpers.collector import Collector
from tests.helpers.processes import serving
from tests.helpers.serving import CHAT

pytestmark = pytest.mark.engine


def test_what_vllm_traces_is_under_the_rollout_that_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (folder := model_folder(cache_dir())).exists():
        convert(folder)
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")  # vLLM's is gRPC by default
        engine = {
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "kv_cache_memory_bytes": 1 << 27,
            "dtype": "float32",
            "otlp_traces_endpoint": f"{collector.url}/v1/traces",
        }
        flags = ("--engine", "vllm", "--model", str(folder), "--served-model", "smol")
        given = ("--engine-context-tokens", "1024", "--engine-args", json.dumps(engine))
        with serving(*flags, *given, timeout_s=180) as (_, url):
            body = {
                "model": "smol-mrsa",
                "messages": [{"role": "user", "content": "Name a colour."}],
                "mrsa": {"population": 2, "set_size": 2, "rounds": 1, "rollout_tokens": 16, "final_tokens": 16},
            }
            assert httpx.post(url + CHAT, json={**body, "temperature": 0.3}, timeout=120).status_code == 200
            until = time.monotonic() + 30  # vLLM does not send what is left when it ends
            while sum(span.name == "llm_request" for span in collector.spans) < 3:
                assert time.monotonic() < until
                time.sleep(0.1)
    rollouts = {span.span_id: span for span in collector.spans if span.name == "chat smol"}
    requests = [span for span in collector.spans if span.name == "llm_request"]
    assert len(rollouts) == 3
    assert {span.parent_span_id for span in requests} == rollouts.keys()
    assert {span.trace_id for span in requests} == {span.trace_id for span in rollouts.values()}
