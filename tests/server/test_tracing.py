"""Runs as spans: their shapes, how each of them ends, and that nothing is paid where nobody asked."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from harness.engine import EngineError
from harness.scripted import Script, ScriptedEngine, Speed
from harness.types import RolloutRequest
from mrsa_server.api.errors import RunCancelled
from mrsa_server.cli import main
from mrsa_server.engines.openai_http import OpenAIEngine
from mrsa_server.otel import OpenTelemetry, exporting
from mrsa_server.runs.store import RunStore
from mrsa_server.tracing import INSTALL, noted, trace_of, wanted
from tests.helpers.fake_upstream import FakeUpstream
from tests.helpers.replicas import SIZES, only_run, replica, slow, until_ended
from tests.helpers.serving import CHAT, SMALL, ask, in_memory

SECRET = "the launch code is 4711"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Spans:
    """What a server has traced, by span id."""

    def __init__(self, engine: str = "scripted") -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracing = OpenTelemetry(provider, engine)

    @property
    def all(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all if span.name.split()[0] == name]

    @property
    def run(self) -> ReadableSpan:
        (found,) = self.named("invoke_workflow")
        return found


def said(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  what is waited for has no event to set
            await asyncio.sleep(0.005)


def is_child(span: ReadableSpan, parent: ReadableSpan) -> bool:
    assert span.context is not None
    assert parent.context is not None
    assert span.context.trace_id == parent.context.trace_id
    return span.parent is not None and span.parent.span_id == parent.context.span_id


async def test_a_run_is_a_tree_of_rounds_and_rollouts_under_the_request_s_parent() -> None:
    spans = Spans()
    headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1"}
    async with in_memory(tracing=spans.tracing) as client:
        body = ask(mrsa=SMALL, temperature=0.5, messages=[{"role": "user", "content": SECRET}])
        answer = (await client.post(CHAT, json=body, headers=headers)).json()
    run = spans.run
    assert run.context is not None
    assert run.parent is not None
    assert f"{run.context.trace_id:032x}" == TRACE
    assert f"{run.parent.span_id:016x}" == PARENT
    assert run.context.trace_state.get("vendor") == "1"
    assert run.name == "invoke_workflow markovian-rsa"
    assert run.kind is SpanKind.INTERNAL
    assert run.status.status_code is StatusCode.OK
    usage = answer["usage"]
    assert (
        said(run).items()
        >= {
            "gen_ai.operation.name": "invoke_workflow",
            "gen_ai.provider.name": "scripted",
            "gen_ai.request.model": "scripted",
            "gen_ai.agent.name": "markovian-rsa",
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": usage["completion_tokens"],
            "mrsa.run_id": answer["mrsa"]["run_id"],
            "mrsa.population": 4,
            "mrsa.set_size": 2,
            "mrsa.rounds": 1,
            "mrsa.tail_tokens": 32,
            "mrsa.seed": 7,
            "mrsa.lost_tokens": 0,
            "mrsa.status": "finished",
            "mrsa.taken_up": False,
        }.items()
    )
    rounds = spans.named("round")
    assert [span.name for span in rounds] == ["round 0", "round 1"]
    assert all(is_child(span, run) for span in rounds)
    assert [said(span)["mrsa.rollouts.finished"] for span in rounds] == [
        number["finished"] for number in answer["mrsa"]["rounds"]
    ]
    rollouts = spans.named("chat")
    assert len(rollouts) == sum(number["rollouts"] for number in answer["mrsa"]["rounds"])
    for span in rollouts:
        found = said(span)
        assert is_child(span, rounds[found["mrsa.round"]])
        assert span.name == "chat scripted"
        assert span.kind is SpanKind.CLIENT
        assert span.status.status_code is StatusCode.OK
        assert found["gen_ai.request.temperature"] == 0.5
        assert found["gen_ai.request.max_tokens"] > 0
        assert found["gen_ai.usage.output_tokens"] > 0
        assert found["gen_ai.response.finish_reasons"] in [("stop",), ("thought",)]
        assert len(found["mrsa.members"]) == 2 * found["mrsa.round"]
        assert [event.name for event in span.events] == ["mrsa.engine_asked"]
    assert SECRET not in "".join(span.to_json() for span in spans.all)


async def test_agreement_is_on_the_run_and_a_plain_chat_has_another_name() -> None:
    spans = Spans()
    engine = ScriptedEngine(lambda request: Script("x" * 60, "\\boxed{42}"))
    async with in_memory(engine, tracing=spans.tracing) as client:
        await client.post(CHAT, json=ask(mrsa={**SMALL, "final_candidates": 4}))
        await client.post(CHAT, json=ask(model="scripted"), headers={"traceparent": "00-nonsense"})
    method, plain = spans.named("invoke_workflow")
    assert said(method)["mrsa.agreement"] == 1.0
    assert plain.name == "invoke_workflow plain"
    assert plain.parent is None
    assert "mrsa.agreement" not in said(plain)
    assert said(plain)["gen_ai.usage.output_tokens"] > 0


async def test_a_failed_rollout_says_its_status_and_never_its_message() -> None:
    spans = Spans()

    def script(request: RolloutRequest) -> Script:
        failing = request.slot == (0, 1)
        return Script("x" * 60, "42", EngineError(SECRET, 500) if failing else None, 20)

    async with in_memory(ScriptedEngine(script), tracing=spans.tracing) as client:
        await client.post(CHAT, json=ask(mrsa={**SMALL, "final_candidates": 4}))
    (failed,) = [span for span in spans.named("chat") if said(span)["mrsa.outcome"] == "failed"]
    assert failed.status.status_code is StatusCode.ERROR
    assert said(failed).items() >= {"error.type": "500", "mrsa.index": 1, "mrsa.round": 0}.items()
    assert said(spans.run).items() >= {"mrsa.rollouts.failed": 1, "mrsa.status": "finished"}.items()
    assert SECRET not in "".join(span.to_json() for span in spans.all)


async def test_what_a_deadline_cuts_ends_as_cut() -> None:
    spans = Spans()
    engine = ScriptedEngine(
        lambda request: Script("x" * (10_000 if request.slot.index else 1), "42"),
        speed=Speed(step_s=0.002),
        chunk_tokens=10,
    )
    async with in_memory(engine, tracing=spans.tracing) as client:
        sizes = {"population": 4, "rounds": 0, "final_candidates": 4, "final_tokens": 20_000, "deadline_s": 0.6}
        assert (await client.post(CHAT, json=ask(mrsa=sizes))).status_code == 200
    cut = [span for span in spans.named("chat") if said(span).get("mrsa.cut")]
    assert len(cut) == 3
    assert all(said(span)["gen_ai.response.finish_reasons"] == ("aborted",) for span in cut)
    assert "mrsa.deadline_reached" in [event.name for event in spans.run.events]
    assert said(spans.run).items() >= {"mrsa.status": "stopped", "mrsa.stopped": "deadline"}.items()


async def test_a_run_that_is_cancelled_ends_all_its_spans() -> None:
    spans = Spans()
    async with in_memory(slow(0.5), tracing=spans.tracing) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask(mrsa={**SIZES, "set_size": 4})))
        runner = client.app.state.runner  # type: ignore[attr-defined]
        await until(lambda: any(run.state and len(run.state.running) == 4 for run in runner._runs))
        runner._runs.copy().pop().cancel(RunCancelled())
        assert (await asking).status_code == 409
    assert [said(span)["mrsa.outcome"] for span in spans.named("chat")] == ["cancelled"] * 4
    assert {span.status.status_code for span in spans.named("chat")} == {StatusCode.ERROR}
    assert [said(span)["mrsa.status"] for span in spans.named("round")] == ["cancelled"]
    assert said(spans.run).items() >= {"mrsa.status": "cancelled", "error.type": "run_cancelled"}.items()


async def test_a_refused_run_is_one_span() -> None:
    spans = Spans()
    async with in_memory(ScriptedEngine(context_tokens=64), tracing=spans.tracing) as client:
        messages = [{"role": "user", "content": SECRET * 100}]
        assert (await client.post(CHAT, json=ask(mrsa=SMALL, messages=messages))).status_code == 400
    assert len(spans.all) == 1
    assert said(spans.run)["error.type"] == "context_length_exceeded"
    assert spans.run.status.status_code is StatusCode.ERROR


async def test_rollouts_of_a_dead_engine_are_lost_and_begun_anew() -> None:
    spans, engine = Spans(), slow(0.01)
    async with in_memory(engine, tracing=spans.tracing) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask(mrsa={**SIZES, "set_size": 4})))
        await until(lambda: engine.open_requests == 4)
        engine.kill()
        await until(lambda: not client.app.state.runner.host.up)  # type: ignore[attr-defined]
        engine.revive()
        assert (await asking).status_code == 200
    outcomes = [said(span)["mrsa.outcome"] for span in spans.named("chat")]
    assert outcomes.count("lost") == 4
    assert {said(span).get("error.type") for span in spans.named("chat")} == {None, "engine_lost"}
    assert "mrsa.run_resumed" in [event.name for event in spans.run.events]
    assert said(spans.run)["mrsa.status"] == "finished"


async def test_a_run_that_is_taken_up_goes_on_in_its_trace(store: RunStore, store_url: str) -> None:
    first, second = Spans(), Spans()
    async with replica(slow(0.02), store_url, tracing=first.tracing) as client:
        asking = asyncio.create_task(client.post(CHAT, json=ask(mrsa={**SIZES, "seed": 3})))
        run_id = await only_run(store, events=9)
        await client.app.state.runner.drain(0)  # type: ignore[attr-defined]
        assert (await asking).status_code == 503
    async with replica(slow(), store_url, tracing=second.tracing):
        assert (await until_ended(store, run_id)).status == "finished"
    begun, taken = first.run, second.run
    assert said(begun)["error.type"] == "server_shutting_down"
    assert is_child(taken, begun)
    assert said(taken).items() >= {"mrsa.run_id": run_id, "mrsa.taken_up": True, "mrsa.status": "finished"}.items()
    assert {said(span)["mrsa.outcome"] for span in second.named("chat")} == {"finished"}


def test_the_trace_of_a_run_is_in_its_notes() -> None:
    headers = (("traceparent", TRACEPARENT),)
    assert trace_of(json.dumps({"divisor": 1, **noted(headers)})) == headers
    assert noted(()) == {}
    assert trace_of('{"divisor":1}') == trace_of("") == ()


async def test_the_calls_of_a_remote_engine_carry_the_rollout_s_span() -> None:
    spans = Spans("openai")
    async with FakeUpstream() as upstream:
        engine = OpenAIEngine(upstream.url)
        async with in_memory(engine, tracing=spans.tracing) as client:
            response = await client.post(CHAT, json=ask(model="fake-mrsa", mrsa=SMALL))
            assert response.status_code == 200
            traced = {trace for path, trace in upstream.traces if path.endswith("completions")}
            assert len(traced) == len(spans.named("chat")) == 3
        rollouts = [span.context for span in spans.named("chat") if span.context is not None]
        assert traced == {f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}" for span in rollouts}
        upstream.traces.clear()
        async with in_memory(OpenAIEngine(upstream.url)) as client:
            await client.post(CHAT, json=ask(model="fake-mrsa", mrsa=SMALL), headers={"traceparent": TRACEPARENT})
        assert upstream.traces == []


async def test_a_request_that_is_not_sampled_makes_no_span_and_says_so_to_the_engine() -> None:
    spans = Spans("openai")
    async with FakeUpstream() as upstream:
        async with in_memory(OpenAIEngine(upstream.url), tracing=spans.tracing) as client:
            headers = {"traceparent": TRACEPARENT[:-2] + "00"}
            await client.post(CHAT, json=ask(model="fake-mrsa", mrsa=SMALL), headers=headers)
    assert spans.all == ()
    assert upstream.traces
    assert all(trace.startswith(f"00-{TRACE}-") and trace.endswith("-00") for _, trace in upstream.traces)


# In a process of its own: loggers keep the form in which they were used first.
_LOGS = """
import asyncio
from harness.engine import EngineError
from harness.scripted import Script, ScriptedEngine
from mrsa_server import logs
from mrsa_server.otel import OpenTelemetry, add_trace_ids, exporting
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.helpers.serving import CHAT, SMALL, ask, in_memory
logs.configure("info", "json", (add_trace_ids,))
exporter = InMemorySpanExporter()
async def main():
    engine = ScriptedEngine(lambda _: Script("x", "y", EngineError("no")))
    async with in_memory(engine, tracing=OpenTelemetry(exporting(exporter), "scripted")) as client:
        await client.post(CHAT, json=ask(mrsa=SMALL))
asyncio.run(main())
print([f"{span.context.trace_id:032x}" for span in exporter.get_finished_spans()][0])
"""


def test_log_lines_of_a_run_and_of_its_request_name_its_trace() -> None:
    done = python(_LOGS)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    for event in ("rollout failed", "run failed", "request"):
        assert {line.get("trace_id") for line in lines if line["event"] == event} == {done.stdout.strip()}, event
    assert all("trace_id" not in line for line in lines if line["event"] == "engine up")


class Away(SpanExporter):
    """A collector that does not answer."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter").warning("it is away")
        time.sleep(0.2)
        return SpanExportResult.FAILURE


async def test_a_collector_that_is_away_slows_nothing_and_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
    monkeypatch.setattr("mrsa_server.otel._FLUSH_S", 0.3)
    provider = exporting(Away())
    async with in_memory(tracing=OpenTelemetry(provider, "scripted")) as client:
        for _ in range(5):
            assert (await client.post(CHAT, json=ask(mrsa=SMALL))).status_code == 200
        began = time.perf_counter()
    assert time.perf_counter() - began < 2  # of the seconds that 40 spans would take
    assert [record.message for record in caplog.records if record.name.startswith("opentelemetry")] == ["it is away"]


def test_the_resource_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "k8s.pod.name=mrsa-0")
    usual = exporting(InMemorySpanExporter())
    monkeypatch.setenv("OTEL_SERVICE_NAME", "theirs")
    named = exporting(InMemorySpanExporter())
    for provider, name in ((usual, "mrsa-server"), (named, "theirs")):
        found = provider.resource.attributes
        assert found["service.name"] == name
        assert found["service.version"]
        assert found["k8s.pod.name"] == "mrsa-0"
        provider.shutdown()


@pytest.mark.parametrize(
    ("environ", "on"),
    [
        ({}, False),
        ({ENDPOINT: "http://collector:4318"}, True),
        ({ENDPOINT: ""}, False),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", ENDPOINT: "http://collector:4318"}, False),
        ({"OTEL_SDK_DISABLED": "True", ENDPOINT: "http://collector:4318"}, False),
        ({"OTEL_SERVICE_NAME": "mrsa"}, False),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, False),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", ENDPOINT: "http://collector:4318"}, True),
    ],
)
def test_the_usual_variables_switch_it_on(environ: dict[str, str], on: bool) -> None:
    assert wanted(environ) is on


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER=zipkin: must be otlp or none"),
        (
            {ENDPOINT: "http://collector:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "OTEL_EXPORTER_OTLP_PROTOCOL=grpc: must be http/protobuf, whose usual port is 4318",
        ),
    ],
)
def test_what_it_does_not_know_is_named(
    environ: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(["serve", "--engine", "scripted", "--state-dir", "none"]) == 3
    assert capsys.readouterr().err == f"mrsa serve: {message}\n"


# Without what the extra brings: as where it is not installed.
_WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.proto")):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
"""
_SERVES = """
import asyncio
from tests.helpers.serving import CHAT, SMALL, ask, in_memory
async def main():
    async with in_memory() as client:
        headers = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
        assert (await client.post(CHAT, json=ask(mrsa=SMALL), headers=headers)).status_code == 200
asyncio.run(main())
loaded = ("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.proto", "google.protobuf", "requests")
print([name for name in sys.modules if name.startswith((*loaded, "mrsa_server.otel"))])
"""


def python(program: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=kept | environ, timeout=60
    )


@pytest.mark.parametrize("before", ["import sys\n", _WITHOUT], ids=["installed", "not installed"])
def test_a_server_that_is_not_asked_for_traces_loads_nothing_for_them(before: str) -> None:
    done = python(before + _SERVES)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_who_asks_for_traces_without_the_extra_is_told_how_to_install_it() -> None:
    program = _WITHOUT + "from mrsa_server.cli import main; sys.exit(main(['serve', '--engine', 'scripted']))"
    done = python(program, OTEL_EXPORTER_OTLP_ENDPOINT="http://localhost:4318")
    assert done.returncode == 3
    assert done.stderr == f"mrsa serve: {ENDPOINT} asks for traces, but OpenTelemetry is not installed: {INSTALL}\n"
