"""The check of the planner against a real engine, itself checked on an engine whose constants are known."""

from __future__ import annotations

import asyncio
import random
import string
from dataclasses import replace

import pytest

from harness.lineage import seed_of
from harness.scripted import Script, ScriptedEngine, run_virtual
from harness.speed import EngineModel
from harness.types import RolloutRequest
from tests.bench.plan_check import PARAMS, Calibrated, calibrate, predict, really, wording_of

MODEL = EngineModel(step_s=0.03, stream_s=0.002, kv_token_s=5e-6, prefill_tokens_per_s=900, request_s=0.01)
LETTERS = bytes.maketrans(bytes(range(256)), (string.ascii_letters + string.digits + "  ").encode() * 4)


def say(request: RolloutRequest) -> Script:
    stream = random.Random(seed_of(request.max_tokens, *request.slot, len(request.messages[0].text)))
    return Script("", stream.randbytes(stream.randint(30, 400)).translate(LETTERS).decode())


async def checked() -> tuple[Calibrated, list[tuple[float, float]]]:
    engine = ScriptedEngine(say, speed=MODEL, thinking=False)
    clock = asyncio.get_running_loop().time
    found = await calibrate(engine, clock)
    pairs = []
    for seed in range(3):
        state, seconds = await really(engine, clock, replace(PARAMS, seed=seed))
        pairs.append((predict(found.model, await wording_of(engine, state.params), state), seconds))
    return found, pairs


def test_known_constants_are_found_and_predict_real_runs() -> None:
    found, pairs = run_virtual(checked())
    for name in ("step_s", "stream_s", "kv_token_s", "prefill_tokens_per_s"):
        assert getattr(found.model, name) == pytest.approx(getattr(MODEL, name), rel=0.01), name
    for predicted, seconds in pairs:
        assert predicted == pytest.approx(seconds, rel=0.01)
