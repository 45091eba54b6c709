"""Our order of evaluation against round by round: `python -m tests.bench.compare [--engine real] [--picture FILE]`.

The other side is `tests/helpers/barrier.py`: all N rollouts of a round must end before the next begins, and all of them
are computed, as in the official example proxy and every other public implementation. Both sides get the same draws of
sets, the same lengths and the same engine.

`--engine simulated` runs the harness and the loop on the scripted engine's virtual clock, with the model of ZAYA1-8B on
one H200 out of `mrsa_server/machines.py`: chosen from data sheets before any ratio was known. Lengths are lognormal
(sigma 0.7, median 19,000 tokens), cut at the rollout's budget: so the loop generates what the authors report (about
740,000 tokens for N=16, T=2, beta=40K; 5.5 million for N=32, T=8, beta=32K). CPU and memory are those of a process of
its own for each side, the made-up text among them.

`--engine real` runs both, in turns, on the embedded engine (SmolLM2-135M on vLLM's CPU build), with the same seeds.

`--sensitivity` shows for which engines and lengths the ratios hold, by `harness/simulate.py`, which a test holds equal
to the harness. A run that is alone takes `steps of its longest chain x step_s + tokens x what a token adds`. Chains
are equally long on both sides where each round has a rollout that is cut at its budget: then only the tokens' part is
saved.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import resource
import string
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from math import log
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import psutil

from harness.engine import Engine
from harness.events import RunFinished
from harness.fleet import Fleet, Load, Work, forecast
from harness.lineage import seed_of
from harness.markovian_rsa import init
from harness.prompts import load_templates
from harness.run import Watch, open_run
from harness.scripted import Script, ScriptedEngine, run_virtual
from harness.simulate import Order, Simulation, Wording, draw
from harness.speed import EngineModel
from harness.types import Message, Params, Problem, RolloutRequest, Sampling, Slot
from mrsa_server.machines import MACHINES
from tests.helpers.barrier import barrier_loop

H200 = MACHINES["h200"].engine
MEDIAN, SIGMA = 19_000, 0.7
ROWS = ((16, 4, 2, 40, 1), (16, 4, 2, 16, 1), (32, 4, 8, 32, 1), (16, 4, 2, 40, 16), (32, 4, 8, 32, 32))
SMALL = Params(
    population=16,
    set_size=4,
    rounds=2,
    rollout_tokens=128,
    tail_tokens=64,
    final_tokens=128,
    sampling=Sampling(seeded=True),
)
USERS = 10  # of the loaded rows in the picture: on one GPU, each with one run at a time
_QUESTION = "A pen costs 3 coins and a book 7. What do 4 pens and 5 books cost? Explain each step."
LETTERS = bytes.maketrans(bytes(range(256)), (string.ascii_letters + string.digits + "  ").encode() * 4)


class Figures(NamedTuple):
    """One run: seconds on its engine's clock, generated tokens, rollouts; CPU seconds and MB of its process."""

    wall_s: float
    tokens: float
    rollouts: float
    cpu_s: float = 0.0
    peak_mb: float = 0.0


class Pair(NamedTuple):
    """Ours and the loop's, means over seeds."""

    ours: Figures
    theirs: Figures

    @property
    def wall(self) -> float:
        """Ours in proportion."""
        return self.ours.wall_s / self.theirs.wall_s

    @property
    def tokens(self) -> float:
        """Ours in proportion."""
        return self.ours.tokens / self.theirs.tokens


def params_of(row: Sequence[int], seed: int) -> Params:
    """N, C, T, beta in K, F; the last stage may always have 40K."""
    population, set_size, rounds, beta, finals = row
    return Params(
        population=population,
        set_size=set_size,
        rounds=rounds,
        rollout_tokens=beta * 1024,
        final_candidates=finals,
        final_tokens=40 * 1024,
        seed=seed,
    )


def name_of(row: Sequence[int]) -> str:
    """A row in a table."""
    population, set_size, rounds, beta, finals = row
    return f"{population}, {set_size}, {rounds}, {beta}K, F={finals}"


def thinking(seed: int, slot: Slot, median: float, sigma: float) -> int:
    """Tokens that a rollout would think for; the same for both sides."""
    stream = random.Random(seed_of(seed, "length", *slot))
    return max(1, int(stream.lognormvariate(log(median), sigma)))


async def ours(problem: Problem, params: Params, engine: Engine) -> Figures:
    """The harness itself."""
    clock = asyncio.get_running_loop().time
    began = clock()
    state = init("ours", problem, params, load_templates())
    async with open_run(state, engine, watch=Watch.NONE) as events:
        async for _ in events:
            pass
        state = events.state
    assert isinstance(state.outcome, RunFinished)
    started = sum(stats.started for stats in state.stats)
    return Figures(clock() - began, state.usage.completion_tokens, started)


async def theirs(problem: Problem, params: Params, engine: Engine) -> Figures:
    """The loop."""
    clock = asyncio.get_running_loop().time
    began = clock()
    result = await barrier_loop(problem, params, load_templates(), engine)
    assert not result.failed
    return Figures(clock() - began, result.tokens, result.rollouts)


def scripted(row: Sequence[int], lazy: bool, seeds: int) -> Figures:
    """One side on the scripted engine, in this process and nothing else in it."""
    problem = Problem((Message("user", ("What is asked? " * 34,)),))

    def say(request: RolloutRequest) -> Script:
        length = thinking(seed, request.slot, MEDIAN, SIGMA)
        text = random.Random(seed_of(seed, "text", *request.slot)).randbytes(length).translate(LETTERS).decode()
        return Script(text, "It follows that \\boxed{42}")

    found = []
    began = time.process_time()
    for seed in range(seeds):
        engine = ScriptedEngine(say, speed=H200)
        found.append(run_virtual((ours if lazy else theirs)(problem, params_of(row, seed), engine)))
    cpu_s = (time.process_time() - began) / seeds
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return average(found)._replace(cpu_s=cpu_s, peak_mb=peak_mb)


def average(found: Sequence[Figures]) -> Figures:
    """Means."""
    return Figures(*(mean(values) for values in zip(*found, strict=True)))


def on_scripted(rows: Sequence[Sequence[int]], seeds: int) -> None:
    """Harness and loop on the virtual clock, each in a process of its own."""
    print(f"One H200 with ZAYA1-8B, simulated. Means of {seeds} seeds, ours / round by round.\n")
    print("| N, C, T, beta, F | wall, s | ratio | tokens, thousands | ratio | rollouts | CPU, s | peak RSS, MB |")
    print("|---|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        for row in rows:
            pair = Pair(*(processes.submit(scripted, row, lazy, seeds).result() for lazy in (True, False)))
            print(line(name_of(row), pair), flush=True)


def line(name: str, pair: Pair) -> str:
    """A row of the table."""
    one, other = pair
    return (
        f"| {name} | {one.wall_s:,.1f} / {other.wall_s:,.1f} | {pair.wall:.2f} "
        f"| {one.tokens / 1e3:,.1f} / {other.tokens / 1e3:,.1f} | {pair.tokens:.2f} "
        f"| {one.rollouts:.1f} / {other.rollouts:.0f} | {one.cpu_s:.2f} / {other.cpu_s:.2f} "
        f"| {one.peak_mb:,.0f} / {other.peak_mb:,.0f} |"
    )


def simulated(row: Sequence[int], model: EngineModel, seeds: int, median: float = MEDIAN, sigma: float = SIGMA) -> Pair:
    """Both orders, a run alone on an engine."""
    sides: dict[Order, list[Figures]] = {order: [] for order in Order}
    for seed in range(seeds):
        params = params_of(row, seed)
        width = params.population
        places = (Slot(*divmod(place, width)) for place in range(width * (params.rounds + 1)))
        lengths = [thinking(seed, slot, median, sigma) for slot in places]
        for order, found in sides.items():
            simulation = Simulation(model, 1, [draw(params, order)], order, lambda _: lengths, Wording(), 500)  # noqa: B023  # called in this turn
            simulation.start_at(0.0)
            while not (ended := simulation.step()):
                pass
            found.append(Figures(ended[0].wall_s, ended[0].tokens, ended[0].rollouts))
    return Pair(average(sides[Order.LAZY]), average(sides[Order.BARRIER]))


def sensitivity(seeds: int) -> None:
    """For which engines and lengths the ratios hold."""
    models = {
        "one H200": H200,
        "one L40S": MACHINES["l40s"].engine,
        "latency alone: a step takes 5 ms whatever the batch": EngineModel(step_s=0.005),
        "throughput alone: a stream adds 1 ms to a step": EngineModel(stream_s=0.001),
    }
    print(f"\nA run alone, means of {seeds} seeds: wall ratio / token ratio.\n")
    print("| engine | median length | " + " | ".join(name_of(row) for row in ROWS[:3]) + " |")
    print("|---|---|" + "---|" * 3)
    for name, model in models.items():
        for median in (MEDIAN, 8_000):
            pairs = [simulated(row, model, seeds, median) for row in ROWS[:3]]
            cells = " | ".join(f"{pair.wall:.2f} / {pair.tokens:.2f}" for pair in pairs)
            print(f"| {name} | {median:,} | {cells} |", flush=True)


async def on_embedded(seeds: int) -> None:
    """Harness and loop on the real small model, in turns."""
    from mrsa_server.engines.embedded import EmbeddedEngine

    problem = Problem((Message("user", (_QUESTION,)),))
    engine = EmbeddedEngine()
    await engine.start()
    process = psutil.Process()

    def used() -> tuple[float, float]:
        family = [process, *process.children(recursive=True)]
        times = [member.cpu_times() for member in family]
        return sum(one.user + one.system for one in times), sum(member.memory_info().rss for member in family) / 2**20

    found: dict[bool, list[Figures]] = {True: [], False: []}
    print(
        f"SmolLM2-135M on this CPU, N={SMALL.population}, C={SMALL.set_size}, T={SMALL.rounds}, "
        f"beta={SMALL.rollout_tokens}, F=1; ours / round by round, the engine's CPU and memory with theirs.\n"
    )
    print("| | wall, s | ratio | tokens, thousands | ratio | rollouts | CPU, s | RSS, MB |")
    print("|---|---|---|---|---|---|---|---|")
    try:
        await ours(problem, replace(SMALL, rounds=0), engine)  # the first one is slower
        for seed in range(seeds):
            for lazy in (True, False) if seed % 2 else (False, True):
                before, _ = used()
                # Another question each time: neither side finds the other's prompts in the prefix cache.
                asked = Problem((Message("user", (f"{_QUESTION} ({'ours' if lazy else 'loop'} {seed})",)),))
                figures = await (ours if lazy else theirs)(asked, replace(SMALL, seed=seed), engine)
                after, rss_mb = used()
                found[lazy].append(figures._replace(cpu_s=after - before, peak_mb=rss_mb))
            pair = Pair(found[True][-1], found[False][-1])
            print(line(f"seed {seed}", pair), flush=True)
    finally:
        await engine.aclose()
    print(line("mean", Pair(average(found[True]), average(found[False]))))


def draw_picture(path: Path, seeds: int) -> None:
    """Ours in proportion to the loop: tokens and wall time, a bar for each setting."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    settings = ["N=16, T=2, β=40K", "N=16, T=2, β=16K", "N=32, T=8, β=32K"]
    tokens, walls = [], []
    for pair in (simulated(row, H200, seeds) for row in ROWS[:3]):
        tokens.append(pair.tokens)
        walls.append(pair.wall)
    for row, name in ((ROWS[0], settings[0]), (ROWS[2], settings[2])):
        ours, theirs = (forecast(Work(params_of(row, 0)), Fleet(H200), Load(USERS), order) for order in Order)
        settings.append(f"{name},\n{USERS} users at once")
        tokens.append(ours.tokens / theirs.tokens)
        walls.append(ours.wall_s(0.5) / theirs.wall_s(0.5))
    grey, blue = "#7d8590", "#3b82c4"  # both readable on white and on black
    style = {
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": grey,
        "axes.labelcolor": grey,
        "xtick.color": grey,
        "ytick.color": grey,
        "svg.fonttype": "none",
        "svg.hashsalt": "mrsa",
    }
    with pyplot.rc_context(style):
        figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
        for panel, title, shares in zip(panels, ("generated tokens", "wall time"), (tokens, walls), strict=True):
            places = range(len(shares))
            panel.barh(places, [1] * len(shares), color=grey, alpha=0.22, height=0.62)
            panel.barh(places, shares, color=blue, height=0.62)
            for place, share in zip(places, shares, strict=True):
                panel.text(share - 0.02, place, f"{share:.2f}", va="center", ha="right", color="white")
            panel.set_title(title, color=grey, fontsize=10)
            panel.set_xlim(0, 1)
            panel.set_xticks([0, 1], ["0", "1 = round by round"], ha="left")
            panel.get_xticklabels()[-1].set_ha("right")
            panel.set_yticks(list(places), settings)
            panel.tick_params(length=0)
            for spine in panel.spines.values():
                spine.set_visible(False)
        panels[0].invert_yaxis()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    for name, share, wall in zip(settings, tokens, walls, strict=True):
        print(f"{name.replace(chr(10), ' ')}: tokens {share:.3f}, wall {wall:.3f}")


def main() -> None:
    """Print the tables, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["simulated", "real"], default="simulated")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side on the engine (default 3)")
    parser.add_argument("--sensitivity", action="store_true", help="other engines and lengths too")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it (needs matplotlib); no table then")
    parser.add_argument("--draws", type=int, default=300, help="seeds of picture and sensitivity (default 300)")
    arguments = parser.parse_args()
    if arguments.picture is not None:
        draw_picture(arguments.picture, arguments.draws)
    elif arguments.engine == "real":
        asyncio.run(on_embedded(arguments.seeds))
    else:
        on_scripted(ROWS, arguments.seeds)
    if arguments.sensitivity:
        sensitivity(arguments.draws)


if __name__ == "__main__":
    main()
