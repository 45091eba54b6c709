"""The scripted engine on clocks that are not virtual."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
import uvloop

from harness.events import RunFinished
from harness.markovian_rsa import init
from harness.prompts import Templates
from harness.scripted import Script, ScriptedEngine, Speed
from harness.types import Params
from tests.helpers.runs import PROBLEM, go


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("step_s", [0.0, 1e-5, 1e-4])
def test_a_run_takes_its_time_on_any_loop(
    templates: Templates, loop: Callable[[], asyncio.AbstractEventLoop], step_s: float
) -> None:
    engine = ScriptedEngine(lambda _: Script("x" * 300, "42"), speed=Speed(step_s=step_s), chunk_tokens=7)
    params = Params(population=6, set_size=2, rounds=2, rollout_tokens=200, tail_tokens=20, final_tokens=400)
    began, cpu = time.monotonic(), time.process_time()
    with asyncio.Runner(loop_factory=loop) as runner:
        state, _ = runner.run(asyncio.wait_for(go(init("run", PROBLEM, params, templates), engine), 10))
    wall, used = time.monotonic() - began, time.process_time() - cpu
    assert isinstance(state.outcome, RunFinished)
    longest = 2 * 200 + 303
    assert longest * step_s <= wall + 0.001
    assert used < 1.0, "it waits, and does not spin"
