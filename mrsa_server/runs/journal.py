"""What the runs of this server do, written down before anybody acts on it, and the leases on them.

Each run has a `Book`, and one writer. While the store is away a run stands still at the event that it cannot write, its
rollouts in flight go on, and the write is repeated until it is taken. A run that another server has taken over
meanwhile is let go without a word (`Fenced`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import structlog

from harness.events import Event
from mrsa_server.runs.patience import patiently, promptly
from mrsa_server.runs.record import Ended, Held, NewRun, StoredStatus
from mrsa_server.runs.store_errors import Fenced, KeyTaken, RunExists, StoreUnavailable

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.store import Claim, RunStore

_TOGETHER = 256  # runs in one transaction
_RENEWALS = 3  # in the time of a lease, so that one that is missed loses nothing
_CURRENT = 1 / 2  # of a lease: who renewed his so long ago does it again before he takes others'
_MISSED = 2 / 3  # after so long without a renewal, another server may have lost its leases the same way

log = structlog.get_logger("mrsa.store")


class Book:
    """One run's log, as its owner writes it.

    Attributes:
        claim: The right to write.
        lost: Called once another server has the run.
    """

    def __init__(self, journal: Journal, claim: Claim, lost: Callable[[], None], cancelled: Callable[[], None]) -> None:
        self.claim = claim
        self.lost = lost
        self._cancelled = cancelled
        self._told = False
        self._journal = journal
        self._last = claim.last

    async def write(self, events: Sequence[Event]) -> None:
        """Return when the events are on the disk.

        Raises:
            Fenced: The run is another server's by now.
        """
        self._last = await self._journal.write(self.claim, events, self._last)

    async def close(self, status: Ended, error: bytes | None = None, *, keep_key: bool = True) -> None:
        """The run has ended; what another server makes of it is that one's."""
        try:
            # Its last write may still be on the way, if nobody waited for it: so no number is given.
            await self._journal.write(self.claim, (), None, status, error, keep_key=keep_key)
        except Fenced as fenced:
            log.warning("run was taken over", run_id=self.claim.run_id, reason=str(fenced))
        finally:
            self.forget()

    async def release(self) -> None:
        """Let whoever comes first go on with the run; its lease ends by itself where the store is away."""
        self.forget()
        try:
            await self._journal.store.release(self.claim)
        except StoreUnavailable as error:
            log.warning("run was not released", run_id=self.claim.run_id, reason=str(error))

    def cancel(self) -> None:
        """Somebody wants the run ended; it is told once."""
        if not self._told:
            self._told = True
            self._cancelled()

    def forget(self) -> None:
        """The lease is nobody's concern here any more."""
        self._journal.forget(self)


class _Waiting(NamedTuple):
    claim: Claim
    events: Sequence[Event]
    after: int | None
    status: StoredStatus
    error: bytes | None
    keep_key: bool
    written: asyncio.Future[int]


class Journal:
    """The books of this server's runs. What comes while one transaction is written waits for the next, all together.

    Args:
        store: Where they are.

    Attributes:
        undoing: Forgets runs that were given up while they were stored.
    """

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self._books: dict[Claim, Book] = {}
        self._waiting: deque[_Waiting] = deque()
        self._writer: asyncio.Task[None] | None = None
        self.undoing: set[asyncio.Task[None]] = set()
        self._given_up: deque[tuple[str, asyncio.Task[Claim]]] = deque()
        self._renewed_at = time.time()  # the clock of SQLite's leases, which knows when the machine was asleep
        self._claims_from = 0.0
        store.hear_cancels(self._cancel)

    async def write(
        self,
        claim: Claim,
        events: Sequence[Event],
        after: int | None,
        status: StoredStatus = "running",
        error: bytes | None = None,
        *,
        keep_key: bool = True,
    ) -> int:
        """Return when a run's events are on the disk; the number of the last one.

        Raises:
            Fenced: The run is another server's by now.
        """
        written: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(claim, events, after, status, error, keep_key, written))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write(), name="journal")
        return await written

    async def _write(self) -> None:
        from mrsa_server.runs.store import Entry  # it is there, since there is a store

        try:
            while self._waiting:
                batch: dict[str, _Waiting] = {}  # one for each run
                while self._waiting and len(batch) < _TOGETHER and self._waiting[0].claim.run_id not in batch:
                    waiting = self._waiting.popleft()
                    batch[waiting.claim.run_id] = waiting
                entries = [
                    Entry(one.claim, one.events, one.after, one.status, one.error, keep_key=one.keep_key)
                    for one in batch.values()
                ]
                try:
                    found: Sequence[int | Exception] = await patiently(partial(self.store.write_many, entries))
                except Exception as error:  # whoever waits is told; the writer lives on
                    found = [error] * len(entries)
                for one, last in zip(batch.values(), found, strict=True):
                    if one.written.done():
                        continue
                    if isinstance(last, Exception):
                        one.written.set_exception(last)
                    else:
                        one.written.set_result(last)
        finally:
            self._writer = None

    async def open(
        self, record: NewRun, events: Sequence[Event], lost: Callable[[], None], cancelled: Callable[[], None]
    ) -> Book:
        """Store a new run with its first events, within `NEW_S`. One that was given up leaves nothing to be taken up.

        Raises:
            KeyTaken, RunExists: As the store.
            StoreUnavailable: The store did not take it in that time.
        """
        attempt: asyncio.Task[Claim] | None = None
        away: StoreUnavailable | None = None
        error: BaseException
        try:
            async with promptly(self.store) as wanted:

                async def create() -> Claim:
                    nonlocal attempt, away
                    attempt = asyncio.create_task(self.store.create(record, events, wanted=wanted))
                    try:
                        return await asyncio.shield(attempt)
                    except StoreUnavailable as error:
                        away = error
                        raise

                claim = await patiently(create)
        except RunExists:
            if away is None:
                raise
            error = away  # a write that was thought lost had arrived, and the run was taken up meanwhile
        except (asyncio.CancelledError, StoreUnavailable) as over:
            error = over if away is None or isinstance(over, asyncio.CancelledError) else away
        else:
            return self.take(claim, lost, cancelled)
        if attempt is not None:
            self._undo(record.run_id, attempt)
        raise error

    def _undo(self, run_id: str, attempt: asyncio.Task[Claim]) -> None:
        """Forget a run that was given up before anybody knew of it: a row without an owner would be taken up."""
        self._given_up.append((run_id, attempt))
        if not self.undoing:
            undoing = asyncio.create_task(self._undo_all(), name="undo runs")
            self.undoing.add(undoing)
            undoing.add_done_callback(self.undoing.discard)

    async def _undo_all(self) -> None:
        """One after the other, so that a store that is away is asked for one of them, however many there are."""
        while self._given_up:
            run_id, attempt = self._given_up[0]
            try:
                await asyncio.wait((attempt,))
                if not isinstance(attempt.exception(), KeyTaken):
                    await patiently(partial(self.store.delete, run_id))
            except asyncio.CancelledError:
                log.warning("runs that were given up may be taken up", runs=[name for name, _ in self._given_up])
                raise
            self._given_up.popleft()

    def take(self, claim: Claim, lost: Callable[[], None], cancelled: Callable[[], None]) -> Book:
        """Go on with a run that was claimed."""
        book = self._books[claim] = Book(self, claim, lost, cancelled)
        return book

    def forget(self, book: Book) -> None:
        """Its lease is nobody's concern any more."""
        self._books.pop(book.claim, None)

    async def keep(self) -> None:
        """Prolong the leases for as long as the server lives, and hear who is to be ended."""
        while True:
            await asyncio.sleep(self.store.lease_s / _RENEWALS)
            try:
                await self.renew()
            except StoreUnavailable as error:
                log.debug("leases were not renewed", reason=str(error), runs=len(self._books))

    async def renew(self) -> None:
        """Prolong the leases, and tell the runs that were taken over or are to be ended.

        Raises:
            StoreUnavailable: As the store.
        """
        asked = time.time()
        if not self._books:
            await self.store.ping()  # whether it was away is to be known all the same
        renewed = await self.store.renew(list(self._books))
        if not self._renewed_within(_MISSED):  # their owners are to come first
            self._claims_from = time.time() + self.store.lease_s
        self._renewed_at = asked
        for claim in renewed.lost:
            if (book := self._books.pop(claim, None)) is not None:
                book.lost()
        for claim in renewed.cancelled:
            self._cancel(claim.run_id)

    def _cancel(self, run_id: str) -> None:
        for book in self._books.values():
            if book.claim.run_id == run_id:
                book.cancel()

    async def claim_lost(
        self,
        limit: int,
        models: Collection[str],
        of_batches: int | None = None,
        held: Held | None = None,
    ) -> list[Claim]:
        """Take runs that were left behind; none for a lease's time after one in which leases could not be renewed.

        Args:
            limit: As the store.
            models: Likewise.
            of_batches: Likewise.
            held: Likewise.

        Raises:
            StoreUnavailable: As the store.
        """
        if not self._renewed_within(_CURRENT):
            await self.renew()  # or it would take its own runs
        if time.time() < self._claims_from:
            return []
        return await self.store.claim_lost(limit, models, of_batches, held)

    def _renewed_within(self, share: float) -> bool:
        return 0 <= time.time() - self._renewed_at < share * self.store.lease_s
