"""Settings -> application. The lifespan is the only place that builds and closes things."""

from __future__ import annotations

import asyncio
import re
import socket
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import isinf
from typing import TYPE_CHECKING

import structlog
from fastapi import Depends, FastAPI, Request
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from harness.prompts import load_templates
from mrsa_server import __version__
from mrsa_server.api import batches, chat, export, files, health, models, openapi, responses, runs
from mrsa_server.api.asking import AskService
from mrsa_server.api.auth import Gate, authorize
from mrsa_server.api.errors import NO_RETRY, ApiError, StoreAway, to_response
from mrsa_server.api.idempotency import Keys
from mrsa_server.descriptors import Places, current_limit, share_out
from mrsa_server.engines.build import ServedEngine, build
from mrsa_server.keyring import Caller, KeyRing
from mrsa_server.metrics import Metrics, StoreMetrics
from mrsa_server.runs.admission import Admission
from mrsa_server.runs.host import EngineHost
from mrsa_server.runs.journal import Journal
from mrsa_server.runs.pulse import Pulse
from mrsa_server.runs.retention import Keep, forget
from mrsa_server.runs.runner import Runner
from mrsa_server.runs.store_errors import StoreError, StoreUnavailable
from mrsa_server.runs.tenants import Tenants
from mrsa_server.settings import Settings, usual_state_dir
from mrsa_server.tracing import Tracing, open_tracing

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.batch_keeper import BatchKeeper
    from mrsa_server.runs.store import RunStore

_DAY_S = 86_400.0
# All that is served; each route has a rule of `auth` beside it, or refuses.
ROUTERS = (
    chat.router,
    responses.router,
    runs.router,
    export.router,
    files.router,
    batches.router,
    models.router,
    health.router,
    openapi.router,
)

log = structlog.get_logger("mrsa.http")


def create_app(settings: Settings, engine: ServedEngine | None = None, tracing: Tracing | None = None) -> FastAPI:
    """The application; nothing is built before its lifespan begins.

    Args:
        settings: All of them.
        engine: Served in place of the one that the settings name; it is started and closed here all the same.
        tracing: Of runs, in place of what the environment asks for; it is closed here.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        metrics = Metrics()
        ring = KeyRing.of(settings)
        host = EngineHost(engine or build(settings), sleeps=settings.engine_sleeps)
        admission = Admission(
            host,
            metrics,
            max_tokens=settings.max_inflight_tokens,
            max_calls=places(settings).calls,
        )
        templates = load_templates()
        journal = await open_journal(settings)
        traced = tracing or open_tracing(settings.engine)
        runner = Runner(
            host,
            admission,
            metrics,
            journal=journal,
            max_runs=settings.max_runs,
            max_batch_runs=settings.max_batch_runs,
            max_queued=settings.max_queued,
            engine_wait_s=settings.engine_wait_s,
            tenants=Tenants(ring, metrics, settings.max_committed_tokens),
            tracing=traced,
        )
        names = models.ModelNames(host, settings.served_model, int(time.time()))
        keys = Keys(settings.idempotency_keep_s, settings.max_idempotency_keys)
        app.state.gate = Gate(ring, metrics, settings.metrics_open)
        app.state.metrics, app.state.runner, app.state.models = metrics, runner, names
        store = None if journal is None else journal.store
        routes = {route.kind: route for route in (chat.ROUTE, responses.ROUTE)}
        kept_here = settings if store is not None else settings.model_copy(update={"state_dir": "none"})
        asking = app.state.asking = AskService(kept_here, runner, names, templates, keys, routes, store)
        pulse = app.state.pulse = None if store is None else Pulse(store)
        app.state.runs = runs.RunsService(store, runner, templates, settings.keep_alive_s)
        app.state.batches, app.state.files = None, files.FilesService(None, 0, 0)
        lives = [asyncio.create_task(host.run(), name="engine"), asyncio.create_task(ring.keep(), name="keys")]
        if journal is not None:
            log.info("runs are stored", store=journal.store.name)
            journal.store.observer = metrics.store = StoreMetrics(metrics)
            lives.append(asyncio.create_task(journal.keep(), name="leases"))
            lives.append(asyncio.create_task(forget(journal.store, kept(settings)), name="retention"))
            adopting = runner.adopt(journal, templates, lambda: names.names, asking.revive)
            lives.append(asyncio.create_task(adopting, name="runs left behind"))
            keeper = keep_batches(app, asking, journal.store)
            lives.append(asyncio.create_task(keeper.run(), name="batches"))
        for life in lives:
            life.add_done_callback(_mourn)
        if journal is None:
            log.info("runs live in memory")
        try:
            yield
        finally:
            await runner.aclose()
            await keys.aclose()
            for life in lives:
                life.cancel()
            await asyncio.wait(lives)
            if pulse is not None:
                await pulse.aclose()
            if journal is not None:
                await journal.store.aclose()
            await traced.aclose()

    app = FastAPI(
        title="mrsa-server",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,  # ours says more (`api.openapi`); FastAPI's pages load their scripts from elsewhere
        dependencies=[Depends(authorize)],
        # Of its own, in newer versions: it would tell what stands in errors, and of every probe.
        telemetry={"auto_configure": False, "tracing": False, "metrics": False, "logs": False},
        redirect_slashes=False,  # a redirect's target would be made of the client's own Host header
    )
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(StoreUnavailable, _store_away)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_middleware(RequestScope)
    return app


async def open_journal(settings: Settings) -> Journal | None:
    """Where runs are written down; None where they are not, be it that the usual folder cannot be written.

    Raises:
        StoreError: The database cannot be used as it is.
    """
    if settings.store_url is None:
        if not settings.store_is_asked_for:
            _warn_of_memory("~/.local/state/mrsa-server", "there is no home directory")
        return None
    from mrsa_server.runs.store import RunStore  # a server without a store loads no database

    url, owner = settings.store_url.get_secret_value(), f"{socket.gethostname()}-{uuid.uuid4().hex[:12]}"
    store = RunStore(url, owner=owner, lease_s=settings.lease_s, keep_traces=settings.keep_traces_days > 0)
    try:
        await store.open()
    except StoreError as error:
        await store.aclose()
        if settings.store_is_asked_for or not isinstance(error, StoreUnavailable):
            raise
        _warn_of_memory(str(usual_state_dir()), error.reason)
        return None
    return Journal(store)


def _warn_of_memory(folder: str, reason: str) -> None:
    log.warning(
        "runs live in memory and end with this server: the usual folder cannot be used; --state-dir DIR names another, "
        "--state-dir none accepts this",
        folder=folder,
        reason=reason,
    )


def _mourn(life: asyncio.Task[None]) -> None:
    if not life.cancelled() and (error := life.exception()) is not None:
        log.error("a part of the server broke", part=life.get_name(), exc_info=error)


def keep_batches(app: FastAPI, asking: AskService, store: RunStore) -> BatchKeeper:
    """Files and batches for their routes, and who keeps them."""
    from mrsa_server.runs.batch_keeper import BatchKeeper  # a server without a store loads no database
    from mrsa_server.runs.batch_store import BatchStore
    from mrsa_server.runs.file_store import FileStore

    settings = asking.settings
    stored, uploaded = BatchStore(store), FileStore(store)
    keeper = BatchKeeper(store, stored, uploaded, batches.requests_of(asking), asking.runner.wake)
    app.state.files = files.FilesService(uploaded, settings.max_file_bytes, settings.body_timeout_s)
    app.state.batches = batches.BatchesService(
        stored, uploaded, keeper.wake, settings.body_timeout_s, settings.max_body_bytes
    )
    return keeper


def kept(settings: Settings) -> Keep:
    """How long what is stored is kept."""
    runs, traces = (_DAY_S * days for days in (settings.keep_runs_days, settings.keep_traces_days))
    return Keep(
        runs_s=None if isinf(runs) else runs,
        traces_s=None if isinf(traces) else traces,
        keys_s=settings.idempotency_keep_s,
    )


def places(settings: Settings) -> Places:
    """How many connections and calls the file descriptors allow, as they are limited now."""
    return share_out(current_limit(), settings.max_inflight_calls, remote=settings.engine == "openai")


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # registered for it alone
    if error.status in (408, 413):
        metrics: Metrics = request.app.state.metrics
        metrics.count_rejection("body")
    return to_response(error)


async def _store_away(request: Request, error: Exception) -> Response:
    assert isinstance(error, StoreUnavailable)  # registered for it alone
    return to_response(StoreAway(error.reason))


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)  # registered for it alone
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    message = f"{request.method} {request.scope['path']}: {error.detail}"
    return to_response(ApiError(error.status_code, code, message, headers=tuple((error.headers or {}).items())))


_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)
QUIET = frozenset({"/health/live", "/health/ready", "/metrics"})


class RequestScope:
    """Outermost: gives each request its id, logs it, and turns what breaks into a 500 that tells nothing.

    Not Starlette's own middleware class, which copies every body through a stream.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        state: dict[str, object] = scope.setdefault("state", {})
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        start = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if callable(ratelimit := state.get("ratelimit")):
                    for name, value in ratelimit().items():
                        headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("request broke", request_id=request_id, path=scope["path"])
            if status:
                raise  # the connection has to be cut: half an answer must not look like a whole one
            broken = ApiError(500, "internal_error", "The server failed.", headers=NO_RETRY)
            await to_response(broken)(scope, receive, send_with_id)
        if scope["path"] not in QUIET:
            caller = state.get("caller")
            log.info(
                "request",
                request_id=request_id,
                key_id=caller.key_id if isinstance(caller, Caller) else None,
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=round(time.perf_counter() - start, 3),
            )
