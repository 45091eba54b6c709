"""Who waits when short and long runs share an engine: `python -m tests.bench.fairness [--runs 400]`.

Runs arrive at random (Poisson), nine in ten of the effort `low`, the others half `xhigh` and half `max`, at nine tenths
of what the engine can do. The server's own runner and admission send them to the scripted engine on a virtual clock;
only the order of the queue differs between the rows. A decode step takes 2.2 ms and 0.15 ms for each stream, and all
tokens are a sixteenth of the real ones, memory included, so a second here stands for sixteen.

Latency is from arrival to end. Slowdown is that divided by what the same run takes with the engine to itself.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from harness.engine import Engine
from harness.events import RunFinished
from harness.lineage import seed_of
from harness.markovian_rsa import init
from harness.prompts import load_templates
from harness.run import Watch
from harness.scripted import Script, ScriptedEngine, Speed, run_virtual
from harness.types import Message, Params, Problem, RolloutRequest
from mrsa_server import logs
from mrsa_server.metrics import Metrics
from mrsa_server.runs.admission import AGEING, USUAL_TOKENS, Admission, AdmittedEngine, Hold
from mrsa_server.runs.host import EngineHost
from mrsa_server.runs.runner import Prepared, Runner
from tests.bench.compare import LETTERS

SCALE = 16
SPEED = Speed(0.0022, 0.00015)
PROBLEM = Problem((Message("user", ("What is asked?",)),))
CLASSES = {"low": (8, 2, 8), "xhigh": (16, 8, 16), "max": (32, 8, 32)}  # N, T, beta in K
MIX = (("low", 0.9), ("xhigh", 0.05), ("max", 0.05))
MAX_TOKENS = USUAL_TOKENS // SCALE


Order = Callable[..., Admission]
STRICT_AGE = partial(Admission, ageing=0.0)


class Job(NamedTuple):
    """A run that is to come."""

    number: int
    kind: str
    arrival_s: float


class RoundRobin(Admission):
    """The run whose last turn is longest ago."""

    _turns = itertools.count()

    def through(self, engine: Engine, arrival_s: float, *, plain: bool = False, batch: bool = False) -> AdmittedEngine:
        return super().through(engine, next(self._turns), plain=plain, batch=batch)

    def _charge(self, hold: Hold, tokens: float) -> None:
        if not hold.ageing_s:  # its first time: it is let in
            hold.ageing_s, hold.share.rank = 1.0, next(self._turns)
            if hold.share.waiting:
                self._list(hold.share)


def params(kind: str, seed: int) -> Params:
    population, rounds, beta = CLASSES[kind]
    return Params(
        population=population,
        rounds=rounds,
        rollout_tokens=beta * 1024 // SCALE,
        tail_tokens=4096 // SCALE,
        final_tokens=40_960 // SCALE,
        seed=seed,
    )


def say(request: RolloutRequest) -> Script:
    """Lengths that depend on the run and the place alone."""
    stream = random.Random(f"{request.run_id}/{request.slot}")
    length = int(stream.lognormvariate(0, 0.7) * 19_000 / SCALE)
    return Script(stream.randbytes(min(length, 40_960 // SCALE)).translate(LETTERS).decode(), "\\boxed{42}")


async def simulate(jobs: list[Job], order: Order) -> dict[Job, float]:
    """Latency of each run, in seconds of virtual time; all have to end with an answer."""
    metrics = Metrics()
    host = EngineHost(ScriptedEngine(say, speed=SPEED))
    life = asyncio.create_task(host.run())
    await host.wait_up(1)
    admission = order(host, metrics, max_tokens=MAX_TOKENS, max_calls=4096)
    runner = Runner(host, admission, metrics, max_runs=1 << 20, max_queued=0, engine_wait_s=1)
    clock, found = asyncio.get_running_loop().time, {}
    templates = load_templates()
    start = clock()

    async def one(job: Job) -> None:
        async def prepare(engine: Engine) -> Prepared:
            state = init(f"run-{job.number}", PROBLEM, params(job.kind, job.number), templates, runner.next_priority())
            return Prepared(state, Watch.NONE)

        await asyncio.sleep(start + job.arrival_s - clock())
        state = await runner.submit(f"run-{job.number}", prepare).finished()
        assert isinstance(state.outcome, RunFinished)
        found[job] = clock() - start - job.arrival_s

    async with asyncio.TaskGroup() as tasks:
        for job in jobs:
            tasks.create_task(one(job))
    await runner.aclose()
    life.cancel()
    await asyncio.wait((life,))
    assert (admission.calls, admission.waiting, admission.tokens) == (0, 0, 0)
    return found


def draw_jobs(runs: int, runs_per_s: float, seed: int) -> list[Job]:
    stream, at, jobs = random.Random(seed_of(seed, "arrivals")), 0.0, []
    kinds, weights = zip(*MIX, strict=True)
    for number in range(runs):
        at += stream.expovariate(runs_per_s)
        jobs.append(Job(seed * runs + number, stream.choices(kinds, weights)[0], at))
    return jobs


def quantile(values: list[float], share: float) -> float:
    """The smallest value that so many are not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=400, help="runs in each row")
    parser.add_argument("--load", type=float, default=0.9, help="share of the engine that the runs need")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ageing", type=float, nargs="*", default=[4, 64], help="other values of AGEING")
    options = parser.parse_args()
    logs.configure("warning", "text")
    began = time.perf_counter()
    # All at once: what the engine does when it is never short of work, and so what nine tenths of that is.
    sample = [job._replace(arrival_s=0.0) for job in draw_jobs(options.runs, 1.0, options.seed)]
    full = run_virtual(simulate(sample, STRICT_AGE))
    runs_per_s = options.load * len(sample) / max(full.values())
    jobs = draw_jobs(options.runs, runs_per_s, options.seed)
    alone = {job: run_virtual(simulate([job._replace(arrival_s=0.0)], STRICT_AGE)).popitem()[1] for job in jobs}
    counts = ", ".join(f"{sum(job.kind == kind for job in jobs)} {kind}" for kind in CLASSES)
    print(
        f"{len(jobs)} runs ({counts}), {runs_per_s:.3f} a second, load {options.load:g}, seconds of the scaled engine\n"
    )
    print("| order | effort | latency p50 | p95 | p99 | slowdown p50 | p95 | p99 | most |")
    print("|---|---|---|---|---|---|---|---|---|")
    orders: list[tuple[str, Order]] = [("strict age", STRICT_AGE), ("round robin", RoundRobin)]
    orders.append((f"**ageing by {AGEING:g}**", Admission))
    orders += [(f"ageing by {ageing:g}", partial(Admission, ageing=ageing)) for ageing in options.ageing]
    for name, order in orders:
        found = run_virtual(simulate(jobs, order))
        for kind in CLASSES:
            latencies = [seconds for job, seconds in found.items() if job.kind == kind]
            slowdowns = [seconds / alone[job] for job, seconds in found.items() if job.kind == kind]
            if latencies:
                cells = [f"{quantile(latencies, share):.0f}" for share in (0.5, 0.95, 0.99)]
                cells += [f"{quantile(slowdowns, share):.1f}" for share in (0.5, 0.95, 0.99, 1.0)]
                print(f"| {name} | {kind} | {' | '.join(cells)} |", flush=True)
    print(f"\nSimulated in {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
