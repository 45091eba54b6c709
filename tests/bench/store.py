"""What durability costs: `python -m tests.bench.store [--appends 300]`. The table that it prints is the result.

A checkpoint is the append of one rollout of a `medium` run (a tail of 4,096 ids and 16 KB of text) with its trace
(16,384 ids), as the runner makes it: encoded, written, synced. On SQLite and on a Postgres of its own, with `fsync` as
servers run it. Beside it: the start of a rollout; 16 runs that checkpoint at once; and a run of 5.5 million
tokens (N=32, T=8, beta=32K, tau=4096), written from its first event to its last, read and replayed.

Ids are drawn with Zipf's frequencies and in no order, which deflates worse than a model's; text is this project's own.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import tempfile
import time
from array import array
from pathlib import Path

from sqlalchemy import func, select

import harness
from harness.events import AnswersGrouped, Event, RolloutFinished, RolloutStarted
from harness.markovian_rsa import State, apply, decide, init, pending_vote, plan, replay
from harness.prompts import load_templates
from harness.types import Finish, Message, Params, Problem, Rollout, Slot, Tail, Trace, Usage
from mrsa_server.runs import tables
from mrsa_server.runs.codec import decode, encode, encode_trace
from mrsa_server.runs.database import Database
from mrsa_server.runs.store import NewRun, RunStore
from tests.helpers.postgres import WANTED, running

_VOCABULARY = 262_272
_TAIL_IDS = 4096
_TAIL_CHARACTERS = 16_000
_LARGE = Params(population=32, rounds=8, rollout_tokens=32_768, tail_tokens=_TAIL_IDS)
_LARGE_TOKENS = 27_000  # of each rollout: 204 of them are 5.5 million
_MEDIUM_TOKENS = 16_384


class Writing:
    """Makes rollouts up."""

    def __init__(self) -> None:
        rng = self._rng = random.Random(1)
        order = list(range(_VOCABULARY))
        rng.shuffle(order)
        weights = list(itertools.accumulate(1 / (rank + 10) for rank in range(_VOCABULARY)))
        self._ids = array("I", rng.choices(order, cum_weights=weights, k=1_000_000))
        sources = sorted(Path(harness.__file__).parent.glob("*.py"))
        self._text = "".join(path.read_text() for path in sources)

    def rollout(self, slot: Slot, tokens: int) -> RolloutFinished:
        """A rollout with its trace."""
        start = self._rng.randrange(len(self._ids) - tokens)
        ids = self._ids[start : start + tokens]
        place = self._rng.randrange(len(self._text) - _TAIL_CHARACTERS)
        tail = Tail(ids[-_TAIL_IDS:], self._text[place : place + _TAIL_CHARACTERS])
        usage = Usage(17_000 if slot.round else 200, 0, tokens, tokens - 100)
        answer = "So the answer is \\boxed{42}."
        return RolloutFinished(
            Rollout(slot, tail, answer, Finish.STOP, usage, 100.0),
            Trace(ids, (0, tokens - 100), (tokens - 100, tokens)),
        )


def large_run(writing: Writing) -> tuple[State, list[Event]]:
    """A run of 5.5 million tokens, as the driver would have made it."""
    state = init("run", Problem((Message("user", ("What is 6 times 7?",)),)), _LARGE, load_templates())
    log: list[Event] = [state.started]

    def record(event: Event) -> None:
        nonlocal state
        state = apply(state, event)
        log.append(event)

    while True:
        while (event := decide(state)) is not None:
            record(event)
        if state.outcome is not None:
            return state, log
        for request in plan(state):
            record(RolloutStarted(request.slot, request.members, request.max_tokens))
        for slot in sorted(state.running):
            record(writing.rollout(slot, _LARGE_TOKENS))
        if candidates := pending_vote(state):
            record(AnswersGrouped(candidates, (0,) * len(candidates)))


def line(name: str, seconds: list[float]) -> None:
    """Median and 99th of 100."""
    ms = sorted(1000 * second for second in seconds)
    print(f"  {name:44} {statistics.median(ms):8.2f} ms {ms[int(0.99 * (len(ms) - 1))]:8.2f} ms")


async def appends(store: RunStore, name: str, events: list[list[Event]]) -> list[float]:
    """Seconds of each append to a run of its own."""
    claim = await store.create(NewRun(name, "response", b"{}", "m", created_at=time.time()))
    seconds = []
    for batch in events:
        began = time.perf_counter()
        await store.append(claim, batch)
        seconds.append(time.perf_counter() - began)
    return seconds


async def measure(url: str, count: int, writing: Writing) -> None:
    """The lines of one store."""
    store = RunStore(url, owner="bench", lease_s=60)
    await store.open()
    rollouts: list[list[Event]] = [[writing.rollout(Slot(0, index), _MEDIUM_TOKENS)] for index in range(count)]
    starts: list[list[Event]] = [[RolloutStarted(Slot(0, index), (1, 2, 3, 4), 9)] for index in range(count)]
    await appends(store, "warm", rollouts[:20])
    line("checkpoint of a rollout with its trace", await appends(store, "finished", rollouts))
    line("start of a rollout", await appends(store, "started", starts))
    began = time.perf_counter()
    share = max(1, count // 16)
    found = await asyncio.gather(*(appends(store, f"run {run}", rollouts[:share]) for run in range(16)))
    line("checkpoint, 16 runs at once", list(itertools.chain(*found)))
    print(f"    {16 * share / (time.perf_counter() - began):.0f} a second")

    state, log = large_run(writing)
    began = time.perf_counter()
    claim = await store.create(NewRun("large", "response", b"{}", "m", created_at=time.time()), log[:1])
    for event in log[1:]:
        await store.append(claim, [event])
    written = time.perf_counter() - began
    began = time.perf_counter()
    events = [stored.event for stored in await store.events("large")]
    read = time.perf_counter() - began
    began = time.perf_counter()
    assert replay(events, state.templates) == state
    replayed = time.perf_counter() - began
    sizes = []
    async with store._database.reading() as connection:
        for table in (tables.events, tables.traces):
            query = select(func.sum(func.length(table.c.body))).where(table.c.run_id == "large")
            sizes.append(int((await connection.execute(query)).scalar_one()) / 1e6)
    print(
        f"  run of {state.usage.completion_tokens / 1e6:.1f} million tokens, {len(log)} events: log {sizes[0]:.1f} MB, "
        f"traces {sizes[1]:.1f} MB;\n    written in {written:.2f} s, read and decoded in {read:.3f} s, replayed in "
        f"{replayed:.3f} s"
    )
    await store.aclose()


def codec(writing: Writing) -> None:
    """What encoding costs alone."""
    state, log = large_run(writing)
    began = time.perf_counter()
    bodies = [encode(event) for event in log]
    encoded = time.perf_counter() - began
    traces = [event.trace for event in log if isinstance(event, RolloutFinished) and event.trace is not None]
    began = time.perf_counter()
    for trace in traces:
        encode_trace(trace)
    traced = time.perf_counter() - began
    began = time.perf_counter()
    events = [decode(*body) for body in bodies]
    decoded = time.perf_counter() - began
    assert replay(events, state.templates) == state
    print(f"codec, {len(log)} events of {len(traces)} rollouts on one core")
    print(f"  encoded in {encoded:.3f} s, traces in {traced:.3f} s, decoded in {decoded:.3f} s")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--appends", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="where the stores are; on the disk that is to be measured")
    arguments = parser.parse_args()
    writing = Writing()
    codec(writing)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(f"SQLite (WAL, synchronous=FULL){'median':>24} {'p99':>10}")
        asyncio.run(measure(f"sqlite:///{folder}/runs.db", arguments.appends, writing))
    with running(arguments.folder, durable=True) as server:
        if server is None:
            print(f"Postgres: {WANTED}")
            return
        print("Postgres (fsync=on, on this machine)")
        url = server.url(server.make())
        asyncio.run(upgrade(url))
        asyncio.run(measure(url, arguments.appends, writing))


async def upgrade(url: str) -> None:
    """Make the tables."""
    database = Database(url)
    await database.upgrade()
    await database.aclose()


if __name__ == "__main__":
    main()
