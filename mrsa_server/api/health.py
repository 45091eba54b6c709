"""`/health/*` and `/metrics`: for probes and Prometheus."""

from __future__ import annotations

import asyncio

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from mrsa_server.api.auth import needs, public
from mrsa_server.api.errors import ApiError
from mrsa_server.keyring import Scope
from mrsa_server.metrics import Metrics
from mrsa_server.runs.pulse import Pulse
from mrsa_server.runs.runner import Runner

router = APIRouter()


@router.get("/health/live")
@public
async def live() -> Response:
    """The event loop turns: that is all that a restart could mend."""
    return Response(orjson.dumps({"status": "ok"}), media_type="application/json")


@router.get("/health/ready")
@public
async def ready(request: Request) -> Response:
    """Requests would be answered: engine and store answer, the server stays. A full queue is no reason against."""
    runner: Runner = request.app.state.runner
    if runner.draining:
        raise ApiError(503, "not_ready", "The server is shutting down.")
    if not await runner.host.check():
        raise ApiError(503, "not_ready", f"The engine is not up ({runner.host.health}): {runner.host.reason}")
    pulse: Pulse | None = request.app.state.pulse
    if pulse is not None and (reason := await pulse.check()) is not None:
        raise ApiError(503, "not_ready", f"The store is away: {reason}")
    return Response(orjson.dumps({"status": "ok"}), media_type="application/json")


@router.get("/metrics")
@needs(Scope.METRICS)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    runner: Runner = request.app.state.runner
    found: Metrics = request.app.state.metrics
    pulse: Pulse | None = request.app.state.pulse
    found.engine_up.set(runner.host.up)
    found.tasks.set(len(asyncio.all_tasks()))
    if pulse is not None and found.store is not None:
        found.store.up.set(await pulse.check() is None)
    return Response(found.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
