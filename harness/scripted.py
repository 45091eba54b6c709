"""A deterministic engine that runs on any clock: tests and simulations of thousands of rollouts take milliseconds.

`run_virtual` runs a coroutine on a clock that jumps to the next timer, so that a simulated hour costs what its events
cost. On an ordinary event loop the same engine takes its time: `mrsa serve --engine scripted`.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import json
import random
import selectors
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar

from harness.engine import Delta, EngineDead, EngineError, Vocabulary
from harness.speed import Batch, EngineModel, Prefix, Stream
from harness.types import Finish, Message, RolloutRequest, TokenIds

THINK_OPEN, THINK_CLOSE, END = 256, 257, 258  # after the 256 bytes
_WORDS = (
    "let us see suppose then the sum of both is even so we check a smaller case first and find that it holds "
    "therefore divide by two take the remainder note how each term cancels except for one which gives what was asked"
).split()
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Script:
    """What a rollout generates if nothing cuts it: thinking and answer as text (a token is a byte), or an error.

    With an `error`, that is raised after `fail_after` tokens, if the generation gets so far.
    """

    thinking: str
    answer: str
    error: Exception | None = None
    fail_after: int = 0


# The simple case is the usual one in tests: a fixed time a step, a little for each stream.
Speed = EngineModel


class ScriptedEngine:
    """An engine that says what a script says, at the pace of a model engine, streams sharing its speed.

    Args:
        script: What a request generates; by default text that depends on `seed`, the place and the whole prompt.
        seed: Of the default script.
        speed: How fast it is and how much it holds; instant and boundless by default.
        chunk_tokens: Tokens a delta.
        thinking: Whether the model thinks; without, traces have no markers.
        mean_tokens: Mean length of the default script's thinking, in tokens.
        context_tokens: Longest prompt and generation together; None for any.
        model: The name it is served under.
    """

    def __init__(
        self,
        script: Callable[[RolloutRequest], Script] | None = None,
        *,
        seed: int = 0,
        speed: EngineModel | None = None,
        chunk_tokens: int = 1 << 20,
        thinking: bool = True,
        mean_tokens: int = 400,
        context_tokens: int | None = None,
        model: str = "scripted",
    ) -> None:
        self.model = model
        self.in_process = False  # `revive` brings it back
        self.vocabulary = Vocabulary(
            (THINK_OPEN,) if thinking else (), (THINK_CLOSE,) if thinking else (), context_tokens=context_tokens
        )
        self.open_requests = 0
        self.total_requests = 0
        self._script = script or self._default_script
        self._seed = seed
        self._chunk_tokens = chunk_tokens
        self._mean_tokens = mean_tokens
        self._pace = _Pace(speed or EngineModel())
        self._dead = False

    async def start(self) -> None:
        """Nothing to load."""

    async def aclose(self) -> None:
        """Nothing to free."""

    async def healthy(self) -> bool:
        """Whether it has not been killed."""
        return not self._dead

    def kill(self) -> None:
        """From now on every request meets a dead engine."""
        self._dead = True

    def revive(self) -> None:
        """End of `kill`."""
        self._dead = False

    async def decode(self, token_ids: TokenIds) -> str:
        """Bytes to text; markers are left out."""
        return bytes(token for token in token_ids if token < 256).decode("utf-8", "replace")

    async def count(self, messages: tuple[Message, ...]) -> int:
        """Bytes of the conversation."""
        return sum(len(message.text.encode("utf-8", "replace")) for message in messages)

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        """What the script says, cut at `max_tokens`.

        Raises:
            EngineError: Where the script says so, or the prompt is too long.
            EngineDead: After `kill`.
        """
        prompt_tokens = await self.count(request.messages) + len(request.continuation)
        room = self.vocabulary.context_tokens
        if room is not None and prompt_tokens >= room:
            raise EngineError(f"the prompt has {prompt_tokens} tokens, the context holds {room}", 400)
        limit = request.max_tokens if room is None else min(request.max_tokens, room - prompt_tokens)
        script = self._script(request)
        ids = self._ids(request, script)
        stop = next((at + 1 for at, token in enumerate(ids) if (token,) == request.stop_ids), None)
        if stop is not None:
            ids = ids[:stop]
        whole = len(ids) <= limit
        ids = ids[:limit]
        finish = Finish.STOP if whole else Finish.LENGTH
        prefixes = () if self._pace.instant else _prefixes(request, prompt_tokens)
        stream = Stream(prompt_tokens, len(ids), prefixes, request.priority)
        try:
            self._pace.enter(stream)
        except ValueError as error:
            raise EngineError(str(error), 400) from None
        self.open_requests += 1
        self.total_requests += 1
        sent = 0
        prompt: int | None = prompt_tokens
        cached: int | None = None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        try:
            for part in _parts(ids, self._chunk_tokens):
                if script.error is not None and sent + len(part) > script.fail_after:
                    await self._pace.reach(stream, script.fail_after)
                    raise script.error
                sent += len(part)
                await self._pace.reach(stream, sent)
                if self._dead:
                    raise EngineDead("the scripted engine was killed")
                if prompt is not None and not self._pace.instant:
                    cached = stream.cached_tokens
                text = decoder.decode(bytes(token for token in part if token < 256))
                yield Delta(part, text, prompt_tokens=prompt, cached_tokens=cached)
                prompt = cached = None
            yield Delta((), decoder.decode(b"", final=True), finish=finish, prompt_tokens=prompt)
        finally:
            self.open_requests -= 1
            self._pace.leave(stream)

    def _ids(self, request: RolloutRequest, script: Script) -> list[int]:
        """All that is still to come, from where `continuation` stands."""
        rules = request.answer
        answer = script.answer if rules.json_schema is None else json.dumps(instance_of(json.loads(rules.json_schema)))
        for text in rules.stop:
            answer = answer.partition(text)[0]
        tail = [*answer.encode(), END]
        if not self.vocabulary.think_open:
            return [*script.thinking.encode(), *b"\n", *tail][len(request.continuation) :]
        whole = [THINK_OPEN, *script.thinking.encode(), THINK_CLOSE, *tail]
        if not request.continuation:
            return tail if rules.json_schema is not None else whole
        if THINK_CLOSE in request.continuation:
            written = len(request.continuation) - 1 - request.continuation.index(THINK_CLOSE)
            return tail[written:]
        return whole[len(request.continuation) :]

    def _default_script(self, request: RolloutRequest) -> Script:
        text = "\0".join(f"{message.role}\0{message.text}" for message in request.messages)
        digest = hashlib.sha256(
            f"{self._seed}/{request.seed}/{request.slot}/{text}".encode("utf-8", "replace")
        ).digest()
        stream = random.Random(digest)
        words: list[str] = []
        length = stream.lognormvariate(0, 0.7) * self._mean_tokens
        while sum(len(word) + 1 for word in words[-8:]) * len(words) / max(1, len(words[-8:])) < length:
            words.append(stream.choice(_WORDS))
        number = stream.choice((42, 42, 42, 7, 12))
        return Script(" ".join(words) + ".", f"The result follows from the steps above.\n\n\\boxed{{{number}}}")


def _prefixes(request: RolloutRequest, prompt_tokens: int) -> tuple[Prefix, ...]:
    """Where its prompt may part from another's: after each text, before a candidate.

    What the same rollout has generated is in the cache still, as the last that was written there.
    """
    found: list[Prefix] = []
    key, tokens = 0, 0
    for message in request.messages:
        for part in message.content:
            text = part if isinstance(part, str) else part.text
            key = hash((key, message.role, text))
            tokens += len(text.encode("utf-8", "replace"))
            if isinstance(part, str):
                found.append(Prefix(key, tokens))
    if request.continuation:
        found[-1] = Prefix(found[-1].key, prompt_tokens)
    return tuple(found)


def instance_of(schema: dict[str, Any] | bool) -> object:
    """A small value that a JSON schema admits, for the keywords that tool parameters use; strings are unconstrained."""
    if isinstance(schema, bool):
        return {}
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    for word in ("anyOf", "oneOf", "allOf"):
        if schema.get(word):
            return instance_of(schema[word][0])
    kind = schema.get("type", "object" if "properties" in schema or not schema else "string")
    if isinstance(kind, list):
        kind = kind[0]
    match kind:
        case "object":
            properties = schema.get("properties", {})
            return {name: instance_of(properties.get(name, {})) for name in schema.get("required", properties)}
        case "array":
            return [instance_of(schema.get("items", {})) for _ in range(max(1, schema.get("minItems", 1)))]
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case "null":
            return None
    return "text"


def _parts(ids: list[int], size: int) -> list[list[int]]:
    """Deltas of at most `size` ids, markers alone."""
    parts: list[list[int]] = []
    start = 0
    for at in (*(at for at, token in enumerate(ids) if token in (THINK_OPEN, THINK_CLOSE)), len(ids)):
        parts += [ids[begin : min(begin + size, at)] for begin in range(start, at, size)]
        parts += [ids[at : at + 1]] if at < len(ids) else []
        start = at + 1
    return parts


class _Pace:
    """A `Batch` on the event loop's clock: one timer, for whatever happens next."""

    def __init__(self, model: EngineModel) -> None:
        self.instant = model.instant
        self._batch = Batch(model)
        self._waiting: dict[Stream, asyncio.Future[None]] = {}
        self._timer: asyncio.Handle | None = None
        self._at = inf  # when it rings; uvloop's handles do not always know

    def enter(self, stream: Stream) -> None:
        """A request is sent.

        Raises:
            ValueError: The KV cache could never hold it.
        """
        if not self.instant:
            self._batch.enter(asyncio.get_running_loop().time(), stream)
            self._arm()

    async def reach(self, stream: Stream, tokens: int) -> None:
        """Until a stream has generated so many tokens."""
        if self.instant:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        future = self._waiting[stream] = loop.create_future()
        self._batch.report_at(loop.time(), stream, tokens)
        self._arm()
        await future

    def leave(self, stream: Stream) -> None:
        """The others are faster from now on."""
        if not self.instant:
            self._waiting.pop(stream, None)
            self._batch.leave(asyncio.get_running_loop().time(), stream)
            self._arm()

    def _arm(self) -> None:
        at = self._batch.next_at()
        if self._timer is not None:
            if self._at == at:
                return
            self._timer.cancel()
            self._timer = None
        if at != inf:
            self._at = at
            self._timer = asyncio.get_running_loop().call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer = None
        # A loop may ring within its clock's resolution before the time that it was given.
        for stream in self._batch.due(max(self._at, asyncio.get_running_loop().time())):
            future = self._waiting.pop(stream, None)
            if future is not None and not future.done():
                future.set_result(None)
        self._arm()


class VirtualClock(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer when nothing is left to do. Real I/O still works."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        """Seconds of virtual time since the loop was made."""
        return self._now

    def jump(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


class _Jumping(selectors.DefaultSelector):
    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(0)
        if not ready:
            self._clock.jump(timeout)
        return ready


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a `VirtualClock` of its own."""
    with asyncio.Runner(loop_factory=VirtualClock) as runner:
        return runner.run(main)
