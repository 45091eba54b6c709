"""`mrsa serve`: flags and environment -> Settings -> a server that drains before it leaves."""

from __future__ import annotations

import argparse
import asyncio
import errno
import gc
import json
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from http import HTTPStatus
from typing import get_args

import orjson
import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mrsa_server import logs
from mrsa_server.api.errors import ApiError, Crowded, to_response
from mrsa_server.app import QUIET, RequestScope, create_app, open_journal, places
from mrsa_server.descriptors import raise_limit
from mrsa_server.keyring import KeyRing
from mrsa_server.metrics import Metrics
from mrsa_server.runs.host import EngineHost, Health
from mrsa_server.runs.runner import Runner
from mrsa_server.runs.store_errors import StoreError
from mrsa_server.settings import Settings
from mrsa_server.tracing import log_processors

_CROWDED_S = 10
_MOST_HEAD_BYTES = 65_536
# Python looks through what is new after 700 new objects, and through all that lives whenever that has grown by a
# quarter: at 1,000 runs in flight it took 11 of 26 s of CPU (`tests.bench.load`). So, 0.5 of 15 s, and no more memory.
_GARBAGE = (50_000, 10, 10)
_FAILED = 3  # exit status of a server whose engine or store cannot start, as uvicorn's for a failed start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting that has a group; what is not given is left to the environment and the defaults."""
    parser.usage = "mrsa serve [flags]"
    parser.epilog = (
        "Every flag is also an environment variable, named in brackets; MRSA_ENGINE_API_KEY, MRSA_DATABASE_URL and "
        "MRSA_KEYS, which hold secrets, have no flag. OTEL_EXPORTER_OTLP_ENDPOINT switches traces on, as "
        "everywhere with OpenTelemetry."
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, info in Settings.model_fields.items():
        if info.title is None:
            continue
        if info.title not in groups:
            groups[info.title] = parser.add_argument_group(info.title)
        _add_flag(groups[info.title], name, info)


def _add_flag(group: argparse._ArgumentGroup, name: str, info: FieldInfo) -> None:
    flag = "--" + name.replace("_", "-")
    default = info.get_default(call_default_factory=True)
    shown = "" if default in (None, {}) else f" (default: {default})"
    text = f"{info.description}{shown} [MRSA_{name.upper()}]".replace("%", "%%")
    if info.annotation in (bool, bool | None):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    choices = _choices(info.annotation)
    kind = json.loads if isinstance(default, dict) else str
    metavar = "JSON" if isinstance(default, dict) else None if choices else name.rpartition("_")[2].upper()
    group.add_argument(flag, type=kind, choices=choices, default=argparse.SUPPRESS, metavar=metavar, help=text)


def _choices(annotation: object) -> tuple[str, ...] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            return tuple(member.value for member in kind)
    values = get_args(annotation)
    return values if values and all(isinstance(value, str) for value in values) else None


def read_settings(flags: Mapping[str, object], parser: argparse.ArgumentParser) -> Settings:
    """The settings from flags and environment; a bad value ends the program as argparse does."""
    try:
        return Settings(**{name: value for name, value in flags.items() if name in Settings.model_fields})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        where = f"--{name.replace('_', '-')} [MRSA_{name.upper()}]: " if name else ""
        parser.error(where + first["msg"].removeprefix("Value error, "))


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to leave; the exit status."""
    parser = argparse.ArgumentParser(prog="mrsa serve", usage="mrsa serve [flags]; see mrsa serve --help")
    settings = read_settings(vars(arguments), parser)
    try:
        logs.configure(settings.log_level, settings.log_format, log_processors())
        KeyRing.of(settings)
        settings = asyncio.run(_with_store(settings))
    except (ValueError, StoreError) as error:  # the former of a URL that cannot be read, of keys, of tracing
        print(f"mrsa serve: {error}", file=sys.stderr)
        return _FAILED
    if is_taken(settings.host, settings.port):
        where = f"{settings.host}:{settings.port}"
        print(f"mrsa serve: {where} is taken by another program: --port names another", file=sys.stderr)
        return _FAILED
    raise_limit()
    room = places(settings)
    app = create_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,  # longer than clients keep their connections, so that theirs is never the stale end
        timeout_graceful_shutdown=5,  # `Runner.drain` has given the grace before
        limit_concurrency=room.connections,
        backlog=room.backlog,
    )
    server = DrainingServer(config, app, settings.shutdown_grace_s)
    server.run()
    if server.failed:
        runner: Runner = app.state.runner
        print(f"mrsa serve: the engine cannot start: {runner.host.reason}", file=sys.stderr)
        return _FAILED
    return 0


def is_taken(host: str, port: int) -> bool:
    """Whether another program listens there, known before an engine is loaded; other faults are for uvicorn to find."""
    with suppress(OSError):
        for family, kind, number, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, number) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    tried.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                try:
                    tried.bind(address)
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        return True
    return False


async def _with_store(settings: Settings) -> Settings:
    """The settings with a store that was found good before the server starts, or without one.

    Raises:
        StoreError: It cannot be used.
    """
    journal = await open_journal(settings)
    if journal is None:
        return settings.model_copy(update={"state_dir": "none"})
    await journal.store.aclose()
    return settings


def protocol(settings: Settings) -> type[Unpipelined]:
    """How connections are served, with the times that the settings give them."""

    class Protocol(Unpipelined):
        head_s = settings.header_timeout_s
        rest_s = settings.body_timeout_s

    return Protocol


class Unpipelined(HttpToolsProtocol):
    """Answers one request at a time, and closes after it where a second one came before its end.

    uvicorn would keep the second for later and stop reading: then nobody would notice that the client has left.

    A connection beyond `limit_concurrency` is told so in the words of the API, and closed: without descriptors nobody
    could be told anything. uvicorn counts requests too, and says nothing of when to come back.

    A client that keeps a connection and brings nothing, or reads nothing, is cut off: uvicorn waits for it without end,
    and takes headers of any length.

    What stands behind a body (trailers) is no header of its request: uvicorn adds it to them, where a proxy that looks
    at headers has not seen it, and keeps all of it. It is dropped, and as long as headers at most.

    Attributes:
        head_s: Seconds within which the headers of a request must have arrived.
        rest_s: Seconds for the rest of a body that was answered before its end; it is read, and dropped.
        unread_s: Seconds for which what was written may stay unread.
    """

    head_s = 15.0
    rest_s = 30.0
    unread_s = 300.0
    _crowded = False
    _heading = False  # headers have begun and not ended
    _head_bytes = 0  # of what is no body, since the last piece of one or the last headers
    _arriving = False  # a body has begun and not ended
    _late: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        most, self.limit_concurrency = self.limit_concurrency, None
        super().connection_made(transport)
        # Else what is little is not known to be unread, and a connection that is to be closed waits for it without end.
        transport.set_write_buffer_limits(high=0)
        self._expect(self.head_s)
        if most is not None and len(self.connections) > most:
            self.app = RequestScope(Turnstile(self.config.app, most))
            # As long as it may take to ask; then it goes.
            self.timeout_keep_alive_task = self.loop.call_later(_CROWDED_S, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """A client has left, or was left."""
        self._expect(None)
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads slower than is written."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.unread_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read enough for more."""
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

    def _expect(self, seconds: float | None) -> None:
        """Give the client so long to go on; None for as long as it takes, since it is not its turn."""
        if self._late is not None:
            self._late.cancel()
        self._late = None if seconds is None else self.loop.call_later(seconds, self._leave_late)

    def _leave_late(self) -> None:
        if self._heading:
            self._refuse(ApiError(408, "request_timeout", f"The headers did not arrive within {self.head_s:g} s."))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer to what is no request yet, and close; within an answer to another, or after it, nothing is said."""
        cycle = self.cycle
        if cycle is not None and cycle.response_started and (self._arriving or not cycle.response_complete):
            self.transport.close()
            return
        body = orjson.dumps(error.body())
        status = f"{error.status} {HTTPStatus(error.status).phrase}"
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._heading = True
        if self._late is None:
            self._expect(self.head_s)

    def on_response_complete(self) -> None:
        """An answer was given, perhaps before the end of the body."""
        super().on_response_complete()
        if self._arriving and not self.transport.is_closing():
            self._expect(self.rest_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or what looks like one behind a body."""
        if self._heading:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A request is there: one that comes before the answer to the last is dropped, which HTTP allows."""
        self._heading, self._arriving, self._head_bytes = False, True, 0
        self._expect(None)
        before = self.cycle
        super().on_headers_complete()
        if self.pipeline:
            self.pipeline.clear()
            before.keep_alive = False
            self.cycle = before
            self._crowded = True
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._head_bytes = 0
        if not self._crowded:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The end of a body."""
        self._arriving, self._head_bytes = False, 0
        self._expect(None)
        if not self._crowded:
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        """What follows a dropped request is not even parsed, nor what follows headers that are too long."""
        if self._crowded or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._late is None and not self._arriving and (self.cycle is None or self.cycle.response_complete):
            self._expect(self.head_s)  # uvicorn takes even an empty line for a request, and waits no less for the rest
        super().data_received(data)
        if self._head_bytes > _MOST_HEAD_BYTES and not self.transport.is_closing():
            message = f"Headers, and what stands between pieces of a body, must be at most {_MOST_HEAD_BYTES} bytes."
            self._refuse(ApiError(431, "headers_too_large", message))


def settle_heap() -> None:
    """Take what is there now, modules and the engine, out of the garbage collector's sight; let it look less often."""
    gc.unfreeze()  # what an engine that was started anew has left behind
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE)


class Turnstile:
    """What a connection gets for which there is no place; probes are answered all the same."""

    def __init__(self, app: object, connections: int) -> None:
        assert isinstance(app, FastAPI)  # `run` serves nothing else
        self._app = app
        self._connections = connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse one request."""
        if scope["path"] in QUIET:
            await self._app(scope, receive, send)
            return
        metrics: Metrics = self._app.state.metrics
        metrics.count_rejection("connections")
        await to_response(Crowded(self._connections))(scope, receive, send)


class DrainingServer(uvicorn.Server):
    """Leaves in order: not ready, runs end or are ended, and only then the sockets close."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, grace_s: float) -> None:
        super().__init__(config)
        self.failed = False
        self._engine_up = self._settled = False
        self._app = app
        self._grace_s = grace_s

    @property
    def _host(self) -> EngineHost:
        runner: Runner = self._app.state.runner
        return runner.host

    async def on_tick(self, counter: int) -> bool:
        """Also leave when the engine can never start: whoever watches the process is to know."""
        host = self._host
        if host.up and not self._engine_up and (host.engine.in_process or not self._settled):
            settle_heap()  # again only for an engine that was loaded anew: every run waits for it
            self._settled = True
        self._engine_up = host.up
        self.failed = host.health is Health.FAILED
        return self.failed or await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close. A second interrupt cuts the grace short."""
        runner: Runner = self._app.state.runner
        drain = asyncio.create_task(runner.drain(self._grace_s))
        while not drain.done() and not self.force_exit:
            await asyncio.wait((drain,), timeout=0.1)
        drain.cancel()
        await super().shutdown(sockets)
