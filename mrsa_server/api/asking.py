"""A request that starts a run, on whichever route it comes: its body -> a `Run`, and what an answer needs."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fastapi import Request
from starlette.responses import Response

from harness.engine import Engine, EngineError, Vocabulary
from harness.markovian_rsa import State, init
from harness.prompts import Templates
from harness.run import Watch
from harness.types import InvalidParams, Problem, TraceHeaders
from mrsa_server.api.completion import Reply
from mrsa_server.api.effort import Wishes, check_limits, check_thinking, check_unstreamed, decide_params
from mrsa_server.api.errors import ApiError, BadRequest, EngineFailed, of_params, renamed
from mrsa_server.api.idempotency import Asked, Keys
from mrsa_server.api.models import ModelNames
from mrsa_server.api.sse import ClientGone
from mrsa_server.api.wire import Chat, to_problem, to_wishes
from mrsa_server.engines.build import ServedEngine
from mrsa_server.keyring import Caller
from mrsa_server.runs.record import NewRun, RunKind
from mrsa_server.runs.runner import REFUSALS, Item, Prepare, Prepared, Run, Runner
from mrsa_server.settings import Settings
from mrsa_server.tracing import TRACE_HEADERS

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.store import RunStore, StoredRun

# Where an engine cannot count a prompt before it generates: few texts need more tokens than one for three characters.
_CHARACTERS_PER_TOKEN = 3.0
RUN = "run_"  # begins the id of every run; responses have what follows it in theirs
_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)


@dataclass(frozen=True, slots=True)
class AskService:
    """What the routes that start runs need of the server.

    `routes` are those routes by what their responses are, `store` is None where runs live in memory.
    """

    settings: Settings
    runner: Runner
    models: ModelNames
    templates: Templates
    keys: Keys
    routes: Mapping[RunKind, Route]
    store: RunStore | None = None

    def revive(self, record: StoredRun) -> Prepare:
        """How a run that was stored and has not begun is prepared.

        Raises:
            ApiError: Its request is not valid any more: this server may have other limits.
        """
        try:
            reply, wishes = self.read(self.routes[record.kind], record.body, record.run_id, record.created_at)
        except InvalidParams as error:
            raise of_params(error) from None
        return _preparing(self, reply, wishes, record.run_id, record.priority, record.background)

    def read(self, route: Route, raw: bytes, run_id: str, created_at: float) -> tuple[Reply, Wishes]:
        """A body, as far as that needs no engine.

        Raises:
            ApiError: It cannot be honoured.
            InvalidParams: Likewise.
        """
        reply = route.read(raw, self.settings, run_id.removeprefix(RUN), int(created_at))
        chat = reply.chat
        wishes = to_wishes(chat, self.models.runs_method(chat.model), self.settings.usual_effort)
        try:
            check_limits(wishes, self.settings)
        except BadRequest as error:
            raise renamed(error, chat.names) from None
        reply.effort = wishes.effort
        return reply, wishes


class Key(NamedTuple):
    """An idempotency key, and the digest of the request that it came with."""

    name: str
    digest: bytes


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
        read: The request in a body, under a name and of a Unix second; what it raises is for the client.
        stream: A writer of a run; with `late` its beginning is not read.
        whole: The body of a response that is not streamed.
        complete: A body with what it takes over from stored runs that the caller sees; the key of idempotency stands
            for what came.
        detached: Answers a request whose run goes on in the background.
    """

    kind: RunKind
    read: Callable[[bytes, Settings, str, int], Reply]
    stream: Callable[[Run, Reply, bool], Writer]
    whole: Callable[[Run, State, Reply, Engine], Awaitable[dict[str, object]]]
    complete: Callable[[AskService, bytes, Caller], Awaitable[bytes]] | None = None
    detached: Callable[[AskService, StoredRun], Awaitable[Response]] | None = None


def trace_of_request(request: Request) -> TraceHeaders:
    """The trace that a client says its request is a part of."""
    found = ((name, ",".join(request.headers.getlist(name))) for name in TRACE_HEADERS)
    return tuple((name, value) for name, value in found if value)


def submit(
    service: AskService, route: Route, raw: bytes, caller: Caller, key: Key | None = None, trace: TraceHeaders = ()
) -> Asked:
    """Check a body as far as that needs no engine, and let its run in; `trace` is what it is a part of.

    Raises:
        ApiError: It cannot be honoured, or there is no place for it.
        InvalidParams: Likewise.
    """
    run_id, now = f"{RUN}{uuid.uuid4().hex}", time.time()
    reply, wishes = service.read(route, raw, run_id, now)
    priority = service.runner.next_priority()
    record = NewRun(
        run_id=run_id,
        kind=route.kind,
        body=raw,
        model=reply.chat.model,
        effort=wishes.effort.value,
        priority=priority,
        background=reply.background,
        created_at=now,
        deadline_at=None if wishes.deadline_s is None else now + wishes.deadline_s,
        idempotency_key=key.name if key else None,
        body_digest=key.digest if key else b"",
        metadata=reply.metadata,
        key_id=caller.key_id,
    )
    prepare = _preparing(service, reply, wishes, run_id, priority, reply.background)
    kept = record if reply.stored else None
    run = service.runner.submit(run_id, prepare, wishes.deadline_s, kept, caller.key_id, trace)
    reply.trace = run.spans.headers  # noted by the run's first step, which is still to come
    return Asked(run, reply)


def _preparing(
    service: AskService, reply: Reply, wishes: Wishes, run_id: str, priority: int, background: bool
) -> Prepare:
    async def prepare(engine: ServedEngine) -> Prepared:
        try:
            return await _prepare(service, reply, wishes, run_id, priority, background, engine)
        except BadRequest as error:
            raise renamed(error, reply.chat.names) from None

    return prepare


async def _prepare(
    service: AskService,
    reply: Reply,
    wishes: Wishes,
    run_id: str,
    priority: int,
    background: bool,
    engine: ServedEngine,
) -> Prepared:
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
        if not chat.body.stream and not background and not wishes.plain:
            check_unstreamed(decided.params, service.runner.tokens_per_s, service.settings.max_unstreamed_s)
        reply.divisor, reply.warnings = decided.divisor, decided.warnings
        reply.exact, reply.thinks = engine.vocabulary.exact, bool(engine.vocabulary.think_close)
        state = init(run_id, problem, decided.params, service.templates, priority, reply.notes)
    except InvalidParams as error:
        raise of_params(error) from None
    except EngineError as error:
        if error.status not in REFUSALS:
            raise EngineFailed(str(error)) from None
        raise BadRequest(f"messages: the model's chat template refuses them: {error}", "messages") from None
    return Prepared(state, _watch(chat, decided.params.final_candidates), question_tokens)


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
