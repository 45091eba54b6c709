"""A collector of OpenTelemetry's traces that takes them over HTTP, and keeps them."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

Value = str | int | float | bool | list["Value"] | None


class Collector:
    """The server, in a thread of its own; `spans` are those that came so far, `resource` is the last one's."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, Value] = {}
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.take(ExportTraceServiceRequest.FromString(body))
                said = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, format: str, *args: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, request: ExportTraceServiceRequest) -> None:
        """Keep what came."""
        for part in request.resource_spans:
            self.resource = attributes(part.resource.attributes)
            for scope in part.scope_spans:
                self.spans += scope.spans

    def __enter__(self) -> Collector:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def attributes(found: Iterable[KeyValue]) -> dict[str, Value]:
    """Attributes as they were before they were encoded."""
    return {pair.key: _value(pair) for pair in found}


def _value(pair: KeyValue) -> Value:
    kind = pair.value.WhichOneof("value")
    if kind == "array_value":
        return [getattr(each, each.WhichOneof("value") or "") for each in pair.value.array_value.values]
    found: Value = None if kind is None else getattr(pair.value, kind)
    return found
