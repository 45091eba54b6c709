"""Brings batches from one step of their life to the next: makes runs of their lines, and files of what those end with.

In between nobody does anything for a batch: its runs are taken up by whoever has room for them. Each step can be done
again from its beginning, by this server or another, after a crash at any point of it: a run has its name from its line,
and the files of a batch are there with its end or not at all.

A keeper knows nothing of requests and responses: how a body becomes a run, and a run a body, it is given.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import aclosing, suppress
from typing import NamedTuple

import orjson
import structlog

from mrsa_server.api.errors import ApiError, to_stored
from mrsa_server.runs.batch_lines import Line, LineReader, Raw, Validation, read_line
from mrsa_server.runs.batch_store import (
    BatchClaim,
    BatchStore,
    LineError,
    NewLine,
    StoredBatch,
    Written,
)
from mrsa_server.runs.file_store import FileStore, Writing
from mrsa_server.runs.record import BatchStatus, NewRun, Spent
from mrsa_server.runs.requests import Requests
from mrsa_server.runs.store import RunStore, StoredRun
from mrsa_server.runs.store_errors import BatchLost, NoSuchFile, StoreUnavailable

_POLL_S = 1.0
_AT_ONCE = 2  # batches, so that one of many lines does not hold up all others
_AFTER_ERROR_S = 5.0
_SWEEP_S = 60.0
_LINES = 200  # that become runs in one transaction
_ANSWERS = 8  # in memory at once, each as long as it may be
_RENEWALS = 3  # in the time of a lease
# Later in the engine than any run for which somebody waits, and yet in order among themselves. Times 4,096, as
# rollouts have it, a priority has to stay exact in a float.
LATER_MS = 365 * 86_400_000

log = structlog.get_logger("mrsa.batch")


class BatchKeeper:
    """The keeper of one server.

    Args:
        store: Where the runs are.
        batches: And the batches.
        files: And their files.
        requests: How bodies are read and made.
        expanded: Called when there are runs to be taken up.
    """

    def __init__(
        self,
        store: RunStore,
        batches: BatchStore,
        files: FileStore,
        requests: Requests,
        expanded: Callable[[], None],
    ) -> None:
        self._store = store
        self._batches = batches
        self._files = files
        self._requests = requests
        self._expanded = expanded
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """There may be something to do."""
        self._woken.set()

    async def run(self) -> None:
        """Keep batches until cancelled."""
        await self._requests.ready()  # until then they are left to others
        async with asyncio.TaskGroup() as tasks:
            for _ in range(_AT_ONCE):
                tasks.create_task(self._keep())
            tasks.create_task(self._sweep())

    async def _keep(self) -> None:
        while True:
            try:
                claim = await self._batches.claim_due()
            except StoreUnavailable as error:
                log.debug("batches wait for the store", reason=str(error))
                claim = None
            if claim is not None:
                await self._step(claim)
                continue
            self._woken.clear()
            try:
                async with asyncio.timeout(_POLL_S):
                    await self._woken.wait()
            except TimeoutError:
                pass

    async def _sweep(self) -> None:
        while True:
            try:
                while await self._files.sweep():
                    pass
            except StoreUnavailable as error:
                log.debug("files are not swept", reason=str(error))
            await asyncio.sleep(_SWEEP_S)

    async def _step(self, claim: BatchClaim) -> None:
        """Do what is due for a batch, and give it back."""
        pause_s = 0.0
        try:
            pause_s = await self._holding(claim, self._advance(claim))
        except BatchLost as lost:
            log.info("batch is left to others", batch_id=claim.batch_id, reason=str(lost))
        except StoreUnavailable as error:
            log.debug("batch waits for the store", batch_id=claim.batch_id, reason=str(error))
            pause_s = _POLL_S
        except Exception:
            log.exception("batch broke", batch_id=claim.batch_id)
            pause_s = _AFTER_ERROR_S
        finally:  # also where this server leaves: another may go on at once
            try:
                await self._batches.release(claim, pause_s)
            except StoreUnavailable as error:
                log.debug("batch was not released", batch_id=claim.batch_id, reason=str(error))

    async def _holding(self, claim: BatchClaim, work: Coroutine[None, None, float]) -> float:
        """Work as long as the batch is ours.

        Raises:
            BatchLost: It is not any more.
        """
        working, renewing = asyncio.create_task(work), asyncio.create_task(self._renew(claim))
        try:
            await asyncio.wait((working, renewing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            working.cancel()
            renewing.cancel()
            await asyncio.wait((working, renewing))
        if working.cancelled():
            raise BatchLost(*claim)
        return working.result()

    async def _renew(self, claim: BatchClaim) -> None:
        while True:
            await asyncio.sleep(self._batches.lease_s / _RENEWALS)
            try:
                await self._batches.renew(claim)
            except StoreUnavailable as error:
                log.debug("batch was not renewed", batch_id=claim.batch_id, reason=str(error))
            except BatchLost:
                return

    async def _advance(self, claim: BatchClaim) -> float:
        """The next step of a batch; seconds until another is worth a look."""
        batch = await self._batches.get(claim.batch_id)
        if batch is None:
            return 0.0
        if batch.status == "validating":
            await self._expand(batch, claim)
            return 0.0
        return await self._finish(batch, claim)

    # Lines -> runs.

    async def _expand(self, batch: StoredBatch, claim: BatchClaim) -> None:
        try:
            found = await self._validate(batch)
            models: set[str] = set()
            if not found.errors:
                models = await self._make(batch, claim)
        except NoSuchFile:
            await self._batches.cut(batch.batch_id, _said("batch_failed", "The batch has failed."))
            message = f"The input file {batch.input_file_id} was deleted before it had been read."
            await self._batches.fail(claim, [LineError("input_file_missing", message)])
            return
        if found.errors:
            await self._batches.fail(claim, found.errors)
            log.info("batch failed", batch_id=batch.batch_id, errors=len(found.errors), code=found.errors[0].code)
            return
        await self._batches.start(claim, found.total, models.pop() if len(models) == 1 else None)
        log.info("batch begins", batch_id=batch.batch_id, lines=found.total)
        self._expanded()

    async def _make(self, batch: StoredBatch, claim: BatchClaim) -> set[str]:
        """Make runs of all lines; the models that they ask."""
        models: set[str] = set()
        async with aclosing(self._lines(batch.input_file_id)) as read:
            async for lines in read:
                for start in range(0, len(lines), _LINES):
                    part = lines[start : start + _LINES]
                    made = [await self._run_of(batch, raw) for raw in part]
                    await self._batches.expand(claim, made)
                    models |= {line.run.model for line in made}
        return models - {""}

    async def _validate(self, batch: StoredBatch) -> Validation:
        found = Validation(batch.endpoint, self._requests.max_body_bytes)
        async with aclosing(self._lines(batch.input_file_id)) as read:
            async for lines in read:
                await asyncio.to_thread(found.take, lines)
                if found.over:
                    return found
        found.end()
        return found

    async def _lines(self, file_id: str) -> AsyncGenerator[list[Raw], None]:
        """The lines of a file, as many at once as end in one piece.

        Raises:
            NoSuchFile: It is not there any more.
        """
        if await self._files.get(file_id) is None:
            raise NoSuchFile(file_id)
        reader = LineReader(self._requests.max_body_bytes)
        async for piece in self._files.pieces(file_id):
            yield await asyncio.to_thread(reader.feed, piece)
        yield reader.end()

    async def _run_of(self, batch: StoredBatch, raw: Raw) -> NewLine:
        line = read_line(raw, batch.endpoint, self._requests.max_body_bytes)
        assert isinstance(line, Line)  # the whole file was found good
        checked = await self._requests.check(batch.endpoint, line.body, batch.key_id)
        run = NewRun(
            run_id=f"run_{batch.batch_id.removeprefix('batch_')}_{line.number:05}",
            kind=checked.kind,
            body=checked.body,
            model=checked.model.replace("\0", "\ufffd"),  # Postgres has no NUL, and no such model is served
            effort=checked.effort,
            priority=int(batch.created_at * 1000) + LATER_MS + line.number,
            background=True,
            created_at=batch.created_at,
            metadata=checked.metadata,
            key_id=batch.key_id,
            batch_id=batch.batch_id,
            batch_line=line.number,
            custom_id=line.custom_id,
        )
        return NewLine(run, None if checked.error is None else to_stored(checked.error))

    # Runs -> files.

    async def _finish(self, batch: StoredBatch, claim: BatchClaim) -> float:
        counts = (await self._batches.counts([batch.batch_id])).get(batch.batch_id)
        if batch.status == "in_progress" and counts is not None and counts.queued + counts.running:
            await self._batches.expire(claim)  # or it would not be due
        if batch.status in ("in_progress", "cancelling"):
            unfinished = _CANCELLED if batch.status == "cancelling" else _EXPIRED
            if await self._batches.cut(batch.batch_id, _said(*unfinished)):
                return _POLL_S  # their owners are still to hear of it
        await self._batches.finalize(claim)
        now = await self._batches.get(batch.batch_id)
        assert now is not None  # batches are kept
        await self._write(now, claim)
        return 0.0

    async def _write(self, batch: StoredBatch, claim: BatchClaim) -> None:
        results = _Results(self._files, batch, "output"), _Results(self._files, batch, "error")
        output, error = results
        try:
            spent = await self._tell_all(batch, output, error)
            files = await output.end(), await error.end()
        except BaseException:
            await _drop(results)
            raise
        status: BatchStatus = "completed"
        if batch.status == "cancelling":
            status = "cancelled"
        elif batch.expired_at is not None:
            status = "expired"
        try:
            await self._batches.end(
                claim,
                status,
                output=files[0],
                error=files[1],
                completed=output.lines,
                failed=error.lines,
                usage=spent,
            )
        except BatchLost:  # after any other error it may have ended with these files; if not, they are swept in time
            await _drop(results)
            raise
        log.info(f"batch {status}", batch_id=batch.batch_id, completed=output.lines, failed=error.lines)

    async def _tell_all(self, batch: StoredBatch, output: _Results, error: _Results) -> Spent:
        spent, after = Spent(), 0
        while runs := await self._store.runs_of_batch(batch.batch_id, after, _ANSWERS):
            async with asyncio.TaskGroup() as tasks:
                telling = [tasks.create_task(self._tell(batch, run)) for run in runs]
            for told in (task.result() for task in telling):
                if isinstance(told, StoreUnavailable):
                    raise told
                await (error if told.spent is None else output).write(told.line)
                spent += told.spent or Spent()
            after = runs[-1].batch_line or 0
        return spent

    async def _tell(self, batch: StoredBatch, run: StoredRun) -> _Told | StoreUnavailable:
        """The line of a run that has ended, or why it cannot be told now."""
        response: dict[str, object] | None = None
        failure: dict[str, str] | None = None
        spent: Spent | None = None
        if run.status == "cancelled" and (batch.status == "cancelling" or batch.expired_at is not None):
            code, message = _CANCELLED if batch.status == "cancelling" else _EXPIRED
            failure = {"code": code, "message": message}
        else:
            try:
                status, body, spent = await self._response(run)
            except StoreUnavailable as away:
                return away
            response = {"status_code": status, "request_id": run.run_id, "body": orjson.Fragment(body)}
        line = {
            "id": f"batch_req_{run.run_id.removeprefix('run_')}",
            "custom_id": run.custom_id,
            "response": response,
            "error": failure,
        }
        return _Told(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE), spent)

    async def _response(self, run: StoredRun) -> tuple[int, bytes, Spent | None]:
        try:
            body, spent = await self._requests.answer(run)
            return 200, body, spent
        except ApiError as error:
            found = error
        except StoreUnavailable:
            raise
        except Exception:  # one line that cannot be told is not to keep all others from their client
            log.exception("line broke", run_id=run.run_id)
            found = ApiError(500, "internal_error", "The server failed; the run has no answer.")
        return found.status, orjson.dumps(found.body()), None


class _Told(NamedTuple):
    """A line of results; without `spent` it is one of errors."""

    line: bytes
    spent: Spent | None


class _Results:
    """One of the two files that a batch ends with; it is begun with its first line."""

    def __init__(self, files: FileStore, batch: StoredBatch, kind: str) -> None:
        self.lines = 0
        self._files = files
        self._batch = batch
        self._kind = kind
        self._writing: Writing | None = None

    async def write(self, line: bytes) -> None:
        if self._writing is None:
            name, now = f"{self._batch.batch_id}_{self._kind}.jsonl", time.time()
            keep_s = self._batch.output_expires_s
            expires_at = None if keep_s is None else now + keep_s
            self._writing = await self._files.begin(name, "batch_output", now, expires_at, self._batch.key_id)
        self.lines += 1
        await self._writing.write(line)

    async def end(self) -> Written | None:
        if self._writing is None:
            return None
        await self._writing.flush()
        return Written(self._writing.file_id, self._writing.bytes)

    async def drop(self) -> None:
        if self._writing is not None:
            await self._files.delete(self._writing.file_id)


async def _drop(results: Iterable[_Results]) -> None:
    """Delete what no batch names; where the store is away it is swept later, as after a crash."""
    for one in results:
        with suppress(StoreUnavailable):
            await one.drop()


_CANCELLED = "batch_cancelled", "The batch was cancelled before this request had ended."
_EXPIRED = "batch_expired", "This request could not be executed before the completion window expired."


def _said(code: str, message: str) -> bytes:
    return to_stored(ApiError(409, code, message))
