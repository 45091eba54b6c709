"""A deterministic engine that runs on any clock: tests and simulations of thousands of rollouts take milliseconds.

`run_virtual` runs a coroutine on a clock that jumps to the next timer, so that a simulated hour costs what its events
cost. On an ordinary event loop the same engine takes its time: `mrsa serve --engine scripted`.
"""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import heapq
import json
import random
import selectors
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from harness.engine import Delta, EngineDead, EngineError, Vocabulary
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


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of one stream while `batch` streams run: `1 / (step_s + batch * stream_s)`; zeros are instant.

    A decode step costs a fixed time (weights are read once) and a little for each stream (its KV cache).
    """

    step_s: float = 0.0
    stream_s: float = 0.0

    def tokens_per_s(self, batch: int) -> float:
        """The rate of each of `batch` streams; infinity where the engine is instant."""
        seconds = self.step_s + batch * self.stream_s
        return 1 / seconds if seconds > 0 else float("inf")


class ScriptedEngine:
    """An engine that says what a script says, at the pace of a model engine, streams sharing its speed.

    Args:
        script: What a request generates; by default text that depends on `seed`, the place and the whole prompt.
        seed: Of the default script.
        speed: How fast; instant by default.
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
        speed: Speed | None = None,
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
        self._pace = _Pace(speed or Speed())
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
        self.open_requests += 1
        self.total_requests += 1
        stream = self._pace.enter()
        sent = 0
        prompt: int | None = prompt_tokens
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        try:
            for part in _parts(ids, self._chunk_tokens):
                if script.error is not None and sent + len(part) > script.fail_after:
                    await stream.spend(script.fail_after - sent)
                    raise script.error
                await stream.spend(len(part))
                if self._dead:
                    raise EngineDead("the scripted engine was killed")
                sent += len(part)
                text = decoder.decode(bytes(token for token in part if token < 256))
                yield Delta(part, text, prompt_tokens=prompt)
                prompt = None
            yield Delta((), decoder.decode(b"", final=True), finish=finish, prompt_tokens=prompt)
        finally:
            self.open_requests -= 1
            stream.leave()

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
    """Processor sharing: all streams advance at one rate that falls with their number.

    `work` is the number of tokens that a stream alive since the beginning would have; a stream waits for a value of it.
    So a change of the batch moves one timer, not one for each stream.
    """

    def __init__(self, speed: Speed) -> None:
        self._speed = speed
        self._batch = 0
        self._work = 0.0
        self._since = 0.0
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    def enter(self) -> _Stream:
        """One more stream."""
        self._change(1)
        return _Stream(self)

    def _change(self, by: int) -> None:
        now = asyncio.get_running_loop().time()
        if self._batch and self._speed.tokens_per_s(self._batch) != float("inf"):
            self._work += (now - self._since) * self._speed.tokens_per_s(self._batch)
        self._since = now
        self._batch += by
        self._arm()

    async def wait(self, tokens: int) -> None:
        """Until a stream has generated `tokens` more."""
        if self._speed.tokens_per_s(1) == float("inf"):
            await asyncio.sleep(0)
            return
        self._change(0)
        future = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._waiting, (self._work + tokens, self._count, future))
        self._arm()
        await future

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting and self._waiting[0][2].done():
            heapq.heappop(self._waiting)
        if self._waiting:
            seconds = max(0.0, self._waiting[0][0] - self._work) / self._speed.tokens_per_s(max(1, self._batch))
            self._timer = asyncio.get_running_loop().call_later(seconds, self._ring)

    def _ring(self) -> None:
        self._timer = None
        due = self._waiting[0][0] if self._waiting else self._work
        self._change(0)
        self._work = max(self._work, due)  # a float's last digit must not cost another round
        while self._waiting and self._waiting[0][0] <= self._work:
            future = heapq.heappop(self._waiting)[2]
            if not future.done():
                future.set_result(None)
        self._arm()


class _Stream:
    """One stream's share in a `_Pace`."""

    def __init__(self, pace: _Pace) -> None:
        self._pace = pace

    async def spend(self, tokens: int) -> None:
        """Wait until so many more tokens are generated."""
        await self._pace.wait(tokens)

    def leave(self) -> None:
        """The others are faster from now on."""
        self._pace._change(-1)


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
