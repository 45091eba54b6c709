"""The one queue before the engine, for the rollouts of all runs: how many tokens are in flight, and whose turn it is.

It bounds tokens, since tokens are what fills an engine's memory; within the bound the engine's own scheduler decides.

Classes. Rollouts for somebody who waits go before all those of batches, and are bounded by their own tokens alone: what
batches hold stands in nobody's way, since the engine's scheduler drops it by its priority where memory is short. A
batch's rollouts have what is left of the bound.

Order within a class. A run's rank is the second of its arrival, and `AGEING` seconds later for each second of the whole
engine that it has had: older runs go first, but one that has taken much counts as younger than one that has taken
little. A run that waits keeps its rank, those that are served lose theirs, and those that come later start behind it:
so what passes it is bounded. Within a run the rollouts go by `RolloutRequest.priority`, after those that were begun
before and go on. The first in the queue is never passed by a smaller one, so that a large one gets its turn.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from harness.engine import Delta, Engine, EngineAround, Vocabulary
from harness.types import RolloutRequest, Tail
from mrsa_server.metrics import Metrics
from mrsa_server.runs.host import EngineHost

# What an H200 holds beside ZAYA1-8B: nine tenths of its 141 GB, less 18 GB of weights, at 40 KiB a token.
USUAL_TOKENS = 2_600_000
# A run that takes more than a sixteenth of the engine yields to those that come. By `tests.bench.fairness`: with 4
# short runs wait for long ones (slowdown 22 at the 99th percentile, with 16 it is 6), with 64 they gain nothing more.
AGEING = 16.0
_PACE_S = 60.0  # of an engine's work, over which its pace is measured
# Of the places for generations, which descriptors bound: kept free of batches, one in so many.
_KEPT_FREE = 8
# Of its grant, until rollouts have ended: 740,000 tokens of 33 rollouts of 40K, as the method's authors report.
_FIRST_SHARE = 0.55
_NEWEST = 1 / 64  # weight of the rollout that has just ended
_CHARACTERS_PER_TOKEN = 4.0  # of English, until the engine tells how long the prompt is


Kind = tuple[bool, int]  # of a run's method or not, and how long its grant is in bits
Place = tuple[bool, float]


@dataclass(eq=False, slots=True)
class Share:
    """One run's place in the queue; the lowest `rank` goes first, in seconds of the loop's clock.

    `spent_tokens` is what its generations have cost so far, those that were cut off included.
    """

    rank: float
    plain: bool = False  # one chat and no method: its lengths tell nothing of a rollout's
    batch: bool = False  # nobody waits for it
    waiting: list[tuple[bool, int, int, _Waiter]] = field(default_factory=list, repr=False)
    spent_tokens: float = 0.0

    @property
    def place(self) -> Place:
        """Where it stands in the queue, by its class first."""
        return self.batch, self.rank


@dataclass(eq=False, slots=True)
class Hold:
    """What one generation counts for while it is in flight: its prompt, and what it is expected to generate.

    `ageing_s` is by how much its run counts as younger for it, so far.
    """

    share: Share
    prompt_tokens: float
    expected_tokens: float
    granted_tokens: int
    kind: Kind
    ageing_s: float = 0.0

    @property
    def tokens(self) -> float:
        """Both together."""
        return self.prompt_tokens + self.expected_tokens


@dataclass(eq=False, slots=True)
class _Waiter:
    hold: Hold
    turn: asyncio.Future[None]
    admitted: bool = False


class Admission:
    """Lets generations through to the engine, so many tokens at a time.

    A generation counts the tokens of its prompt that no other one has brought, and a share of its grant: what ended
    generations of its kind used of theirs, weighted by the tokens, the newest 64 or so; one that has more by now
    counts what it has. That is what they hold at their end. Before it they hold less, but those that start together
    grow together: with lengths as models write them, 0.65 of the bound are filled on average and 0.85 at most (a test
    shows it), where counting whole grants would fill less than half. Plain chats and grants of another size are another
    kind: of many short chats nothing is learnt for long rollouts.

    Args:
        host: Whose engine it is.
        metrics: Where tokens in flight and waiting are shown.
        max_tokens: In flight; None for what the engine's memory holds, `USUAL_TOKENS` where it cannot tell.
        max_calls: Generations in flight, however small.
        ageing: See the header; 0 is first come, first served.
    """

    def __init__(
        self, host: EngineHost, metrics: Metrics, *, max_tokens: int | None, max_calls: int, ageing: float = AGEING
    ) -> None:
        self.tokens = 0.0  # in flight
        self.calls = 0  # in flight
        self.waiting = 0
        self._batch_tokens = 0.0  # of those in flight
        self._batch_calls = 0
        self._batch_waiting = 0
        self._host = host
        self._max_tokens = max_tokens
        self._max_calls = max_calls
        self._ageing = ageing
        self._used: dict[Kind, tuple[float, float]] = {}  # tokens granted and used, means of the newest that ended
        self._done = 0.0  # tokens of the newest generations, fading
        self._busy_s = 0.0  # in which they were done, fading likewise
        self._since = 0.0  # the engine is busy and that is not yet in `_busy_s`
        self._queue: list[tuple[Place, int, Share]] = []  # an entry counts while its place is that of its share
        self._numbers = itertools.count()
        self._seconds = metrics.admission_seconds
        metrics.inflight_tokens.set_function(lambda: self.tokens)
        metrics.max_inflight_tokens.set_function(lambda: self.max_tokens)
        metrics.rollouts_waiting.set_function(lambda: self.waiting)

    @property
    def max_tokens(self) -> int:
        """Tokens that may be in flight."""
        return self._max_tokens or self._host.memory_tokens or USUAL_TOKENS

    def used_share(self, kind: Kind) -> float:
        """Of its grant, what a generation is expected to use."""
        granted, used = self._used.get(kind, (1.0, _FIRST_SHARE))
        return used / granted

    @property
    def tokens_per_s(self) -> float | None:
        """What the whole engine does while it is busy, prompts included; None before anything has ended."""
        return self._done / self._busy_s if self._busy_s > 0 else None

    def through(
        self,
        engine: Engine,
        arrival_s: float,
        *,
        plain: bool = False,
        batch: bool = False,
        cache_salt: str | None = None,
    ) -> AdmittedEngine:
        """The engine as one run may use it.

        Args:
            engine: Where its rollouts are generated.
            arrival_s: When the run was submitted, on the loop's clock.
            plain: Whether it is one chat, without the method.
            batch: Whether nobody waits for it, so that it yields to all for whom somebody does.
            cache_salt: That of its key.
        """
        return AdmittedEngine(engine, self, Share(arrival_s, plain, batch), cache_salt)

    async def enter(self, share: Share, request: RolloutRequest, vocabulary: Vocabulary) -> Hold:
        """Wait for a turn; `leave` gives it back. One that is cancelled meanwhile holds nothing."""
        kind = (share.plain, request.max_tokens.bit_length())
        expected = request.max_tokens * self.used_share(kind)
        hold = Hold(share, _prompt_estimate(request, vocabulary), expected, request.max_tokens, kind)
        before = self.waiting if share.batch else self.waiting - self._batch_waiting
        if not before and self._fits(hold):
            self._admit(hold)
            self._seconds.observe(0)
            return hold
        loop = asyncio.get_running_loop()
        waiter, since = _Waiter(hold, loop.create_future()), loop.time()
        entry = (not request.continuation, request.priority, next(self._numbers), waiter)
        heapq.heappush(share.waiting, entry)
        self._wait(share, 1)
        if len(share.waiting) == 1:
            self._list(share)
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter.admitted:
                self._free(hold)
                self._charge(hold, 0)
                self._let_in()
            else:
                self._wait(share, -1)
                share.waiting.remove(entry)
                heapq.heapify(share.waiting)
                self._let_in()  # a smaller one may have waited behind it
            raise
        self._seconds.observe(loop.time() - since)
        return hold

    def settle(self, hold: Hold, prompt_tokens: int, cached_tokens: int) -> None:
        """Count the prompt as the engine does; what its cache held is counted with another generation."""
        before, hold.prompt_tokens = hold.prompt_tokens, max(0, prompt_tokens - cached_tokens)
        self._hold(hold.share, hold.prompt_tokens - before)
        if hold.prompt_tokens < before:
            self._let_in()

    def grow(self, hold: Hold, generated: float) -> None:
        """Count a generation by what it has, once that is more than was expected of it."""
        if generated > hold.expected_tokens:
            self._hold(hold.share, generated - hold.expected_tokens)
            hold.expected_tokens = generated

    def leave(self, hold: Hold, generated: float, *, whole: bool) -> None:
        """A generation is over, one way or the other.

        Args:
            hold: What `enter` gave.
            generated: Its tokens.
            whole: Whether it came to its end; one that was cut off tells nothing of how long generations are.
        """
        had = hold.prompt_tokens + generated if generated else 0.0
        hold.share.spent_tokens += had
        self._free(hold)
        self._measure(had)
        if whole:
            self._learn(hold, generated)
        self._charge(hold, had)
        self._let_in()

    def _fits(self, hold: Hold) -> bool:
        """Whether there is room; alone among its like everything has it, as long as there is a place for a call."""
        tokens, calls, most = self.tokens, self.calls, self._max_calls
        if hold.share.batch:
            most -= most // _KEPT_FREE
        else:
            tokens, calls = tokens - self._batch_tokens, calls - self._batch_calls
        if self.calls >= most:
            return False
        return not calls or tokens + hold.tokens <= self.max_tokens

    def _admit(self, hold: Hold) -> None:
        if not self.calls:
            self._since = asyncio.get_running_loop().time()
        self._hold(hold.share, hold.tokens, calls=1)
        self._charge(hold, hold.tokens)

    def _free(self, hold: Hold) -> None:
        self._hold(hold.share, -hold.tokens, calls=-1)
        # A sum of floats that came and went is not quite zero.
        if not self._batch_calls:
            self._batch_tokens = 0.0
        if self.calls == self._batch_calls:
            self.tokens = self._batch_tokens

    def _hold(self, share: Share, tokens: float, calls: int = 0) -> None:
        self.tokens += tokens
        self.calls += calls
        if share.batch:
            self._batch_tokens += tokens
            self._batch_calls += calls

    def _wait(self, share: Share, waiters: int) -> None:
        self.waiting += waiters
        if share.batch:
            self._batch_waiting += waiters

    def _charge(self, hold: Hold, tokens: float) -> None:
        """Let a run be younger for a generation of so many tokens."""
        share, pace = hold.share, self.tokens_per_s
        ageing_s = self._ageing * tokens / pace if pace else 0.0
        if ageing_s != hold.ageing_s:
            share.rank += ageing_s - hold.ageing_s
            hold.ageing_s = ageing_s
            if share.waiting:
                self._list(share)

    def _list(self, share: Share) -> None:
        """Put a share that waits where it belongs now; its old entry is dropped when it comes up."""
        if len(self._queue) > 4 * self.waiting + 64:
            listed = {share: place for place, _, share in self._queue if share.waiting and place == share.place}
            self._queue = [(place, next(self._numbers), share) for share, place in listed.items()]
            heapq.heapify(self._queue)
        heapq.heappush(self._queue, (share.place, next(self._numbers), share))

    def _let_in(self) -> None:
        """Everyone for whom there is room, in order."""
        while self.waiting and self._queue:
            place, _, share = self._queue[0]
            if place != share.place or not share.waiting:
                heapq.heappop(self._queue)
                continue
            waiter = share.waiting[0][-1]
            if waiter.turn.done():  # cancelled, and its task has not come by yet
                return
            if not self._fits(waiter.hold):
                return
            heapq.heappop(share.waiting)
            self._wait(share, -1)
            waiter.admitted = True
            waiter.turn.set_result(None)
            self._admit(waiter.hold)

    def _measure(self, tokens: float) -> None:
        now = asyncio.get_running_loop().time()
        elapsed, self._since = now - self._since, now
        fade = math.exp(-elapsed / _PACE_S)
        self._done = self._done * fade + tokens
        self._busy_s = self._busy_s * fade + elapsed

    def _learn(self, hold: Hold, generated: float) -> None:
        new = hold.granted_tokens
        granted, used = self._used.get(hold.kind, (new, _FIRST_SHARE * new))
        self._used[hold.kind] = granted + _NEWEST * (new - granted), used + _NEWEST * (generated - used)


class AdmittedEngine(EngineAround):
    """An engine whose generations wait for their turn, with the salt of whoever asks. Nothing else of it changes."""

    def __init__(self, engine: Engine, admission: Admission, share: Share, cache_salt: str | None = None) -> None:
        super().__init__(engine)
        self._admission = admission
        self.share = share
        self._cache_salt = cache_salt

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        """The engine's, once it is its turn.

        Raises:
            EngineError, EngineDead: As the engine.
        """
        admission, vocabulary = self._admission, self._engine.vocabulary
        if self._cache_salt is not None:
            request = replace(request, cache_salt=self._cache_salt)
        hold = await admission.enter(self.share, request, vocabulary)
        ids, whole = 0, False
        counted: int | None = None
        try:
            async with aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    ids += len(delta.token_ids)
                    if delta.prompt_tokens is not None:
                        admission.settle(hold, delta.prompt_tokens, delta.cached_tokens or 0)
                    counted = delta.completion_tokens
                    admission.grow(hold, ids / vocabulary.ids_per_token)
                    yield delta
            whole = True
        except GeneratorExit:  # its reader has what it wanted; a run that is cut off is cancelled instead
            whole = True
            raise
        finally:
            generated = ids / vocabulary.ids_per_token if counted is None else counted
            admission.leave(hold, generated, whole=whole)


def _prompt_estimate(request: RolloutRequest, vocabulary: Vocabulary) -> float:
    """Tokens of the prompt, near enough: rendering it is dear, and the engine will do it."""
    characters = ids = 0
    for message in request.messages:
        for part in message.content:
            if isinstance(part, Tail):
                ids += len(part.token_ids)
            else:
                characters += len(part)
    ratio = vocabulary.ids_per_token
    return characters / (ratio if ratio > 1 else _CHARACTERS_PER_TOKEN) + (ids + len(request.continuation)) / ratio
