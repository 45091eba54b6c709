"""`/v1/runs`: the stored runs, what became of each of their rollouts, and their events, live and afterwards.

All of it is read from the store, so that every replica says the same. Without a store there is nothing to read.
"""

from __future__ import annotations

import re
import time
from array import array
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from harness.engine import EngineDead, EngineError
from harness.events import RunFailed, RunFinished
from harness.markovian_rsa import State, fold
from harness.prompts import Templates
from harness.types import Slot, TokenIds, Trace
from mrsa_server.api.asking import RUN
from mrsa_server.api.auth import caller_of, needs
from mrsa_server.api.errors import ApiError, BadRequest, EngineFailed, EngineUnavailable
from mrsa_server.api.query import integer, one_of, page, query
from mrsa_server.api.responses_wire import RESPONSE
from mrsa_server.api.sse import KEEP_ALIVE, EventStream
from mrsa_server.api.stored import further, log_of, unavailable
from mrsa_server.api.wire import COMPLETION, echo
from mrsa_server.keyring import Caller, Scope
from mrsa_server.runs.codec import KINDS
from mrsa_server.runs.record import RunKind, StoredStatus
from mrsa_server.runs.runner import Runner
from mrsa_server.runs.store_errors import NoSuchRun, StoreUnavailable
from mrsa_server.settings import Effort

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.store import RunStore, RunSummary, Stored, StoredRun

router = APIRouter()

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}", re.ASCII)  # a database may choke on others
_VIEWS: Mapping[str, RunKind] = {COMPLETION: "chat.completion", RESPONSE: "response"}
_MOST_RUNS = 100  # on a page
_USUAL_RUNS = 20
_EVENTS = 100  # read at once


@dataclass(frozen=True, slots=True)
class RunsService:
    """What the routes need of the server; `store` is None where runs live in memory."""

    store: RunStore | None
    runner: Runner
    templates: Templates
    keep_alive_s: float

    @property
    def kept(self) -> RunStore:
        """The store.

        Raises:
            ApiError: There is none.
        """
        if self.store is None:
            message = "This server stores no runs: start it with --state-dir DIR or MRSA_DATABASE_URL."
            raise ApiError(404, "runs_not_stored", message)
        return self.store


def _store(request: Request) -> tuple[RunsService, RunStore]:
    service: RunsService = request.app.state.runs
    return service, service.kept


@router.get("/v1/runs")
@needs(Scope.RUNS_READ)
async def list_runs(request: Request) -> Response:
    """A page of runs, the newest first; by `status`, `model`, `kind`, `batch`; `limit` of them `after` one."""
    from mrsa_server.runs.store import RunFilter  # it is there, since there is a store

    caller, (_, store) = caller_of(request), _store(request)
    asked = query(request, {"limit", "after", "status", "model", "kind", "batch"})
    limit = integer(asked, "limit", 1, _MOST_RUNS, _USUAL_RUNS)
    status = tuple(asked.get("status", "").split(",")) if "status" in asked else ()
    for one in status:
        one_of(one, "status", get_args(StoredStatus))
    if "kind" in asked:
        one_of(asked["kind"], "kind", get_args(RunKind))
    which = RunFilter(
        status=cast("tuple[StoredStatus, ...]", status),
        model=asked.get("model"),
        kind=cast("RunKind | None", asked.get("kind")),
        key_id=caller.only,
        batch_id=asked.get("batch"),
    )
    last = await find_run(store, asked["after"], caller) if "after" in asked else None
    if "after" in asked and last is None:
        raise BadRequest(f"after: there is no run {asked['after'][:128]!r}", "after")
    for name in ("model", "batch"):
        if not asked.get(name, "").isprintable():
            raise BadRequest(f"{name}: must be printable", name)
    found = await store.list_runs(which, before=last.cursor if last else None, limit=limit + 1)
    return _json(page([_summary(run) for run in found[:limit]], more=len(found) > limit))


@router.get("/v1/runs/{run_id}")
@needs(Scope.RUNS_READ)
async def get_run(request: Request, run_id: str) -> Response:
    """A run with all its rounds and rollouts, who reads whom, tails, answers and usage."""
    service, store = _store(request)
    run = await _find(request, store, run_id)
    return _json(_tree(run, await log_of(store, run.run_id), service.templates))


@router.delete("/v1/runs/{run_id}")
@needs(Scope.RUNS_WRITE)
async def cancel_run(request: Request, run_id: str) -> Response:
    """End a run, wherever it is; one that has ended stays as it is."""
    _, store = _store(request)
    run = await _find(request, store, run_id)
    if run.ended_at is None:
        await store.request_cancel(run.run_id)
    return _json({**_summary(run), "cancel_requested": run.ended_at is None})


@router.get("/v1/runs/{run_id}/events")
@needs(Scope.RUNS_READ)
async def run_events(request: Request, run_id: str) -> Response:
    """The events of a run as a stream, numbered by `id:`; from `after` or `Last-Event-ID` on, up to its end.

    Of the two the later counts: a browser that comes back sends the one with the address that has the other.

    Once there is nothing more to come the answer is a 204, at which a browser's EventSource asks no more.
    """
    service, store = _store(request)
    asked = query(request, {"after"})
    last_read = integer(request.headers, "last-event-id", 0, 2**31 - 1, 0)
    after = max(integer(asked, "after", 0, 2**31 - 1, 0), last_read)
    run = await _find(request, store, run_id)
    if run.ended_at is not None and after >= run.last:
        return Response(status_code=204)
    return EventStream(lambda: _frames(service, store, run.run_id, after), _broken)


@router.get("/v1/runs/{run_id}/export")
@needs(Scope.RUNS_READ)
async def export_run(request: Request, run_id: str) -> Response:
    """The log of a run as JSON lines."""
    _, store = _store(request)
    run = await _find(request, store, run_id)
    lines = [orjson.dumps(_numbered(stored), default=_plain) for stored in await log_of(store, run.run_id)]
    return Response(b"".join(line + b"\n" for line in lines), media_type="application/jsonl")


@router.get("/v1/runs/{run_id}/traces/{round}/{index}")
@needs(Scope.RUNS_READ)
async def run_trace(request: Request, run_id: str, round: str, index: str) -> Response:
    """All that one rollout generated, as ids and, where the engine is up, as text."""
    service, store = _store(request)
    run_id = (await _find(request, store, run_id)).run_id
    place = {"round": round, "index": index}
    slot = Slot(integer(place, "round", 0, 10_000, 0), integer(place, "index", 0, 1_000_000, 0))
    trace = await store.trace(run_id, slot)
    if trace is None:
        raise ApiError(404, "not_found", f"Run {run_id} has no trace of rollout {slot.index} of round {slot.round}.")
    return _json(await _told(service, trace) | {"run_id": run_id, "round": slot.round, "index": slot.index})


async def _told(service: RunsService, trace: Trace) -> dict[str, object]:
    ids, engine = trace.token_ids, service.runner.host.engine
    reasoning: str | None
    answer: str | None
    try:
        await service.runner.host.wait_up(0)
        reasoning = await engine.decode(ids[slice(*trace.reasoning)])
        answer = await engine.decode(ids[slice(*trace.answer)])
    except (EngineDead, EngineUnavailable):
        reasoning = answer = None  # the ids are what was asked for; the words need the model's vocabulary
    except EngineError as error:
        raise EngineFailed(f"the trace cannot be decoded: {error}") from None
    return {
        "object": "run.trace",
        "reasoning": reasoning,
        "answer": answer,
        "reasoning_span": trace.reasoning,
        "answer_span": trace.answer,
        "token_ids": ids,
    }


async def _frames(service: RunsService, store: RunStore, run_id: str, after: int) -> AsyncGenerator[bytes, None]:
    try:
        while True:
            found = await log_of(store, run_id, after, _EVENTS)
            if found:
                after = found[-1].number
                yield b"".join(map(_frame, found))
                continue
            last = await further(store, service.runner, run_id, after, service.keep_alive_s)
            if last is None:
                yield KEEP_ALIVE
            elif last <= after:
                return
    except NoSuchRun:  # it was deleted while somebody read it
        return
    except StoreUnavailable as error:
        raise unavailable(error) from None


def _frame(stored: Stored) -> bytes:
    data = orjson.dumps(_numbered(stored), default=_plain)
    kind = KINDS[type(stored.event)]
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (stored.number, kind.encode(), data)


def _numbered(stored: Stored) -> dict[str, object]:
    return {"number": stored.number, "at": stored.at, "kind": KINDS[type(stored.event)], "event": stored.event}


def _broken(error: ApiError) -> bytes:
    return b"event: error\ndata: " + orjson.dumps(error.body()) + b"\n\n"


async def find_run(store: RunStore, name: str, caller: Caller) -> StoredRun | None:
    """A run by its id, or by that of its completion or response; None where there is none that the caller sees."""
    if not _NAME.fullmatch(name):
        return None
    view = next((view for view in _VIEWS if name.startswith(view)), None)
    run = await store.get(name if view is None else RUN + name.removeprefix(view))
    if run is None or not caller.sees(run.key_id):
        return None
    return run if view is None or run.kind == _VIEWS[view] else None


async def _find(request: Request, store: RunStore, run_id: str) -> StoredRun:
    run = await find_run(store, run_id, caller_of(request))
    if run is None:
        raise ApiError(404, "not_found", f"There is no run {run_id!r}.")
    return run


def _summary(run: RunSummary) -> dict[str, object]:
    return {
        "id": run.run_id,
        "object": "run",
        "kind": run.kind,
        "status": run.status,
        "model": run.model,
        "effort": run.effort,
        "background": run.background,
        "created_at": run.created_at,
        "deadline_at": run.deadline_at,
        "ended_at": run.ended_at,
        "seconds": round((run.ended_at or time.time()) - run.created_at, 3),
        "events": run.last,
        "cancel_requested": run.cancel_requested,
        "metadata": dict(run.metadata),
        "key_id": run.key_id,
        "batch_id": run.batch_id,
        "custom_id": run.custom_id,
    }


def _tree(run: StoredRun, log: list[Stored], templates: Templates) -> dict[str, object]:
    found = _summary(run) | {"error": None if run.error is None else orjson.loads(run.error)["error"]}
    if not log:
        return found
    try:
        state = fold([stored.event for stored in log], templates)
    except ValueError as error:
        raise ApiError(500, "run_unreadable", f"The run cannot be read: {error}.") from None
    outcome, usage = state.outcome, state.usage
    found["params"] = echo(state.params, Effort(run.effort or Effort.NONE))
    found["usage"] = usage
    found["lost_tokens"] = state.charged_tokens
    found["rounds"] = [_round(state, number) for number in range(state.params.rounds + 1)]
    if isinstance(outcome, RunFinished):
        found["stopped"] = outcome.stopped
        found["answers"] = [
            {**slot._asdict(), "votes": votes, "content": state.rollouts[slot].answer}
            for slot, votes in zip(outcome.candidates, outcome.votes, strict=True)
        ]
    elif isinstance(outcome, RunFailed) and found["error"] is None:
        found["error"] = {"message": outcome.reason}
    return found


def _round(state: State, number: int) -> dict[str, object]:
    stats = state.stats[number]
    slots = sorted(
        slot
        for slot in {*state.needed, *state.rollouts, *state.lost, *state.running, *state.shortcuts}
        if slot.round == number
    )
    return {
        "round": number,
        "skipped": state.skipped[number],
        "failed": stats.failed,
        "usage": stats.usage,
        "rollouts": [_rollout(state, slot) for slot in slots],
    }


def _rollout(state: State, slot: Slot) -> dict[str, object]:
    rollout = state.rollouts.get(slot)
    found: dict[str, object] = {
        "index": slot.index,
        "status": _status(state, slot),
        "reads": [source.index for source in state.inputs(slot)] if state.sets else [],
    }
    if rollout is not None:
        found |= {
            "finish": rollout.finish,
            "tokens": rollout.usage.completion_tokens,
            "seconds": round(rollout.seconds, 3),
            "tail": rollout.tail.text,
            "answer": rollout.answer,
        }
    return found


def _status(state: State, slot: Slot) -> str:
    if slot in state.shortcuts:
        return "skipped"
    if slot in state.rollouts:
        return "finished"
    if slot in state.lost:
        return "lost"
    return "running" if slot in state.running else "waiting"


def _json(body: object) -> Response:
    return Response(orjson.dumps(body, default=_plain), media_type="application/json")


def _plain(value: object) -> object:
    """What orjson does not know: places by name, sets and ids as lists."""
    if isinstance(value, Slot):
        return value._asdict()
    if isinstance(value, tuple | array):
        return list(cast(TokenIds, value))
    raise TypeError(type(value).__name__)
