"""Batches: many requests in a file, each of which becomes a run. What is told of their progress is read from the runs.

Whoever does something for a batch holds it by a claim, as an owner holds a run: its fence grows with each, and every
write carries it. Between two steps of its life nobody holds a batch, and only its runs go on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Row, and_, case, func, literal, or_, select, update

from mrsa_server.runs import codec, tables
from mrsa_server.runs.record import BATCH_ENDED, BatchStatus, NewRun, Spent
from mrsa_server.runs.store import RunStore, row_of
from mrsa_server.runs.store_errors import BatchLost, GivenUp
from mrsa_server.runs.transactions import whole

_TOGETHER = 500  # runs in one transaction
_batches = tables.batches.c
_runs = tables.runs.c
_UNFINISHED = _runs.ended_at.is_(None)
_ANSWERED = ("finished", "stopped")


@dataclass(frozen=True, slots=True)
class NewBatch:
    """A batch to be stored.

    Attributes:
        batch_id: Its name; names sort as their batches were made.
        endpoint: Where its lines would be sent one by one.
        input_file_id: What its lines are.
        completion_window: As the client wrote it.
        created_at: Unix seconds.
        expires_at: When what has not ended by then is given up, Unix seconds.
        output_expires_s: How long its results are kept; None for until somebody deletes them.
        metadata: The client's.
        idempotency_key: The client's, no two batches have the same.
        body_digest: Tells whether a request with the same key is the same request.
        key_id: The API key that asked; None on a server without keys.
    """

    batch_id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: float
    expires_at: float
    output_expires_s: float | None = None
    metadata: Mapping[str, str] | None = None
    idempotency_key: str | None = None
    body_digest: bytes = field(default=b"", repr=False)
    key_id: str | None = None


class LineError(NamedTuple):
    """What is wrong with a line of an input file, or with the whole of it."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class StoredBatch(NewBatch):
    """A batch and how far it is. Times are Unix seconds, and None until they have come.

    Attributes:
        status: Where in its life it is.
        output_file_id: The answers, once all are there.
        error_file_id: The lines without one, likewise.
        expired_at: When its window was over and unfinished runs were given up; it may not have ended yet.
        errors: Why it failed as a whole.
        model: The one that all its lines ask, once they have been read; None where there are several.
        total: Its lines, once they have been read.
        completed: How many had an answer in the end; None while it goes on.
        failed: How many had none, likewise.
        usage: What its answers cost, likewise.
    """

    status: BatchStatus = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    completed_at: float | None = None
    failed_at: float | None = None
    expired_at: float | None = None
    cancelling_at: float | None = None
    cancelled_at: float | None = None
    errors: tuple[LineError, ...] = ()
    model: str | None = None
    total: int = 0
    completed: int | None = None
    failed: int | None = None
    usage: Spent | None = None


class Counts(NamedTuple):
    """How the runs of a batch stand."""

    queued: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0


class BatchClaim(NamedTuple):
    """The right to do the next step of a batch."""

    batch_id: str
    fence: int


class NewLine(NamedTuple):
    """A line that becomes a run; with an error, one that is refused at once."""

    run: NewRun
    error: bytes | None = None


class Written(NamedTuple):
    """A file that was written to its end, and is not there for others yet."""

    file_id: str
    bytes: int


class BatchStore:
    """The batches in the database of a store of runs, for one owner."""

    def __init__(self, store: RunStore) -> None:
        self.transactions = store.transactions
        self.lease_s = store.lease_s
        self._store = store
        self._owner = store.owner
        self._database = store.database

    # A client's side.

    @whole("write")
    async def create(self, record: NewBatch, *, wanted: Callable[[], bool] = lambda: True) -> StoredBatch:
        """Store a new batch, or find the one that has its idempotency key.

        Args:
            record: The batch.
            wanted: Asked before the end: whether somebody still waits for it.

        Raises:
            GivenUp: Nobody does.
            StoreUnavailable: Nobody knows whether it is stored; the same again is safe where there is a key.
        """
        values = {name: getattr(record, name) for name in _GIVEN} | {
            "metadata": json.dumps(None if record.metadata is None else dict(record.metadata)),
            "status": "validating",
            "total": 0,
            "fence": 0,
            "lease_until": 0.0,
        }
        same = _batches.batch_id == record.batch_id
        if record.idempotency_key is not None:
            same = _batches.idempotency_key == record.idempotency_key
        async with self._database.writing() as connection:
            await connection.execute(self._database.insert(tables.batches).values(**values).on_conflict_do_nothing())
            made = _batch((await connection.execute(select(*_COLUMNS).where(same))).one())
            if not wanted():
                raise GivenUp(record.batch_id)
            return made

    @whole("read")
    async def get(self, batch_id: str) -> StoredBatch | None:
        """A batch; None where there is none.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        async with self._database.reading() as connection:
            row = (await connection.execute(select(*_COLUMNS).where(_batches.batch_id == batch_id))).first()
        return None if row is None else _batch(row)

    @whole("read")
    async def find_key(self, idempotency_key: str) -> StoredBatch | None:
        """The batch that an idempotency key stands for; None for nothing.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        query = select(*_COLUMNS).where(_batches.idempotency_key == idempotency_key)
        async with self._database.reading() as connection:
            row = (await connection.execute(query)).first()
        return None if row is None else _batch(row)

    @whole("read")
    async def list_batches(
        self, *, after: str | None = None, limit: int = 20, key_id: str | None = None
    ) -> list[StoredBatch]:
        """Batches, the newest first, from the one `after` on; fewer than `limit` are the last. With `key_id` of a key.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        query = select(*_COLUMNS).order_by(_batches.batch_id.desc()).limit(limit)
        if after is not None:
            query = query.where(_batches.batch_id < after)
        if key_id is not None:
            query = query.where(_batches.key_id == key_id)
        async with self._database.reading() as connection:
            return [_batch(row) for row in await connection.execute(query)]

    @whole("read")
    async def counts(self, batch_ids: Collection[str]) -> dict[str, Counts]:
        """How the runs of batches stand; a batch without runs is left out.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        found: dict[str, Counts] = {}
        query = (
            select(
                _runs.batch_id,
                _tally(_runs.status == "queued").label("queued"),
                _tally(_runs.status == "running").label("running"),
                _tally(_runs.status.in_(_ANSWERED)).label("completed"),
                _tally(_runs.status.not_in(("queued", "running", *_ANSWERED))).label("failed"),
            )
            .where(_runs.batch_id.in_(list(batch_ids)))
            .group_by(_runs.batch_id)
        )
        async with self._database.reading() as connection:
            for row in await connection.execute(query):
                found[row.batch_id] = Counts(row.queued, row.running, row.completed, row.failed)
        return found

    @whole("write")
    async def request_cancel(self, batch_id: str) -> StoredBatch | None:
        """Begin to cancel a batch, if it has not come further than its runs; as it is then.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        going = and_(_batches.batch_id == batch_id, _batches.status.in_(("validating", "in_progress")))
        async with self._database.writing() as connection:
            await connection.execute(
                update(tables.batches).where(going).values(status="cancelling", cancelling_at=self._database.now)
            )
            row = (await connection.execute(select(*_COLUMNS).where(_batches.batch_id == batch_id))).first()
        return None if row is None else _batch(row)

    # A keeper's side.

    @whole("claim")
    async def claim_due(self) -> BatchClaim | None:
        """Take the oldest batch for which there is something to do, if nobody else does it.

        Raises:
            StoreUnavailable: The database does not answer.
        """
        now = self._database.now
        going = select(literal(1)).where(_runs.batch_id == _batches.batch_id, _UNFINISHED).exists()
        waits = and_(_batches.status == "in_progress", _batches.expires_at > now, going)
        query = (
            select(_batches.batch_id)
            .where(_batches.status.not_in(BATCH_ENDED), _batches.lease_until < now, ~waits)
            .order_by(_batches.batch_id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        async with self._database.writing() as connection:
            batch_id = (await connection.execute(query)).scalar()
            if batch_id is None:
                return None
            fence = await connection.execute(
                update(tables.batches)
                .where(_batches.batch_id == batch_id)
                .values(owner=self._owner, fence=_batches.fence + 1, lease_until=now + self.lease_s)
                .returning(_batches.fence)
            )
            return BatchClaim(batch_id, fence.scalar_one())

    async def renew(self, claim: BatchClaim) -> None:
        """Begin its lease anew.

        Raises:
            BatchLost: Another server has it.
            StoreUnavailable: Nobody knows; the lease may end.
        """
        await self._change(claim, {})

    @whole("renew")
    async def release(self, claim: BatchClaim, pause_s: float = 0.0) -> None:
        """Let whoever comes first after a while do what is to be done next.

        Raises:
            StoreUnavailable: Nobody knows; the lease ends by itself.
        """
        async with self._database.writing() as connection:
            free = {"owner": None, "lease_until": self._database.now + pause_s}
            await connection.execute(update(tables.batches).where(self._held(claim)).values(free))

    async def expand(self, claim: BatchClaim, lines: Sequence[NewLine]) -> None:
        """Store lines as runs that anybody may take up; those that are there already stay as they are.

        Raises:
            BatchLost: Another server has it, or somebody has cancelled it.
            StoreUnavailable: Nobody knows whether they are stored; the same again is safe.
        """
        # In a thread: bodies may be long, and are deflated.
        await self._insert(claim, await asyncio.to_thread(lambda: [_row(line) for line in lines]))

    @whole("write")
    async def _insert(self, claim: BatchClaim, rows: list[dict[str, object]]) -> None:
        async with self._database.writing() as connection:
            held = await connection.execute(
                update(tables.batches)
                .where(self._held(claim), _batches.status == "validating")
                .values(lease_until=self._database.now + self.lease_s)
                .returning(self._database.now)
            )
            now = held.scalar()
            if now is None:
                raise BatchLost(*claim)
            timed = [row | {"ended_at": None if row["error"] is None else now} for row in rows]
            await connection.execute(
                self._database.insert(tables.runs).on_conflict_do_nothing(index_elements=[_runs.run_id]), timed
            )

    async def start(self, claim: BatchClaim, total: int, model: str | None = None) -> None:
        """All its lines are runs, and ask one model or several. Raises as `expand`."""
        now = self._database.now
        await self._change(
            claim, {"status": "in_progress", "in_progress_at": now, "total": total, "model": model}, "validating"
        )

    async def fail(self, claim: BatchClaim, errors: Sequence[LineError]) -> None:
        """It is over before it has begun. Raises as `expand`."""
        said = codec.deflate(json.dumps([error._asdict() for error in errors]).encode())
        await self._change(claim, {"status": "failed", "failed_at": self._database.now, "errors": said}, "validating")

    async def expire(self, claim: BatchClaim) -> None:
        """Its window is over: what has not ended is given up from now on. Raises as `renew`."""
        await self._change(claim, {"expired_at": func.coalesce(_batches.expired_at, self._database.now)})

    async def cut(self, batch_id: str, error: bytes) -> int:
        """End its runs that nobody works on, and ask the owners of others to do so; how many are still to end.

        Args:
            batch_id: Whose.
            error: What those say that had nobody.

        Raises:
            StoreUnavailable: The database does not answer; the same again is safe.
        """
        # In small transactions, so that no writer waits long.
        while await self._end_idle(batch_id, codec.deflate(error)):
            pass
        left = await self._left(batch_id)
        for run_id, cancel_requested in left.items():
            if not cancel_requested:
                await self._store.request_cancel(run_id)  # at once, where an owner can hear it
        return len(left)

    @whole("write")
    async def _end_idle(self, batch_id: str, error: bytes) -> int:
        now = self._database.now
        idle = or_(_runs.owner.is_(None), _runs.lease_until < now)
        query = select(_runs.run_id).where(_runs.batch_id == batch_id, _UNFINISHED, idle).order_by(_runs.run_id)
        async with self._database.writing() as connection:
            found = await connection.execute(query.limit(_TOGETHER).with_for_update(skip_locked=True))
            chosen = list(found.scalars())
            if chosen:
                ended = {"status": "cancelled", "ended_at": now, "owner": None, "fence": _runs.fence + 1}
                await connection.execute(
                    update(tables.runs).where(_runs.run_id.in_(chosen)).values({**ended, "error": error})
                )
        return len(chosen)

    @whole("read")
    async def _left(self, batch_id: str) -> dict[str, bool]:
        """The runs that have not ended, and whether they are to."""
        query = select(_runs.run_id, _runs.cancel_requested).where(_runs.batch_id == batch_id, _UNFINISHED)
        async with self._database.reading() as connection:
            return {row.run_id: row.cancel_requested for row in await connection.execute(query)}

    async def finalize(self, claim: BatchClaim) -> None:
        """All its runs have ended, and its results are to be written; a batch that is cancelled says so still.

        Raises:
            BatchLost, StoreUnavailable: As `renew`.
        """
        further = case((_batches.status == "in_progress", literal("finalizing")), else_=_batches.status)
        since = func.coalesce(_batches.finalizing_at, self._database.now)
        await self._change(claim, {"status": further, "finalizing_at": since})

    @whole("write")
    async def end(
        self,
        claim: BatchClaim,
        status: BatchStatus,
        *,
        output: Written | None,
        error: Written | None,
        completed: int,
        failed: int,
        usage: Spent,
    ) -> None:
        """It has ended, and at this moment its files are there.

        Raises:
            BatchLost: Another server has it.
            StoreUnavailable: Nobody knows; what follows has to begin with `claim_due`.
        """
        values = {
            "status": status,
            f"{status}_at": self._database.now,
            "output_file_id": output and output.file_id,
            "error_file_id": error and error.file_id,
            "total": completed + failed,
            "completed": completed,
            "failed": failed,
            "usage": json.dumps(usage._asdict()),
            "owner": None,
        }
        async with self._database.writing() as connection:
            going = _batches.status.not_in(BATCH_ENDED)
            done = await connection.execute(update(tables.batches).where(self._held(claim), going).values(values))
            if not done.rowcount:
                raise BatchLost(*claim)
            for file in filter(None, (output, error)):
                whose = tables.files.c.file_id == file.file_id
                await connection.execute(update(tables.files).where(whose).values(bytes=file.bytes, status="processed"))

    def _held(self, claim: BatchClaim) -> ColumnElement[bool]:
        return and_(_batches.batch_id == claim.batch_id, _batches.owner == self._owner, _batches.fence == claim.fence)

    @whole("write")
    async def _change(
        self, claim: BatchClaim, values: Mapping[str, object], status: BatchStatus | None = None, /
    ) -> None:
        """Write to a batch that is held, and is at `status`."""
        held = self._held(claim) if status is None else and_(self._held(claim), _batches.status == status)
        async with self._database.writing() as connection:
            lease = {"lease_until": self._database.now + self.lease_s}
            done = await connection.execute(update(tables.batches).where(held).values({**lease, **values}))
            if not done.rowcount:
                raise BatchLost(*claim)


_GIVEN = (
    "batch_id",
    "endpoint",
    "input_file_id",
    "completion_window",
    "output_expires_s",
    "created_at",
    "expires_at",
    "idempotency_key",
    "body_digest",
    "key_id",
)
_COLUMNS = [column for column in tables.batches.columns if column.name not in ("owner", "fence", "lease_until")]


def _batch(row: Row[Any]) -> StoredBatch:
    found = dict(row._mapping)
    errors = found.pop("errors")
    usage = found.pop("usage")
    return StoredBatch(
        **found
        | {
            "metadata": json.loads(found["metadata"]),
            "errors": () if errors is None else tuple(LineError(**one) for one in json.loads(codec.inflate(errors))),
            "usage": None if usage is None else Spent(**json.loads(usage)),
        }
    )


def _tally(which: ColumnElement[bool]) -> ColumnElement[int]:
    return func.sum(case((which, 1), else_=0))


def _row(line: NewLine) -> dict[str, object]:
    """A run that is nobody's; the lease that it has not is over."""
    return row_of(line.run) | {
        "status": "queued" if line.error is None else "refused",
        "error": None if line.error is None else codec.deflate(line.error),
        "events": 0,
        "owner": None,
        "fence": 0,
        "lease_until": 0.0,
    }
