"""Runs as OpenTelemetry spans: run -> rounds -> rollouts. The only place that imports it, and needs the extra `otel`.

Names are those of the semantic conventions for generative AI, ours begin with `mrsa.`. Nothing stands in a span of what
users, models and engines write: no prompt, no answer, no message of an error.

There is no span of the HTTP request: a run begins with it, and may go on for an hour after its end.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from opentelemetry import context as current
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from structlog.typing import EventDict, WrappedLogger

from harness.engine import Delta, Engine, EngineAround
from harness.events import (
    AnswersAgreed,
    DeadlineReached,
    Event,
    QuorumReached,
    RolloutAborted,
    RolloutFailed,
    RolloutFinished,
    RolloutStarted,
    RunFinished,
    RunResumed,
    SetSkipped,
    ToppedUp,
    WentFinal,
)
from harness.markovian_rsa import RoundStats, State
from harness.types import Finish, Params, Rollout, RolloutRequest, Slot, TraceHeaders, Usage
from mrsa_server import __version__
from mrsa_server.metrics import RunStatus

_METHOD = "markovian-rsa"
_PLAIN = "plain"  # one chat without the method
_FLUSH_S = 3.0  # for what is left when the server leaves
_SELDOM_S = 300.0
# Facts that explain how a run went on, as events of its span.
_TOLD: Mapping[type[Event], str] = {
    AnswersAgreed: "mrsa.answers_agreed",
    DeadlineReached: "mrsa.deadline_reached",
    QuorumReached: "mrsa.quorum_reached",
    RunResumed: "mrsa.run_resumed",
    SetSkipped: "mrsa.set_skipped",
    ToppedUp: "mrsa.topped_up",
    WentFinal: "mrsa.went_final",
}
_W3C = TraceContextTextMapPropagator()

Attributes = dict[str, AttributeValue]


def exporting(exporter: SpanExporter | None = None) -> TracerProvider:
    """Sends spans in batches, from a thread of its own, as OpenTelemetry's environment variables say.

    Args:
        exporter: Where to, in place of the collector that they name.
    """
    named = OTELResourceDetector().detect().attributes
    usual: Attributes = {
        "service.name": "mrsa-server",
        "service.version": __version__,
        "service.instance.id": str(uuid.uuid4()),
    }
    # Not at exit: that would wait for half a minute where the collector is away.
    provider = TracerProvider(resource=Resource.create(usual | dict(named)), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    _quieten()
    return provider


class _Seldom(logging.Filter):
    """One line in five minutes: a collector that is away is told of with every batch."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is time for one."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + _SELDOM_S
        return True


def _quieten() -> None:
    seldom = _Seldom()
    for name in list(logging.Logger.manager.loggerDict):
        if name.startswith("opentelemetry."):
            logger = logging.getLogger(name)
            if not any(isinstance(each, _Seldom) for each in logger.filters):
                logger.addFilter(seldom)


def add_trace_ids(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Name the trace and the span that a log line belongs to."""
    context = get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"], event["span_id"] = f"{context.trace_id:032x}", f"{context.span_id:016x}"
    return event


class OpenTelemetry:
    """The `Tracing` of a server.

    Args:
        provider: What sends spans; it is shut down with this.
        engine: Which kind of engine generates, for `gen_ai.provider.name`.
    """

    def __init__(self, provider: TracerProvider, engine: str) -> None:
        self._provider = provider
        self._engine = engine
        self._tracer = provider.get_tracer("mrsa_server", __version__)

    def run(self, run_id: str, key_id: str | None, parent: TraceHeaders, *, taken_up: bool = False) -> OpenRun:
        """See `Tracing`."""
        attributes: Attributes = {"mrsa.run_id": run_id, "mrsa.taken_up": taken_up}
        if key_id is not None:
            attributes["mrsa.key_id"] = key_id
        # Of what is current here nothing is taken over: a run belongs to the request alone.
        return OpenRun(self._tracer, self._engine, _W3C.extract(dict(parent), Context()), attributes)

    async def aclose(self) -> None:
        """See `Tracing`. What the collector does not take in time is lost."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop is gone by then
                loop.call_soon_threadsafe(done.set)

        # Not the loop's own threads, whose end it waits for.
        threading.Thread(target=shut_down, name="last spans", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await done.wait()


@dataclass(slots=True)
class _OpenRound:
    span: Span
    context: Context


class OpenRun:
    """The `RunSpans` of a run.

    Args:
        tracer: Makes spans.
        engine: For `gen_ai.provider.name`.
        parent: What the run's span is a child of.
        attributes: What is known of the run so far.
    """

    def __init__(self, tracer: Tracer, engine: str, parent: Context, attributes: Attributes) -> None:
        self._tracer = tracer
        self._engine = engine
        self._model = ""
        self._rounds: dict[int, _OpenRound] = {}
        self._rollouts: dict[Slot, Span] = {}
        self._ended = False
        self._span = tracer.start_span(
            f"invoke_workflow {_METHOD}",
            context=parent,
            kind=SpanKind.INTERNAL,
            attributes={"gen_ai.operation.name": "invoke_workflow", "gen_ai.provider.name": engine, **attributes},
        )
        self._context = set_span_in_context(self._span, Context())

    @property
    def headers(self) -> TraceHeaders:
        """See `RunSpans`."""
        return _headers(self._context)

    def attach(self) -> None:
        """See `RunSpans`. The task's context ends with it, so nothing is detached."""
        current.attach(self._context)

    def begin(self, state: State) -> None:
        """See `RunSpans`."""
        params = state.params
        name = _PLAIN if not params.rounds and params.population == 1 else _METHOD
        self._span.update_name(f"invoke_workflow {name}")
        # The conventions call it a workflow up to 1.45, and an agent since they have a repository of their own.
        self._span.set_attributes({"gen_ai.workflow.name": name, "gen_ai.agent.name": name, **_described(params)})

    def through(self, engine: Engine, model: str) -> Engine:
        """See `RunSpans`."""
        self._model = model
        self._span.set_attribute("gen_ai.request.model", model)
        return _TracedEngine(engine, self)

    def asked(self, request: RolloutRequest) -> TraceHeaders:
        """A rollout has got its place in the engine: its span's headers. It may ask twice, the second time to close."""
        span = self._rollouts.get(request.slot)
        if span is None:  # the run has ended, and its rollouts are being cancelled
            return ()
        if span.is_recording():
            sampling = request.sampling
            attributes: Attributes = {
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.stream": True,
            }
            if sampling.top_k:
                attributes["gen_ai.request.top_k"] = sampling.top_k
            if request.seed is not None:
                attributes["gen_ai.request.seed"] = request.seed
            span.set_attributes(attributes)
            span.add_event("mrsa.engine_asked", {"mrsa.max_tokens": request.max_tokens})
        return _headers(set_span_in_context(span, Context()))

    def take(self, event: Event) -> None:
        """See `RunSpans`."""
        if self._ended:
            return
        match event:
            case RolloutStarted():
                self._start(event)
            case RolloutFinished(rollout) | RolloutAborted(rollout):
                self._close(rollout)
            case RolloutFailed(slot, _, usage, _, status):
                # Its message may quote the prompt; the log has it.
                self._lose(slot, "failed", str(status) if status is not None else "engine_error", usage)
            case RunResumed(slots):
                for slot in slots:
                    self._lose(slot, "lost", "engine_lost")
        if (name := _TOLD.get(type(event))) is not None:
            self._span.add_event(name)

    def end_round(self, round: int, stats: RoundStats) -> None:
        """See `RunSpans`. What is begun anew later, after a loss, is its child all the same."""
        if (opened := self._rounds.get(round)) is not None:
            opened.span.set_attributes(_counted(stats))
            opened.span.end()

    def end(self, status: RunStatus, state: State | None, code: str | None) -> None:
        """See `RunSpans`."""
        if self._ended:
            return
        good = status in ("finished", "stopped")
        for slot in list(self._rollouts):
            self._lose(slot, "cancelled", code or status)
        for opened in self._rounds.values():
            if opened.span.is_recording():  # it is not, once ended
                opened.span.set_attribute("mrsa.status", status)
                opened.span.end()
        self._ended = True
        attributes: Attributes = {"mrsa.status": status} | (_outcome(state) if state is not None else {})
        if not good:
            attributes["error.type"] = code or status
        self._span.set_attributes(attributes)
        self._span.set_status(StatusCode.OK if good else StatusCode.ERROR)
        self._span.end()

    def _start(self, event: RolloutStarted) -> None:
        slot = event.slot
        opened = self._rounds.get(slot.round)
        if opened is None:
            span = self._tracer.start_span(
                f"round {slot.round}", context=self._context, attributes={"mrsa.round": slot.round}
            )
            opened = self._rounds[slot.round] = _OpenRound(span, set_span_in_context(span, Context()))
        self._rollouts[slot] = self._tracer.start_span(
            f"chat {self._model}",
            context=opened.context,
            kind=SpanKind.CLIENT,
            attributes={
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": self._engine,
                "gen_ai.request.model": self._model,
                "gen_ai.request.max_tokens": event.grant,
                "mrsa.round": slot.round,
                "mrsa.index": slot.index,
                "mrsa.members": event.members,
            },
        )

    def _close(self, rollout: Rollout) -> None:
        span = self._rollouts.pop(rollout.slot, None)
        if span is None:  # it was begun by another server
            return
        span.set_attributes(
            {
                "gen_ai.response.finish_reasons": (rollout.finish.value,),
                "mrsa.outcome": "aborted" if rollout.finish is Finish.ABORTED else "finished",
                "mrsa.loop": rollout.loop,
                "mrsa.cut": rollout.cut or rollout.finish is Finish.ABORTED,
                **_tokens(rollout.usage),
            }
        )
        span.set_status(StatusCode.OK)
        span.end()

    def _lose(self, slot: Slot, outcome: str, error: str, usage: Usage | None = None) -> None:
        span = self._rollouts.pop(slot, None)
        if span is None:  # it was begun by another server
            return
        span.set_attributes({"mrsa.outcome": outcome, "error.type": error, **(_tokens(usage) if usage else {})})
        span.set_status(StatusCode.ERROR)
        span.end()


class _TracedEngine(EngineAround):
    """An engine that is told of the span of each rollout. Nothing else of it changes."""

    def __init__(self, engine: Engine, run: OpenRun) -> None:
        super().__init__(engine)
        self._run = run

    def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        """The engine's own generator: between two deltas nothing is added."""
        return self._engine.generate(replace(request, trace_headers=self._run.asked(request)))


def _headers(context: Context) -> TraceHeaders:
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, context)
    return tuple(carrier.items())


def _described(params: Params) -> Attributes:
    found: Attributes = {
        "mrsa.population": params.population,
        "mrsa.set_size": params.set_size,
        "mrsa.rounds": params.rounds,
        "mrsa.rollout_tokens": params.rollout_tokens,
        "mrsa.tail_tokens": params.tail_tokens,
        "mrsa.final_tokens": params.final_tokens,
        "mrsa.final_candidates": params.final_candidates,
        "mrsa.carry": params.carry.value,
        "mrsa.selection": params.selection.value,
        "mrsa.seed": params.seed,
    }
    for name in ("budget_tokens", "deadline_s", "quorum", "start_small"):
        if (value := getattr(params, name)) is not None:
            found[f"mrsa.{name}"] = value
    return found


def _tokens(usage: Usage) -> Attributes:
    return {
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
    }


def _counted(stats: RoundStats) -> Attributes:
    return {
        "mrsa.rollouts.started": stats.started,
        "mrsa.rollouts.finished": stats.finished,
        "mrsa.rollouts.failed": stats.failed,
        "mrsa.rollouts.aborted": stats.aborted,
        **_tokens(stats.usage),
    }


def _outcome(state: State) -> Attributes:
    found: Attributes = {
        "mrsa.rollouts.started": sum(stats.started for stats in state.stats),
        "mrsa.rollouts.failed": sum(stats.failed for stats in state.stats),
        "mrsa.lost_tokens": state.charged_tokens,
        **_tokens(state.usage),
    }
    outcome = state.outcome
    if isinstance(outcome, RunFinished):
        found["mrsa.partial"] = outcome.partial
        if outcome.stopped is not None:
            found["mrsa.stopped"] = outcome.stopped.value
        if outcome.votes[0] > 0 and len(outcome.candidates) > 1:
            found["mrsa.agreement"] = outcome.votes[0] / len(outcome.candidates)
    return found
