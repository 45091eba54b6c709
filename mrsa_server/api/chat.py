"""`POST /v1/chat/completions`, streamed and not, and how any route starts a run and answers with it."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple, Protocol

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from harness.engine import Engine, EngineError, Vocabulary
from harness.markovian_rsa import State, init
from harness.prompts import Templates
from harness.run import Watch
from harness.types import InvalidParams, Problem
from mrsa_server.api.chunks import ChatChunks
from mrsa_server.api.completion import Reply, completion
from mrsa_server.api.effort import Wishes, check_limits, check_thinking, check_unstreamed, decide_params
from mrsa_server.api.errors import ApiError, BadRequest, EngineFailed, of_params, renamed
from mrsa_server.api.idempotency import Asked, Kept, Keys, read_key
from mrsa_server.api.models import ModelNames
from mrsa_server.api.sse import KEEP_ALIVE, ClientGone, EventStream, until_gone
from mrsa_server.api.wire import Chat, parse_chat, to_problem, to_wishes
from mrsa_server.engines.build import ServedEngine
from mrsa_server.runs.record import NewRun, RunKind
from mrsa_server.runs.runner import Item, Prepared, Run, Runner, Subscription
from mrsa_server.settings import Settings

router = APIRouter()

# A stream says that it lives before the second in which its first bytes have to leave.
_FIRST_BYTES_S = 0.5
# Where an engine cannot count a prompt before it generates: few texts need more tokens than one for three characters.
_CHARACTERS_PER_TOKEN = 3.0
_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ChatService:
    """What the route needs of the server."""

    settings: Settings
    runner: Runner
    models: ModelNames
    templates: Templates
    keys: Keys


class Writer(Protocol):
    """Writes a run as a stream, item by item."""

    def take(self, item: Item) -> Iterator[bytes]:
        """The frames of an item."""
        ...

    def finish(self, state: State) -> Iterator[bytes]:
        """The frames after the run's end."""
        ...

    def fail(self, error: ApiError) -> bytes:
        """The frames after an error."""
        ...


class Route(NamedTuple):
    """What tells a route that starts runs from the others: how it reads a body, and how it answers.

    Attributes:
        kind: What its responses are.
        read: The request in a body, under a name; what it raises is for the client.
        stream: A writer of a run; with `late` its beginning is not read.
        whole: The body of a response that is not streamed.
    """

    kind: RunKind
    read: Callable[[bytes, Settings, str], Reply]
    stream: Callable[[Run, Reply, bool], Writer]
    whole: Callable[[Run, State, Reply, Engine], Awaitable[dict[str, object]]]


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """Answer a conversation; `mrsa` in the body, or the model's name, says with how much work."""
    return await answer(request, _CHAT)


async def answer(request: Request, route: Route) -> Response:
    """Start the run that a request asks for, and answer with it."""
    service: ChatService = request.app.state.chat
    settings = service.settings
    try:
        key = read_key(request.headers.get("idempotency-key"))
        raw = await read_body(request, settings.max_body_bytes, settings.body_timeout_s)
        asking = request.url.path.encode() + b"\0" + raw  # what is valid on one route says nothing on another
        found = service.keys.find(key, asking)
        if isinstance(found, Kept):
            return _replayed(found)
        asked = found or _submit(service, route, raw)
        if found is None and key is not None:
            service.keys.put(key, asking, asked, lambda: _whole(service, route, asked))
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


def _submit(service: ChatService, route: Route, raw: bytes) -> Asked:
    """Check a body as far as that needs no engine, and let its run in.

    Raises:
        ApiError: It cannot be honoured, or there is no place for it.
        InvalidParams: Likewise.
    """
    settings = service.settings
    name = uuid.uuid4().hex
    reply = route.read(raw, settings, name)
    chat = reply.chat
    wishes = to_wishes(chat, service.models.runs_method(chat.model), settings.usual_effort)
    try:
        check_limits(wishes, settings)
    except BadRequest as error:
        raise renamed(error, chat.names) from None
    reply.effort = wishes.effort

    async def prepare(engine: ServedEngine) -> Prepared:
        try:
            return await _prepare(service, reply, wishes, f"run_{name}", engine)
        except BadRequest as error:
            raise renamed(error, chat.names) from None

    record = NewRun(
        run_id=f"run_{name}",
        kind=route.kind,
        body=raw,
        model=chat.model,
        effort=wishes.effort.value,
        created_at=time.time(),
        deadline_at=None if wishes.deadline_s is None else time.time() + wishes.deadline_s,
    )
    return Asked(service.runner.submit(f"run_{name}", prepare, wishes.deadline_s, record), reply)


def _read(raw: bytes, settings: Settings, name: str) -> Reply:
    return Reply(parse_chat(raw, settings), f"chatcmpl-{name}", int(time.time()))


_CHAT = Route("chat.completion", _read, ChatChunks, completion)


async def _whole(service: ChatService, route: Route, asked: Asked) -> bytes:
    """The whole response of a run that has ended with an answer."""
    run, reply = asked
    assert run.state is not None  # it has ended without an error
    if not reply.chat.body.stream:
        return orjson.dumps(await route.whole(run, run.state, reply, service.runner.host.engine))
    writer = route.stream(run, reply, True)
    return b"".join((*writer.take(Prepared(run.state, Watch.NONE)), *writer.finish(run.state)))


def _replayed(kept: Kept) -> Response:
    """A response that was given before."""
    headers = {"idempotent-replayed": "true", **({"cache-control": "no-cache"} if kept.streamed else {})}
    return Response(
        kept.body, headers=headers, media_type=EventStream.media_type if kept.streamed else "application/json"
    )


async def _prepare(service: ChatService, reply: Reply, wishes: Wishes, run_id: str, engine: ServedEngine) -> Prepared:
    """Check the request against the engine, and make the run.

    Raises:
        ApiError: It cannot be honoured by this engine.
        EngineDead: As the engine's `count`.
    """
    chat = reply.chat
    service.models.runs_method(chat.model)  # a name that was not known before is now
    problem = to_problem(chat, wishes)
    try:
        question_tokens = await _count(engine, problem)
        decided = decide_params(
            wishes, service.settings, chat.sampling, chat.seed, engine.vocabulary.context_tokens, question_tokens
        )
        check_thinking(decided.params, engine.vocabulary)
        if not chat.body.stream and not wishes.plain:
            check_unstreamed(decided.params, service.runner.tokens_per_s, service.settings.max_unstreamed_s)
        priority = service.runner.next_priority()
        state = init(run_id, problem, decided.params, service.templates, priority)
    except InvalidParams as error:
        raise of_params(error) from None
    except EngineError as error:
        if error.status is not None and error.status >= 500:
            raise EngineFailed(str(error)) from None
        raise BadRequest(f"messages: the model's chat template refuses them: {error}", "messages") from None
    reply.divisor, reply.warnings = decided.divisor, decided.warnings
    reply.exact, reply.thinks = engine.vocabulary.exact, bool(engine.vocabulary.think_close)
    return Prepared(state, _watch(chat, decided.params.final_candidates))


def _watch(chat: Chat, final_candidates: int) -> Watch:
    """Which rollouts are shown while they are written."""
    if not chat.body.stream:
        return Watch.NONE
    mrsa = chat.body.mrsa
    if mrsa is not None and not isinstance(mrsa, bool) and mrsa.stream == "rollouts":
        return Watch.ALL
    return Watch.FINAL if final_candidates == 1 else Watch.NONE


async def _count(engine: ServedEngine, problem: Problem) -> int:
    """Tokens of the conversation, tools included."""
    counted = await engine.count(problem.messages)
    tools = len(problem.answer.tools or "")
    if counted is not None:
        return counted + ceil(tools / _CHARACTERS_PER_TOKEN)
    characters = sum(len(message.text) for message in problem.messages) + tools
    return ceil(characters / _ratio(engine.vocabulary))


def _ratio(vocabulary: Vocabulary) -> float:
    return _CHARACTERS_PER_TOKEN if vocabulary.exact else vocabulary.ids_per_token


async def _frames(
    run: Run, subscription: Subscription, writer: Writer, keep_alive_s: float
) -> AsyncGenerator[bytes, None]:
    """The stream of a run; closing it leaves the run."""
    silence_s = min(_FIRST_BYTES_S, keep_alive_s)
    try:
        while True:
            try:
                items = await subscription.next(silence_s)
            except TimeoutError:
                yield KEEP_ALIVE
            else:
                if not items:
                    break
                frames, error = _write(part for item in items for part in writer.take(item))
                if frames:
                    yield frames
                if error is not None:
                    raise error
            silence_s = keep_alive_s
        assert run.state is not None  # it has ended without an error
        frames, error = _write(writer.finish(run.state))
        if frames:
            yield frames
        if error is not None:
            raise error
    finally:
        run.leave(subscription)


def _write(parts: Iterator[bytes]) -> tuple[bytes, Exception | None]:
    """Frames, and what broke after them: a writer counts on all that it has handed out being sent."""
    written: list[bytes] = []
    try:
        for part in parts:
            written.append(part)
    except Exception as error:
        return b"".join(written), error
    return b"".join(written), None


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The body, bounded in size and in time.

    Raises:
        ApiError: It is no JSON by its headers, too large, or too slow.
        ClientGone: The client left before its end.
    """
    kind, _, options = request.headers.get("content-type", "").lower().partition(";")
    if kind.strip() != "application/json":
        raise BadRequest("The content-type must be application/json.", code="invalid_content_type")
    charset = options.strip().removeprefix("charset=").strip('"')
    if charset not in ("", "utf-8", "utf8"):
        raise BadRequest("The charset must be utf-8.", code="invalid_content_type")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise BadRequest("The body must not be compressed.", code="invalid_content_encoding")
    length = request.headers.get("content-length", "0")
    if not _LENGTH.fullmatch(length):
        raise BadRequest("The content-length must be a number.", code="invalid_content_length")
    if int(length) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if len(body) > max_bytes:
                    raise _too_large(max_bytes)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(
            408,
            "request_timeout",
            f"The body did not arrive within {timeout_s:g} s.",
            headers=(("connection", "close"),),
        ) from None


def _too_large(max_bytes: int) -> ApiError:
    # The connection stays: closing it on a client that still writes would reset it before it has read the error.
    return ApiError(413, "request_too_large", f"The body must be at most {max_bytes} bytes.")
