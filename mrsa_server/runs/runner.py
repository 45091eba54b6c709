"""Owns the task of every run. A run goes on by itself; who reads it subscribes, and never slows it.

Each run has one writer, its own task. A run whose last reader has left is cancelled. Nothing of a run that has ended is
kept here. Where there is a journal, what a run does is written down before anybody reads it or acts on it; a run that
an owner left behind, here or elsewhere, is taken up from its log, and goes on without a reader.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from harness.engine import EngineDead
from harness.events import (
    DeadlineReached,
    Event,
    QuorumReached,
    RolloutAborted,
    RolloutDelta,
    RolloutFailed,
    RolloutFinished,
    RolloutStarted,
    RunFailed,
    RunFinished,
    RunResumed,
    RunStarted,
    SetSkipped,
    Stopped,
)
from harness.markovian_rsa import RoundStats, State, apply, replay
from harness.prompts import Templates
from harness.run import Watch, open_run
from harness.savings import savings
from harness.selection import MathJudge
from harness.types import Rollout, Slot, Trace, TraceHeaders
from mrsa_server.api.errors import (
    NO_RETRY,
    ApiError,
    DeadlinePassed,
    EngineFailed,
    EngineRefused,
    EngineUnavailable,
    KeyBusy,
    Overloaded,
    RunCancelled,
    ShuttingDown,
    StoreAway,
    TakenOver,
    to_stored,
)
from mrsa_server.engines.build import ServedEngine
from mrsa_server.keyring import KeyRing
from mrsa_server.metrics import Metrics, RunStatus
from mrsa_server.runs.admission import Admission
from mrsa_server.runs.codec import Undecodable
from mrsa_server.runs.host import EngineHost
from mrsa_server.runs.journal import Book, Journal
from mrsa_server.runs.record import NewRun
from mrsa_server.runs.store_errors import Fenced, KeyTaken, StoreUnavailable
from mrsa_server.runs.tenants import Tenants, Ticket
from mrsa_server.tracing import UNTRACED, RunSpans, Tracing, trace_of

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.store import Claim, StoredRun

# An engine that dies again before any rollout has ended is not worth a sixth try.
_MOST_DEATHS = 5
_FIRST_PAUSE_S = 0.05
# Fewer tokens tell little of an engine's speed: the prompt and the start take their share of the seconds.
_MEASURED_TOKENS = 512
_CLOSING_S = 5.0  # for the last words of runs, when the server leaves; their leases end by themselves
_LOOK_S = 1.0  # between looks for runs that were left behind
_TOGETHER_S = 0.05  # in which places of batches that come free are filled together
_TAKEN_AT_ONCE = 64  # runs that were left behind; others that share the store may have room too
# What a server answers to a request that would be refused the next time too.
REFUSALS = frozenset({400, 413, 422})

log = structlog.get_logger("mrsa.run")


@dataclass(frozen=True, slots=True)
class Prepared:
    """The request was found good and the run exists; what follows is the run itself.

    `watch` says which of its rollouts somebody follows delta by delta, `prompt_tokens` are those of the question.
    """

    state: State
    watch: Watch
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RoundStarted:
    """The first rollout of a round was asked for; `rollouts` of the round are read by something."""

    round: int
    rollouts: int


@dataclass(frozen=True, slots=True)
class RoundFinished:
    """Every rollout of a round that something reads has ended. Later losses may make it run more of them."""

    round: int
    stats: RoundStats
    seconds: float


Item = Prepared | RoundStarted | RoundFinished | Event | RolloutDelta
Prepare = Callable[[ServedEngine], Awaitable[Prepared]]
Revive = Callable[["StoredRun"], Prepare]


@dataclass(slots=True)
class _Joined:
    """Deltas of one rollout that nobody has read yet, joined: a slow reader costs text, never one object a token."""

    delta: RolloutDelta
    texts: list[str]

    def whole(self) -> RolloutDelta:
        return self.delta if len(self.texts) == 1 else replace(self.delta, text="".join(self.texts))


class Subscription:
    """What one reader has still to read of a run."""

    def __init__(self) -> None:
        self._items: deque[Item | _Joined] = deque()
        self._open: dict[tuple[Slot, bool], _Joined] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._end: ApiError | bool = False

    def put(self, item: Item) -> None:
        """Take an item; a delta is joined to the unread ones of the same rollout."""
        if isinstance(item, RolloutDelta):
            key = (item.slot, item.answer)
            joined = self._open.get(key)
            if joined is None:
                joined = self._open[key] = _Joined(item, [])
                self._items.append(joined)
            joined.delta = item
            joined.texts.append(item.text)
        else:
            match item:  # a delta never moves past a fact about its rollout
                case RolloutStarted(slot) | RolloutFailed(slot):
                    self._close(slot)
                case RolloutFinished(rollout) | RolloutAborted(rollout):
                    self._close(rollout.slot)
                case RunResumed():
                    self._open.clear()
            self._items.append(item)
        self._wake()

    def _close(self, slot: Slot) -> None:
        self._open.pop((slot, False), None)
        self._open.pop((slot, True), None)

    def end(self, error: ApiError | None) -> None:
        """Nothing follows; with an error, the run has none."""
        self._end = error or True
        self._wake()

    async def next(self, timeout_s: float | None = None) -> list[Item]:
        """All that is there to read, at least one item; nothing after the end.

        Raises:
            TimeoutError: Nothing came within `timeout_s`.
            ApiError: The run ended with an error.
        """
        while not self._items:
            if isinstance(self._end, ApiError):
                raise self._end
            if self._end:
                return []
            await self._wait(timeout_s)
        items = [item.whole() if isinstance(item, _Joined) else item for item in self._items]
        self._items.clear()
        self._open.clear()
        return items

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self, timeout_s: float | None) -> None:
        # A bare future: this is run for every delta, and an `asyncio.timeout` costs more than all else here.
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        timer = None if timeout_s is None else loop.call_later(timeout_s, _expire, waiter)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()


def _expire(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


@dataclass(slots=True)
class _Clock:
    """When a round began and when its last rollout so far ended, on the loop's clock."""

    first: float
    last: float


@dataclass(eq=False)
class Run:
    """One run, from its admission on.

    Attributes:
        id: Its name, everywhere.
        begun: When it was submitted, on the loop's clock: waiting counts against its deadline.
        state: The run so far; None until it is prepared.
        traces: Of the last round; a reader that shows its reasoning needs them.
        error: Why it has no answer.
        failures: With which HTTP statuses its rollouts failed.
        deadline: When it has to have ended, on the loop's clock; waiting counts. None for whenever.
        cancelled: Whether it was told to end.
        book: Its log; None where nothing is written down.
        detached: Whether it goes on without a reader, and waits for its engine: one in the background, or one that was
            taken up from its log.
        ticket: Its share of what its key may use.
        batch: Whether it is a line of a batch: it has places of its own, and yields to all others.
        stored: Set once it is in the store, and at its end.
        ended_at: Unix seconds, of one that is told again from its log.
        spans: Where what happens is traced.
    """

    id: str
    begun: float
    deadline: float | None = None
    cancelled: bool = False
    state: State | None = None
    traces: dict[Slot, Trace] = field(default_factory=dict)
    error: ApiError | None = None
    failures: set[int | None] = field(default_factory=set)
    task: asyncio.Task[None] | None = field(default=None, repr=False)
    book: Book | None = field(default=None, repr=False)
    detached: bool = False
    ticket: Ticket = field(default_factory=lambda: Ticket(None, batch=True), repr=False)
    batch: bool = False
    stored: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    ended_at: float | None = None
    spans: RunSpans = field(default=UNTRACED, repr=False)
    clocks: dict[int, _Clock] = field(default_factory=dict)
    _subscriptions: list[Subscription] = field(default_factory=list)
    _reported: set[int] = field(default_factory=set)
    _waiting: int = 0  # for the end alone
    _ended: bool = False

    def subscribe(self) -> Subscription:
        """Read the run from here on; whoever does has to `leave`. A late reader gets a `Prepared` of its own."""
        subscription = Subscription()
        self._subscriptions.append(subscription)
        if self.state is not None and not (self._ended and self.error):
            subscription.put(Prepared(self.state, Watch.NONE))
        if self._ended:
            subscription.end(self.error)
        return subscription

    def leave(self, subscription: Subscription) -> None:
        """Read no further. When the last reader has left, the run is cancelled."""
        self._subscriptions.remove(subscription)
        self._left()

    def _left(self) -> None:
        if not self._subscriptions and not self._waiting and not self._ended and not self.detached:
            self.cancel()

    async def ended(self) -> None:
        """Wait for the end, without being a reader."""
        assert self.task is not None  # `Runner.submit` gives it one
        await asyncio.wait((self.task,))

    async def finished(self) -> State:
        """Wait for the end as a reader.

        Raises:
            ApiError: The run has no answer.
        """
        self._waiting += 1
        try:
            await self.ended()
        finally:
            self._waiting -= 1
            self._left()
        if self.error is not None:
            raise self.error
        assert self.state is not None  # a run that ended by itself and without an error was prepared
        return self.state

    def seconds(self, round: int) -> float:
        """From a round's first start to its last end so far."""
        clock = self.clocks.get(round)
        return clock.last - clock.first if clock else 0.0

    def cancel(self, error: ApiError | None = None) -> None:
        """End the run now; with an error, those who still read it are told."""
        if error is not None and self.error is None:
            self.error = error
        self.cancelled = True
        if self.task is not None:
            self.task.cancel()

    def publish(self, item: Item) -> None:
        """Hand an item to everyone who reads."""
        for subscription in self._subscriptions:
            subscription.put(item)

    def end(self) -> None:
        """The last word, once the task has ended."""
        self._ended = True
        self.stored.set()
        for subscription in self._subscriptions:
            subscription.end(self.error)

    def facts(self, event: Event, now: float) -> Iterator[Item]:
        """An event with what follows from it for those who read along; traces are kept back."""
        assert self.state is not None
        match event:
            case RolloutStarted(slot):
                if slot.round not in self.clocks:
                    self.clocks[slot.round] = _Clock(now, now)
                    needed = sum(1 for other in self.state.needed if other.round == slot.round)
                    yield RoundStarted(slot.round, needed)
                yield event
            case RolloutFinished(rollout, trace):
                if trace is not None and rollout.slot.round == self.state.params.rounds:
                    self.traces[rollout.slot] = trace
                yield RolloutFinished(rollout)
                yield from self._round_end(rollout.slot.round, now)
            case RolloutFailed(slot):
                yield event
                yield from self._round_end(slot.round, now)
            case RolloutAborted(rollout):
                yield event
                yield from self._round_end(rollout.slot.round, now)
            case SetSkipped(slot):
                yield event
                yield from self._round_end(slot.round, now)
            case QuorumReached(round):
                yield event
                yield from self._round_end(round, now)
            case _:
                yield event

    def _round_end(self, round: int, now: float) -> Iterator[Item]:
        state, clock = self.state, self.clocks.get(round)
        assert state is not None
        if clock is None:  # nothing of it was ever generated
            return
        clock.last = now
        if round not in self._reported and all(state.ended(slot) for slot in state.needed if slot.round == round):
            self._reported.add(round)
            yield RoundFinished(round, state.stats[round], self.seconds(round))


class Runner:
    """Starts runs, bounds how many there are, and ends them. `aclose` leaves none behind."""

    def __init__(
        self,
        host: EngineHost,
        admission: Admission,
        metrics: Metrics,
        *,
        max_runs: int,
        max_queued: int,
        engine_wait_s: float,
        max_batch_runs: int = 256,
        journal: Journal | None = None,
        tenants: Tenants | None = None,
        tracing: Tracing = UNTRACED,
    ) -> None:
        self.host = host
        self.tenants = tenants or Tenants(KeyRing(), metrics)
        self.draining = False
        self.left = asyncio.Event()  # every run has ended here: who still follows one has to do so elsewhere
        self.tokens_per_s: float | None = None  # of the fastest rollout that was long enough to tell
        self._admission = admission
        self._metrics = metrics
        self._max_runs = max_runs
        self._max_queued = max_queued
        self._max_batch_runs = max_batch_runs
        self._engine_wait_s = engine_wait_s
        self._journal = journal
        self._tracing = tracing
        self._closing: set[asyncio.Task[None]] = set()  # books of runs that have ended
        self._places = asyncio.Semaphore(max_runs)
        self._runs: set[Run] = set()
        self._batch_runs = 0  # of those
        self._adopting: asyncio.Task[Any] | None = None
        self._woken = asyncio.Event()  # there may be runs to take up, and room for them
        self._priority = 0
        self._judge = MathJudge()

    def next_priority(self) -> int:
        """The priority of the next run: older runs come first in the engine.

        Milliseconds since 1970, so that servers which share an engine agree, before and after a restart.
        """
        self._priority = max(self._priority + 1, time.time_ns() // 1_000_000)
        return self._priority

    def submit(
        self,
        run_id: str,
        prepare: Prepare,
        deadline_s: float | None = None,
        record: NewRun | None = None,
        key_id: str | None = None,
        trace: TraceHeaders = (),
    ) -> Run:
        """Let a run in.

        Args:
            run_id: Its name.
            prepare: Checks the request against the engine, once that is up, and makes the run.
            deadline_s: Seconds from now within which it has to end, whatever it waits for.
            record: What the store keeps of the request; None for a run that is not stored.
            key_id: The API key that asks for it; None on a server without keys.
            trace: The trace that the request is a part of.

        Raises:
            RateLimited: The key has used what it may.
            Overloaded: Too many runs in flight and waiting.
            ShuttingDown: The server is about to leave.
        """
        if self.draining:
            self._metrics.count_rejection("shutting_down")
            raise ShuttingDown
        ticket = self.tenants.enter(key_id)
        alive = len(self._runs) - self._batch_runs
        if alive >= self._max_runs + self._max_queued:
            self._metrics.count_rejection("overloaded")
            self.tenants.undo(ticket)
            raise Overloaded(self._max_runs, alive - self._max_runs)
        detached = record is not None and record.background
        run = Run(run_id, asyncio.get_running_loop().time(), detached=detached, ticket=ticket)
        if deadline_s is not None:
            run.deadline = run.begun + deadline_s
        run.spans = self._tracing.run(run_id, key_id, trace)
        run.spans.attach()  # of the request too, whose log line comes with its end
        self._let_go(run, partial(self._begin, run, prepare, record))
        return run

    def _let_go(self, run: Run, life: Callable[[], Awaitable[None]]) -> None:
        self._runs.add(run)
        self._batch_runs += run.batch
        run.task = asyncio.create_task(self._own(run, life), name=f"run {run.id}")
        run.task.add_done_callback(lambda _: self._forget(run))

    def find(self, run_id: str) -> Run | None:
        """A run that is in flight here."""
        return next((run for run in self._runs if run.id == run_id), None)

    async def adopt(
        self, journal: Journal, templates: Templates, models: Callable[[], Collection[str] | None], revive: Revive
    ) -> None:
        """Take up runs that were left behind, again and again, for as long as the server lives.

        Args:
            journal: Where they are.
            templates: The wording that they have to have been started with.
            models: Those whose runs can go on here, as clients name them; None while they are not known.
            revive: How those are prepared that have not begun.
        """
        self._adopting = asyncio.current_task()
        while not self.draining:
            room = min(_TAKEN_AT_ONCE, self._max_runs - (len(self._runs) - self._batch_runs))
            of_batches = min(_TAKEN_AT_ONCE, self._max_batch_runs - self._batch_runs)
            # One without an engine leaves them to others; but to end those that are to be ended takes none.
            served = (models() or ()) if self.host.up else ()
            claims: list[Claim] = []
            try:
                # An engine that is asleep has to be woken for them too.
                self._metrics.left_behind.set(0 if self.host.up else await journal.store.count_lost())
                claims = await journal.claim_lost(max(0, room), served, max(0, of_batches), self.tenants.held)
                for claim in claims:
                    if not await self._take_up(journal, claim, templates, revive):
                        await journal.store.release(claim)
            except StoreUnavailable as error:
                log.debug("runs are not taken up", reason=str(error))
            if len(claims) < _TAKEN_AT_ONCE:
                await self._rest(min(journal.store.lease_s / 2, _LOOK_S))

    def wake(self) -> None:
        """There may be runs to take up, or room for more of them."""
        self._woken.set()

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
                await asyncio.sleep(_TOGETHER_S)
        except TimeoutError:
            pass
        self._woken.clear()

    async def _take_up(self, journal: Journal, claim: Claim, templates: Templates, revive: Revive) -> bool:
        """Go on with a run; False where it is gone, or is for another server since this one leaves."""
        record = await journal.store.get(claim.run_id)
        if record is None or self.draining:
            return False
        unix_to_loop = asyncio.get_running_loop().time() - time.time()
        # Another server's clock may be ahead of this one's.
        begun = min(record.created_at, time.time()) + unix_to_loop
        batch = record.batch_id is not None
        ticket = self.tenants.adopt(record.key_id, batch=batch)
        run = Run(claim.run_id, begun, detached=True, batch=batch, ticket=ticket)
        if record.deadline_at is not None:
            run.deadline = record.deadline_at + unix_to_loop
        run.book = journal.take(claim, *_ends(run))
        run.stored.set()
        go_on = partial(self._go_on, run, run.book, journal, templates, partial(revive, record))
        # To end a run takes neither its engine nor its log.
        self._let_go(run, partial(_end, run) if record.cancel_requested else go_on)
        return True

    async def _go_on(
        self, run: Run, book: Book, journal: Journal, templates: Templates, revive: Callable[[], Prepare]
    ) -> None:
        """The further life of a run that was left behind."""
        log_so_far = await journal.store.events(run.id)
        events = [stored.event for stored in log_so_far]
        notes = events[0].notes if events and isinstance(events[0], RunStarted) else ""
        run.spans = self._tracing.run(run.id, run.ticket.key_id, trace_of(notes), taken_up=bool(events))
        run.spans.attach()
        if run.batch:  # its time begins with its turn: a batch may take a day
            waited_s = time.time() - log_so_far[0].at if log_so_far else 0.0
            run.begun = asyncio.get_running_loop().time() - max(0.0, waited_s)
        if events:
            try:
                run.state = replay(events, templates)
            except ValueError as error:
                raise ApiError(500, "run_lost", f"The run cannot go on: {error}.", headers=NO_RETRY) from None
        else:
            async with _in_time(run):
                await asyncio.sleep(0)  # one that comes too late may be of a model that is not served here
                run.state = (await self._prepare(revive(), run)).state
                await book.write([run.state.started])
        run.spans.begin(run.state)
        self.tenants.resume(run.ticket, run.state)
        log.info("run is taken up", run_id=run.id, events=len(events), rollouts=len(run.state.rollouts))
        if run.state.outcome is not None:
            return
        if run.batch and run.state.params.deadline_s is not None:
            run.deadline = run.begun + run.state.params.deadline_s
        clock = asyncio.get_running_loop().time
        entered = False
        try:
            try:
                async with asyncio.timeout_at(run.deadline) as until:
                    await self._enter(run)
                    entered = True
                    await self.host.wait_up(None)
            except TimeoutError:
                if not until.expired():
                    raise
                await self._end_at_deadline(run, sum(run.state.running.values()), clock())
            await self._drive(run, Watch.NONE)
        finally:
            if entered:
                self._leave(run)

    def _close(self, run: Run, status: RunStatus) -> None:
        """Write down how a run ended, or leave it to others, behind the back of those who wait for its answer."""
        if run.book is None:
            return
        if isinstance(run.error, TakenOver):
            run.book.forget()
            return
        if self._is_handed_on(run):
            closing = run.book.release()
        else:
            error = None if run.error is None else to_stored(run.error)
            # As a key in memory: one whose run may be asked for again is free.
            keep_key = not run.cancelled and (run.error is None or run.error.final)
            closing = run.book.close(status, error, keep_key=keep_key)
        task = asyncio.create_task(closing, name=f"close run {run.id}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _is_handed_on(self, run: Run) -> bool:
        """Whether a run was begun and ends here alone: whoever comes first goes on with it."""
        return self.draining and isinstance(run.error, ShuttingDown) and run.book is not None

    async def drain(self, grace_s: float) -> None:
        """Let no run in any more; give those in flight `grace_s` to end, then end them with an error that says so."""
        self.draining = True
        tasks = [run.task for run in self._runs if run.task is not None]
        if tasks:
            log.info("draining", runs=len(tasks), grace_s=grace_s)
            await asyncio.wait(tasks, timeout=grace_s)
        await self._cancel_all()

    async def aclose(self) -> None:
        """End every run."""
        self.draining = True
        await self._cancel_all()
        self._judge.close()

    async def _cancel_all(self) -> None:
        if self._adopting is not None:  # what it has just claimed is to be released, or to be among those that end
            self.wake()
            await asyncio.wait((self._adopting,), timeout=_LOOK_S)
        runs = list(self._runs)
        for run in runs:
            run.cancel(ShuttingDown(None if run.book is None else run.id))
        await asyncio.gather(*(run.task for run in runs if run.task is not None), return_exceptions=True)
        last_words = self._closing | (set() if self._journal is None else self._journal.undoing)
        if last_words:
            await asyncio.wait(last_words, timeout=_CLOSING_S)
        self.left.set()

    async def _own(self, run: Run, life: Callable[[], Awaitable[None]]) -> None:
        """The whole life of a run here; its only place where an error becomes its end."""
        clock = asyncio.get_running_loop().time
        status: RunStatus = "cancelled"
        try:
            await life()
            assert run.state is not None  # it lived
            run.error, status = _verdict(run.state, run.failures)
        except ApiError as error:
            run.error, status = error, "refused" if error.status < 500 else "failed"
        except (Fenced, StoreUnavailable, Undecodable) as error:
            # Another server has it, or can read what a newer one wrote: whoever reads it here has to come again.
            log.warning("run is given up", run_id=run.id, reason=str(error))
            run.error = TakenOver()
        except Exception:
            log.exception("run broke", run_id=run.id)
            headers = NO_RETRY if run.detached or run.clocks else ()
            run.error = ApiError(500, "internal_error", "The server failed; the run has no answer.", headers=headers)
            status = "failed"
        finally:
            self._report(run, status, clock() - run.begun)
            self._close(run, status)

    async def _begin(self, run: Run, prepare: Prepare, record: NewRun | None) -> None:
        """The life of a run that was submitted."""
        async with _in_time(run):
            prepared = await self._prepare(prepare, run, record)
            params = prepared.state.params
            self.tenants.admit(run.ticket, params, prepared.prompt_tokens, promised=run.book is not None)
            if run.book is not None:
                await run.book.write([prepared.state.started])
            elif record is not None:
                await self._write_down(run, record, prepared.state.started)
            run.state = prepared.state
            run.spans.begin(run.state)
            run.publish(prepared)
            await self._enter(run)
        try:
            await self._drive(run, prepared.watch)
        finally:
            self._leave(run)

    async def _write_down(self, run: Run, record: NewRun, *events: Event) -> None:
        """From here on the run outlives this server."""
        if self._journal is None:
            return
        try:
            run.book = await self._journal.open(record, events, *_ends(run))
        except KeyTaken:
            raise KeyBusy from None
        except StoreUnavailable as error:
            raise StoreAway(error.reason) from None
        run.stored.set()

    def _forget(self, run: Run) -> None:
        """Let go of a run whose task has ended, even if it was cancelled before its first step."""
        self._runs.discard(run)
        self.tenants.leave(run.ticket, run.state)
        run.spans.end("cancelled", run.state, None)
        if run.batch:
            self._batch_runs -= 1
            self.wake()
        run.end()

    async def _enter(self, run: Run) -> None:
        """Wait for one of `max_runs` places, first come, first served; `_leave` gives it back.

        A run of a batch is taken up where it has one already.
        """
        self._metrics.queued.inc()
        try:
            if not run.batch:
                await self._places.acquire()
        finally:
            self._metrics.queued.dec()
        self._metrics.running.inc()

    def _leave(self, run: Run) -> None:
        self._metrics.running.dec()
        if not run.batch:
            self._places.release()

    async def _prepare(self, prepare: Prepare, run: Run, record: NewRun | None = None) -> Prepared:
        for deaths in range(_MOST_DEATHS):
            if record is not None and record.background and run.book is None and not self.host.up:
                await self._write_down(run, record)  # its engine may take long: whoever asked is told that it waits
            if not self.host.up:
                with self._metrics.queued.track_inprogress():
                    await self.host.wait_up(None if run.detached else self._engine_wait_s)
            try:
                return await prepare(self.host.engine)
            except EngineDead as error:
                self.host.lost(str(error))
                await asyncio.sleep(_FIRST_PAUSE_S * 2**deaths)
        raise EngineUnavailable(self.host.reason or "it dies again and again")

    async def _drive(self, run: Run, watch: Watch) -> None:
        """Run to the outcome; a dead engine is waited for, and the run goes on from where it stands.

        Args:
            run: The run.
            watch: Which rollouts are followed delta by delta.
        """
        clock = asyncio.get_running_loop().time
        assert run.state is not None
        params = run.state.params
        plain = not params.rounds and params.population == 1
        engine = self._admission.through(
            run.spans.through(self.host.engine, self.host.engine.model),
            run.begun,
            plain=plain,
            batch=run.batch,
            cache_salt=self.tenants.salt(run.ticket.key_id),
        )
        run.ticket.share = engine.share
        lost_tokens: int | None = None
        deaths, ended = 0, 0
        while True:
            async with open_run(
                run.state,
                engine,
                watch=watch,
                judge=self._judge,
                elapsed_s=clock() - run.begun,
                lost_tokens=lost_tokens,
            ) as events:
                try:
                    async for item in events:
                        if isinstance(item, RolloutDelta):
                            run.publish(item)
                            continue
                        batch = [(item, events.state), *events.rest()]
                        if run.book is not None:
                            await run.book.write([event for event, _ in batch])
                        for event, state in batch:
                            self._take(run, state, event, clock())
                    return
                except EngineDead as error:
                    reason = str(error)
                    run.state, lost_tokens = events.state, events.lost_tokens
            before, ended = ended, len(run.state.rollouts) + len(run.state.lost)
            deaths = 1 if ended > before else deaths + 1
            self.host.lost(reason)
            log.warning(
                "run waits for its engine", run_id=run.id, reason=reason, deaths=deaths, lost_tokens=lost_tokens
            )
            try:
                async with asyncio.timeout_at(run.deadline) as until:
                    if deaths > _MOST_DEATHS:
                        raise EngineUnavailable(reason)
                    await asyncio.sleep(_FIRST_PAUSE_S * 2**deaths)
                    await self.host.wait_up(None if run.detached else self._engine_wait_s)
            except EngineUnavailable as error:
                spent = run.state.usage.completion_tokens + run.state.charged_tokens + lost_tokens
                raise (error.unretried() if spent else error) from None
            except TimeoutError:
                if not until.expired():
                    raise
                await self._end_at_deadline(run, lost_tokens, clock())

    async def _end_at_deadline(self, run: Run, lost_tokens: int, now: float) -> None:
        """Fold the deadline into the state of a run without an engine: what follows is decided from the state alone.

        The deadline comes before the loss of what was in flight, so that readers see why it is not begun anew.
        """
        assert run.state is not None  # it was running
        facts: list[Event] = [] if run.state.stopping is Stopped.DEADLINE else [DeadlineReached()]
        if run.state.running:
            facts.append(RunResumed(tuple(sorted(run.state.running)), lost_tokens))
        if run.book is not None:
            await run.book.write(facts)
        for fact in facts:
            self._take(run, apply(run.state, fact), fact, now)

    def _take(self, run: Run, state: State, item: Event, now: float) -> None:
        run.state = state
        match item:
            case RolloutFinished(rollout) | RolloutAborted(rollout):
                self._metrics.count_rollout(rollout.finish.value, rollout.usage)
                self._measure(rollout)
            case RolloutFailed(slot, error, usage, _, status):
                run.failures.add(status)
                self._metrics.count_rollout("failed", usage)
                log.info("rollout failed", run_id=run.id, round=slot.round, index=slot.index, error=error[:500])
            case RunResumed(slots, tokens):
                self._metrics.count_lost(len(slots), tokens)
                log.info("rollouts are asked for again", run_id=run.id, rollouts=len(slots), lost_tokens=tokens)
        run.spans.take(item)
        for fact in run.facts(item, now):
            if isinstance(fact, RoundFinished):
                run.spans.end_round(fact.round, fact.stats)
            run.publish(fact)

    def _measure(self, rollout: Rollout) -> None:
        tokens = rollout.usage.completion_tokens
        if tokens >= _MEASURED_TOKENS and rollout.seconds > 0:
            self.tokens_per_s = max(self.tokens_per_s or 0.0, tokens / rollout.seconds)

    def _report(self, run: Run, status: RunStatus, seconds: float) -> None:
        """One line and the metrics of a run that has ended; whoever goes on with one counts it at its end."""
        run.spans.end(status, run.state, run.error.code if run.error else None)
        if isinstance(run.error, TakenOver) or self._is_handed_on(run):
            how = "taken over" if isinstance(run.error, TakenOver) else "handed on"
            log.info(f"run {how}", run_id=run.id, key_id=run.ticket.key_id, seconds=round_off(seconds))
            return
        self._metrics.count_run(status)
        self._metrics.run_seconds.observe(seconds)
        for round in run.clocks:
            self._metrics.round_seconds.observe(run.seconds(round))
        state, key_id = run.state, run.ticket.key_id
        code = run.error.code if run.error else None
        if key_id is not None:
            self._metrics.count_key_run(key_id, status, run.ticket.spent(state))
        if state is None:
            if code == "context_length_exceeded":
                self._metrics.count_rejection("prompt_tokens")
            log.info("run refused", run_id=run.id, key_id=key_id, code=code)
            return
        outcome = state.outcome
        if isinstance(outcome, RunFinished):
            for option, saving in savings(state).items():
                self._metrics.skipped.labels(option).inc(saving.rollouts)
            if outcome.votes[0] > 0 and len(outcome.candidates) > 1:
                self._metrics.agreement.observe(outcome.votes[0] / len(outcome.candidates))
        usage = state.usage
        log.info(
            f"run {status}",
            run_id=run.id,
            key_id=key_id,
            seconds=round_off(seconds),
            rollouts=sum(stats.started for stats in state.stats),
            failed=sum(stats.failed for stats in state.stats),
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            code=code,
        )


@asynccontextmanager
async def _in_time(run: Run) -> AsyncIterator[None]:
    """Give a run no longer than its deadline, for as long as it has nothing that could be an answer.

    Raises:
        DeadlinePassed: Out of the block.
    """
    try:
        async with asyncio.timeout_at(run.deadline) as until:
            yield
    except TimeoutError:
        if run.deadline is None or not until.expired():
            raise
        raise DeadlinePassed(run.deadline - run.begun) from None


def _ends(run: Run) -> tuple[Callable[[], None], Callable[[], None]]:
    """How the store ends a run: by giving it to another server, and because somebody asked for it."""
    return lambda: run.cancel(TakenOver()), lambda: run.cancel(RunCancelled())


async def _end(run: Run) -> None:
    """The further life of a run that was cancelled while nobody had it."""
    run.cancel(RunCancelled())
    await asyncio.sleep(0)


def round_off(seconds: float) -> float:
    """Milliseconds are enough for people."""
    return round(seconds, 3)


def _verdict(state: State, failures: set[int | None]) -> tuple[ApiError | None, RunStatus]:
    """What the outcome is to a client."""
    match state.outcome:
        case RunFinished(stopped=stopped):
            return None, "stopped" if stopped in (Stopped.DEADLINE, Stopped.BUDGET) else "finished"
        case RunFailed(reason):
            if state.stopping is Stopped.DEADLINE and state.params.deadline_s is not None:
                return DeadlinePassed(state.params.deadline_s), "failed"
            if failures and failures <= REFUSALS:
                return EngineRefused(reason), "refused"
            return EngineFailed(reason), "failed"
    raise RuntimeError(f"run {state.run_id} ended without an outcome")
