"""`/v1/responses` after Open Responses (2026-04-24) and OpenAI's Responses API: made, streamed, retrieved, cancelled.

A response is the view of a stored run, made from the run's log whenever it is asked for. One in the background is
streamed from its log too, and never from memory: so each of its events has one number, at every replica and after every
crash, and `starting_after` goes on where a connection was cut.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from harness.engine import Engine, EngineDead
from harness.events import RunFinished
from harness.markovian_rsa import State
from harness.run import Watch
from mrsa_server.api.answering import answer
from mrsa_server.api.asking import RUN, AskService, Route
from mrsa_server.api.auth import caller_of, needs
from mrsa_server.api.completion import Reply, chosen, read_thinking, thinking_of
from mrsa_server.api.errors import ApiError, BadRequest, EngineUnavailable, RunCancelled, ShuttingDown, of_stored
from mrsa_server.api.query import boolean, integer, one_of, page, query
from mrsa_server.api.response_events import ResponseEvents
from mrsa_server.api.responses_wire import RESPONSE, check_body, continued, input_items, parse_response, previous_of
from mrsa_server.api.sse import KEEP_ALIVE, EventStream, named_frame
from mrsa_server.api.stored import Retelling, add_traces, answer_of, further, log_of, unavailable
from mrsa_server.keyring import Caller, Scope
from mrsa_server.runs.host import Health
from mrsa_server.runs.patience import promptly
from mrsa_server.runs.runner import Prepared, Run
from mrsa_server.runs.store_errors import NoSuchRun, StoreUnavailable
from mrsa_server.settings import Settings

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.store import RunStore, StoredRun

router = APIRouter()

_NAME = re.compile(rf"{RESPONSE}([0-9A-Za-z_]{{1,120}})", re.ASCII)
_EVENTS = 100  # read at once
_CANCELLING_S = 10.0  # in which the owner of a run, wherever that is, ends it; then the answer says how it stands
_CLOSING_S = 5.0  # in which the end of a run is stored whose answer was given already
_PAUSE_S = 0.25  # between tries to read what an engine alone knows
_MOST_ITEMS = 100
_USUAL_ITEMS = 20


@router.post("/v1/responses")
@needs(Scope.INFERENCE)
async def create_response(request: Request) -> Response:
    """Answer an input; `reasoning`, `mrsa` or the model's name says with how much work."""
    return await answer(request, ROUTE)


@router.post("/v1/responses/compact")
@needs(Scope.INFERENCE)
async def compact_response() -> Response:
    """Known to clients, and not served: nothing here makes a conversation shorter."""
    raise ApiError(404, "not_found", "Conversations are not compacted here: send what the model is to read.")


@router.get("/v1/responses/{response_id}")
@needs(Scope.INFERENCE)
async def get_response(request: Request, response_id: str) -> Response:
    """A response as it stands; with `stream` its events, from the one after `starting_after` on."""
    service, store, record = await _find(request, response_id)
    asked = query(request, {"stream", "starting_after", "include", "include[]", "include_obfuscation"})
    if not boolean(asked, "stream"):
        if "starting_after" in asked:
            raise BadRequest("starting_after: needs stream=true", "starting_after")
        return _json(await _body_of(service, record))
    after = integer(asked, "starting_after", 0, 2**31 - 1, -1)
    if not record.background and "starting_after" in asked:
        raise BadRequest(
            "starting_after: this response was not made with background=true, so its events have no numbers that last",
            "starting_after",
        )
    return _stream(service, store, record, after)


@router.post("/v1/responses/{response_id}/cancel")
@needs(Scope.INFERENCE)
async def cancel_response(request: Request, response_id: str) -> Response:
    """End a response that is made in the background, wherever that is; one that has ended stays as it is."""
    service, store, record = await _find(request, response_id)
    if not record.background:
        raise BadRequest("response_id: only a response made with background=true can be cancelled", "response_id")
    if record.ended_at is None:
        await store.request_cancel(record.run_id)  # nothing is left to cancel where it has just ended: then no wait
        try:
            await store.wait(record.run_id, 2**31 - 1, _CANCELLING_S)
        except NoSuchRun:
            raise _unknown(response_id) from None
        record = await store.get(record.run_id) or record
    return _json(await _body_of(service, record))


@router.delete("/v1/responses/{response_id}")
@needs(Scope.INFERENCE)
async def delete_response(request: Request, response_id: str) -> Response:
    """Forget a response with its run; one that is still made is ended first."""
    service, store, record = await _find(request, response_id)
    here = service.runner.find(record.run_id)
    if here is not None:
        here.cancel(RunCancelled())
    await store.delete(record.run_id)
    service.keys.forget(record.run_id)
    return _json({"id": response_id, "object": "response", "deleted": True})


@router.get("/v1/responses/{response_id}/input_items")
@needs(Scope.INFERENCE)
async def list_input_items(request: Request, response_id: str) -> Response:
    """What a response was asked with, earlier turns included, the newest first unless `order` is `asc`."""
    _, _, record = await _find(request, response_id)
    asked = query(request, {"after", "include", "include[]", "limit", "order"})
    limit = integer(asked, "limit", 1, _MOST_ITEMS, _USUAL_ITEMS)
    items = input_items(record.body, record.run_id.removeprefix(RUN))
    if one_of(asked.get("order", "desc"), "order", ("asc", "desc")) == "desc":
        items.reverse()
    if "after" in asked:
        place = next((number for number, item in enumerate(items) if item["id"] == asked["after"]), None)
        if place is None:
            raise BadRequest(f"after: there is no item {asked['after'][:128]!r}", "after")
        items = items[place + 1 :]
    return _json(page(items[:limit], more=len(items) > limit))


def _read(raw: bytes, settings: Settings, name: str, created: int) -> Reply:
    asking = parse_response(raw, settings)
    return Reply(asking.chat, f"{RESPONSE}{name}", created, form=asking.form)


async def _whole(run: Run, state: State, reply: Reply, engine: Engine) -> dict[str, object]:
    events = ResponseEvents(run, reply, late=True)
    frames = [*events.take(Prepared(state, Watch.NONE))]
    thinking = await thinking_of(run, chosen(state, 1)[0], engine) if events.reads_thinking else ""
    frames += events.finish(state, thinking)  # they are of no use here, the body is what they end in
    return events.body


async def _complete(service: AskService, raw: bytes, caller: Caller) -> bytes:
    """A body whose input begins with the conversation that it goes on with.

    Raises:
        BadRequest: There is no such response, or it has no answer; or the body is not good by itself, or too large with
            the conversation.
        InvalidParams: Likewise.
        StoreUnavailable: The database does not answer.
    """
    check_body(raw)
    earlier = previous_of(raw)
    if earlier is None or service.store is None:
        return raw
    try:
        parse_response(raw, service.settings)  # so that an error names the places that the client wrote
    except BadRequest as error:
        if error.param != "input":  # what is too little by itself may do as the end of more
            raise
    async with promptly(service.store):
        record = await _look_up(service, service.store, earlier, caller)
    if record is None:
        raise BadRequest(
            f"previous_response_id: there is no response {earlier[:128]!r}",
            "previous_response_id",
            "previous_response_not_found",
        )
    if record.ended_at is None:
        raise BadRequest(f"previous_response_id: {earlier} is still being made", "previous_response_id")
    try:
        body = await answer_of(service, record)
    except ApiError as error:
        message = f"previous_response_id: {earlier} has no answer to go on with: {error.message}"
        raise BadRequest(message, "previous_response_id") from None
    whole = continued(raw, record.body, body["output"])
    most = service.settings.max_body_bytes
    if len(whole) > most:  # else each turn would be stored with all before it, and grow by a body
        message = f"previous_response_id: the conversation has {len(whole)} bytes with it, and may have {most}"
        raise BadRequest(message, "previous_response_id", "request_too_large")
    return whole


async def _detached(service: AskService, record: StoredRun) -> Response:
    """The answer to a request for a response in the background, whose run is stored by now."""
    assert service.store is not None  # the record is its
    told = Retelling(service, record)
    if told.reply.chat.body.stream:
        return _stream(service, service.store, record, -1)
    return _json(await _body_of(service, record))


ROUTE = Route("response", _read, ResponseEvents, _whole, _complete, _detached)


async def _body_of(service: AskService, record: StoredRun) -> dict[str, object]:
    """A response as it stands.

    Raises:
        ApiError: This version cannot read its run.
        StoreUnavailable: The database does not answer.
    """
    store = service.store
    assert store is not None  # the record is its
    told = Retelling(service, record)
    events = ResponseEvents(told.run, told.reply, late=not record.background)
    # While it is made its start is enough: clients poll, and to fold the log of a long run takes 0.1 s.
    for stored in await log_of(store, record.run_id, limit=None if record.ended_at is not None else 1):
        for item in told.take(stored):
            for _ in events.take(item):
                pass
    if record.ended_at is None:
        return events.so_far("queued" if told.run.state is None else "in_progress")
    if events.reads_thinking:
        await add_traces(store, told.run)
    # Whoever asks for the answer gets it, with or without what an engine that is away alone could read.
    _finish(record, told, events, await _thinking(service, told.run, 0) or "")
    return events.body


def _finish(record: StoredRun, told: Retelling, events: ResponseEvents, thinking: str) -> bytes:
    """The last frames of a response whose run has ended and was told to its end."""
    state = told.run.state
    if record.error is not None and record.status != "cancelled":
        return events.fail(of_stored(record.error))
    if record.status not in ("finished", "stopped") or state is None:
        return events.cancel()
    return b"".join(events.finish(state, thinking))


async def _thinking(service: AskService, run: Run, wait_s: float) -> str | None:
    """The thinking before the answer of a run whose traces are there; None where its engine did not come in time.

    Raises:
        EngineUnavailable: It never will, and it was to be waited for.
    """
    if not run.traces or run.state is None or not isinstance(run.state.outcome, RunFinished):
        return ""
    host = service.runner.host
    try:
        await host.wait_up(wait_s)
        return await read_thinking(run, chosen(run.state, 1)[0], host.engine)
    except EngineDead as error:
        host.lost(str(error))
    except EngineUnavailable:
        if host.health is Health.FAILED and wait_s:
            raise
    return None


def _stream(service: AskService, store: RunStore, record: StoredRun, after: int) -> Response:
    last = after

    def noted(number: int) -> None:
        nonlocal last
        last = max(last, number)

    def broken(error: ApiError) -> bytes:
        """The stream ends here, and the response does not: so nothing is numbered."""
        blame = error.body()["error"]
        hint = error.message
        if record.background and error.status >= 500:
            hint = f"{hint.rstrip('.')}. Go on with starting_after={last}."
        assert isinstance(blame, dict)  # as the shape of errors has it
        fields = {"type": "error", "sequence_number": max(last, 0), "code": error.code, "message": hint, "param": None}
        return named_frame("error", {**fields, "error": {**blame, "message": hint}})

    return EventStream(lambda: _frames(service, store, record, after, noted), broken)


async def _frames(
    service: AskService, store: RunStore, record: StoredRun, after: int, noted: Any
) -> AsyncGenerator[bytes, None]:
    """The events of a response, from its log: while its run goes on and afterwards."""
    told = Retelling(service, record)
    events = ResponseEvents(told.run, told.reply, late=not record.background, after=after)
    frames = b"".join(events.queued()) if record.background else b""
    number = 0
    clock, keep_alive_s = asyncio.get_running_loop().time, service.settings.keep_alive_s
    yield frames or KEEP_ALIVE
    noted(events.last)
    said = clock()
    try:
        while True:
            found = await log_of(store, record.run_id, number, _EVENTS)
            for stored in found:
                number = stored.number
                frames = b"".join(part for item in told.take(stored) for part in events.take(item))
                if frames:
                    yield frames
                    said = clock()
                noted(events.last)
            if not found:
                left_s = max(0.0, said + keep_alive_s - clock())
                progress = await further(store, service.runner, record.run_id, number, left_s)
                if progress is not None and progress <= number:
                    break
            if clock() - said >= keep_alive_s:  # much may happen that this client is not told
                yield KEEP_ALIVE
                said = clock()
        ended = await store.get(record.run_id)
        if ended is None:
            raise NoSuchRun(record.run_id)
        told.run.ended_at = ended.ended_at
        if events.reads_thinking:
            await add_traces(store, told.run)
        # Its events have numbers too: a stream that left them out would number anew what follows.
        thinking = await _thinking(service, told.run, 0)
        until = clock() + service.settings.engine_wait_s
        while thinking is None:
            if service.runner.left.is_set():
                raise ShuttingDown
            if clock() >= until:
                raise EngineUnavailable(service.runner.host.reason)
            yield KEEP_ALIVE
            await asyncio.sleep(_PAUSE_S)
            thinking = await _thinking(service, told.run, min(keep_alive_s, max(0.1, until - clock())))
        yield _finish(ended, told, events, thinking)
    except NoSuchRun:
        raise ApiError(404, "not_found", "The response was deleted while it was read.") from None
    except StoreUnavailable as error:
        raise unavailable(error) from None


async def _find(request: Request, response_id: str) -> tuple[AskService, RunStore, StoredRun]:
    service: AskService = request.app.state.asking
    if service.store is None:
        raise ApiError(
            404,
            "responses_not_stored",
            "This server stores no responses: start it with --state-dir DIR or MRSA_DATABASE_URL.",
        )
    record = await _look_up(service, service.store, response_id, caller_of(request))
    if record is None:
        raise _unknown(response_id)
    return service, service.store, record


async def _look_up(service: AskService, store: RunStore, response_id: str, caller: Caller) -> StoredRun | None:
    """A response that a caller sees; one whose answer it may have already, as it was answered.

    In the foreground that comes before the run's end is on the disk: whoever goes on with it at once would be told that
    it is still being made.
    """
    name = _NAME.fullmatch(response_id)
    record = await store.get(RUN + name[1]) if name else None
    if record is None or record.kind != "response" or not caller.sees(record.key_id):
        return None
    if record.ended_at is not None or record.background or service.runner.find(record.run_id) is not None:
        return record
    try:
        await store.wait(record.run_id, 2**31 - 1, _CLOSING_S)
    except NoSuchRun:
        return None
    return await store.get(record.run_id)


def _unknown(response_id: str) -> ApiError:
    return ApiError(404, "not_found", f"There is no response {response_id[:128]!r}.")


def _json(body: object) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
