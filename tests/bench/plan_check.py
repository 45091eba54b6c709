"""Whether the planner's engine model holds on a real engine: `python -m tests.bench.plan_check [--runs 5]`.

Takes the constants of `EngineModel` from a minute or two of short calibrations on the embedded engine (1 to 16 streams
with short and with long prompts, prefills of 200 to 2,000 tokens), then runs Markovian RSA on it, and predicts each
run's wall time from the constants and the run's own token counts. Needs vLLM's CPU build (`make venv-cpu`) and a
machine that does nothing else. Where others use it, a yardstick before and after each run says by how much it is
slower than while the constants were taken; the last errors are without that. `--clock cpu` takes CPU seconds for time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import NamedTuple, Protocol

import psutil

from harness.engine import Engine
from harness.events import RunFinished
from harness.markovian_rsa import State, init
from harness.prompts import aggregation_messages, load_templates
from harness.run import Watch, open_run
from harness.simulate import Order, Simulation, Wording, draw
from harness.speed import EngineModel
from harness.types import Message, Params, Problem, RolloutRequest, Sampling, Slot, Tail

# Streams at once, words of their prompts, tokens of each at most.
CALIBRATIONS = (
    *((batch, 20, 64) for batch in (1, 2, 4, 8, 16)),
    *((batch, 250, 48) for batch in (2, 8)),
    *((1, words, 1) for words in (100, 300, 600)),
)
YARDSTICK = (8, 100, 40)  # before and after each run: how fast the machine is just then
REPEATS = 3
WORDS = "river stone lamp paper cloud engine garden window number forest letter silver music winter table ocean".split()
QUESTION = (
    "A baker sells 12 loaves a day and 7 more on Sundays. How many does she sell in four weeks? Explain each step."
)
PROBLEM = Problem((Message("user", (QUESTION,)),))
PARAMS = Params(
    population=8,
    set_size=4,
    rounds=2,
    rollout_tokens=200,
    tail_tokens=96,
    final_tokens=200,
    sampling=Sampling(seeded=True),
)


class Clock(Protocol):
    """Seconds since some moment."""

    def __call__(self) -> float: ...


def cpu_clock() -> float:
    """CPU seconds of this process and the engine's."""
    process = psutil.Process()
    times = [member.cpu_times() for member in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": cpu_clock}


class Asked(NamedTuple):
    """Generations that ran at once: seconds, and what the model's constants are multiplied by to give them.

    Attributes:
        seconds: From the first request to the last end.
        prompt_tokens: Of all prompts.
        steps: Of the longest generation.
        tokens: Of all generations.
        kv_tokens: In flight, summed over the steps.
    """

    seconds: float
    prompt_tokens: int
    steps: int
    tokens: int
    kv_tokens: float


async def ask(engine: Engine, clock: Clock, batch: int, words: int, max_tokens: int, stream: random.Random) -> Asked:
    """So many generations at once, with prompts that share nothing but their first words."""

    async def one() -> tuple[int, int]:
        text = " ".join(stream.choice(WORDS) for _ in range(words))
        message = Message("user", (f"{text}\nContinue this list of words for as long as you can.",))
        request = RolloutRequest("check", Slot(0, 0), (message,), max_tokens, watched=False)
        tokens = prompt = 0
        async for delta in engine.generate(request):
            tokens += len(delta.token_ids)
            prompt += delta.prompt_tokens or 0
        return tokens, prompt

    began = clock()
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(one()) for _ in range(batch)]
    seconds = clock() - began
    counts = [task.result() for task in asked]
    return Asked(
        seconds,
        prompt_tokens=sum(prompt for _, prompt in counts),
        steps=max(tokens for tokens, _ in counts),
        tokens=sum(tokens for tokens, _ in counts),
        kv_tokens=sum(tokens * (prompt + tokens / 2) for tokens, prompt in counts),
    )


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """The coefficients that are least wrong in proportion, none below 0: the most negative is left out, one by one."""
    used = list(range(len(rows[0])))
    while True:
        scaled = [[row[column] / value for column in used] for row, value in zip(rows, values, strict=True)]
        size = len(used)
        matrix = [[sum(row[i] * row[j] for row in scaled) for j in range(size)] for i in range(size)]
        right = [sum(row[i] for row in scaled) for i in range(size)]
        found = solve(matrix, right)
        if min(found) >= 0:
            return [found[used.index(column)] if column in used else 0.0 for column in range(len(rows[0]))]
        del used[found.index(min(found))]


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss's elimination."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for column in range(len(rows)):
        pivot = max(range(column, len(rows)), key=lambda index: abs(rows[index][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for index, row in enumerate(rows):
            if index != column:
                factor = row[column] / rows[column][column]
                rows[index] = [value - factor * above for value, above in zip(row, rows[column], strict=True)]
    return [row[-1] / row[index] for index, row in enumerate(rows)]


class Calibrated(NamedTuple):
    """The constants: of a request, a prompt token, a step, a stream, a token of KV cache, in seconds."""

    constants: tuple[float, ...]

    @property
    def model(self) -> EngineModel:
        """The engine."""
        request_s, prompt_s, step_s, stream_s, kv_token_s = self.constants
        return EngineModel(step_s, stream_s, kv_token_s, prefill_tokens_per_s=1 / prompt_s, request_s=request_s)

    def expected(self, asked: Asked) -> float:
        """Seconds of some generations."""
        return sum(value * constant for value, constant in zip(row_of(asked), self.constants, strict=True))


def row_of(asked: Asked) -> tuple[float, ...]:
    """What the constants are multiplied by."""
    return (1.0, asked.prompt_tokens, asked.steps, asked.tokens, asked.kv_tokens)


def fitted(measured: Sequence[Asked]) -> Calibrated:
    """Seconds are linear in the constants: one regression over all that was measured."""
    found = least_squares([row_of(asked) for asked in measured], [asked.seconds for asked in measured])
    return Calibrated(tuple(found))


async def calibrate(engine: Engine, clock: Clock) -> Calibrated:
    """The constants of this machine, printed with what they were taken from."""
    stream = random.Random(1)
    await ask(engine, clock, 4, 20, 64, stream)  # the first one is slower
    tries = [[await ask(engine, clock, *calibration, stream) for _ in range(REPEATS)] for calibration in CALIBRATIONS]
    rough = fitted([asked for repeats in tries for asked in repeats])
    # Whatever else runs here only makes it slower: the fastest of each counts.
    best = [min(repeats, key=lambda asked: asked.seconds / rough.expected(asked)) for repeats in tries]
    found = fitted(best)
    print("| streams | prompt tokens | tokens | s | fitted |\n|---|---|---|---|---|")
    for (batch, *_), asked in zip(CALIBRATIONS, best, strict=True):
        print(
            f"| {batch} | {asked.prompt_tokens} | {asked.tokens} | {asked.seconds:.2f} | {found.expected(asked):.2f} |"
        )
    print(f"\n{found.model}\n", flush=True)
    return found


async def slowness(engine: Engine, clock: Clock, found: Calibrated, stream: random.Random) -> float:
    """Seconds of the yardstick just now, in proportion to what is expected."""
    asked = await ask(engine, clock, *YARDSTICK, stream)
    return asked.seconds / found.expected(asked)


async def really(engine: Engine, clock: Clock, params: Params) -> tuple[State, float]:
    """A run, and its time."""
    state = init("check", PROBLEM, params, load_templates())
    began = clock()
    async with open_run(state, engine, watch=Watch.NONE) as events:
        async for _ in events:
            pass
        state = events.state
    assert isinstance(state.outcome, RunFinished)
    return state, clock() - began


async def wording_of(engine: Engine, params: Params) -> Wording:
    """Lengths of the prompts' parts, by the engine's own count."""

    async def count(*content: str) -> int:
        return await engine.count((Message("user", content),)) or 0

    tails = [Tail((1,), "x")] * min(params.set_size, params.population)
    (prompt,) = aggregation_messages(load_templates(), PROBLEM, tails, params.seed, 1)
    frame = await count("")
    opening, *between, closing = [await count(part) - frame for part in prompt.content if isinstance(part, str)]
    question = await count(QUESTION)
    return Wording(question, frame + opening - question, round(mean(between)) if between else 0, closing)


def predict(model: EngineModel, wording: Wording, state: State) -> float:
    """The wall time of a run from its token counts. A model that does not think has no markers and asks once."""
    params = state.params
    lengths = [1] * (params.population * (params.rounds + 1))
    for slot, rollout in state.rollouts.items():
        last = slot.round == params.rounds
        lengths[slot.round * params.population + slot.index] = rollout.usage.completion_tokens - 2 - last
    boundless = replace(params, rollout_tokens=1 << 20, final_tokens=1 << 20)
    graph = draw(boundless, Order.LAZY)
    simulation = Simulation(model, 1, [graph], Order.LAZY, lambda _: lengths, wording, 1)
    simulation.start_at(0.0)
    while not (ended := simulation.step()):
        pass
    assert ended[0].tokens == state.usage.completion_tokens
    return ended[0].wall_s


async def check(runs: int, clock: Clock) -> None:
    """Calibrate, run, compare."""
    from mrsa_server.engines.embedded import EmbeddedEngine

    engine = EmbeddedEngine()
    await engine.start()
    try:
        print(f"load average {os.getloadavg()[0]:.1f}")
        found = await calibrate(engine, clock)
        print("| N, C, T, beta, seed | tokens | s | predicted | error | machine | error, machine taken out | load |")
        print("|---|---|---|---|---|---|---|---|")
        stream = random.Random(2)
        wording = await wording_of(engine, PARAMS)
        errors = []
        for seed in range(runs):
            params = replace(PARAMS, seed=seed)
            before = await slowness(engine, clock, found, stream)
            state, seconds = await really(engine, clock, params)
            machine = (before + await slowness(engine, clock, found, stream)) / 2
            predicted = predict(found.model, wording, state)
            errors.append((predicted / seconds - 1, predicted * machine / seconds - 1))
            print(
                f"| {params.population}, {params.set_size}, {params.rounds}, {params.rollout_tokens}, {seed} "
                f"| {state.usage.completion_tokens:,} | {seconds:.2f} | {predicted:.2f} | {errors[-1][0]:+.0%} "
                f"| x {machine:.2f} | {errors[-1][1]:+.0%} | {os.getloadavg()[0]:.1f} |",
                flush=True,
            )
        for name, values in zip(("as predicted", "machine taken out"), zip(*errors, strict=True), strict=True):
            print(f"Error {name}: mean {mean(values):+.1%}, mean of its size {mean(map(abs, values)):.1%}.")
    finally:
        await engine.aclose()


def main() -> None:
    """Print the constants and the errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs to predict (default 5)")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="what is predicted (default wall)")
    arguments = parser.parse_args()
    asyncio.run(check(arguments.runs, CLOCKS[arguments.clock]))


if __name__ == "__main__":
    main()
