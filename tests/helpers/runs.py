"""Runs over an engine whose every word, failure and delay comes out of one number: for properties of the harness."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from harness.engine import Delta, EngineError
from harness.events import Event, RolloutDelta
from harness.markovian_rsa import State, init
from harness.prompts import Templates
from harness.run import open_run
from harness.scripted import Script, ScriptedEngine, run_virtual
from harness.selection import group_by_text
from harness.types import Carry, Message, Params, Problem, RolloutRequest, Selection, Slot

PROBLEM = Problem((Message("system", ("You are terse.",)), Message("user", ("What is 6 times 7?",))))
property_of_runs = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150
)


def number(*path: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(path).encode()).digest()[:6], "big")


class World(ScriptedEngine):
    """Scripts, failures and delays that depend on the slot and on what is read, drawn from one number."""

    def __init__(self, key: int, failing: int = 0, thinking: bool = True, longest: int = 60) -> None:
        super().__init__(self.say, thinking=thinking, chunk_tokens=7)
        self.key = key
        self.failing = failing  # percent
        self.longest = longest
        self.asked: list[Slot] = []

    def say(self, request: RolloutRequest) -> Script:
        text = "".join(message.text for message in request.messages)
        thinking = f"{number(self.key, request.slot, text):x}" * 9
        broken = number(self.key, "fails", request.slot) % 100 < self.failing
        return Script(
            thinking[: 1 + number(self.key, "length", request.slot) % self.longest],
            f"\\boxed{{{number(self.key, text, request.slot)}}}",
            EngineError(f"{request.slot} is lost") if broken else None,
            number(self.key, "breaks", request.slot) % 30,
        )

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        self.asked.append(request.slot)
        await asyncio.sleep(1 + number(self.key, "delay", request.slot) % 1000)
        async for delta in super().generate(request):
            yield delta


params_of_runs = st.builds(
    lambda n, c, t, f, beta, tau, carry, seed: Params(
        population=n,
        set_size=c,
        rounds=t,
        final_candidates=min(n, f),
        rollout_tokens=beta,
        tail_tokens=tau,
        final_tokens=4000,
        carry=carry,
        selection=Selection.FIRST,
        seed=seed,
    ),
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(0, 4),
    st.integers(1, 7),
    st.integers(2, 80),
    st.integers(1, 100),
    st.sampled_from([Carry.REASONING, Carry.HYBRID]),
    st.integers(0, 2**63),
)


class TextJudge:
    """Takes no worker process: answers are equal as texts."""

    def group(self, answers: list[str | None]) -> Future[tuple[int, ...]]:
        """As `MathJudge`."""
        found: Future[tuple[int, ...]] = Future()
        found.set_result(group_by_text(answers))
        return found


async def go(state: State, engine: ScriptedEngine, **options: Any) -> tuple[State, list[Event]]:
    events: list[Event] = []
    async with open_run(state, engine, **options) as stream:
        async for event in stream:
            if not isinstance(event, RolloutDelta):
                events.append(event)
        return stream.state, events


def run(params: Params, engine: ScriptedEngine, templates: Templates, problem: Problem = PROBLEM) -> State:
    return run_virtual(go(init("run", problem, params, templates), engine))[0]
