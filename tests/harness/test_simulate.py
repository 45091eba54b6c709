"""The simulation against real runs on the scripted engine: the same walls, tokens and rollouts."""

from __future__ import annotations

import asyncio
import random
import string
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.events import RunFinished
from harness.lineage import seed_of
from harness.markovian_rsa import init
from harness.prompts import aggregation_messages, load_templates
from harness.run import Watch, open_run
from harness.scripted import Script, ScriptedEngine, run_virtual
from harness.simulate import Order, Simulation, Wording, draw
from harness.speed import EngineModel
from harness.types import Message, Params, Problem, RolloutRequest, Slot, Tail
from tests.helpers.barrier import barrier_loop

LETTERS = bytes.maketrans(bytes(range(256)), (string.ascii_letters + string.digits + "  ").encode() * 4)
ANSWER = "\\boxed{42}"


def problem(run: int) -> Problem:
    """A question of its own for each run, of one length: nothing is shared between runs."""
    return Problem((Message("user", (f"{run:04d}: what is asked? " * 5,)),))


FULL = EngineModel(
    step_s=0.002,
    stream_s=0.0003,
    kv_token_s=2e-7,
    experts=16,
    experts_s=0.004,
    prefill_tokens_per_s=50_000.0,
    request_s=0.003,
    kv_tokens=20_000,
    streams=12,
)


class Took(NamedTuple):
    """What a run took."""

    started_s: float
    wall_s: float
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    rollouts: int


def wording(candidates: int) -> Wording:
    """Lengths of the rendered prompts' parts, in bytes as the scripted engine counts."""
    tails = [Tail((1,), "x")] * candidates
    (message,) = aggregation_messages(load_templates(), problem(0), tails, 0, 1)
    texts = [len(part) for part in message.content if isinstance(part, str)]
    question = len(problem(0).messages[0].text)
    return Wording(question, texts[0] - question, texts[1] if candidates > 1 else 0, texts[-1])


def thinking(seed: int, run: int, slot: Slot, median: float) -> int:
    return max(1, int(random.Random(seed_of(seed, run, *slot)).lognormvariate(0, 0.7) * median))


def engine(model: EngineModel, seed: int, median: float) -> ScriptedEngine:
    def say(request: RolloutRequest) -> Script:
        run = int(request.run_id) if request.run_id.isdigit() else 0
        stream = random.Random(seed_of(seed, "text", run, *request.slot))
        text = stream.randbytes(thinking(seed, run, request.slot, median)).translate(LETTERS).decode()
        return Script(text, ANSWER)

    return ScriptedEngine(say, speed=model)


async def really(params: Params, starts: list[float], model: EngineModel, seed: int, median: float) -> list[Took]:
    """Runs of the harness, on one engine."""
    served, templates = engine(model, seed, median), load_templates()
    clock = asyncio.get_running_loop().time

    async def one(number: int, start_s: float) -> Took:
        await asyncio.sleep(start_s)
        state = init(
            str(number), problem(number), replace(params, seed=params.seed + number), templates, priority=number
        )
        began = clock()
        async with open_run(state, served, watch=Watch.NONE) as events:
            async for _ in events:
                pass
            state = events.state
        assert isinstance(state.outcome, RunFinished)
        usage, rollouts = state.usage, sum(stats.started for stats in state.stats)
        return Took(began, clock() - began, usage.completion_tokens, usage.prompt_tokens, usage.cached_tokens, rollouts)

    return await asyncio.gather(*(one(number, start) for number, start in enumerate(starts)))


async def behind_a_barrier(params: Params, model: EngineModel, seed: int, median: float) -> tuple[float, int, int]:
    result = await barrier_loop(problem(0), params, load_templates(), engine(model, seed, median))
    return asyncio.get_running_loop().time(), result.tokens, result.rollouts


def simulated(
    params: Params, starts: list[float], model: EngineModel, seed: int, median: float, order: Order = Order.LAZY
) -> list[Took]:
    width = params.population

    def lengths(run: int) -> list[int]:
        places = range(width * (params.rounds + 1))
        return [thinking(seed, run, Slot(*divmod(place, width)), median) for place in places]

    graphs = [draw(replace(params, seed=params.seed + number), order) for number in range(len(starts))]
    simulation = Simulation(model, 1, graphs, order, lengths, wording(min(params.set_size, width)), len(ANSWER) + 1)
    for start in starts:
        simulation.start_at(start)
    ended = []
    while len(ended) < len(starts):
        ended += simulation.step()
    return [
        Took(run.started_s, run.wall_s, run.tokens, run.prompt_tokens, run.cached_tokens, run.rollouts)
        for run in sorted(ended, key=lambda run: run.number)
    ]


def same(ours: list[Took], theirs: list[Took]) -> None:
    for simulation, run in zip(ours, theirs, strict=True):
        assert simulation[2:] == run[2:]
        assert simulation[:2] == pytest.approx(run[:2], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "model",
    [
        EngineModel(0.002, 0.0001),
        replace(FULL, kv_tokens=None, streams=None),
        replace(FULL, streams=5),
        FULL,
        replace(FULL, kv_tokens=6_000, cached_prefixes=0),
    ],
    ids=["simple", "boundless", "streams", "full", "crowded"],
)
def test_runs_that_share_an_engine_take_what_the_simulation_says(model: EngineModel) -> None:
    params = Params(population=8, set_size=3, rounds=3, rollout_tokens=900, tail_tokens=150, final_tokens=1000, seed=3)
    starts = [0.0, 0.0, 0.4, 0.41, 3.0]
    ours = simulated(params, starts, model, 1, 400.0)
    same(ours, run_virtual(really(params, starts, model, 1, 400.0)))
    assert len({run.wall_s for run in ours}) > 1


@settings(deadline=None, max_examples=25)
@given(
    population=st.integers(1, 9),
    set_size=st.integers(1, 4),
    rounds=st.integers(0, 4),
    finals=st.integers(1, 9),
    beta=st.integers(24, 700),
    final_tokens=st.integers(1, 700),
    tail=st.integers(16, 300),
    seed=st.integers(0, 999),
    starts=st.lists(st.floats(0, 2, allow_subnormal=False), min_size=1, max_size=4).map(sorted),
    model=st.sampled_from([EngineModel(0.002, 0.0001), FULL, replace(FULL, kv_tokens=5_000, streams=4)]),
)
def test_any_runs_take_what_the_simulation_says(
    population: int,
    set_size: int,
    rounds: int,
    finals: int,
    beta: int,
    final_tokens: int,
    tail: int,
    seed: int,
    starts: list[float],
    model: EngineModel,
) -> None:
    params = Params(
        population=population,
        set_size=set_size,
        rounds=rounds,
        rollout_tokens=beta,
        tail_tokens=tail,
        final_tokens=final_tokens,
        final_candidates=min(finals, population),
        seed=seed,
    )
    same(
        simulated(params, starts, model, seed, 300.0),
        run_virtual(really(params, starts, model, seed, 300.0)),
    )


@pytest.mark.parametrize("model", [EngineModel(0.002, 0.0001), replace(FULL, kv_tokens=60_000)])
def test_the_barrier_takes_what_the_reference_loop_takes(model: EngineModel) -> None:
    params = Params(population=8, set_size=3, rounds=3, rollout_tokens=900, tail_tokens=150, final_tokens=4000, seed=3)
    (ours,) = simulated(params, [0.0], model, 1, 300.0, Order.BARRIER)
    wall_s, tokens, rollouts = run_virtual(behind_a_barrier(params, model, 1, 300.0))
    assert (ours.tokens, ours.rollouts) == (tokens, rollouts) == (tokens, 25)
    assert ours.wall_s == pytest.approx(wall_s, rel=1e-9)


def test_a_fleet_gives_a_run_to_the_engine_with_the_fewest() -> None:
    params = Params(population=4, set_size=2, rounds=1, rollout_tokens=100, tail_tokens=10, final_tokens=100)
    graphs = [draw(params, Order.LAZY)]
    simulation = Simulation(FULL, 3, graphs, Order.LAZY, lambda _: [50] * 8, Wording(), 5)
    for _ in range(7):
        simulation.start_at(0.0)
    ended = []
    while len(ended) < 7:
        ended += simulation.step()
    assert sorted(run.engine for run in ended) == [0, 0, 0, 1, 1, 2, 2]
