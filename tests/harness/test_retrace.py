"""What a log says that the engine was asked for is what it was asked for."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.budget import smallest_budget
from harness.engine import Delta, EngineError
from harness.events import CandidatesAmended, Event, RolloutStarted, SetAmended, SetSkipped, WentFinal
from harness.markovian_rsa import init, replay, retrace
from harness.prompts import Templates
from harness.scripted import Script, ScriptedEngine, run_virtual
from harness.types import AnswerRules, Message, Params, Problem, RolloutRequest, Slot
from tests.harness.test_shortcuts import Agreeing, options_of_runs, with_options
from tests.helpers.runs import PROBLEM, TextJudge, go, params_of_runs, property_of_runs

TOOLS = AnswerRules(tools='[{"type": "function", "function": {"name": "f", "parameters": {}}}]')
problems = st.sampled_from(
    [
        PROBLEM,
        replace(PROBLEM, messages=(*PROBLEM.messages, Message("assistant", ("Six of seven?",)))),
        replace(PROBLEM, answer=TOOLS),
        replace(PROBLEM, answer=AnswerRules(json_schema='{"type": "integer"}')),
        replace(PROBLEM, answer=AnswerRules(max_tokens=30, stop=("}",))),
    ]
)


class Listening(Agreeing):
    """Keeps what it was asked for last, by slot."""

    def __init__(self, key: int, failing: int = 0) -> None:
        super().__init__(key, failing)
        self.heard: dict[Slot, RolloutRequest] = {}

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        self.heard[request.slot] = request
        async for delta in super().generate(request):
            yield delta


def check(log: list[Event], templates: Templates, *heard: dict[Slot, RolloutRequest]) -> None:
    """Each rollout's request is the one that was heard last, but for what the driver makes of it."""
    state, requests = retrace(log, templates)
    assert state == replay(log, templates)
    assert requests.keys() == {event.slot for event in log if isinstance(event, RolloutStarted)}
    said: dict[Slot, RolloutRequest] = {}
    for one in heard:
        said |= one
    assert said.keys() <= requests.keys()
    for slot, request in said.items():
        asked = requests[slot]
        assert request.messages == asked.messages
        assert request.members == asked.members
        assert (request.run_id, request.sampling, request.seed, request.priority) == (
            asked.run_id,
            asked.sampling,
            asked.seed,
            asked.priority,
        )
        assert request.answer.tools == asked.answer.tools
        last = slot.round == state.params.rounds
        assert asked.answer == (state.problem.answer if last else AnswerRules())


@settings(property_of_runs, max_examples=100)
@given(
    params_of_runs,
    options_of_runs,
    problems,
    st.integers(0, 2**32),
    st.sampled_from([0, 0, 30, 70]),
    st.none() | st.integers(0, 2000),
    st.integers(0, 10_000),
)
def test_the_requests_of_a_log_are_those_that_the_engine_was_given(
    templates: Templates,
    params: Params,
    options: dict[str, object],
    problem: Problem,
    key: int,
    failing: int,
    extra: int | None,
    cut: int,
) -> None:
    params = replace(with_options(params, options), final_tokens=300)
    if problem.answer != AnswerRules():
        params = replace(params, stop_when_agreed=None, start_small=None)
    if extra is not None:
        params = replace(params, budget_tokens=smallest_budget(params) + extra)

    async def twice() -> None:
        fresh = init("run", problem, params, templates)
        first = Listening(key, failing)
        _, events = await go(fresh, first, judge=TextJudge())
        log: list[Event] = [fresh.started, *events]
        check(log, templates, first.heard)
        kept = log[: 1 + cut % len(log)]
        again = Listening(key, failing)
        _, more = await go(replay(kept, templates), again, judge=TextJudge())
        begun = {event.slot for event in kept if isinstance(event, RolloutStarted)}
        before = {slot: request for slot, request in first.heard.items() if slot in begun}
        check([*kept, *more], templates, before, again.heard)

    run_virtual(twice())


def logged(params: Params, engine: ScriptedEngine, templates: Templates) -> list[Event]:
    fresh = init("run", PROBLEM, params, templates)
    return [fresh.started, *run_virtual(go(fresh, engine, judge=TextJudge()))[1]]


def test_a_request_is_the_one_of_its_time_though_its_set_was_drawn_anew_later(templates: Templates) -> None:
    """The last rollouts fail after spending; what is left pays for no other inputs: the last sets are drawn anew."""
    params = Params(
        population=8, set_size=2, rounds=1, final_candidates=2,
        rollout_tokens=100, tail_tokens=100, final_tokens=200, seed=2,
    )  # fmt: skip
    params = replace(params, budget_tokens=smallest_budget(params) + 210)
    heard: dict[Slot, RolloutRequest] = {}
    lost_ones = (Slot(1, 0), Slot(1, 1))

    def say(request: RolloutRequest) -> Script:
        heard[request.slot] = request
        lost = EngineError("lost at its end") if request.slot in lost_ones else None
        return Script("abcdefgh"[request.slot.index] * 95, "42", lost, 90)

    log = logged(params, ScriptedEngine(say), templates)
    assert any(isinstance(event, CandidatesAmended) for event in log)
    assert any(isinstance(event, WentFinal) for event in log)
    state, requests = retrace(log, templates)
    assert any(tuple(source.index for source in state.inputs(slot)) != requests[slot].members for slot in lost_ones)
    check(log, templates, heard)


def test_amended_and_skipped_sets_show_what_their_readers_read(templates: Templates) -> None:
    params = Params(
        population=6, set_size=2, rounds=3, final_candidates=3, rollout_tokens=200, final_tokens=400, seed=7,
        skip_agreed_sets=True,
    )  # fmt: skip
    kinds: set[type[Event]] = set()
    for key in range(40):
        engine = Listening(key, failing=45)
        log = logged(params, engine, templates)
        kinds |= {type(event) for event in log}
        check(log, templates, engine.heard)
    assert {SetAmended, SetSkipped} <= kinds


def test_a_log_of_another_wording_is_not_retraced(templates: Templates) -> None:
    started = init("run", PROBLEM, Params(), templates).started
    with pytest.raises(ValueError, match="was started with the prompts old"):
        retrace([replace(started, templates="old")], templates)
