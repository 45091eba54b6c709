"""Runs that outlive their process: an append-only log of events for each, and a lease that says who may write to it.

An owner holds a run by a claim. Its fence grows with each takeover, and every write carries it: an owner that froze and
was given up for dead writes nothing more. A run whose lease is over is anybody's (`claim_lost`), who goes on from the
fold over its events. Waking is best effort (`bells`, LISTEN/NOTIFY); the tables are the truth.

A write that met `StoreUnavailable` may have arrived. It may be repeated as it was: `create` and `finish` by themselves,
`append` with `after`. One that is cancelled goes on by itself to its end, for which `aclose` waits.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog
from sqlalchemy import (
    Boolean,
    ColumnElement,
    Executable,
    Row,
    Select,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    null,
    or_,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.exc import IntegrityError

from harness.events import Event, RolloutFinished
from harness.types import Slot, Trace
from mrsa_server.runs import codec, tables
from mrsa_server.runs.bells import Bells, Progress
from mrsa_server.runs.database import Database, Transaction
from mrsa_server.runs.record import BATCH_ENDED, Ended, Held, NewRun, RunKind, StoredStatus
from mrsa_server.runs.store_errors import Fenced, GivenUp, KeyTaken, NoSuchRun, RunExists, StoreError
from mrsa_server.runs.transactions import Observer, Transactions
from mrsa_server.runs.transactions import whole as _whole

_CHANNEL = "mrsa_runs"
_CANCELS = "mrsa_cancels"
_POLL_S = 0.25  # where nobody tells us what other processes write
_LISTENING_POLL_S = 5.0  # beside LISTEN, in case a word was lost
_RECONNECT_S = 1.0
_BATCH = 500  # runs in one statement
_FORGOTTEN = 400  # events of the runs in one transaction that deletes: with traces up to 16 MB, some 60 ms
_BREATH_S = 0.02  # between such transactions, for writers in other processes, who ask now and then

log = structlog.get_logger("mrsa.store")
_runs = tables.runs.c
_UNFINISHED = _runs.ended_at.is_(None)
_GOING = ("queued", "running")
_CHANGED = ("events", "status", "owner", "ended_at", "lease_until", "result", "error")
_CHANGE = (
    update(tables.runs)
    .where(_runs.run_id == bindparam("which"))
    .values(
        {name: bindparam(f"new_{name}") for name in _CHANGED}
        | {"idempotency_key": case((bindparam("keep_key", type_=Boolean), _runs.idempotency_key), else_=null())}
    )
)


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to write to a run, until somebody takes it over.

    Attributes:
        run_id: The run.
        fence: How often it has been taken, itself included.
        last: The number of its last event when it was claimed; 0 for none.
    """

    run_id: str
    fence: int
    last: int


@dataclass(frozen=True, slots=True)
class Entry:
    """What is to be written to a run, beside what others are to write to theirs (`write_many`).

    Attributes:
        claim: The right to write.
        events: As of `append`.
        after: Likewise.
        status: How the run ended, or `running`.
        error: As of `finish`.
        result: Likewise.
        keep_key: Likewise.
    """

    claim: Claim
    events: Sequence[Event] = ()
    after: int | None = None
    status: StoredStatus = "running"
    error: bytes | None = None
    result: bytes | None = None
    keep_key: bool = True


class Renewed(NamedTuple):
    """What became of claims: those that are lost, and those whose run is to be cancelled."""

    lost: tuple[Claim, ...]
    cancelled: tuple[Claim, ...]


class Cursor(NamedTuple):
    """A place in the list of runs, newest first."""

    created_at: float
    run_id: str


class Pruned(NamedTuple):
    """How many runs were deleted whole, how many lost their traces, how many keys are free again."""

    runs: int
    traces: int
    keys: int


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What the list shows of a run: as `NewRun`, and how far it is.

    Attributes:
        ended_at: Unix seconds; None while it goes on.
        last: The number of its last event.
        owner: Who holds it; None for nobody.
        cancel_requested: Whether its owner is to end it.
        key_id: As of `NewRun`, likewise the three after it.
    """

    run_id: str
    kind: RunKind
    status: StoredStatus
    model: str
    effort: str | None
    priority: int
    background: bool
    created_at: float
    deadline_at: float | None
    ended_at: float | None
    idempotency_key: str | None
    metadata: Mapping[str, str]
    last: int
    owner: str | None
    cancel_requested: bool
    key_id: str | None
    batch_id: str | None
    batch_line: int | None
    custom_id: str | None

    @property
    def cursor(self) -> Cursor:
        """Its place in the list."""
        return Cursor(self.created_at, self.run_id)


@dataclass(frozen=True, slots=True)
class StoredRun(RunSummary):
    """A run with what it was asked and what it answered.

    Attributes:
        body: The request as it came.
        body_digest: As it was given.
        result: What `finish` was given.
        error: Likewise.
    """

    body: bytes = field(repr=False)
    body_digest: bytes = field(repr=False)
    result: bytes | None = field(repr=False)
    error: bytes | None


@dataclass(frozen=True, slots=True)
class RunFilter:
    """Which runs to list; what is left out does not matter. `since` is included, `until` is not.

    `key_id` is the API key that asked.
    """

    status: Collection[StoredStatus] = ()
    model: str | None = None
    kind: RunKind | None = None
    batch_id: str | None = None
    since: float | None = None
    until: float | None = None
    key_id: str | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """An event of a log: its number from 1 on, and when it was stored, Unix seconds."""

    number: int
    at: float
    event: Event


class RunStore:
    """One owner's way to the stored runs.

    Args:
        url: `sqlite:///PATH` or `postgresql://USER@HOST/NAME`.
        owner: Who holds what is claimed here; no two stores that are open at once have the same.
        lease_s: Seconds that a claim holds without `renew` or `append`.
        keep_traces: Whether traces are stored at all.
        wait_s: Seconds to wait for a lock, a connection or an answer of the database.

    Raises:
        ValueError: The URL is for no database that is known here.
    """

    def __init__(
        self,
        url: str,
        *,
        owner: str,
        lease_s: float,
        keep_traces: bool = True,
        wait_s: float = 10.0,
    ) -> None:
        self.owner = owner
        self.lease_s = lease_s
        self._keep_traces = keep_traces
        self._database = Database(url, wait_s)
        self._bells = Bells(self._look, _POLL_S)
        self._listener: asyncio.Task[None] | None = None
        self._cancelled: Callable[[str], None] = lambda run_id: None
        self.transactions = Transactions()

    @property
    def observer(self) -> Observer | None:
        """Is told what is done here."""
        return self.transactions.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self.transactions.observer = observer

    @property
    def database(self) -> Database:
        """Where the runs are."""
        return self._database

    @property
    def name(self) -> str:
        """Where the runs are, without the password."""
        return self._database.name

    @_whole("other")
    async def open(self) -> None:
        """Find the database and its tables; a SQLite file is made and brought up to date.

        Raises:
            SchemaMismatch: `mrsa db upgrade` has to be run first, or a newer version was here.
            StoreUnavailable: It does not answer.
        """
        await self._database.check()
        if self._database.postgres:
            self._listener = asyncio.create_task(self._listen(), name="store listen")

    def hear_cancels(self, heard: Callable[[str], None]) -> None:
        """Have `heard` called with the id of each run that is to be cancelled, whoever has it.

        At once what is asked for in this process and, with Postgres, in any. It may be called twice for one request,
        and not at all where the database was away: `renew` tells in any case.
        """
        self._cancelled = heard

    async def aclose(self) -> None:
        """Let transactions end and close every connection. Claims stay what they are until their leases end.

        Whoever waits or comes later is told that the store is not available.
        """
        self.transactions.closed = True
        await self.transactions.settle()
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.wait((self._listener,))
        await self._bells.aclose()
        await self.transactions.settle()
        await self._database.aclose()

    # Writing: an owner's side.

    @_whole("write")
    async def create(
        self, record: NewRun, events: Sequence[Event] = (), *, wanted: Callable[[], bool] = lambda: True
    ) -> Claim:
        """Store a new run and claim it. Without events it is `queued`, until it gets some.

        Args:
            record: The run.
            events: The first of its log.
            wanted: Asked before the end: whether somebody still waits for it.

        Raises:
            GivenUp: Nobody does.
            KeyTaken: Another run has its idempotency key.
            RunExists: A run of this id is there already.
            StoreUnavailable: Nobody knows whether it is stored; the same again is safe.
        """
        (rows,) = await _rows([events], keep_traces=self._keep_traces)
        values = row_of(record) | {
            "status": "running" if events else "queued",
            "events": len(events),
            "owner": self.owner,
            "fence": 1,
        }
        try:
            async with self._database.writing() as connection:
                now = self._database.now
                make = self._database.insert
                made = (
                    await connection.execute(
                        make(tables.runs)
                        .values(**values, lease_until=now + self.lease_s)
                        .on_conflict_do_nothing(index_elements=[_runs.idempotency_key])
                        .returning(now)
                    )
                ).first()
                if made is not None:
                    stored = _event_rows(record.run_id, 0, made[0], rows)
                    await _insert(connection, stored, _trace_rows(record.run_id, rows))
                    if not wanted():
                        raise GivenUp(record.run_id)
                    return Claim(record.run_id, 1, len(events))
        except IntegrityError as error:
            if await self._is_ours(record.run_id):
                return Claim(record.run_id, 1, len(events))
            raise RunExists(record.run_id) from error
        assert record.idempotency_key is not None  # nothing else makes an insert do nothing
        other = await self.find_key(record.idempotency_key)
        if other is None:  # it was freed just now
            return await self.create(record, events, wanted=wanted)
        if other.run_id == record.run_id and await self._is_ours(record.run_id):
            return Claim(record.run_id, 1, len(events))
        raise KeyTaken(other.run_id, other.body_digest)

    async def append(self, claim: Claim, events: Sequence[Event], *, after: int | None = None) -> int:
        """Add events to the log, with the traces that come along, in one transaction; the lease begins anew.

        Args:
            claim: The run.
            events: In their order; they get the next numbers.
            after: The last number that the owner knows of, for a write that can be repeated: what is there already
                is not written again.

        Returns:
            The number of the last event.

        Raises:
            Fenced: The run is another's by now, or has ended.
            StoreUnavailable: Nobody knows whether they are stored; the same again is safe with `after`.
            ValueError: The log does not end at `after`.
        """
        return await self._write(Entry(claim, events, after))

    async def finish(
        self,
        claim: Claim,
        status: Ended,
        events: Sequence[Event] = (),
        *,
        after: int | None = None,
        result: bytes | None = None,
        error: bytes | None = None,
        keep_key: bool = True,
    ) -> int:
        """End a run: nobody writes to it any more, and those who wait are woken.

        Args:
            claim: The run.
            status: How it ended.
            events: The last of its events.
            after: As of `append`.
            result: The whole response, for those who ask later.
            error: The same of a run that has none.
            keep_key: Whether its idempotency key goes on standing for it; else a request with it is a new run.

        Returns:
            The number of the last event.

        Raises:
            Fenced: The run is another's by now, or has ended otherwise.
            StoreUnavailable: Nobody knows whether it has ended; the same again is safe.
            ValueError: The log does not end at `after`.
        """
        return await self._write(Entry(claim, events, after, status, error, result, keep_key))

    async def _write(self, entry: Entry) -> int:
        (last,) = await self.write_many([entry])
        if isinstance(last, int):
            return last
        raise last

    @_whole("write")
    async def write_many(self, entries: Sequence[Entry]) -> list[int | Fenced | ValueError]:
        """`append` and `finish` for many runs in one transaction: that costs little more than for one.

        Args:
            entries: At most one for each run.

        Returns:
            For each the number of its last event, or why nothing was written of it, as `append` would raise it.

        Raises:
            StoreUnavailable: Nobody knows whether they are stored; the same again is safe where `after` is given.
        """
        rows = await _rows([entry.events for entry in entries], keep_traces=self._keep_traces)
        found: list[int | Fenced | ValueError] = []
        changed: list[dict[str, object]] = []
        events: list[dict[str, object]] = []
        traces: list[dict[str, object]] = []
        query = select(
            _runs.run_id, _runs.fence, _runs.status, _runs.owner, _runs.events, self._database.now.label("now")
        ).where(_runs.run_id.in_([entry.claim.run_id for entry in entries]))
        async with self._database.writing() as connection:
            # In one order, so that two transactions never wait for each other.
            there = {
                row.run_id: row for row in await connection.execute(query.order_by(_runs.run_id).with_for_update())
            }
            for entry, encoded in zip(entries, rows, strict=True):
                row, run_id = there.get(entry.claim.run_id), entry.claim.run_id
                last = _number(row, entry, self.owner)
                found.append(last)
                if row is None or not isinstance(last, int) or row.status not in _GOING:
                    continue
                if entry.events and last == row.events:
                    continue  # it was written before
                ended = entry.status not in _GOING
                changed.append(
                    {
                        "which": run_id,
                        "new_events": last,
                        "new_status": entry.status,
                        "new_owner": None if ended else self.owner,
                        "new_ended_at": row.now if ended else None,
                        "new_lease_until": row.now + self.lease_s,
                        "new_result": None if entry.result is None else codec.deflate(entry.result),
                        "new_error": None if entry.error is None else codec.deflate(entry.error),
                        "keep_key": entry.keep_key,
                    }
                )
                events += _event_rows(run_id, row.events, row.now, encoded)
                traces += _trace_rows(run_id, encoded)
            if changed:
                await connection.execute(_CHANGE, changed)
            await _insert(connection, events, traces)
            if changed:
                await self._notify(connection, *(str(change["which"]) for change in changed))
        for change in changed:
            self._bells.ring(str(change["which"]))
        if self.observer is not None and (fenced := sum(isinstance(one, Fenced) for one in found)):
            self.observer.fenced(fenced)
        return found

    @_whole("renew")
    async def renew(self, claims: Collection[Claim]) -> Renewed:
        """Begin leases anew.

        Raises:
            StoreUnavailable: Nobody knows; the leases may end.
        """
        held: dict[str, tuple[int, bool]] = {}
        for batch in _batches([claim.run_id for claim in claims]):
            async with self._database.writing() as connection:
                found = await connection.execute(
                    update(tables.runs)
                    .where(_UNFINISHED, _runs.owner == self.owner, _runs.run_id.in_(batch))
                    .values(lease_until=self._database.now + self.lease_s)
                    .returning(_runs.run_id, _runs.fence, _runs.cancel_requested)
                )
                held |= {row.run_id: (row.fence, row.cancel_requested) for row in found}
        # A run that this store itself has taken again is held, though not by the old claim.
        good = {claim for claim in claims if held.get(claim.run_id, (None, False))[0] == claim.fence}
        return Renewed(
            tuple(claim for claim in claims if claim not in good),
            tuple(claim for claim in claims if claim in good and held[claim.run_id][1]),
        )

    @_whole("other")
    async def release(self, claim: Claim) -> None:
        """Give an unfinished run back: its lease ends now, and whoever comes first goes on with it.

        Raises:
            StoreUnavailable: Nobody knows; the lease ends by itself.
        """
        async with self._database.writing() as connection:
            await connection.execute(
                update(tables.runs)
                .where(_runs.run_id == claim.run_id, self._held(claim))
                # The fence grows, so that what its last owner has still on the way comes too late.
                .values(owner=None, lease_until=0.0, fence=_runs.fence + 1)
            )

    @_whole("claim")
    async def claim_lost(
        self,
        limit: int,
        models: Collection[str],
        of_batches: int | None = None,
        held: Held | None = None,
    ) -> list[Claim]:
        """Take unfinished runs whose lease is over.

        Args:
            limit: Most of those for whom somebody waits. They come first, the oldest first.
            models: Those that are served here. A run that is to be cancelled, or whose time is over, may be of any.
            of_batches: Most of the others, which are lines of batches; None for what is left of `limit`.
            held: Tells of which keys lines of batches are left alone; None for none.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        now = self._database.now
        ours = or_(_runs.model.in_(models), _runs.cancel_requested, _runs.deadline_at < now)
        lost = select(_runs.run_id).where(_UNFINISHED, _runs.lease_until < now, ours)
        alone = lost.where(_runs.batch_id.is_(None)).order_by(_runs.created_at, _runs.run_id)
        batched = lost.where(_runs.batch_id.is_not(None)).order_by(_runs.batch_id, _runs.batch_line)
        found: list[Claim] = []
        if limit > 0:
            found += await self._claim(alone.limit(limit))
        left = limit - len(found) if of_batches is None else of_batches
        if left > 0:
            if held is not None and (waiting := held(await self._keys_of_batches())):
                free = or_(_runs.key_id.is_(None), _runs.key_id.not_in(waiting), _runs.cancel_requested)
                batched = batched.where(free)
            found += await self._claim(batched.limit(left))
        if self.observer is not None and (lost_before := sum(claim.fence > 1 for claim in found)):
            self.observer.takeovers(lost_before)  # the others are lines that nobody has had yet
        return found

    async def _keys_of_batches(self) -> list[str]:
        """Those that have a batch under way: a few, however many keys there are."""
        batches = tables.batches.c
        query = select(batches.key_id).where(batches.status.not_in(BATCH_ENDED), batches.key_id.is_not(None)).distinct()
        async with self._database.reading() as connection:
            return list((await connection.execute(query)).scalars())

    async def _claim(self, which: Select[tuple[str]]) -> list[Claim]:
        """Take these runs, in their order."""
        async with self._database.reading() as connection:  # every server looks every second: without a lock
            if (await connection.execute(which)).first() is None:
                return []
        async with self._database.writing() as connection:
            # Read once, before the update: a subquery may be run anew for each row, and then take other rows.
            chosen = list((await connection.execute(which.with_for_update(skip_locked=True))).scalars())
            taken = await connection.execute(
                update(tables.runs)
                .where(_runs.run_id.in_(chosen))
                .values(owner=self.owner, fence=_runs.fence + 1, lease_until=self._database.now + self.lease_s)
                .returning(_runs.run_id, _runs.fence, _runs.events)
            )
            claims = {row.run_id: Claim(row.run_id, row.fence, row.events) for row in taken}
        return [claims[run_id] for run_id in chosen]

    @_whole("read")
    async def count_lost(self) -> int:
        """How many unfinished runs nobody has, of whatever model.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        lost = select(func.count()).where(_UNFINISHED, _runs.lease_until < self._database.now)
        async with self._database.reading() as connection:
            return int((await connection.execute(lost)).scalar_one())

    # Writing: anybody's side.

    @_whole("other")
    async def request_cancel(self, run_id: str) -> bool:
        """Ask the owner of a run to end it, wherever it is (`hear_cancels`). Its idempotency key is free at once.

        Returns:
            Whether there was anything to cancel.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        async with self._database.writing() as connection:
            found = await connection.execute(
                update(tables.runs)
                .where(_runs.run_id == run_id, _UNFINISHED)
                .values(cancel_requested=True, idempotency_key=null())
            )
            if not found.rowcount:
                return False
            await self._notify(connection, run_id, channel=_CANCELS)
        self._cancelled(run_id)
        return True

    @_whole("other")
    async def delete(self, run_id: str) -> bool:
        """Forget a run with its events and traces; an owner that still works on it is fenced.

        Returns:
            Whether there was one.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        async with self._database.writing() as connection:
            found = bool((await connection.execute(delete(tables.runs).where(_runs.run_id == run_id))).rowcount)
            await self._notify(connection, run_id)
        self._bells.ring(run_id)
        return found

    async def prune(
        self,
        *,
        traces_older_than_s: float | None = None,
        runs_older_than_s: float | None = None,
        keys_older_than_s: float | None = None,
    ) -> Pruned:
        """Forget what has been kept long enough, counted from the end of a run; None keeps it for ever.

        In small transactions with pauses, so that no writer waits long.

        Raises:
            StoreUnavailable: The database does not answer; what was pruned before is gone.
        """
        runs = traces = keys = 0
        if runs_older_than_s is not None:
            async for batch in self._ended_before(runs_older_than_s):
                runs += await self._execute(delete(tables.runs).where(_runs.run_id.in_(batch)))
        if traces_older_than_s is not None:
            has_traces = select(tables.traces.c.run_id).where(tables.traces.c.run_id == _runs.run_id).exists()
            async for batch in self._ended_before(traces_older_than_s, has_traces):
                await self._execute(delete(tables.traces).where(tables.traces.c.run_id.in_(batch)))
                traces += len(batch)
        if keys_older_than_s is not None:
            freed = update(tables.runs).values(idempotency_key=null())
            async for batch in self._ended_before(keys_older_than_s, _runs.idempotency_key.is_not(None)):
                keys += await self._execute(freed.where(_runs.run_id.in_(batch)))
        return Pruned(runs, traces, keys)

    # Reading.

    @_whole("read")
    async def ping(self) -> None:
        """See whether the database answers.

        Raises:
            StoreUnavailable: It does not.
        """
        async with self._database.reading() as connection:
            await connection.execute(select(1))

    async def get(self, run_id: str) -> StoredRun | None:
        """A run with its request and its result; None if there is none.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        return await self._one(_runs.run_id == run_id)

    async def find_key(self, idempotency_key: str) -> StoredRun | None:
        """The run that an idempotency key stands for; None for nothing.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        return await self._one(_runs.idempotency_key == idempotency_key)

    @_whole("read")
    async def list_runs(
        self, which: RunFilter | None = None, *, before: Cursor | None = None, limit: int = 50
    ) -> list[RunSummary]:
        """Runs, the newest first; fewer than `limit` are the last.

        Args:
            which: Of which runs.
            before: The `cursor` of the last one that was read, to go on from there.
            limit: Most runs.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        which = which or RunFilter()
        query = select(*(_runs[name] for name in _SUMMARY)).order_by(_runs.created_at.desc(), _runs.run_id.desc())
        if which.status:
            query = query.where(_runs.status.in_(which.status))
        if which.model is not None:
            query = query.where(_runs.model == which.model)
        if which.kind is not None:
            query = query.where(_runs.kind == which.kind)
        if which.batch_id is not None:
            query = query.where(_runs.batch_id == which.batch_id)
        if which.key_id is not None:
            query = query.where(_runs.key_id == which.key_id)
        if which.since is not None:
            query = query.where(_runs.created_at >= which.since)
        if which.until is not None:
            query = query.where(_runs.created_at < which.until)
        if before is not None:
            older = _runs.created_at < before.created_at
            twin = and_(_runs.created_at == before.created_at, _runs.run_id < before.run_id)
            query = query.where(or_(older, twin))
        async with self._database.reading() as connection:
            return [RunSummary(**_summary(row)) for row in await connection.execute(query.limit(limit))]

    @_whole("read")
    async def runs_of_batch(self, batch_id: str, after: int = 0, limit: int = 50) -> list[StoredRun]:
        """Runs of a batch, whole, by their lines from `after` on; fewer than `limit` are the last.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        query = select(*_WHOLE).where(_runs.batch_id == batch_id, _runs.batch_line > after)
        async with self._database.reading() as connection:
            return [_stored(row) for row in await connection.execute(query.order_by(_runs.batch_line).limit(limit))]

    @_whole("read")
    async def events(self, run_id: str, after: int = 0, limit: int | None = None) -> list[Stored]:
        """The log of a run beyond a number, all of it by default.

        Raises:
            Undecodable: A newer version wrote it.
            StoreUnavailable: The database does not answer.
        """
        found = tables.events.c
        query = (
            select(found.number, found.at, found.kind, found.body)
            .where(found.run_id == run_id, found.number > after)
            .order_by(found.number)
            .limit(limit)
        )
        async with self._database.reading() as connection:
            rows = (await connection.execute(query)).all()
        # In a thread: those of a long run take 50 ms, and its traces twice that.
        return await asyncio.to_thread(
            lambda: [Stored(row.number, row.at, codec.decode(row.kind, row.body)) for row in rows]
        )

    @_whole("read")
    async def trace(self, run_id: str, slot: Slot) -> Trace | None:
        """The trace of a rollout; None where there is none, or none any more.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        found = tables.traces.c
        query = select(found.body).where(
            found.run_id == run_id, found.round == slot.round, tables.traces.c["index"] == slot.index
        )
        async with self._database.reading() as connection:
            body = (await connection.execute(query)).scalar()
        return None if body is None else codec.decode_trace(body)

    @_whole("read")
    async def traces(self, run_id: str, round: int | None = None) -> dict[Slot, Trace]:
        """The traces of a run, or of one of its rounds.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        found = tables.traces.c
        query = select(found.round, found["index"].label("place"), found.body).where(found.run_id == run_id)
        if round is not None:
            query = query.where(found.round == round)
        async with self._database.reading() as connection:
            rows = (await connection.execute(query.order_by(found.round, found["index"]))).all()
        return await asyncio.to_thread(
            lambda: {Slot(row.round, row.place): codec.decode_trace(row.body) for row in rows}
        )

    async def wait(self, run_id: str, after: int, timeout_s: float) -> Progress:
        """Wait until a run has gone beyond `after` or has ended, or for `timeout_s`; how far it is then.

        Raises:
            NoSuchRun: There is none, or none any more.
            StoreUnavailable: The database does not answer.
        """
        clock = asyncio.get_running_loop().time
        until = clock() + timeout_s
        while True:
            with self._bells.hung(run_id, after) as bell:  # before looking, so that no ring is missed
                progress = (await self._look((run_id,))).get(run_id)
                if progress is None:
                    raise NoSuchRun(run_id)
                left = until - clock()
                if progress.last > after or progress.ended or left <= 0:
                    return progress
                await asyncio.wait((bell,), timeout=left)

    # Below.

    def _held(self, claim: Claim) -> ColumnElement[bool]:
        return and_(_UNFINISHED, _runs.owner == self.owner, _runs.fence == claim.fence)

    @_whole("prune")
    async def _execute(self, statement: Executable) -> int:
        """Write to so many rows."""
        async with self._database.writing() as connection:
            return (await connection.execute(statement)).rowcount

    async def _notify(self, connection: Transaction, *run_ids: str, channel: str = _CHANNEL) -> None:
        if self._database.postgres:  # heard once the transaction is committed, and not if it is undone
            await connection.execute(
                text("SELECT pg_notify(:channel, :run_id)"),
                [{"channel": channel, "run_id": run_id} for run_id in run_ids],
            )

    async def _listen(self) -> None:
        heard = {_CHANNEL: self._bells.ring, _CANCELS: lambda run_id: self._cancelled(run_id)}
        while True:
            with suppress(StoreError):
                async with self._database.listening(heard) as lost:
                    self._bells.poll_s = _LISTENING_POLL_S
                    self._bells.ring_all()  # for what was said while nobody listened
                    await lost.wait()
                    log.warning("no notifications", store=self.name)
            self._bells.poll_s = _POLL_S
            self._bells.ring_all()  # they find out whether the database is gone too
            await asyncio.sleep(_RECONNECT_S)

    @_whole("read")
    async def _look(self, run_ids: Collection[str]) -> Mapping[str, Progress]:
        found: dict[str, Progress] = {}
        for batch in _batches(list(run_ids)):
            query = select(_runs.run_id, _runs.events, _runs.ended_at).where(_runs.run_id.in_(batch))
            async with self._database.reading() as connection:
                rows = (await connection.execute(query)).all()
            found |= {row.run_id: Progress(row.events, row.ended_at is not None) for row in rows}
        return found

    @_whole("read")
    async def _one(self, which: ColumnElement[bool]) -> StoredRun | None:
        async with self._database.reading() as connection:
            row = (await connection.execute(select(*_WHOLE).where(which))).first()
        return None if row is None else _stored(row)

    @_whole("read")
    async def _is_ours(self, run_id: str) -> bool:
        """Whether a run was made by a write of this store that we thought lost."""
        query = select(_runs.run_id).where(_runs.run_id == run_id, _runs.owner == self.owner, _runs.fence == 1)
        async with self._database.reading() as connection:
            return (await connection.execute(query)).first() is not None

    async def _ended_before(self, seconds: float, *which: ColumnElement[bool]) -> AsyncIterator[list[str]]:
        """Runs that have ended so long ago, a few at a time, each once."""
        place = tuple_(_runs.ended_at, _runs.run_id)
        ended = select(tables.batches.c.batch_id).where(tables.batches.c.status.in_(BATCH_ENDED))
        # What a batch is still to answer with is kept until it has.
        answered = or_(_runs.batch_id.is_(None), _runs.batch_id.in_(ended))
        query = (
            select(_runs.run_id, _runs.ended_at, _runs.events)
            .where(_runs.ended_at < self._database.now - seconds, answered, *which)
            .order_by(_runs.ended_at, _runs.run_id)
            .limit(_BATCH)
        )
        page = await self._page(query)
        while page:
            batch: list[str] = []
            events = 0
            for row in page:
                if batch and events + row.events > _FORGOTTEN:
                    yield batch
                    await asyncio.sleep(_BREATH_S)
                    batch, events = [], 0
                batch.append(row.run_id)
                events += row.events
            yield batch
            page = await self._page(query.where(place > (page[-1].ended_at, page[-1].run_id)))

    @_whole("prune")
    async def _page(self, query: Select[Any]) -> Sequence[Row[Any]]:
        async with self._database.reading() as connection:
            rows: Sequence[Row[Any]] = (await connection.execute(query)).all()
            return rows


_SUMMARY = (
    "run_id",
    "kind",
    "status",
    "model",
    "effort",
    "priority",
    "background",
    "created_at",
    "deadline_at",
    "ended_at",
    "idempotency_key",
    "metadata",
    "events",
    "owner",
    "cancel_requested",
    "key_id",
    "batch_id",
    "batch_line",
    "custom_id",
)


def _summary(row: Row[Any]) -> dict[str, Any]:
    found = {name: value for name, value in row._mapping.items() if name in _SUMMARY}
    return found | {"metadata": json.loads(found["metadata"]), "last": found.pop("events")}


_WHOLE = tuple(_runs[name] for name in (*_SUMMARY, "body", "body_digest", "result", "error"))


def _stored(row: Row[Any]) -> StoredRun:
    return StoredRun(
        **_summary(row),
        body=codec.inflate(row.body),
        body_digest=row.body_digest,
        result=None if row.result is None else codec.inflate(row.result),
        error=None if row.error is None else codec.inflate(row.error),
    )


def row_of(record: NewRun) -> dict[str, object]:
    """The columns of a run that is to be stored; who has it and how far it is are the caller's."""
    return {
        "run_id": record.run_id,
        "kind": record.kind,
        "model": record.model,
        "effort": record.effort,
        "priority": record.priority,
        "background": record.background,
        "created_at": record.created_at,
        "deadline_at": record.deadline_at,
        "idempotency_key": record.idempotency_key,
        "body_digest": record.body_digest,
        "body": codec.deflate(record.body),
        "metadata": json.dumps(dict(record.metadata)),
        "cancel_requested": False,
        "key_id": record.key_id,
        "batch_id": record.batch_id,
        "batch_line": record.batch_line,
        "custom_id": record.custom_id,
    }


class _Rows(NamedTuple):
    """What an append puts into the tables: kinds and bodies of events, and traces by slot."""

    events: list[tuple[str, bytes]]
    traces: list[tuple[Slot, bytes]]


def _event_rows(run_id: str, after: int, at: float, rows: _Rows) -> list[dict[str, object]]:
    return [
        {"run_id": run_id, "number": number, "at": at, "kind": kind, "body": body}
        for number, (kind, body) in enumerate(rows.events, after + 1)
    ]


async def _insert(connection: Transaction, events: list[dict[str, object]], traces: list[dict[str, object]]) -> None:
    if events:
        await connection.execute(insert(tables.events), events)
    if traces:
        await connection.execute(insert(tables.traces), traces)


def _trace_rows(run_id: str, rows: _Rows) -> list[dict[str, object]]:
    return [{"run_id": run_id, "round": slot.round, "index": slot.index, "body": body} for slot, body in rows.traces]


def _number(row: Row[Any] | None, entry: Entry, owner: str) -> int | Fenced | ValueError:
    """The last number of a run once an entry is written, as it may have been before; or why it cannot be."""
    claim, count = entry.claim, len(entry.events)
    if row is None:
        return Fenced(claim.run_id, claim.fence, None, None)
    if row.fence != claim.fence or row.owner not in (owner, None) or (row.owner is None and row.status in _GOING):
        return Fenced(claim.run_id, claim.fence, row.fence, row.status)
    last: int = row.events
    if row.status not in _GOING:  # it ends but once
        again = row.status == entry.status and entry.after in (None, last - count)
        return last if again else Fenced(claim.run_id, claim.fence, row.fence, row.status)
    if entry.after is None or last == entry.after:
        return last + count
    if last == entry.after + count and entry.status in _GOING:
        return last
    return ValueError(f"the log of {claim.run_id} ends at {last}, not at {entry.after}")


async def _rows(logs: Sequence[Sequence[Event]], *, keep_traces: bool) -> list[_Rows]:
    """Events of some runs as they are stored; in a thread where they bring traces, whose ids are many."""

    def encoded() -> list[_Rows]:
        return [_encoded(events, keep_traces) for events in logs]

    if any(isinstance(event, RolloutFinished) for events in logs for event in events):
        return await asyncio.to_thread(encoded)
    return encoded()


def _encoded(events: Sequence[Event], keep_traces: bool) -> _Rows:
    traces = [
        (event.rollout.slot, codec.encode_trace(event.trace))
        for event in events
        if keep_traces and isinstance(event, RolloutFinished) and event.trace is not None
    ]
    return _Rows([codec.encode(event) for event in events], traces)


def _batches(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), _BATCH):
        yield ids[start : start + _BATCH]
