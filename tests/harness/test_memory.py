from __future__ import annotations

import asyncio
import gc
import tracemalloc

from harness.events import RunFinished
from harness.markovian_rsa import init
from harness.prompts import Templates
from harness.run import Watch, open_run
from harness.scripted import ScriptedEngine, run_virtual
from harness.types import Message, Params, Problem, Selection


def test_runs_that_have_ended_leave_nothing_behind(templates: Templates) -> None:
    async def many() -> None:
        engine = ScriptedEngine(mean_tokens=200)
        problem = Problem((Message("user", ("What is 6 times 7?",)),))

        async def one(seed: int) -> None:
            params = Params(
                population=6, rounds=2, tail_tokens=100, final_candidates=3, selection=Selection.FIRST, seed=seed
            )
            async with open_run(init("run", problem, params, templates), engine, watch=Watch.NONE) as events:
                async for _ in events:
                    await asyncio.sleep(0)
                assert isinstance(events.state.outcome, RunFinished)

        for seed in range(60):
            await one(seed)
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for seed in range(200):
            await one(seed)
        gc.collect()
        after = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert after - before < 100_000, "bytes that 200 runs left behind: a single trace of each would be 900,000"

    run_virtual(many())
