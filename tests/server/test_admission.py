"""One queue for the rollouts of all runs: what it bounds, who is next, and that nothing is held for ever."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import string
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from statistics import mean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.engine import Delta, EngineDead, EngineError
from harness.events import RunFinished
from harness.markovian_rsa import init
from harness.prompts import load_templates
from harness.run import Watch, open_run
from harness.scripted import Script, ScriptedEngine, Speed, run_virtual
from harness.types import Message, Params, Problem, RolloutRequest, Slot, Tail
from mrsa_server.metrics import Metrics
from mrsa_server.runs.admission import Admission, AdmittedEngine
from mrsa_server.runs.host import EngineHost
from mrsa_server.runs.runner import Prepared, Run, Runner
from tests.helpers.serving import CHAT, SMALL, ask, in_memory

PROBLEM = Problem((Message("user", ("What is asked?",)),))
TEMPLATES = load_templates()
_LONG_S = 3_600  # of virtual time: nobody is to wait for ever


def admission(engine: ScriptedEngine, *, tokens: int = 1 << 20, calls: int = 1 << 20) -> Admission:
    return Admission(EngineHost(engine), Metrics(), max_tokens=tokens, max_calls=calls)


def request(index: int = 0, tokens: int = 100, priority: int = 0, continuation: tuple[int, ...] = ()) -> RolloutRequest:
    return RolloutRequest("run", Slot(0, index), PROBLEM.messages, tokens, continuation, priority=priority)


async def use(engine: AdmittedEngine, asked: RolloutRequest) -> list[Delta]:
    async with aclosing(engine.generate(asked)) as deltas:
        return [delta async for delta in deltas]


def now() -> float:
    return asyncio.get_running_loop().time()


def empty(gate: Admission) -> bool:
    return (gate.tokens, gate.calls, gate.waiting) == (0, 0, 0)


class Silent(ScriptedEngine):
    """Says nothing of its prompts, so that what is in flight is what was let in."""

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        async with aclosing(super().generate(request)) as deltas:
            async for delta in deltas:
                yield replace(delta, prompt_tokens=None)


SHAPES = st.lists(
    st.tuples(
        st.floats(0, 1),  # seconds since the run before
        st.integers(1, 4),  # population
        st.integers(0, 2),  # rounds
        st.integers(8, 200),  # tokens of a rollout
        st.booleans(),  # of a batch
    ),
    min_size=2,
    max_size=8,
)


@settings(deadline=None)
@given(SHAPES, st.integers(50, 2000), st.integers(1, 4))
def test_under_any_arrivals_every_run_ends_and_no_rollout_is_passed_without_bound(
    shapes: list[tuple[float, int, int, int, bool]], max_tokens: int, max_calls: int
) -> None:
    """A rollout is passed by runs alone that arrived before its own run's rank: those are finitely many."""
    begun: list[tuple[str, Slot]] = []
    ranks: dict[str, list[float]] = {}
    engines: dict[str, AdmittedEngine] = {}
    entered: dict[tuple[str, Slot], int] = {}
    arrivals: dict[str, float] = {}
    in_batch: dict[str, bool] = {}

    def say(asked: RolloutRequest) -> Script:  # called when a generation begins
        for name, engine in engines.items():
            ranks[name].append(engine.share.rank)
        if not asked.continuation:
            begun.append((asked.run_id, asked.slot))
        others = gate.tokens - gate._batch_tokens, gate.calls - gate._batch_calls
        for tokens, calls in (others, (gate._batch_tokens, gate._batch_calls)):
            assert tokens < max_tokens + 1 or calls == 1
        assert gate.calls <= max_calls
        return Script("x" * (37 * (asked.slot.index + 1) % 150), "42")

    inner = Silent(say, speed=Speed(0.02, 0.002), chunk_tokens=16)
    gate = admission(inner, tokens=max_tokens, calls=max_calls)

    class Noting(AdmittedEngine):
        def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
            if not request.continuation:
                entered[request.run_id, request.slot] = len(begun)
            return super().generate(request)

    async def one(number: int, at: float, params: Params, batch: bool) -> None:
        await asyncio.sleep(at)
        name = f"run{number}"
        in_batch[name] = batch
        arrivals[name], ranks[name] = now(), [now()]
        engines[name] = Noting(inner, gate, gate.through(inner, now(), batch=batch).share)
        async with open_run(init(name, PROBLEM, params, TEMPLATES), engines[name], watch=Watch.NONE) as events:
            async for _ in events:
                pass
            assert isinstance(events.state.outcome, RunFinished)

    async def main() -> None:
        at = 0.0
        async with asyncio.timeout(_LONG_S), asyncio.TaskGroup() as tasks:
            for number, (gap, population, rounds, tokens, batch) in enumerate(shapes):
                at += gap
                params = Params(
                    population=population,
                    set_size=2,
                    rounds=rounds,
                    rollout_tokens=tokens,
                    tail_tokens=4,
                    final_tokens=tokens,
                    seed=number,
                )
                tasks.create_task(one(number, at, params, batch))
        assert empty(gate)

    run_virtual(main())
    assert len(begun) == len(set(begun)) == len(entered)
    for place, (name, slot) in enumerate(begun):
        for other, _ in begun[entered[name, slot] : place]:
            before = in_batch[other] < in_batch[name] or arrivals[other] <= max(ranks[name])
            assert other == name or before, "passed by a run that came behind its rank"


def order_of(*asked: tuple[float, RolloutRequest]) -> list[int]:
    """Indices in the order in which they get the one place there is, each a run of its own that arrived so."""
    seen: list[int] = []

    async def main() -> None:
        def say(request: RolloutRequest) -> Script:
            seen.append(request.slot.index)
            return Script("x" * 50, "42")

        inner = ScriptedEngine(say, speed=Speed(0.01))
        gate = admission(inner, calls=1)
        async with asyncio.timeout(_LONG_S), asyncio.TaskGroup() as tasks:
            tasks.create_task(use(gate.through(inner, -1.0), request(99)))
            await asyncio.sleep(0.05)
            for arrival_s, one in asked:
                tasks.create_task(use(gate.through(inner, arrival_s), one))
                await asyncio.sleep(0.001)
        assert empty(gate)

    run_virtual(main())
    return seen[1:]


def test_the_older_run_goes_first() -> None:
    assert order_of((3.0, request(0)), (1.0, request(1)), (2.0, request(2))) == [1, 2, 0]


def test_within_a_run_the_lower_priority_goes_first_and_what_was_begun_before_all() -> None:
    seen: list[int] = []

    async def main() -> None:
        def say(asked: RolloutRequest) -> Script:
            seen.append(asked.slot.index)
            return Script("x" * 50, "42")

        inner = ScriptedEngine(say, speed=Speed(0.01))
        gate = admission(inner, calls=1)
        run = gate.through(inner, 0.0)
        asked = (request(0), request(1, priority=-1), request(2, priority=-9), request(3, priority=5))
        async with asyncio.timeout(_LONG_S), asyncio.TaskGroup() as tasks:
            for one in (*asked, request(4, continuation=(256,), priority=7)):
                tasks.create_task(use(run, one))

    run_virtual(main())
    assert seen == [0, 4, 2, 1, 3]


def test_a_run_that_has_had_much_yields_to_one_that_comes_later() -> None:
    """Sixteen long rollouts are there first; the short run that comes behind them waits for one, not for all."""
    seen: list[str] = []

    async def main() -> None:
        def say(asked: RolloutRequest) -> Script:
            seen.append(asked.run_id)
            return Script("x" * 1000, "42")

        inner = ScriptedEngine(say, speed=Speed(0.01))
        gate = admission(inner, calls=1)
        long, short = gate.through(inner, 0.0), None
        async with asyncio.timeout(_LONG_S), asyncio.TaskGroup() as tasks:
            for index in range(16):
                tasks.create_task(use(long, RolloutRequest("long", Slot(0, index), PROBLEM.messages, 1000)))
            await asyncio.sleep(25)  # two of them have ended
            short = gate.through(inner, now())
            tasks.create_task(use(short, RolloutRequest("short", Slot(0, 0), PROBLEM.messages, 100)))

    run_virtual(main())
    assert seen.index("short") == 3
    assert len(seen) == 17


def test_what_is_larger_than_the_bound_goes_alone() -> None:
    async def main() -> None:
        inner = ScriptedEngine(lambda request: Script("x" * 50, "42"), speed=Speed(0.01))
        gate = admission(inner, tokens=10)
        most = 0

        async def look() -> None:
            nonlocal most
            while True:
                most = max(most, gate.calls)
                await asyncio.sleep(0.01)

        looker = asyncio.create_task(look())
        async with asyncio.timeout(_LONG_S), asyncio.TaskGroup() as tasks:
            for index in range(5):
                tasks.create_task(use(gate.through(inner, 0.0), request(index)))
        looker.cancel()
        assert most == 1
        assert empty(gate)

    run_virtual(main())


@pytest.mark.parametrize("turns", range(6))
async def test_a_rollout_that_is_cancelled_while_it_waits_gives_nothing_back_twice(turns: int) -> None:
    """At any point around the moment at which it is let in."""
    inner = ScriptedEngine(lambda request: Script("x" * 50, "42"), speed=Speed(0.0002))
    gate = admission(inner, calls=1)
    first = asyncio.create_task(use(gate.through(inner, 0.0), request(0)))
    await asyncio.sleep(0)
    second = asyncio.create_task(use(gate.through(inner, 1.0), request(1)))
    third = asyncio.create_task(use(gate.through(inner, 2.0), request(2)))
    await asyncio.sleep(0)
    assert (gate.calls, gate.waiting) == (1, 2)
    first.cancel()  # it gives its place to the second in the next turn of the loop
    for _ in range(turns):
        await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait((first, second))
    assert gate.calls <= 1
    async with asyncio.timeout(5):
        assert (await third)[-1].finish is not None
    assert empty(gate)
    assert inner.open_requests == 0


@pytest.mark.parametrize("error", [EngineError("out of luck"), EngineDead("gone")])
async def test_a_generation_that_fails_gives_its_place_back(error: Exception) -> None:
    inner = ScriptedEngine(lambda request: Script("x" * 50, "42", error, fail_after=20), chunk_tokens=8)
    gate = admission(inner, calls=1)
    found = await asyncio.gather(
        *(use(gate.through(inner, float(index)), request(index)) for index in range(4)), return_exceptions=True
    )
    assert found == [error] * 4
    assert empty(gate)


async def test_what_a_generation_counts_follows_what_the_engine_says_of_its_prompt() -> None:
    class Cached(ScriptedEngine):
        async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
            yield Delta((256,), prompt_tokens=1000, cached_tokens=900)
            async for delta in super().generate(request):
                yield delta

    inner = Cached(lambda request: Script("x" * 50, "42"))
    gate = admission(inner)
    tails = (Message("user", ("x" * 400, Tail(tuple(range(30)), "a tail"))),)
    deltas = gate.through(inner, 0.0).generate(RolloutRequest("run", Slot(0, 0), tails, 200))
    assert gate.tokens == 0
    await anext(deltas)
    expected = 200 * gate.used_share((False, 8))
    assert gate.tokens == pytest.approx(100 + expected)
    await deltas.aclose()
    assert empty(gate)


async def test_the_share_of_their_grants_that_rollouts_use_is_learnt() -> None:
    inner = ScriptedEngine(lambda request: Script("x" * 17, "42"))  # 22 tokens with its marks and its end
    gate = admission(inner)
    rollouts = (False, 8)  # 220 and 130 have eight bits
    assert 0.5 < gate.used_share(rollouts) < 0.6
    for index in range(400):
        await use(gate.through(inner, 0.0), request(index, tokens=220))
    assert gate.used_share(rollouts) == pytest.approx(0.1, abs=0.002)
    refusing = ScriptedEngine(lambda request: Script("", "", EngineError("no")))
    with pytest.raises(EngineError):
        await use(gate.through(refusing, 0.0), request(tokens=130))
    assert gate.used_share(rollouts) == pytest.approx(0.1, abs=0.002)


@pytest.mark.parametrize("chats", [0, 500])
@pytest.mark.parametrize("grant", [400, 4000])
def test_short_chats_teach_nothing_about_long_rollouts(chats: int, grant: int) -> None:
    bound, held = 20_000, []

    async def main() -> None:
        inner = Metered(
            lambda asked: Script("x" * (4 if asked.run_id == "chat" else 220), "42"),
            speed=Speed(0.01, 0),
            chunk_tokens=16,
        )
        gate = admission(inner, tokens=bound)
        for index in range(chats):
            asked = replace(request(index, tokens=grant), run_id="chat")
            await use(gate.through(inner, 0.0, plain=True), asked)

        async def look() -> None:
            while True:
                await asyncio.sleep(0.1)
                held.append(inner.held)

        looker, run = asyncio.create_task(look()), gate.through(inner, now())
        async with asyncio.TaskGroup() as tasks:
            for index in range(400):
                tasks.create_task(use(run, request(index, tokens=400)))
        looker.cancel()

    run_virtual(main())
    assert bound / 2 < max(held) <= bound


async def test_a_generation_that_has_more_than_was_expected_counts_what_it_has() -> None:
    inner = ScriptedEngine(lambda request: Script("x" * 200, "42"), chunk_tokens=16)
    gate = admission(inner)
    seen = []
    async with aclosing(gate.through(inner, 0.0).generate(request(tokens=210))) as deltas:
        async for delta in deltas:
            seen.append(gate.tokens - (delta.prompt_tokens or 0))
    assert seen[0] < 0.6 * 210 + 30
    assert seen[-1] >= 200
    assert empty(gate)


class Metered(ScriptedEngine):
    """Knows what it holds: prompts, and what has been generated of each open request."""

    held = 0

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        mine = 0
        try:
            async with aclosing(super().generate(request)) as deltas:
                async for delta in deltas:
                    more = len(delta.token_ids) + (delta.prompt_tokens or 0) - (delta.cached_tokens or 0)
                    mine += more
                    self.held += more
                    yield delta
        finally:
            self.held -= mine


def beside_a_batch(speed: Speed, *, batch_runs: int, as_batch: bool = True, bound: int = 40_000) -> float:
    """Seconds of one run for which somebody waits, that comes when the engine has long been full of others."""

    def say(asked: RolloutRequest) -> Script:
        stream = random.Random(f"{asked.run_id}/{asked.slot}")
        return Script("".join(stream.choices(string.ascii_letters + "  ", k=int(stream.uniform(200, 1500)))), "42")

    async def main() -> float:
        inner = ScriptedEngine(say, speed=speed, chunk_tokens=64)
        gate = admission(inner, tokens=bound)

        async def one(name: str, arrival_s: float, batch: bool) -> float:
            params = Params(population=8, rounds=2, rollout_tokens=2000, tail_tokens=128, final_tokens=2000, seed=1)
            priority = (_YEAR_MS if batch else 0) + int(arrival_s * 1000)
            state = init(name, PROBLEM, params, TEMPLATES, priority)
            async with open_run(state, gate.through(inner, arrival_s, batch=batch), watch=Watch.NONE) as events:
                async for _ in events:
                    pass
            return now() - arrival_s

        batch = [asyncio.create_task(one(f"batch{number}", now(), as_batch)) for number in range(batch_runs)]
        await asyncio.sleep(60)
        assert not batch_runs or gate.waiting > 100, "the engine is full"
        seconds = await one("run", now(), False)
        assert not as_batch or all(not task.done() for task in batch[-8:]), "it is full still"
        for task in batch:
            task.cancel()
        if batch:
            await asyncio.wait(batch)
        assert empty(gate)
        return seconds

    return run_virtual(main())


_YEAR_MS = 365 * 86_400_000


def test_a_run_beside_a_batch_that_fills_the_engine_is_hardly_slowed() -> None:
    """Where a stream more costs nothing: the batch takes neither its turn nor its memory."""
    speed = Speed(step_s=0.02, kv_tokens=40_000)
    alone = beside_a_batch(speed, batch_runs=0)
    assert beside_a_batch(speed, batch_runs=100) < 1.1 * alone
    assert beside_a_batch(speed, batch_runs=100, as_batch=False) > 3 * alone, "which is what classes are for"


def test_batches_leave_places_for_calls_free_and_wait_behind_others() -> None:
    async def main() -> None:
        begun: list[int] = []

        def say(asked: RolloutRequest) -> Script:
            begun.append(asked.slot.index)
            return Script("x" * 500, "42")

        inner = ScriptedEngine(say, speed=Speed(0.01))
        gate = admission(inner, tokens=100_000, calls=16)
        batch = [
            asyncio.create_task(use(gate.through(inner, 0.0, batch=True), request(index, 600))) for index in range(40)
        ]
        await asyncio.sleep(0.1)
        assert (gate.calls, gate.waiting) == (14, 26)
        others = [asyncio.create_task(use(gate.through(inner, now()), request(99, 600))) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert (gate.calls, gate.waiting) == (16, 27)
        await asyncio.wait([*batch, *others])
        assert begun[14:17] == [99] * 3
        assert empty(gate)

    run_virtual(main())


def test_a_batch_has_what_others_leave_of_the_bound() -> None:
    async def main() -> None:
        inner = Silent(lambda request: Script("x" * 900, "42"), speed=Speed(0.01))
        gate = admission(inner, tokens=2500)
        others = [asyncio.create_task(use(gate.through(inner, now()), request(index, 1000))) for index in range(4)]
        batch = [
            asyncio.create_task(use(gate.through(inner, 0.0, batch=True), request(index, 1000))) for index in range(4)
        ]
        await asyncio.sleep(0.1)
        assert (gate.calls, gate.waiting) == (4, 4)
        await asyncio.wait(others)
        assert not any(task.done() for task in batch)
        alone = asyncio.create_task(use(gate.through(inner, now(), batch=True), request(9, 10_000)))
        await asyncio.wait([*batch, alone])
        assert empty(gate)

    run_virtual(main())


def test_while_rollouts_wait_the_engines_memory_is_filled_and_not_overfilled() -> None:
    bound, filled = 100_000, []

    def say(asked: RolloutRequest) -> Script:
        stream = random.Random(f"{asked.run_id}/{asked.slot}")
        length = int(stream.lognormvariate(0, 0.7) * 1200)
        return Script("".join(stream.choices(string.ascii_letters + "  ", k=length)), "42")

    async def main() -> None:
        inner = Metered(say, speed=Speed(0.0022, 0.00015), chunk_tokens=64)
        gate = admission(inner, tokens=bound)

        async def look() -> None:
            while True:
                await asyncio.sleep(1)
                if gate.waiting:
                    filled.append(inner.held / bound)

        async def one(seed: int) -> None:
            size = 1024 if seed % 2 else 2560
            params = Params(rollout_tokens=size, tail_tokens=256, final_tokens=2560, seed=seed)
            state = init(f"run{seed}", PROBLEM, params, TEMPLATES)
            async with open_run(state, gate.through(inner, now()), watch=Watch.NONE) as events:
                async for _ in events:
                    pass

        looker = asyncio.create_task(look())
        async with asyncio.timeout(_LONG_S), asyncio.TaskGroup() as tasks:
            for seed in range(60):
                tasks.create_task(one(seed))
        looker.cancel()

    run_virtual(main())
    assert len(filled) > 100
    assert mean(filled) > 0.6
    assert max(filled) < 1


class Roomy(ScriptedEngine):
    """An engine that knows its memory."""

    memory_tokens = 12_345


async def test_the_bound_is_the_engines_memory_where_it_can_tell() -> None:
    async with in_memory(Roomy()) as client:
        assert "mrsa_inflight_tokens_limit 12345.0" in (await client.get("/metrics")).text
    async with in_memory(Roomy(), max_inflight_tokens=99) as client:
        assert "mrsa_inflight_tokens_limit 99.0" in (await client.get("/metrics")).text
    async with in_memory() as client:
        assert "mrsa_inflight_tokens_limit 2.6e+06" in (await client.get("/metrics")).text


def gauge(text: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", text, re.M)
    assert found, name
    return float(found[1])


async def test_a_run_ends_whole_however_little_room_there_is() -> None:
    async with in_memory(max_inflight_tokens=1) as client:
        tight = (await client.post(CHAT, json=ask(mrsa=SMALL))).json()
        text = (await client.get("/metrics")).text
    async with in_memory() as client:
        roomy = (await client.post(CHAT, json=ask(mrsa=SMALL))).json()
    assert tight["choices"] == roomy["choices"]
    assert tight["usage"] == roomy["usage"]
    assert gauge(text, "mrsa_rollout_admission_seconds_count") == sum(
        part["rollouts"] for part in tight["mrsa"]["rounds"]
    )
    assert gauge(text, "mrsa_inflight_tokens") == gauge(text, "mrsa_rollouts_waiting") == 0


async def test_a_deadline_that_passes_while_rollouts_wait_ends_the_run_with_its_best_answer() -> None:
    engine = ScriptedEngine(lambda request: Script("hm", f"\\boxed{{{request.slot.index}}}"), speed=Speed(0.005))
    async with in_memory(engine, max_inflight_calls=1) as client:
        other = asyncio.create_task(client.post(CHAT, json=ask(mrsa={**SMALL, "population": 16, "set_size": 16})))
        mrsa = {**SMALL, "population": 8, "set_size": 8, "deadline_s": 0.6}
        async with asyncio.timeout(3):
            body = (await client.post(CHAT, json=ask(mrsa=mrsa))).json()
        assert body["mrsa"]["stopped"] == "deadline"
        assert body["choices"][0]["message"]["content"].startswith("\\boxed")
        finished, aborted = (sum(part[kind] for part in body["mrsa"]["rounds"]) for kind in ("finished", "aborted"))
        assert finished >= 1
        assert aborted >= 1
        assert (await other).status_code == 200
        text = (await client.get("/metrics")).text
    assert gauge(text, "mrsa_inflight_tokens") == gauge(text, "mrsa_rollouts_waiting") == 0


async def test_runs_whose_rollouts_wait_outlive_their_engine() -> None:
    """The engine dies with one rollout in it and dozens before it; back again, it serves them all."""
    engine = ScriptedEngine(lambda request: Script("x" * 20, "42"), speed=Speed(0.0005), chunk_tokens=4)
    async with in_memory(engine, max_inflight_calls=2, engine_wait_s=5) as client:
        runs = [asyncio.create_task(client.post(CHAT, json=ask(mrsa=SMALL, seed=number))) for number in range(8)]
        await asyncio.sleep(0.05)
        engine.kill()
        await asyncio.sleep(0.1)
        text = (await client.get("/metrics")).text
        assert gauge(text, "mrsa_inflight_tokens") == gauge(text, "mrsa_rollouts_waiting") == 0
        engine.revive()
        async with asyncio.timeout(10):
            assert [(await run).status_code for run in runs] == [200] * 8
        text = (await client.get("/metrics")).text
    assert gauge(text, "mrsa_inflight_tokens") == gauge(text, "mrsa_rollouts_waiting") == 0
    assert engine.open_requests == 0


@asynccontextmanager
async def running(engine: ScriptedEngine, calls: int) -> AsyncIterator[tuple[Runner, Admission]]:
    metrics, host = Metrics(), EngineHost(engine)
    gate = Admission(host, metrics, max_tokens=1 << 20, max_calls=calls)
    runner = Runner(host, gate, metrics, max_runs=99, max_queued=0, engine_wait_s=5)
    life = asyncio.create_task(host.run())
    try:
        yield runner, gate
    finally:
        await runner.aclose()
        life.cancel()
        await asyncio.wait((life,))


def submit(runner: Runner, name: str) -> Run:
    async def prepare(engine: object) -> Prepared:
        params = Params(population=4, rounds=1, set_size=4)
        return Prepared(init(name, PROBLEM, params, TEMPLATES, runner.next_priority()), Watch.NONE)

    return runner.submit(name, prepare)


def leave_by_draining(runner: Runner, runs: list[Run]) -> Any:
    return runner.drain(0.0)


async def leave_by_cancelling(runner: Runner, runs: list[Run]) -> None:
    for run in runs:
        run.cancel()
    for run in runs:
        await run.ended()


@pytest.mark.parametrize("leave", [leave_by_draining, leave_by_cancelling])
async def test_runs_that_are_ended_leave_nothing_in_the_queue(leave: Callable[[Runner, list[Run]], Any]) -> None:
    engine = ScriptedEngine(lambda request: Script("x" * 9999, "42"), speed=Speed(0.01), chunk_tokens=1)
    async with running(engine, calls=3) as (runner, gate):
        runs = [submit(runner, f"run{number}") for number in range(5)]
        await asyncio.sleep(0.05)
        assert (gate.calls, gate.waiting) == (3, 17)
        await leave(runner, runs)
        assert empty(gate)
        assert engine.open_requests == 0


async def test_priorities_grow_and_are_milliseconds_that_stay_exact_in_json() -> None:
    async with running(ScriptedEngine(), calls=1) as (runner, _):
        found = [runner.next_priority() for _ in range(10_000)]
    assert all(first < second for first, second in itertools.pairwise(found))
    assert 1.7e12 < found[0] < found[-1]
    assert found[-1] * 4096 < 2**53
