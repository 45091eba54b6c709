"""Barrier loop against lazy evaluation on the same draws, lengths and engine: `python -m tests.bench.lazy`.

The engine is the scripted one on a virtual clock, prefill left out. A decode step takes 2.2 ms and 0.15 ms for each
stream: a mixture of experts of ZAYA1's shape on one H200 reads 1.5 GB a step for one stream and some 11 GB for 16, at
4.8 TB/s, beside a fixed 2 ms. Lengths are lognormal (sigma 0.7, median 19,000 tokens), cut at the rollout's budget:
so a barrier run of the headline setting generates about what the authors report (740,000 tokens).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import string
import time
from statistics import mean
from typing import NamedTuple

from harness.events import RunFinished
from harness.lineage import seed_of
from harness.markovian_rsa import init
from harness.prompts import load_templates
from harness.run import Watch, open_run
from harness.scripted import Script, ScriptedEngine, Speed, run_virtual
from harness.types import Message, Params, Problem, RolloutRequest
from tests.helpers.barrier import barrier_loop

_LETTERS = bytes.maketrans(bytes(range(256)), (string.ascii_letters + string.digits + "  ").encode() * 4)
_PROBLEM = Problem((Message("user", ("What is asked?",)),))
ROWS = ((16, 4, 2, 40, 16), (16, 4, 2, 40, 1), (16, 4, 2, 16, 1), (32, 4, 8, 32, 1), (32, 4, 8, 32, 32))


class Figures(NamedTuple):
    """One run: seconds of virtual time, generated tokens, rollouts."""

    seconds: float
    tokens: int
    rollouts: int


def engine(seed: int) -> ScriptedEngine:
    """An engine whose rollout lengths depend on the seed and the place alone, so that both loops meet the same."""

    def say(request: RolloutRequest) -> Script:
        stream = random.Random(seed_of(seed, "length", *request.slot))
        length = int(stream.lognormvariate(0, 0.7) * 19_000)
        return Script(stream.randbytes(length).translate(_LETTERS).decode(), "\\boxed{42}")

    return ScriptedEngine(say, speed=Speed(0.0022, 0.00015))


async def lazy(params: Params) -> Figures:
    """The harness itself."""
    async with open_run(
        init("lazy", _PROBLEM, params, load_templates()), engine(params.seed), watch=Watch.NONE
    ) as events:
        async for _ in events:
            pass
        state = events.state
    assert isinstance(state.outcome, RunFinished)
    started = sum(stats.started for stats in state.stats)
    return Figures(asyncio.get_running_loop().time(), state.usage.completion_tokens, started)


async def barrier(params: Params) -> Figures:
    """The plain loop."""
    result = await barrier_loop(_PROBLEM, params, load_templates(), engine(params.seed))
    return Figures(asyncio.get_running_loop().time(), result.tokens, result.rollouts)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="runs averaged in each row (default 10)")
    seeds = parser.parse_args().seeds
    print(f"Means of {seeds} seeds, lazy / barrier.\n")
    print("| N, C, T, beta, F | wall, s | ratio | tokens, thousands | ratio | rollouts |")
    print("|---|---|---|---|---|---|")
    began = time.perf_counter()
    for population, set_size, rounds, beta, finals in ROWS:
        runs = []
        for seed in range(seeds):
            params = Params(
                population=population,
                set_size=set_size,
                rounds=rounds,
                rollout_tokens=beta * 1024,
                final_candidates=finals,
                final_tokens=40 * 1024,
                seed=seed,
            )
            runs.append((run_virtual(lazy(params)), run_virtual(barrier(params))))
        ours, theirs = (
            Figures(*(mean(values) for values in zip(*side, strict=True))) for side in zip(*runs, strict=True)
        )
        print(
            f"| {population},{set_size},{rounds},{beta}K, F={finals} "
            f"| {ours.seconds:,.0f} / {theirs.seconds:,.0f} | {ours.seconds / theirs.seconds:.2f} "
            f"| {ours.tokens / 1e3:,.0f} / {theirs.tokens / 1e3:,.0f} | {ours.tokens / theirs.tokens:.2f} "
            f"| {ours.rollouts:.1f} of {theirs.rollouts:.0f} |",
            flush=True,
        )
    print(f"\nSimulated in {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    main()
