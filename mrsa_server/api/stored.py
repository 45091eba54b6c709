"""Stored runs told again, as to those who read them live: responses are made of the log, and kept nowhere.

The same log gives the same items, so that a stream that was cut goes on anywhere from the number of its last event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from harness.events import RunStarted
from harness.markovian_rsa import apply, fold
from harness.run import Watch
from mrsa_server.api.asking import RUN, AskService
from mrsa_server.api.errors import ApiError, RunCancelled, ShuttingDown, StoreAway, of_stored
from mrsa_server.api.idempotency import Asked
from mrsa_server.runs.codec import Undecodable
from mrsa_server.runs.runner import Item, Prepared, Run, Runner
from mrsa_server.runs.store_errors import NoSuchRun, StoreUnavailable
from mrsa_server.settings import Effort

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.store import RunStore, Stored, StoredRun

_POLL_S = 10.0  # of a run's end, of which the store tells anyway


class Retelling:
    """One stored run, told event by event.

    Args:
        service: Whose routes read its request.
        record: The run.

    Attributes:
        run: The run as far as it was told; its clock is Unix time.
        reply: Its request, and what was noted of it once it had begun.

    Raises:
        ApiError: This version cannot read its request.
    """

    def __init__(self, service: AskService, record: StoredRun) -> None:
        self.route = service.routes[record.kind]
        self.run = Run(record.run_id, record.created_at, ended_at=record.ended_at)
        name = record.run_id.removeprefix(RUN)
        self.reply = self.route.read(record.body, service.settings, name, int(record.created_at))
        self.reply.effort = Effort(record.effort or Effort.NONE)
        self._templates = service.templates

    def take(self, stored: Stored) -> Iterator[Item]:
        """What those who read along get of an event.

        Raises:
            ApiError: The log does not begin as logs do.
        """
        run, event = self.run, stored.event
        if run.state is not None:
            run.state = apply(run.state, event)
            yield from run.facts(event, stored.at)
        elif isinstance(event, RunStarted):
            run.state = fold((event,), self._templates)
            self.reply.recall(event.notes)
            yield Prepared(run.state, Watch.NONE)
        else:
            raise _unreadable("its log does not begin with its start")


async def log_of(store: RunStore, run_id: str, after: int = 0, limit: int | None = None) -> list[Stored]:
    """As `RunStore.events`.

    Raises:
        ApiError: A newer version wrote it.
        StoreUnavailable: The database does not answer.
    """
    try:
        return await store.events(run_id, after, limit)
    except Undecodable as error:
        raise _unreadable(str(error)) from None


async def retell(service: AskService, record: StoredRun) -> Retelling:
    """A run told to the end of its log, with the traces that its answer needs.

    Raises:
        ApiError: This version cannot read it.
        StoreUnavailable: The database does not answer.
    """
    store = service.store
    assert store is not None  # the record is its
    told = Retelling(service, record)
    for stored in await log_of(store, record.run_id):
        for _ in told.take(stored):
            pass
    await add_traces(store, told.run)
    return told


async def add_traces(store: RunStore, run: Run) -> None:
    """What a run that has ended needs for showing how it came to its answer."""
    if run.state is not None and run.state.outcome is not None:
        run.traces = await store.traces(run.id, run.state.params.rounds)


async def answer_of(service: AskService, record: StoredRun) -> dict[str, object]:
    """The body of the response of a run that has ended, whether or not it was streamed.

    Raises:
        ApiError: What the run ended with, where it has no answer; or this version cannot read it.
        StoreUnavailable: The database does not answer.
    """
    check_answered(record)
    told = await retell(service, record)
    state = told.run.state
    if state is None:
        raise _unreadable("it has no log")
    return await told.route.whole(told.run, state, told.reply, service.runner.host.engine)


async def asked_again(service: AskService, record: StoredRun) -> Asked:
    """A run that has ended with an answer, for those who send its request again.

    Raises:
        ApiError: As `answer_of`.
        StoreUnavailable: The database does not answer.
    """
    check_answered(record)
    told = await retell(service, record)
    return Asked(told.run, told.reply)


def check_answered(record: StoredRun) -> None:
    """Say with which error a run has ended, if with any.

    Raises:
        ApiError: That one.
    """
    if record.error is not None:
        raise of_stored(record.error)
    if record.status not in ("finished", "stopped"):
        raise RunCancelled


async def until_ended(store: RunStore, run_id: str) -> StoredRun:
    """Wait for a run's end, wherever it runs.

    Raises:
        ApiError: It was deleted meanwhile.
        StoreUnavailable: The database does not answer.
    """
    try:
        ended = False
        while not ended:
            ended = (await store.wait(run_id, 2**31 - 1, _POLL_S)).ended
    except NoSuchRun:
        raise RunCancelled from None
    record = await store.get(run_id)
    if record is None:
        raise RunCancelled
    return record


async def further(store: RunStore, runner: Runner, run_id: str, after: int, timeout_s: float) -> int | None:
    """Wait for more of a run; the last number once there is more or it has ended, None for nothing yet.

    Raises:
        NoSuchRun: It was deleted.
        StoreUnavailable: The database does not answer.
        ShuttingDown: This server leaves; the run goes on elsewhere, or when it is back.
    """
    waiting = asyncio.create_task(store.wait(run_id, after, timeout_s))
    leaving = asyncio.create_task(runner.left.wait())
    try:
        await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ShuttingDown
        progress = waiting.result()
    finally:
        leaving.cancel()
        waiting.cancel()
    return progress.last if progress.ended or progress.last > after else None


def unavailable(error: StoreUnavailable) -> ApiError:
    """What a stream says where its store does not answer."""
    return StoreAway(error.reason)


def _unreadable(reason: str) -> ApiError:
    return ApiError(500, "run_unreadable", f"The run was written by another version: {reason}.")
