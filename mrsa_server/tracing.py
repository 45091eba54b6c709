"""Whether runs are traced, and what the runner tells of them. Nothing of OpenTelemetry is imported here.

OpenTelemetry's own environment variables decide, as in any program that it traces: `OTEL_EXPORTER_OTLP_ENDPOINT` (or
`OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, or `OTEL_TRACES_EXPORTER=otlp` for a collector on this machine) switches it on,
`OTEL_TRACES_EXPORTER=none` and `OTEL_SDK_DISABLED=true` switch it off. `mrsa_server.otel` makes the spans, and is
imported only where it is on: whoever does not ask for it pays nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import orjson

from harness.engine import Engine
from harness.events import Event
from harness.markovian_rsa import RoundStats, State
from harness.types import TraceHeaders
from mrsa_server.metrics import RunStatus

if TYPE_CHECKING:
    from structlog.typing import Processor

INSTALL = "pip install 'mrsa-server[otel]'"
TRACE_HEADERS = ("traceparent", "tracestate")
_NOTE = "trace"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_EXPORTER = "OTEL_TRACES_EXPORTER"
_PROTOCOL = "http/protobuf"  # what the specification recommends; the other takes gRPC, 12 MB of it


class RunSpans(Protocol):
    """The spans of one run. Called in the order in which things come about, by the run's own task."""

    @property
    def headers(self) -> TraceHeaders:
        """By which others join the run's trace; none where there is none."""
        ...

    def attach(self) -> None:
        """Let log lines of this task, and of those that it starts, carry the run's trace."""
        ...

    def begin(self, state: State) -> None:
        """The request was found good."""
        ...

    def through(self, engine: Engine, model: str) -> Engine:
        """The engine as the run's rollouts are to use it: each tells it of its span."""
        ...

    def take(self, event: Event) -> None:
        """Something has happened."""
        ...

    def end_round(self, round: int, stats: RoundStats) -> None:
        """Every rollout of a round that something reads has ended."""
        ...

    def end(self, status: RunStatus, state: State | None, code: str | None) -> None:
        """The run has ended here, and with it every span that is still open; the first word is the last.

        Args:
            status: How.
            state: Where it stands; None for one that was never begun.
            code: Of its error, where it has one.
        """
        ...


class Tracing(Protocol):
    """Makes spans of runs."""

    def run(self, run_id: str, key_id: str | None, parent: TraceHeaders, *, taken_up: bool = False) -> RunSpans:
        """Those of a run that begins now.

        Args:
            run_id: Its name.
            key_id: The API key that asked for it.
            parent: Of the request, or of the run as it was begun elsewhere; what cannot be read counts as none.
            taken_up: Whether it was begun elsewhere.
        """
        ...

    async def aclose(self) -> None:
        """Send what is left, for some seconds at most."""
        ...


class Untraced:
    """No spans: both of a server and of a run."""

    headers: TraceHeaders = ()

    def run(self, run_id: str, key_id: str | None, parent: TraceHeaders, *, taken_up: bool = False) -> RunSpans:
        """See `Tracing`."""
        return self

    def attach(self) -> None:
        """See `RunSpans`."""

    def begin(self, state: State) -> None:
        """See `RunSpans`."""

    def through(self, engine: Engine, model: str) -> Engine:
        """See `RunSpans`."""
        return engine

    def take(self, event: Event) -> None:
        """See `RunSpans`."""

    def end_round(self, round: int, stats: RoundStats) -> None:
        """See `RunSpans`."""

    def end(self, status: RunStatus, state: State | None, code: str | None) -> None:
        """See `RunSpans`."""

    async def aclose(self) -> None:
        """See `Tracing`."""


UNTRACED = Untraced()


def noted(headers: TraceHeaders) -> dict[str, object]:
    """What `RunStarted.notes` is to say of a run's trace, as fields of its JSON."""
    return {_NOTE: headers} if headers else {}


def trace_of(notes: str) -> TraceHeaders:
    """The trace of a run, by its notes: whoever takes it up goes on with it."""
    found = orjson.loads(notes).get(_NOTE, ()) if notes else ()
    return tuple((str(name), str(value)) for name, value in found)


def wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether spans are to be sent.

    Raises:
        ValueError: They are, but that is not installed, or in a way that it does not know.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter, endpoint = environ.get(_EXPORTER, "").strip(), _first(environ, _ENDPOINTS)
    if exporter == "none" or not (exporter or endpoint):
        return False
    asked = f"{_EXPORTER}={exporter}" if exporter else endpoint
    if exporter not in ("", "otlp"):
        raise ValueError(f"{asked}: must be otlp or none")
    protocol = _first(environ, _PROTOCOLS)
    if protocol and environ[protocol].strip() != _PROTOCOL:
        raise ValueError(f"{protocol}={environ[protocol]}: must be {_PROTOCOL}, whose usual port is 4318")
    if not _installed():
        raise ValueError(f"{asked} asks for traces, but OpenTelemetry is not installed: {INSTALL}")
    return True


def _first(environ: Mapping[str, str], names: Sequence[str]) -> str | None:
    """The first of the variables that says something."""
    return next((name for name in names if environ.get(name, "").strip()), None)


def _installed() -> bool:
    try:
        return all(map(find_spec, ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")))
    except ModuleNotFoundError:  # of a package above
        return False


def open_tracing(provider: str) -> Tracing:
    """The tracing that the environment asks for.

    Args:
        provider: Which kind of engine generates, for `gen_ai.provider.name`.

    Raises:
        ValueError: As `wanted`.
    """
    if not wanted():
        return UNTRACED
    from mrsa_server.otel import OpenTelemetry, exporting

    return OpenTelemetry(exporting(), provider)


def log_processors() -> tuple[Processor, ...]:
    """What gives log lines their trace.

    Raises:
        ValueError: As `wanted`.
    """
    if not wanted():
        return ()
    from mrsa_server.otel import add_trace_ids

    return (add_trace_ids,)
