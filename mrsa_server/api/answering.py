"""A request that starts a run is answered: at its end, as a stream, by what its key of idempotency stands for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from functools import partial
from typing import TYPE_CHECKING

import orjson
from fastapi import Request
from starlette.responses import Response

from harness.run import Watch
from harness.types import InvalidParams
from mrsa_server.api.asking import AskService, Key, Route, Writer, read_body, submit, trace_of_request
from mrsa_server.api.auth import caller_of
from mrsa_server.api.errors import KeyBusy, KeyInUse, RunCancelled, of_params
from mrsa_server.api.idempotency import Asked, Kept, digest_of, read_key
from mrsa_server.api.sse import KEEP_ALIVE, ClientGone, EventStream, error_frame, until_gone
from mrsa_server.api.stored import asked_again, unavailable, until_ended
from mrsa_server.runs.patience import promptly
from mrsa_server.runs.runner import Prepared, Run, Subscription
from mrsa_server.runs.store_errors import StoreUnavailable

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.store import StoredRun

# A stream says that it lives before the second in which its first bytes have to leave.
_FIRST_BYTES_S = 0.5
_REPLAYED = {"idempotent-replayed": "true"}


async def answer(request: Request, route: Route) -> Response:
    """Start the run that a request asks for, and answer with it."""
    service: AskService = request.app.state.asking
    settings, caller = service.settings, caller_of(request)
    request.state.ratelimit = partial(service.runner.tenants.headers, caller.key_id)
    try:
        name = read_key(request.headers.get("idempotency-key"), caller.key_id)
        raw = await read_body(request, settings.max_body_bytes, settings.body_timeout_s)
        # What is valid on one route says nothing on another. Not `request.url`, which is made of the Host header.
        asking = request.scope["path"].encode() + b"\0" + raw
        key = None if name is None else Key(name, digest_of(asking))
        if (earlier := await _earlier(request, service, key)) is not None:
            return earlier
        if route.complete is not None:
            raw = await route.complete(service, raw, caller)
        found = service.keys.find(name, asking)  # again: nothing comes between this and the new run
        if isinstance(found, Kept):
            return _replayed(found)
        asked = found or submit(service, route, raw, caller, key, trace_of_request(request))
        if asked.reply.background:
            async with until_gone(request.receive):
                return await _detached(service, route, asked)
        if found is None and key is not None:
            service.keys.put(key.name, asking, asked, lambda: _whole(service, route, asked))
        run, reply = asked
        if reply.chat.body.stream:
            late = run.state is not None
            subscription = run.subscribe()  # before the run's first step, so that nothing of it is missed
            writer = route.stream(run, reply, late)
            return EventStream(lambda: _frames(run, subscription, writer, settings.keep_alive_s), writer.fail)
        async with until_gone(request.receive):
            await run.finished()
            body = await _whole(service, route, asked)
        return Response(body, media_type="application/json")
    except InvalidParams as error:
        raise of_params(error) from None
    except ClientGone:
        return Response(status_code=499)  # nobody reads it


async def _earlier(request: Request, service: AskService, key: Key | None) -> Response | None:
    """What a key stands for in the store; None where that is for this server alone to know."""
    if key is None or service.store is None or key.name in service.keys:
        return None
    async with promptly(service.store):
        record = await service.store.find_key(key.name)
    if record is None:
        return None
    if record.body_digest != key.digest:
        raise KeyInUse
    route = service.routes[record.kind]
    if record.background:
        assert route.detached is not None  # it was answered before
        return await route.detached(service, record)
    if route.read(record.body, service.settings, "", 0).chat.body.stream:
        return EventStream(lambda: _late(service, record), error_frame)
    async with until_gone(request.receive):
        return Response(await _again(service, record), headers=_REPLAYED, media_type="application/json")


async def _again(service: AskService, record: StoredRun) -> bytes:
    """The whole response of a run that may still be under way, here or elsewhere."""
    assert service.store is not None  # the record is its
    ended = record if record.ended_at is not None else await until_ended(service.store, record.run_id)
    if ended.status == "cancelled" and not ended.cancel_requested:  # whoever had begun it has left, and nobody else
        raise KeyBusy
    return await _whole(service, service.routes[record.kind], await asked_again(service, ended))


async def _late(service: AskService, record: StoredRun) -> AsyncGenerator[bytes, None]:
    """A response that comes as a whole, as a stream that says meanwhile that it lives."""
    again = asyncio.create_task(_again(service, record), name=f"again {record.run_id}")
    silence_s = min(_FIRST_BYTES_S, service.settings.keep_alive_s)
    try:
        while not (await asyncio.wait((again,), timeout=silence_s))[0]:
            yield KEEP_ALIVE
            silence_s = service.settings.keep_alive_s
        try:
            yield again.result()
        except StoreUnavailable as error:
            raise unavailable(error) from None
    finally:
        again.cancel()


async def _detached(service: AskService, route: Route, asked: Asked) -> Response:
    """The first answer to a request whose run goes on by itself."""
    run = asked.run
    try:
        await run.stored.wait()
        if run.book is None or service.store is None:
            raise run.error or RunCancelled()
        async with promptly(service.store):
            record = await service.store.get(run.id)
            if record is None:
                raise run.error or RunCancelled()
            assert route.detached is not None  # or no request could ask for it
            return await route.detached(service, record)
    except (asyncio.CancelledError, StoreUnavailable):  # who asked never hears its name
        run.cancel(RunCancelled())
        raise


async def _whole(service: AskService, route: Route, asked: Asked) -> bytes:
    """The whole response of a run that has ended with an answer."""
    run, reply = asked
    assert run.state is not None  # it has ended without an error
    if not reply.chat.body.stream:
        return orjson.dumps(await route.whole(run, run.state, reply, service.runner.host.engine))
    writer = route.stream(run, reply, True)
    return b"".join((*writer.take(Prepared(run.state, Watch.NONE)), *writer.finish(run.state)))


def _replayed(kept: Kept) -> Response:
    """A response that was given before."""
    headers = {**_REPLAYED, **({"cache-control": "no-cache"} if kept.streamed else {})}
    return Response(
        kept.body, headers=headers, media_type=EventStream.media_type if kept.streamed else "application/json"
    )


async def _frames(
    run: Run, subscription: Subscription, writer: Writer, keep_alive_s: float
) -> AsyncGenerator[bytes, None]:
    """The stream of a run; closing it leaves the run."""
    clock = asyncio.get_running_loop().time
    said, silence_s = clock(), min(_FIRST_BYTES_S, keep_alive_s)
    try:
        while True:
            frames, error = _write(())
            try:
                items = await subscription.next(max(0.0, said + silence_s - clock()))
                if not items:
                    break
                frames, error = _write(part for item in items for part in writer.take(item))
            except TimeoutError:
                pass
            if not frames and clock() - said >= silence_s:  # much may happen that this client is not told
                frames = KEEP_ALIVE
            if frames:
                yield frames
                said, silence_s = clock(), keep_alive_s
            if error is not None:
                raise error
        assert run.state is not None  # it has ended without an error
        frames, error = _write(writer.finish(run.state))
        if frames:
            yield frames
        if error is not None:
            raise error
    finally:
        run.leave(subscription)


def _write(parts: Iterable[bytes]) -> tuple[bytes, Exception | None]:
    """Frames, and what broke after them: a writer counts on all that it has handed out being sent."""
    written: list[bytes] = []
    try:
        for part in parts:
            written.append(part)
    except Exception as error:
        return b"".join(written), error
    return b"".join(written), None
