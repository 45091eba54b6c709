"""`/v1/export`: stored runs as training data, a stream of JSON lines. What the rows are is in `training`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from harness.selection import MathJudge
from mrsa_server.api.auth import caller_of, needs
from mrsa_server.api.errors import BadRequest
from mrsa_server.api.query import boolean, integer, moment, one_of, query
from mrsa_server.api.runs import RunsService, find_run
from mrsa_server.api.training import Exporter, Form, Only, Rounds, Thinking, Wanted
from mrsa_server.keyring import Scope
from mrsa_server.runs.record import Ended, StoredStatus

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.store import RunFilter, RunStore, RunSummary

router = APIRouter()

_PAGE = 50  # runs
_MOST_NAMED = 100  # runs
_MOST_ROWS = 10**9
_FILTERS = ("status", "model", "since", "until")
_OF_SFT = ("only", "thinking")
_KNOWN = {"format", "run", "rounds", "limit", "summary", *_FILTERS, *_OF_SFT}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A query.

    Attributes:
        wanted: Which rows of a run.
        which: Which runs, where none is named.
        named: The names of runs; empty for all that `which` lets through.
        limit: Most rows.
        summary: Whether a last line that is no row says what was left out.
    """

    wanted: Wanted
    which: RunFilter
    named: tuple[str, ...]
    limit: int
    summary: bool


@router.get("/v1/export")
@needs(Scope.RUNS_READ)
async def export(request: Request) -> Response:
    """Rows of `format` sft or rl, the newest run first, however many there are; memory holds one run at a time.

    By `run` (may be repeated) or by `status`, `model`, `since`, `until`; of these the `rounds`, and `only` what is
    worth learning; at most `limit` rows. A stream that breaks is cut, so that it cannot look whole; with `summary=true`
    the last line is an `export.summary` in place of a row, and one that lacks it was cut.
    """
    service: RunsService = request.app.state.runs
    store = service.kept
    asked = await _asked(request, store)
    if asked.wanted.form is Form.SFT:  # the words are read out of the ids by the engine
        await service.runner.host.wait_up(0)
    return StreamingResponse(_lines(service, store, asked), media_type="application/jsonl")


async def _lines(service: RunsService, store: RunStore, asked: _Asked) -> AsyncGenerator[bytes, None]:
    with closing(MathJudge()) as judge:  # not that of the runs, which has a time to keep
        exporter = Exporter(store, service.runner.host.engine, service.templates, judge, asked.wanted)
        async with aclosing(_rows(exporter, store, asked)) as rows:
            async for row in rows:
                yield row
                if exporter.tally.rows == asked.limit:
                    break
    if asked.summary:
        yield orjson.dumps(exporter.tally.body(), option=orjson.OPT_APPEND_NEWLINE)


async def _rows(exporter: Exporter, store: RunStore, asked: _Asked) -> AsyncGenerator[bytes, None]:
    async with aclosing(_runs(store, asked)) as runs:
        async for run in runs:
            async with aclosing(exporter.lines(run)) as lines:
                async for line in lines:
                    yield line


async def _runs(store: RunStore, asked: _Asked) -> AsyncGenerator[RunSummary, None]:
    for name in asked.named:
        named = await store.get(name)
        if named is not None:  # else it was deleted just now
            yield named
    before = None
    while not asked.named:
        page = await store.list_runs(asked.which, before=before, limit=_PAGE)
        for run in page:
            yield run
        if len(page) < _PAGE:
            return
        before = page[-1].cursor


async def _asked(request: Request, store: RunStore) -> _Asked:
    from mrsa_server.runs.store import RunFilter  # it is there, since there is a store

    asked = query(request, _KNOWN)
    if "format" not in asked:
        raise BadRequest(f"format: is needed, one of {', '.join(Form)}", "format")
    for name, known in (("format", Form), ("rounds", Rounds), ("only", Only), ("thinking", Thinking)):
        if name in asked:
            one_of(asked[name], name, tuple(known))
    form = Form(asked["format"])
    for name in _OF_SFT if form is Form.RL else ():
        if name in asked:
            raise BadRequest(f"{name}: is for format=sft; rows of format=rl have no completion", name)
    status = tuple(asked.get("status", "finished,stopped").split(","))
    for one in status:
        one_of(one, "status", get_args(Ended))
    if not asked.get("model", "").isprintable():
        raise BadRequest("model: must be printable", "model")
    return _Asked(
        Wanted(
            form,
            Rounds(asked.get("rounds", Rounds.AGGREGATION)),
            Only(asked.get("only", Only.WHOLE)),
            Thinking(asked.get("thinking", Thinking.INLINE)),
        ),
        RunFilter(
            status=cast("tuple[StoredStatus, ...]", status),
            model=asked.get("model"),
            since=moment(asked, "since"),
            until=moment(asked, "until"),
            key_id=caller_of(request).only,
        ),
        await _named(request, asked, store),
        integer(asked, "limit", 1, _MOST_ROWS, _MOST_ROWS),
        boolean(asked, "summary"),
    )


async def _named(request: Request, asked: dict[str, str], store: RunStore) -> tuple[str, ...]:
    named = tuple(dict.fromkeys(request.query_params.getlist("run")))
    if len(named) > _MOST_NAMED:
        raise BadRequest(f"run: at most {_MOST_NAMED} runs can be named at once, not {len(named)}", "run")
    for name in _FILTERS if named else ():
        if name in asked:
            raise BadRequest(f"{name}: cannot be combined with run, which names the runs", name)
    found: dict[str, None] = {}
    for name in named:
        run = await find_run(store, name, caller_of(request))
        if run is None:
            raise BadRequest(f"run: there is no run {name[:128]!r}", "run")
        found[run.run_id] = None
    return tuple(found)
