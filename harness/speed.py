"""How fast an engine is and how much it holds: a pure model of one, with its scheduler. Nothing here reads a clock.

`ScriptedEngine` and the planner run on the same `Batch`, so that a plan is what a run on the scripted engine takes.

A decode step gives every stream of the batch one token. It costs a fixed time, the experts that the batch touches, a
little for each stream, and the reading of every token of KV cache in flight. A prefill takes the engine to itself: in
an engine that prefills in chunks beside the decode steps, the steps are longer by the same time in all.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from typing import NamedTuple

_TOKENS = 1e-6  # of a token: a float's last digit must not cost another round
_SECONDS = 1e-9
# Of the KV cache that an admission leaves free: what was preempted would return at once, and be preempted again.
# Between 1 and 10 % a loaded engine's walls and tokens a second differ by less than 1 %.
_HEADROOM = 0.05


@dataclass(frozen=True, slots=True)
class EngineModel:
    """An engine by its constants; all zeros are an instant one.

    Attributes:
        step_s: Seconds of a decode step whatever the batch: launches, sampling, weights that every token reads.
        stream_s: Seconds a step for each stream: its arithmetic, its state, its logits.
        kv_token_s: Seconds a step for each token of KV cache in flight, prompts included.
        experts: Experts of a layer, of which a token reads one, each with the same chance; 0 for a dense model.
        experts_s: Seconds to read all of them, in all layers.
        prefill_tokens_per_s: Prompt tokens a second, those in the prefix cache left out.
        request_s: Seconds from a request's sending to its scheduler.
        kv_tokens: Tokens that the KV cache holds; None for any number.
        streams: Most streams in a batch; None for any number.
        cached_prefixes: Prefixes that the prefix cache remembers, the last used ones; 0 for an engine without one.
    """

    step_s: float = 0.0
    stream_s: float = 0.0
    kv_token_s: float = 0.0
    experts: int = 0
    experts_s: float = 0.0
    prefill_tokens_per_s: float = inf
    request_s: float = 0.0
    kv_tokens: int | None = None
    streams: int | None = None
    cached_prefixes: int = 4_096

    def __post_init__(self) -> None:
        for name in ("step_s", "stream_s", "kv_token_s", "experts", "experts_s", "request_s", "cached_prefixes"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name}: must be at least 0, not {value}")
        if not self.prefill_tokens_per_s > 0:
            raise ValueError(f"prefill_tokens_per_s: must be above 0, not {self.prefill_tokens_per_s}")
        for name in ("kv_tokens", "streams"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: must be at least 1, not {value}")
        if self.experts_s and not self.experts:
            raise ValueError("experts: must be at least 1 where experts_s is above 0")

    @property
    def instant(self) -> bool:
        """Whether nothing takes time; such an engine has no queue either."""
        return not (self.step_s or self.stream_s or self.kv_token_s or self.experts_s or self.request_s) and (
            self.prefill_tokens_per_s == inf
        )

    def fixed_s(self, batch: int) -> float:
        """Seconds of a decode step of `batch` streams, their KV cache left out."""
        read = 1 - (1 - 1 / self.experts) ** batch if self.experts else 0.0
        return self.step_s + batch * self.stream_s + self.experts_s * read

    def decode_s(self, batch: int, kv_tokens: float = 0.0) -> float:
        """Seconds of a decode step of `batch` streams with so many tokens of KV cache between them."""
        return self.fixed_s(batch) + kv_tokens * self.kv_token_s

    def tokens_per_s(self, batch: int, context_tokens: float = 0.0) -> float:
        """Tokens a second of `batch` streams together, each with so much context; infinity where nothing costs."""
        seconds = self.decode_s(batch, batch * context_tokens)
        return batch / seconds if seconds > 0 else inf


class Prefix(NamedTuple):
    """A beginning of a prompt that other prompts may share: its name, and its length in tokens."""

    key: Hashable
    tokens: int


class Stream:
    """One request in a `Batch`.

    Attributes:
        prompt_tokens: Of its prompt.
        tokens: That it will generate.
        prefixes: Beginnings of its prompt, shortest first; the last is the whole.
        priority: Lower is served first; then the older.
        cached_tokens: Of its prompt, once it has been admitted.
        owner: Whatever the caller wants to find again.
    """

    __slots__ = (
        "_done",
        "_running",
        "_start",
        "_target",
        "cached_tokens",
        "mark",
        "number",
        "owner",
        "prefixes",
        "priority",
        "prompt_tokens",
        "tokens",
    )

    def __init__(
        self,
        prompt_tokens: int,
        tokens: int,
        prefixes: Sequence[Prefix | tuple[Hashable, int]] = (),
        priority: int = 0,
        owner: object = None,
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.tokens = tokens
        self.prefixes = prefixes
        self.priority = priority
        self.owner = owner
        self.cached_tokens = 0
        self.mark = tokens  # generated tokens at which it is next reported
        self.number = 0
        self._running = False
        self._done = 0.0  # tokens generated before it was last preempted
        self._start = 0.0  # the batch's work when it had none
        self._target = 0.0  # the batch's work at its mark

    def __lt__(self, other: Stream) -> bool:
        """Streams stand in heaps, where one may be twice for a while."""
        return self.number < other.number


class Batch:
    """The streams that decode together, and those that wait: the scheduler of one engine.

    `work` is the number of steps since the beginning; a stream's mark is a value of it. So what changes the pace moves
    no stream. Waiting streams are admitted by priority, the first that does not fit holds up the others; where the KV
    cache is full, the last by priority is preempted and computed anew later (vLLM's priority scheduling).

    Args:
        model: Of the engine.
    """

    def __init__(self, model: EngineModel) -> None:
        self.model = model
        self.size = 0
        self.tokens = 0.0  # generated
        self.prefill_tokens = 0.0
        self.preemptions = 0
        self.stream_s = 0.0  # seconds, each counted once for every stream in the batch
        self._now = 0.0
        self._work = 0.0
        self._kv = 0.0  # tokens in flight
        self._stall_s = 0.0  # of prefills to come before the next step
        self._count = 0
        self._coming: deque[tuple[float, Stream]] = deque()  # to the scheduler, by time
        self._waiting: list[tuple[int, int, Stream]] = []
        self._marks: list[tuple[float, int, Stream]] = []
        self._running: set[Stream] = set()
        self._lasts: list[tuple[int, int, Stream]] = []  # the last by priority first
        self._cache: OrderedDict[Hashable, None] = OrderedDict()
        self._fixed = [0.0]  # seconds of a step, by batch
        self._capacity = inf if model.kv_tokens is None else float(model.kv_tokens)
        self._most = inf if model.streams is None else model.streams
        self._headroom = 0.0 if model.kv_tokens is None else _HEADROOM * model.kv_tokens

    @property
    def waiting(self) -> int:
        """Requests that are not in the batch yet."""
        streams = [stream for _, stream in self._coming] + [stream for *_, stream in self._waiting]
        return sum(1 for stream in streams if stream.number)

    def enter(self, now: float, stream: Stream) -> None:
        """A request is sent.

        Raises:
            ValueError: It would not fit into the KV cache were it alone there.
        """
        if stream.prompt_tokens + stream.tokens > self._capacity:
            raise ValueError(
                f"{stream.prompt_tokens} prompt tokens and {stream.tokens} more do not fit into a KV cache of "
                f"{self._capacity:.0f} tokens"
            )
        self._count += 1
        stream.number = self._count
        if self.model.request_s:
            self._coming.append((now + self.model.request_s, stream))
        else:
            self._advance(now)
            heapq.heappush(self._waiting, (stream.priority, stream.number, stream))
            self._admit()

    def report_at(self, now: float, stream: Stream, tokens: int) -> None:
        """Have a stream reported when it has generated so many tokens, which may be the case already."""
        self._advance(now)
        stream.mark = tokens
        if stream._running:
            self._aim(stream)
        elif stream._done >= tokens:  # it has ended, or was preempted after its mark
            heapq.heappush(self._marks, (self._work, stream.number, stream))
            stream._target = self._work

    def leave(self, now: float, stream: Stream) -> None:
        """A request is withdrawn, or was done."""
        if stream._running:
            self._advance(now)
            self._drop(stream)
            self._admit()
        stream.number = 0
        stream._target = -1.0

    def next_at(self) -> float:
        """When `due` should be called; infinity where nothing happens by itself."""
        at = self._coming[0][0] if self._coming else inf
        marks = self._marks
        while marks and marks[0][0] != marks[0][2]._target:
            heapq.heappop(marks)
        if marks:
            steps = marks[0][0] - self._work
            if self.size:
                steps = min(steps, (self._capacity - self._kv) / self.size)
                seconds = self._stall_s + self._seconds(steps) if steps > 0 else 0.0
            else:
                seconds = 0.0
            at = min(at, self._now + seconds)
        return at

    def due(self, now: float) -> list[Stream]:
        """Let time pass to `now`, which must not be after `next_at`.

        Returns:
            Streams that have reached their marks; one that has generated all its tokens has left.
        """
        self._advance(now)
        moved = False
        while self._coming and self._coming[0][0] <= now + _SECONDS:
            stream = self._coming.popleft()[1]
            if stream.number:
                heapq.heappush(self._waiting, (stream.priority, stream.number, stream))
                moved = True
        reached: list[Stream] = []
        marks = self._marks
        while marks and marks[0][0] <= self._work + _TOKENS:
            target, _, stream = heapq.heappop(marks)
            if target != stream._target:
                continue
            stream._target = -1.0
            self._work = max(self._work, target)
            reached.append(stream)
            if stream._running and stream.mark >= stream.tokens:
                self._drop(stream)
                moved = True
        if self._kv >= self._capacity - _TOKENS * max(1, self.size):
            self._preempt()
            moved = True
        if moved:
            self._admit()
        return reached

    def _advance(self, now: float) -> None:
        passed = now - self._now
        if passed <= 0:
            return
        self._now = now
        if not self.size:
            return
        self.stream_s += passed * self.size
        if self._stall_s:
            stalled = min(passed, self._stall_s)
            self._stall_s -= stalled
            passed -= stalled
            if self._stall_s < _SECONDS:
                self._stall_s = 0.0
        if passed > 0:
            steps = self._steps(passed)
            self._work += steps
            self._kv += steps * self.size
            self.tokens += steps * self.size

    def _seconds(self, steps: float) -> float:
        """Of so many steps from now, if nobody comes or goes: the KV cache grows by a token a stream and step."""
        each = self._fixed[self.size] + self._kv * self.model.kv_token_s
        return steps * (each + 0.5 * steps * self.size * self.model.kv_token_s)

    def _steps(self, seconds: float) -> float:
        """The inverse of `_seconds`."""
        each = self._fixed[self.size] + self._kv * self.model.kv_token_s
        growth = self.size * self.model.kv_token_s
        return 2 * seconds / (each + sqrt(each * each + 2 * growth * seconds)) if growth else seconds / each

    def _admit(self) -> None:
        waiting = self._waiting
        while waiting and self.size < self._most:
            stream = waiting[0][2]
            if not stream.number:  # it was withdrawn
                heapq.heappop(waiting)
                continue
            tokens = stream.prompt_tokens + stream._done
            if self.size and self._kv + tokens + self._headroom > self._capacity:
                return
            heapq.heappop(waiting)
            cached = self._cached(stream)
            if not stream._done:
                stream.cached_tokens = cached
            self.prefill_tokens += tokens - cached
            self._stall_s += (tokens - cached) / self.model.prefill_tokens_per_s
            self._kv += tokens
            self.size += 1
            while len(self._fixed) <= self.size:
                self._fixed.append(self.model.fixed_s(len(self._fixed)))
            stream._running = True
            stream._start = self._work - stream._done
            self._running.add(stream)
            if self._capacity != inf:
                self._rank(stream)
            self._aim(stream)

    def _rank(self, stream: Stream) -> None:
        """Keep a stream among those that may be preempted, and those that have ended from piling up there."""
        lasts = self._lasts
        heapq.heappush(lasts, (-stream.priority, -stream.number, stream))
        if len(lasts) > 4 * self.size + 64:
            lasts[:] = [(-one.priority, -one.number, one) for one in self._running]
            heapq.heapify(lasts)

    def _aim(self, stream: Stream) -> None:
        target = stream._start + stream.mark
        if target != stream._target:
            stream._target = target
            heapq.heappush(self._marks, (target, stream.number, stream))

    def _cached(self, stream: Stream) -> int:
        """Tokens of its prompt that were computed before; the rest of its prefixes are known from now on."""
        if not self.model.cached_prefixes or stream._done:  # what was preempted has been overwritten
            return 0
        cache, found, missed = self._cache, 0, False
        for key, tokens in stream.prefixes:
            if not missed and key in cache:
                cache.move_to_end(key)
                found = tokens
            else:
                missed = True
                cache[key] = None
        while len(cache) > self.model.cached_prefixes:
            cache.popitem(last=False)
        return found

    def _drop(self, stream: Stream) -> None:
        stream._done = min(float(stream.tokens), self._work - stream._start)
        stream._running = False
        self._running.remove(stream)
        self.size -= 1
        self._kv -= stream.prompt_tokens + stream._done
        if not self.size:
            self._kv = self._stall_s = 0.0
        elif self.size == 1:  # sums of floats drift, and the last one must reach its end
            (only,) = self._running
            self._kv = only.prompt_tokens + self._work - only._start

    def _preempt(self) -> None:
        while self.size > 1 and self._kv >= self._capacity - _TOKENS * self.size:
            last = heapq.heappop(self._lasts)[2]
            if not last._running:  # it has ended
                continue
            self._drop(last)
            self.preemptions += 1
            last._target = -1.0
            heapq.heappush(self._waiting, (last.priority, last.number, last))
