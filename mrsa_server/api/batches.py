"""`/v1/batches`: many requests in a file, answered in files; and how a line of one is read and answered."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from harness.types import InvalidParams
from mrsa_server.api.asking import AskService, Route, read_body
from mrsa_server.api.auth import caller_of, needs
from mrsa_server.api.batches_wire import ENDPOINTS, BatchBody, batch_object, hours, parse_batch, spent_of
from mrsa_server.api.errors import NO_RETRY, ApiError, BadRequest, KeyInUse, of_params
from mrsa_server.api.files import find_file, not_stored
from mrsa_server.api.idempotency import digest_of, read_key
from mrsa_server.api.query import integer, page, query
from mrsa_server.api.sse import ClientGone
from mrsa_server.api.stored import answer_of
from mrsa_server.keyring import Caller, Scope, maker
from mrsa_server.runs.patience import promptly
from mrsa_server.runs.requests import Answered, Checked, Requests

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.batch_store import BatchStore, StoredBatch
    from mrsa_server.runs.file_store import FileStore
    from mrsa_server.runs.store import StoredRun

router = APIRouter()

_NAME = re.compile(r"batch_[0-9a-z]{1,64}", re.ASCII)
_MOST_BATCHES = 100  # on a page
_USUAL_BATCHES = 20


@dataclass(frozen=True, slots=True)
class BatchesService:
    """What the routes need of the server, where it has a store.

    Attributes:
        batches: Where batches are.
        files: Where their files are.
        wake: Tells who keeps batches that there is something to do.
        body_timeout_s: As of other bodies.
        max_body_bytes: Likewise.
    """

    batches: BatchStore
    files: FileStore
    wake: Callable[[], None]
    body_timeout_s: float
    max_body_bytes: int


def _service(request: Request) -> BatchesService:
    service: BatchesService | None = request.app.state.batches
    if service is None:
        raise not_stored()
    return service


@router.post("/v1/batches")
@needs(Scope.INFERENCE)
async def create_batch(request: Request) -> Response:
    """Begin a batch: `input_file_id`, `endpoint`, `completion_window`, `metadata`, `output_expires_after`."""
    service, caller = _service(request), caller_of(request)
    try:
        key = read_key(request.headers.get("idempotency-key"), caller.key_id)
        raw = await read_body(request, service.max_body_bytes, service.body_timeout_s)
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    digest = digest_of(request.scope["path"].encode() + b"\0" + raw)
    async with promptly(service.batches) as wanted:
        if key is not None and (earlier := await service.batches.find_key(key)) is not None:
            return await _same(service, earlier, digest)
        made = await _made(service, caller, parse_batch(raw), key, digest, wanted)
    service.wake()
    return await _same(service, made, digest)


async def _made(
    service: BatchesService, caller: Caller, body: BatchBody, key: str | None, digest: bytes, wanted: Callable[[], bool]
) -> StoredBatch:
    """A new batch, or the one that has its key of idempotency."""
    from mrsa_server.runs.batch_store import NewBatch  # it is there, since there is a store

    file = await find_file(service.files, body.input_file_id, caller)
    if file is None or file.purpose != "batch":
        message = f"input_file_id: there is no file {body.input_file_id[:128]!r} of the purpose batch"
        raise BadRequest(message, "input_file_id")
    now = time.time()
    record = NewBatch(
        # Its time first, so that names sort as batches were made.
        batch_id=f"batch_{int(now * 1000):012x}{uuid.uuid4().hex[:20]}",
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        created_at=now,
        expires_at=now + hours(body.completion_window) * 3_600,
        output_expires_s=body.output_expires_after.seconds if body.output_expires_after else None,
        metadata=body.metadata,
        idempotency_key=key,
        body_digest=digest,
        key_id=caller.key_id,
    )
    return await service.batches.create(record, wanted=wanted)


async def _same(service: BatchesService, batch: StoredBatch, digest: bytes) -> Response:
    """The batch of a request, which may have come before."""
    if batch.body_digest != digest:
        raise KeyInUse
    return await _told(service, batch)


@router.get("/v1/batches")
@needs(Scope.INFERENCE)
async def list_batches(request: Request) -> Response:
    """A page of batches, the newest first, from the one `after` on."""
    service = _service(request)
    asked = query(request, {"after", "limit"})
    limit = integer(asked, "limit", 1, _MOST_BATCHES, _USUAL_BATCHES)
    if "after" in asked and not _NAME.fullmatch(asked["after"]):
        raise BadRequest(f"after: there is no batch {asked['after'][:128]!r}", "after")
    found = await service.batches.list_batches(
        after=asked.get("after"), limit=limit + 1, key_id=caller_of(request).only
    )
    shown = found[:limit]
    counts = await service.batches.counts([batch.batch_id for batch in shown])
    return _json(page([batch_object(batch, counts.get(batch.batch_id)) for batch in shown], more=len(found) > limit))


@router.get("/v1/batches/{batch_id}")
@needs(Scope.INFERENCE)
async def get_batch(request: Request, batch_id: str) -> Response:
    """A batch and how far it is."""
    service = _service(request)
    return await _told(service, await _find(request, service, batch_id))


async def _find(request: Request, service: BatchesService, batch_id: str) -> StoredBatch:
    batch = await service.batches.get(batch_id) if _NAME.fullmatch(batch_id) else None
    if batch is None or not caller_of(request).sees(batch.key_id):
        raise _unknown(batch_id)
    return batch


@router.post("/v1/batches/{batch_id}/cancel")
@needs(Scope.INFERENCE)
async def cancel_batch(request: Request, batch_id: str) -> Response:
    """End a batch; what has an answer by then is in its output."""
    service = _service(request)
    await _find(request, service, batch_id)
    batch = await service.batches.request_cancel(batch_id)
    if batch is None:
        raise _unknown(batch_id)
    if batch.status not in ("cancelling", "cancelled"):
        raise ApiError(409, "batch_ended", f"A batch that is {batch.status} cannot be cancelled.", headers=NO_RETRY)
    service.wake()
    return await _told(service, batch)


def _unknown(batch_id: str) -> ApiError:
    return ApiError(404, "not_found", f"There is no batch {batch_id[:128]!r}.")


async def _told(service: BatchesService, batch: StoredBatch) -> Response:
    counts = await service.batches.counts([batch.batch_id])
    return _json(batch_object(batch, counts.get(batch.batch_id)))


def _json(body: object) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")


# Lines.


def requests_of(service: AskService) -> Requests:
    """How lines are read and answered: as the routes would, were they sent one by one."""

    async def check(endpoint: str, body: bytes, key_id: str | None) -> Checked:
        route = service.routes[ENDPOINTS[endpoint]]
        try:
            if route.complete is not None:
                body = await route.complete(service, body, maker(key_id))
            return await asyncio.to_thread(_checked, service, route, body)
        except InvalidParams as error:
            return _refused(route, body, of_params(error))
        except ApiError as error:
            return _refused(route, body, error)

    async def answer(run: StoredRun) -> Answered:
        body = await answer_of(service, run)
        return Answered(orjson.dumps(body), spent_of(run.kind, body))

    async def ready() -> None:
        await service.runner.host.wait_up(None)  # before that nobody may know the model's name

    return Requests(ready, check, answer, service.settings.max_body_bytes)


def _checked(service: AskService, route: Route, body: bytes) -> Checked:
    reply, wishes = service.read(route, body, "", 0)
    if reply.chat.body.stream:
        raise BadRequest("stream: a line of a batch cannot be streamed", "stream")
    return Checked(route.kind, body, reply.chat.model, wishes.effort.value, reply.metadata)


def _refused(route: Route, body: bytes, error: ApiError) -> Checked:
    model = orjson.loads(body).get("model")
    return Checked(route.kind, body, model[:256] if isinstance(model, str) else "", error=error)
