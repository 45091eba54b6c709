from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness.budget import BudgetTooSmall, smallest_budget
from harness.engine import Delta, EngineDead, EngineError, GenerationLost
from harness.events import (
    DeadlineReached,
    Event,
    RolloutAborted,
    RolloutDelta,
    RolloutFailed,
    RolloutFinished,
    RolloutStarted,
    RunFailed,
    RunFinished,
    RunResumed,
    SetAmended,
    Stopped,
    WentFinal,
)
from harness.markovian_rsa import State, apply, init, replay
from harness.prompts import Templates
from harness.run import Watch, open_run
from harness.scripted import Script, ScriptedEngine, Speed, run_virtual
from harness.types import (
    AnswerRules,
    Carry,
    Finish,
    InvalidParams,
    Params,
    Problem,
    RolloutRequest,
    Sampling,
    Slot,
    TokenIds,
)
from tests.helpers.barrier import Result, barrier_loop
from tests.helpers.runs import PROBLEM, World, go, params_of_runs, property_of_runs, run

# The property that everything stands on.


@property_of_runs
@given(params_of_runs, st.integers(0, 2**32), st.sampled_from([0, 0, 20, 50, 80]), st.booleans())
def test_lazy_evaluation_gives_what_the_barrier_loop_gives_on_the_same_draws(
    templates: Templates, params: Params, key: int, failing: int, thinking: bool
) -> None:
    async def both() -> tuple[State, Result]:
        state, _ = await go(init("run", PROBLEM, params, templates), World(key, failing, thinking))
        return state, await barrier_loop(PROBLEM, params, templates, World(key, failing, thinking))

    state, barrier = run_virtual(both())
    if isinstance(state.outcome, RunFinished):
        assert not barrier.failed
        assert {slot: state.rollouts[slot].answer for slot in state.outcome.candidates} == barrier.answers
    else:
        assert isinstance(state.outcome, RunFailed)
        assert barrier.failed
    for slot, rollout in state.rollouts.items():
        if slot.round < params.rounds:
            assert rollout.tail.text == barrier.tails[slot].text
    assert state.usage.completion_tokens <= barrier.tokens
    assert sum(stats.started for stats in state.stats) <= barrier.rollouts


@property_of_runs
@given(params_of_runs, st.integers(0, 2**32))
def test_only_what_something_reads_is_started_and_only_once(templates: Templates, params: Params, key: int) -> None:
    engine = World(key)
    state = run(params, engine, templates)
    assert len(engine.asked) == len(set(engine.asked)) == len(state.needed)
    assert set(engine.asked) == set(state.needed)
    assert sum(state.skipped) == params.population * params.rounds + params.final_candidates - len(state.needed)


def test_nobody_waits_for_the_slowest(templates: Templates) -> None:
    """Every rollout starts in the very moment in which the last of its own inputs ends."""

    async def times() -> None:
        loop, ended = asyncio.get_running_loop(), dict[Slot, float]()
        params = Params(population=8, set_size=2, rounds=3, final_candidates=8, rollout_tokens=500, final_tokens=4000)
        waited = 0
        async with open_run(init("run", PROBLEM, params, templates), World(5)) as events:
            async for event in events:
                if isinstance(event, RolloutFinished):
                    ended[event.rollout.slot] = loop.time()
                elif isinstance(event, RolloutStarted) and event.slot.round:
                    inputs = events.state.inputs(event.slot)
                    assert loop.time() == max(ended[slot] for slot in inputs)
                    round_end = [slot for slot in events.state.needed if slot.round == event.slot.round - 1]
                    waited += all(slot in ended for slot in round_end)
        assert waited < 24 - 3, "a barrier would let each of them wait for its whole round"

    run_virtual(times())


# Failures.


def failing_at(*slots: Slot) -> ScriptedEngine:
    def say(request: RolloutRequest) -> Script:
        lost = EngineError("out of luck") if request.slot in slots else None
        return Script("thinking " * 5, f"answer {request.slot.index}", lost)

    return ScriptedEngine(say)


SMALL = Params(population=4, set_size=2, rounds=1, rollout_tokens=100, tail_tokens=20, final_tokens=400, seed=3)


def test_a_set_goes_on_with_the_members_that_are_left(templates: Templates) -> None:
    first = run(SMALL, failing_at(), templates).inputs(Slot(1, 0))
    state, events = run_virtual(go(init("run", PROBLEM, SMALL, templates), failing_at(first[0])))
    assert isinstance(state.outcome, RunFinished)
    assert [event.members for event in events if isinstance(event, RolloutStarted) and event.slot.round == 1] == [
        (first[1].index,)
    ]


def test_a_set_left_empty_draws_again_and_the_log_says_so(templates: Templates) -> None:
    first = run(SMALL, failing_at(), templates).inputs(Slot(1, 0))
    state, events = run_virtual(go(init("run", PROBLEM, SMALL, templates), failing_at(*first)))
    assert isinstance(state.outcome, RunFinished)
    amended = [event for event in events if isinstance(event, SetAmended)]
    assert len(amended) == 1
    assert set(amended[0].members) == set(range(4)) - {slot.index for slot in first}


def test_when_the_last_candidate_fails_another_stands_in(templates: Templates) -> None:
    state = run(SMALL, failing_at(Slot(1, 0), Slot(1, 1)), templates)
    assert isinstance(state.outcome, RunFinished)
    assert state.outcome.candidates == (Slot(1, 2),)


@pytest.mark.parametrize("round", [0, 1])
def test_only_an_empty_population_fails_the_run_and_the_reason_is_named(templates: Templates, round: int) -> None:
    state = run(SMALL, failing_at(*(Slot(round, index) for index in range(4))), templates)
    assert isinstance(state.outcome, RunFailed)
    assert "out of luck" in state.outcome.reason
    assert state.stats[round].failed == 4


class Crumbling(World):
    """A pool whose engines go: a generation is lost at some token, up to `most` times for each rollout."""

    def __init__(self, key: int, most: int) -> None:
        super().__init__(key)
        self._key, self._most = key, most
        self.lost: Counter[Slot] = Counter()

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        draw = random.Random(f"{self._key} {request.slot} {self.lost[request.slot]}")
        loses = self.lost[request.slot] < self._most and draw.random() < 0.6
        deltas = 0
        async with aclosing(super().generate(request)) as stream:
            async for delta in stream:
                if loses and (deltas := deltas + 1) > draw.randrange(4):
                    self.lost[request.slot] += 1
                    raise GenerationLost("the connection broke")
                yield delta


@property_of_runs
@given(params_of_runs, st.integers(0, 2**32))
def test_generations_that_are_lost_change_no_answer_and_the_log_says_what_they_cost(
    templates: Templates, params: Params, key: int
) -> None:
    params = replace(params, budget_tokens=None)

    async def both() -> tuple[State, State, list[Event], Crumbling]:
        whole, _ = await go(init("run", PROBLEM, params, templates), World(key))
        engine = Crumbling(key, 2)
        start = init("run", PROBLEM, params, templates)
        state, events = await go(start, engine)
        return whole, state, [start.started, *events], engine

    whole, state, events, engine = run_virtual(both())
    again = [event for event in events if isinstance(event, RunResumed)]
    assert Counter(slot for event in again for slot in event.slots) == engine.lost
    assert state.charged_tokens == sum(event.charged_tokens for event in again)
    assert state.outcome == whole.outcome
    assert {slot: rollout.answer for slot, rollout in state.rollouts.items()} == {
        slot: rollout.answer for slot, rollout in whole.rollouts.items()
    }
    assert replay(events, templates) == state


def test_a_rollout_that_is_lost_again_and_again_has_failed(templates: Templates) -> None:
    def say(request: RolloutRequest) -> Script:
        return Script("t" * 50, "a", GenerationLost("gone", 502) if request.slot == Slot(0, 1) else None, 20)

    state, events = run_virtual(go(init("run", PROBLEM, SMALL, templates), ScriptedEngine(say, chunk_tokens=1)))
    assert isinstance(state.outcome, RunFinished)
    assert [event.charged_tokens for event in events if isinstance(event, RunResumed)] == [20] * 2
    (failed,) = (event for event in events if isinstance(event, RolloutFailed))
    assert (failed.slot, failed.status, failed.usage.completion_tokens) == (Slot(0, 1), 502, 20)
    assert state.charged_tokens == 40


def test_a_rollout_that_nobody_takes_is_asked_for_again_for_half_a_minute(templates: Templates) -> None:
    class Refusing(World):
        async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
            if asyncio.get_running_loop().time() < 30:
                raise GenerationLost("no server", 503)
            async with aclosing(super().generate(request)) as stream:
                async for delta in stream:
                    yield delta

    state, events = run_virtual(go(init("run", PROBLEM, SMALL, templates), Refusing(1)))
    assert isinstance(state.outcome, RunFinished)
    assert not any(isinstance(event, RolloutFailed) for event in events)
    assert state.charged_tokens == 0


def test_a_dead_engine_fails_no_run_and_the_run_goes_on_when_it_is_back(templates: Templates) -> None:
    async def dies() -> None:
        engine = World(11)
        events: list[Event] = []
        stream_state = init("run", PROBLEM, replace(SMALL, population=6, rounds=3), templates)
        events.append(stream_state.started)

        async def until_it_dies() -> None:
            async with open_run(stream_state, engine) as stream:
                async for event in stream:
                    events.append(event)  # type: ignore[arg-type]
                    if sum(isinstance(event, RolloutFinished) for event in events) == 5:
                        engine.kill()

        with pytest.raises(EngineDead):
            await until_it_dies()
        assert not any(isinstance(event, RolloutFailed | RunFailed) for event in events)
        finished = {event.rollout.slot for event in events if isinstance(event, RolloutFinished)}
        engine.revive()
        engine.asked.clear()
        state = replay([event for event in events if not isinstance(event, RolloutDelta)], templates)
        state, more = await go(state, engine, lost_tokens=0)
        assert isinstance(state.outcome, RunFinished)
        assert isinstance(more[0], RunResumed)
        assert not finished & set(engine.asked)
        whole = await go(init("run", PROBLEM, replace(SMALL, population=6, rounds=3), templates), World(11))
        assert [state.rollouts[slot].answer for slot in state.outcome.candidates] == [
            whole[0].rollouts[slot].answer for slot in state.outcome.candidates
        ]

    run_virtual(dies())


# Durability: state is the fold over the log.


@settings(property_of_runs, max_examples=40)
@given(params_of_runs, st.integers(0, 2**32), st.sampled_from([0, 30]), st.integers(0, 10_000))
def test_a_log_cut_after_any_event_goes_on_to_the_same_end(
    templates: Templates, params: Params, key: int, failing: int, cut: int
) -> None:
    async def twice() -> None:
        fresh = init("run", PROBLEM, params, templates)
        whole, events = await go(fresh, World(key, failing))
        log = [fresh.started, *events]
        kept = log[: 1 + cut % len(log)]
        engine = World(key, failing)
        resumed, _ = await go(replay(kept, templates), engine)
        assert resumed.outcome == whole.outcome
        assert {slot: rollout.answer for slot, rollout in resumed.rollouts.items()} == {
            slot: rollout.answer for slot, rollout in whole.rollouts.items()
        }
        ended = {event.rollout.slot for event in kept if isinstance(event, RolloutFinished)}
        ended |= {event.slot for event in kept if isinstance(event, RolloutFailed)}
        assert not ended & set(engine.asked), "no rollout that ended is asked for again"
        assert replay(log, templates) == whole

    run_virtual(twice())


def test_a_log_of_another_wording_is_refused(templates: Templates) -> None:
    started = init("run", PROBLEM, SMALL, templates).started
    with pytest.raises(ValueError, match="was started with the prompts old"):
        replay([replace(started, templates="old")], templates)
    with pytest.raises(ValueError, match="begins with RunStarted"):
        replay([], templates)


# Budget and deadline.


@property_of_runs
@given(params_of_runs, st.integers(0, 2**32), st.sampled_from([0, 20, 60]), st.integers(-5, 3000))
def test_a_run_never_generates_more_than_its_budget(
    templates: Templates, params: Params, key: int, failing: int, extra: int
) -> None:
    params = replace(params, final_tokens=300, tail_tokens=1 + params.tail_tokens)  # one token is `<think>` alone
    need = smallest_budget(params)
    params = replace(params, budget_tokens=max(1, need + extra))
    if params.budget_tokens < need:  # type: ignore[operator]
        with pytest.raises(BudgetTooSmall, match=str(need)):
            init("run", PROBLEM, params, templates)
        return

    class Counting(World):
        generated = 0

        async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
            async for delta in super().generate(request):
                self.generated += len(delta.token_ids)
                yield delta

    engine = Counting(key, failing)
    state = run(params, engine, templates)
    assert state.outcome is not None
    assert engine.generated == state.usage.completion_tokens <= params.budget_tokens  # type: ignore[operator]
    if not failing:
        assert isinstance(state.outcome, RunFinished)
        assert state.outcome.stopped is None


def test_a_budget_that_losses_have_eaten_sends_the_run_to_its_last_stage(templates: Templates) -> None:
    """Round 1 loses its set after spending; what is left pays no spare, so the last stage reads round 0."""
    params = Params(
        population=6, set_size=1, rounds=2, rollout_tokens=100, tail_tokens=100, final_tokens=200, seed=1,
    )  # fmt: skip
    params = replace(params, budget_tokens=smallest_budget(params) + 50)

    def say(request: RolloutRequest) -> Script:
        lost = EngineError("lost at its end") if request.slot.round == 1 else None
        return Script("x" * 95, "42", lost, 90)

    state, events = run_virtual(go(init("run", PROBLEM, params, templates), ScriptedEngine(say)))
    assert [event.round for event in events if isinstance(event, WentFinal)] == [0]
    assert isinstance(state.outcome, RunFinished)
    assert state.outcome.stopped is Stopped.BUDGET
    assert state.usage.completion_tokens <= (params.budget_tokens or 0)


def test_tokens_that_a_rollout_did_not_use_go_to_the_later_ones(templates: Templates) -> None:
    params = replace(SMALL, rounds=3, population=4, rollout_tokens=100_000, final_tokens=1000, seed=9)
    params = replace(params, budget_tokens=smallest_budget(params) + 4000)
    _, events = run_virtual(go(init("run", PROBLEM, params, templates), World(1)))
    grants = [(event.slot.round, event.grant) for event in events if isinstance(event, RolloutStarted)]
    assert max(tokens for round, tokens in grants if round == 2) > max(tokens for round, tokens in grants if round == 0)


def test_a_deadline_ends_in_the_best_answer_so_far(templates: Templates) -> None:
    def say(request: RolloutRequest) -> Script:
        return Script("t" * (50 if request.slot.round == 0 else 50_000), f"answer of {request.slot}")

    async def late() -> None:
        params = Params(
            population=4, set_size=2, rounds=2, rollout_tokens=60_000, tail_tokens=50, deadline_s=30, seed=2
        )
        engine = ScriptedEngine(say, speed=Speed(0.01))
        state, events = await go(init("run", PROBLEM, params, templates), engine)
        assert asyncio.get_running_loop().time() == pytest.approx(30, abs=0.1)
        assert engine.open_requests == 0
        outcome = state.outcome
        assert isinstance(outcome, RunFinished)
        assert outcome.stopped is Stopped.DEADLINE
        assert outcome.candidates[0].round == 0
        assert not outcome.partial
        cut = [event.rollout.slot.round for event in events if isinstance(event, RolloutAborted)]
        assert cut
        assert set(cut) == {1}

    run_virtual(late())


def test_a_deadline_waits_for_no_judge(templates: Templates) -> None:
    class Slow:
        def group(self, answers: list[str | None]) -> Future[tuple[int, ...]]:
            raise AssertionError("asked after the deadline")

    async def late() -> None:
        params = Params(population=4, rounds=0, final_candidates=4, deadline_s=2, final_tokens=40_000)
        engine = ScriptedEngine(
            lambda request: Script("", f"x^{request.slot.index} " * 999), speed=Speed(0.01), chunk_tokens=9
        )
        state, _ = await go(init("run", PROBLEM, params, templates), engine, judge=Slow())
        assert isinstance(state.outcome, RunFinished)

    run_virtual(late())


def test_what_an_engine_may_have_made_unseen_is_not_spent_again(templates: Templates) -> None:
    """A rollout that loops is cut: the rest of its grant stays reserved, for its engine may have gone on."""
    params = replace(SMALL, rollout_tokens=30_000, final_tokens=1000, tail_tokens=100, budget_tokens=61_000)
    loops = ScriptedEngine(lambda _: Script("over and over, " * 8000, "42"), chunk_tokens=64)
    state, events = run_virtual(go(init("run", PROBLEM, params, templates), loops))
    grants = [event.grant for event in events if isinstance(event, RolloutStarted) and event.slot.round == 0]
    assert any(rollout.cut for rollout in state.rollouts.values())
    cut = [state.rollouts[slot] for slot in state.rollouts if slot.round == 0]
    assert state.withheld_tokens == sum(grants) - sum(rollout.usage.completion_tokens for rollout in cut)


@pytest.mark.parametrize(("deadline_s", "ends_s"), [(None, 10), (7.0, 7), (30.0, 10)])
def test_a_judge_that_is_too_slow_is_not_waited_for(
    templates: Templates, deadline_s: float | None, ends_s: float
) -> None:
    class Never:
        def group(self, answers: list[str | None]) -> Future[tuple[int, ...]]:
            return Future()

    async def judged() -> None:
        params = Params(population=3, rounds=0, final_candidates=3, final_tokens=400, deadline_s=deadline_s)
        engine = ScriptedEngine(lambda request: Script("", f"x^{request.slot.index % 2}"))
        state, _ = await go(init("run", PROBLEM, params, templates), engine, judge=Never())
        assert asyncio.get_running_loop().time() == pytest.approx(ends_s)
        assert isinstance(state.outcome, RunFinished)
        assert state.outcome.votes == (2, 1, 2)

    run_virtual(judged())


def test_a_last_stage_that_was_cut_asks_only_for_what_its_engine_cannot_have_spent(templates: Templates) -> None:
    asked: list[int] = []

    class Asked(ScriptedEngine):
        async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
            asked.append(request.max_tokens)
            async with aclosing(super().generate(request)) as deltas:
                async for delta in deltas:
                    yield delta

    loops = Asked(lambda _: Script("over and over, " * 8000, "42"), chunk_tokens=64)
    state = run(Params(population=1, rounds=0, final_tokens=100_000), loops, templates)
    assert state.rollouts[Slot(0, 0)].answer == "42"
    assert sum(asked) == 100_000


def test_a_deadline_waits_a_second_for_text_that_is_being_decoded(templates: Templates) -> None:
    class Hanging(ScriptedEngine):
        async def decode(self, token_ids: TokenIds) -> str:
            await asyncio.sleep(1e6)
            return ""

    async def late() -> None:
        state, _ = await go(init("run", PROBLEM, replace(SMALL, deadline_s=5), templates), Hanging())
        assert asyncio.get_running_loop().time() == pytest.approx(6)
        assert isinstance(state.outcome, RunFailed)

    run_virtual(late())


def test_who_leaves_a_run_that_went_final_waits_for_nothing(templates: Templates) -> None:
    class Hanging(ScriptedEngine):
        async def decode(self, token_ids: TokenIds) -> str:
            if bytes(token_ids).startswith(b"42"):
                await asyncio.sleep(1e6)
            return await super().decode(token_ids)

    def say(request: RolloutRequest) -> Script:
        return Script("x" * 95, "42", EngineError("lost") if request.slot.round == 1 else None, 90)

    async def leave() -> None:
        params = Params(population=6, set_size=1, rounds=2, rollout_tokens=100, tail_tokens=100, final_tokens=200)
        params = replace(params, budget_tokens=smallest_budget(params) + 50)
        async with open_run(init("run", PROBLEM, params, templates), Hanging(say, speed=Speed(0.01))) as events:
            async for event in events:
                if isinstance(event, RolloutStarted) and event.slot.round == 2:
                    break
            await asyncio.sleep(60)
        assert asyncio.get_running_loop().time() < 100

    run_virtual(leave())


def test_an_engine_that_does_not_keep_to_max_tokens_is_cut(templates: Templates) -> None:
    class Greedy(ScriptedEngine):
        async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
            async with aclosing(super().generate(replace(request, max_tokens=10**6))) as deltas:
                async for delta in deltas:
                    yield delta

    engine = Greedy(lambda _: Script("", "word " * 10_000), chunk_tokens=10, thinking=False)
    state = run(Params(population=1, rounds=0, final_tokens=100), engine, templates)
    rollout = state.rollouts[Slot(0, 0)]
    assert rollout.finish is Finish.LENGTH
    assert rollout.cut
    assert rollout.usage.completion_tokens == 110


def test_candidates_that_the_budget_cannot_pay_any_more_do_not_sink_those_that_answered(templates: Templates) -> None:
    """A death of the engine charges what was in flight; what has answered by then is the answer."""
    params = Params(population=3, rounds=0, final_candidates=3, final_tokens=100, budget_tokens=300)

    async def dies() -> None:
        engine = ScriptedEngine(
            lambda request: Script("", "4" * (5 if request.slot.index == 0 else 90)), speed=Speed(1.0), thinking=False
        )
        events: list[Event] = []
        state = init("run", PROBLEM, params, templates)

        async def until_it_dies() -> None:
            async with open_run(state, engine) as stream:
                async for event in stream:
                    if not isinstance(event, RolloutDelta):
                        events.append(event)
                    if isinstance(event, RolloutFinished):
                        engine.kill()

        with pytest.raises(EngineDead):
            await until_it_dies()
        engine.revive()
        ended, _ = await go(replay([state.started, *events], templates), engine, lost_tokens=299)
        assert isinstance(ended.outcome, RunFinished)
        assert ended.outcome.stopped is Stopped.BUDGET
        assert ended.outcome.candidates == (Slot(0, 0),)

    run_virtual(dies())


def test_a_call_that_failed_unseen_may_have_cost_its_whole_grant(templates: Templates) -> None:
    """A timeout says nothing of what was generated; a refusal with its status generated nothing."""

    def withheld(status: int | None) -> int:
        lost = EngineError("no answer", status)
        engine = ScriptedEngine(lambda request: Script("a", "b", lost if request.slot == Slot(0, 0) else None))
        params = replace(SMALL, set_size=4, budget_tokens=1000)
        return run(params, engine, templates).withheld_tokens

    assert withheld(500) == 0
    assert withheld(None) == SMALL.rollout_tokens


def test_a_deadline_in_the_middle_of_the_only_answer_gives_it_as_partial(templates: Templates) -> None:
    def say(request: RolloutRequest) -> Script:
        return Script("t", "many words " * 1000)

    async def late() -> None:
        params = Params(population=1, rounds=0, deadline_s=5, final_tokens=40_000)
        engine = ScriptedEngine(say, speed=Speed(0.01), chunk_tokens=10)
        state, _ = await go(init("run", PROBLEM, params, templates), engine)
        assert isinstance(state.outcome, RunFinished)
        assert state.outcome.partial
        assert state.rollouts[Slot(0, 0)].answer.startswith("many words")
        assert state.rollouts[Slot(0, 0)].finish is Finish.ABORTED

    run_virtual(late())


def test_a_deadline_before_any_answer_fails_and_says_so(templates: Templates) -> None:
    async def late() -> None:
        params = replace(SMALL, deadline_s=0.5)
        state, _ = await go(init("run", PROBLEM, params, templates), ScriptedEngine(speed=Speed(10.0)))
        assert isinstance(state.outcome, RunFailed)
        assert "deadline_s=0.5" in state.outcome.reason

    run_virtual(late())


def test_a_deadline_that_comes_before_the_first_step_of_a_rollout_still_ends_the_run(templates: Templates) -> None:
    state = apply(
        apply(init("run", PROBLEM, replace(SMALL, deadline_s=1), templates), DeadlineReached()), DeadlineReached()
    )
    assert run_virtual(go(state, ScriptedEngine()))[0].outcome is not None
    state = run_virtual(go(init("run", PROBLEM, replace(SMALL, deadline_s=1e-9), templates), World(1)))[0]
    assert isinstance(state.outcome, RunFailed)


# Thinking, and the answer that always comes.


def test_the_last_stage_closes_its_thinking_when_its_share_is_spent(templates: Templates) -> None:
    engine = ScriptedEngine(lambda _: Script("never ends " * 10_000, "42"))
    params = Params(population=1, rounds=0, final_tokens=1000)
    state = run(params, engine, templates)
    rollout = state.rollouts[Slot(0, 0)]
    assert rollout.answer == "42"
    assert rollout.finish is Finish.STOP
    assert rollout.usage.completion_tokens == 750 + 3  # three quarters of thinking, "42" and the end
    assert engine.total_requests == 2


def test_an_answer_that_outgrows_the_thinking_s_share_goes_on_to_the_whole(templates: Templates) -> None:
    engine = ScriptedEngine(lambda _: Script("short", "a" * 5000))
    state = run(Params(population=1, rounds=0, final_tokens=1000), engine, templates)
    rollout = state.rollouts[Slot(0, 0)]
    assert rollout.usage.completion_tokens == 1000
    assert len(rollout.answer) == 1000 - len("short") - 2
    assert rollout.finish is Finish.LENGTH
    assert isinstance(state.outcome, RunFinished)
    assert state.outcome.partial


@pytest.mark.parametrize("thinking", [True, False])
def test_max_tokens_of_the_answer_bound_the_answer_alone(templates: Templates, thinking: bool) -> None:
    engine = ScriptedEngine(lambda _: Script("why " * 50 if thinking else "", "a" * 500), thinking=thinking)
    problem = Problem(PROBLEM.messages, AnswerRules(max_tokens=10))
    rollout = run(Params(population=1, rounds=0, final_tokens=1000), engine, templates, problem).rollouts[Slot(0, 0)]
    assert len(rollout.answer) == (10 if thinking else 9)  # without thinking, the script begins with a newline


def test_rules_of_the_answer_do_not_touch_the_thinking(templates: Templates) -> None:
    problem = Problem(PROBLEM.messages, AnswerRules(stop=("END",), json_schema='{"type":"object","required":["a"]}'))
    engine = ScriptedEngine(lambda _: Script("the END is not yet", "free text"))
    rollout = run(SMALL, engine, templates, problem).rollouts[Slot(1, 0)]
    assert rollout.answer == '{"a": {}}'
    assert rollout.usage.reasoning_tokens > len("the END is not yet")


def test_a_free_answer_that_is_begun_anew_is_shown_to_nobody(templates: Templates) -> None:
    class Direct(ScriptedEngine):
        """A model that may think, and answers at once."""

        async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
            text = '{"a": 1}' if request.answer.json_schema else "Well, it is 42."
            yield Delta(tuple(text.encode()), text, prompt_tokens=1)
            yield Delta(finish=Finish.STOP)

    async def watch() -> None:
        problem = Problem(PROBLEM.messages, AnswerRules(json_schema="{}"))
        params = Params(population=1, rounds=0, final_tokens=100)
        async with open_run(init("run", problem, params, templates), Direct()) as events:
            shown = "".join([event.text async for event in events if isinstance(event, RolloutDelta)])
            rollout = events.state.rollouts[Slot(0, 0)]
        assert shown == rollout.answer == '{"a": 1}'
        assert rollout.usage.completion_tokens == len("Well, it is 42.") + len('{"a": 1}')

    run_virtual(watch())


def test_a_rollout_before_the_last_stage_stops_where_nothing_reads_on(templates: Templates) -> None:
    engine = ScriptedEngine(lambda _: Script("because", "a long answer " * 20))
    state = run(SMALL, engine, templates)
    early = [rollout for slot, rollout in state.rollouts.items() if slot.round == 0]
    assert {rollout.finish for rollout in early} == {Finish.THOUGHT}
    assert {rollout.answer for rollout in early} == {""}
    carried = run(replace(SMALL, carry=Carry.HYBRID), engine, templates)
    assert carried.rollouts[Slot(0, early[0].slot.index)].answer.startswith("a long answer")


def test_an_engine_that_knows_no_stop_ids_is_cut_and_every_token_counted(templates: Templates) -> None:
    class Deaf(ScriptedEngine):
        async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
            async with aclosing(super().generate(replace(request, stop_ids=()))) as deltas:
                async for delta in deltas:
                    yield delta

    state = run(SMALL, Deaf(lambda _: Script("because", "a long answer " * 20), chunk_tokens=8), templates)
    for slot, rollout in state.rollouts.items():
        if slot.round == 0:
            assert rollout.cut
            assert rollout.finish is Finish.THOUGHT
            assert rollout.tail.text == "because"
            assert rollout.usage.completion_tokens == len("because") + 2 + 8


def test_carrying_answers_makes_every_stage_answer(templates: Templates) -> None:
    engine = ScriptedEngine(lambda _: Script("never ends " * 1000, "42"))
    state = run(replace(SMALL, carry=Carry.ANSWER), engine, templates)
    assert all(rollout.answer == "42" for rollout in state.rollouts.values())
    assert all(rollout.tail.text.startswith("42") for slot, rollout in state.rollouts.items() if slot.round == 0)


def test_a_rollout_that_loops_is_cut_and_says_so(templates: Templates) -> None:
    loops = ScriptedEngine(lambda _: Script("over and over, " * 8000, "42"), chunk_tokens=64)
    params = replace(SMALL, rollout_tokens=100_000, final_tokens=100_000)
    state = run(params, loops, templates)
    early = state.rollouts[state.inputs(Slot(1, 0))[0]]
    assert early.finish is Finish.LOOP
    assert early.loop
    assert early.usage.completion_tokens < 5 * 2048
    final = state.rollouts[Slot(1, 0)]
    assert final.loop
    assert final.answer == "42"
    assert final.finish is Finish.STOP


# What a user may ask for.


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"population": 0}, "population"),
        ({"rounds": -1}, "rounds"),
        ({"final_candidates": 17}, "final_candidates"),
        ({"tail_tokens": 0}, "tail_tokens"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"budget_tokens": 0}, "budget_tokens"),
    ],
)
def test_a_bad_parameter_is_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        Params(**changes)
    assert caught.value.field == field


def test_a_vote_over_the_last_round_counts_equal_answers(templates: Templates) -> None:
    texts = ["\\boxed{7}", "\\boxed{1/2}", "I do not know, sorry about that, " * 9, "\\boxed{0.5}"]
    engine = ScriptedEngine(lambda request: Script("hm", texts[request.slot.index]))
    state = run(Params(population=4, rounds=0, final_candidates=4), engine, templates)
    assert isinstance(state.outcome, RunFinished)
    assert state.outcome.candidates == (Slot(0, 1), Slot(0, 0), Slot(0, 2), Slot(0, 3))
    assert state.outcome.votes == (2, 1, 0, 2)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(templates: Templates) -> None:
    def answer(seed: int) -> str:
        params = replace(SMALL, seed=seed, sampling=Sampling(seeded=True))
        state = run(params, ScriptedEngine(), templates)
        return state.rollouts[Slot(0, state.inputs(Slot(1, 0))[0].index)].tail.text

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(5)}) == 5


def test_deltas_of_watched_rollouts_join_to_their_texts(templates: Templates) -> None:
    async def watch() -> None:
        engine = ScriptedEngine(chunk_tokens=5)
        shown: dict[tuple[Slot, bool], str] = {}
        async with open_run(init("run", PROBLEM, SMALL, templates), engine, watch=Watch.ALL) as events:
            async for event in events:
                if isinstance(event, RolloutDelta):
                    key = (event.slot, event.answer)
                    shown[key] = shown.get(key, "") + event.text
            final = Slot(1, 0)
            assert shown[final, True].strip() == events.state.rollouts[final].answer
            for slot in events.state.inputs(final):
                assert shown[slot, False].endswith(events.state.rollouts[slot].tail.text)

    run_virtual(watch())


def test_leaving_the_block_aborts_every_request(templates: Templates) -> None:
    async def leave() -> None:
        engine = ScriptedEngine(speed=Speed(1.0))
        async with open_run(init("run", PROBLEM, SMALL, templates), engine) as events:
            async for _ in events:
                if engine.open_requests:
                    break
                await asyncio.sleep(0.01)
        assert engine.total_requests
        assert engine.open_requests == 0

    run_virtual(leave())


@given(st.integers(1, 5), st.integers(1, 5))
def test_a_whole_trace_fits_in_its_tail_where_tau_is_beta_or_more(templates: Templates, n: int, c: int) -> None:
    assume(c <= n)
    engine = ScriptedEngine(lambda request: Script(f"whole thought of {request.slot}", "42"))
    params = Params(population=n, set_size=c, rounds=1, rollout_tokens=200, tail_tokens=200, final_tokens=400)
    state = run(params, engine, templates)
    for slot in state.inputs(Slot(1, 0)):
        assert state.rollouts[slot].tail.text == f"whole thought of {slot}"


@property_of_runs
@given(params_of_runs, st.integers(0, 2**32), st.sampled_from([0, 30]), st.booleans())
def test_an_engine_is_asked_for_nothing_whose_start_was_not_taken(
    templates: Templates, params: Params, key: int, failing: int, together: bool
) -> None:
    """Whoever writes events down, slowly or many at once, knows of every rollout that an engine works on."""

    async def follow() -> None:
        engine, known = World(key, failing), set[Slot]()
        async with open_run(init("run", PROBLEM, params, templates), engine) as events:
            async for event in events:
                batch = [event, *(later for later, _ in events.rest())] if together else [event]
                await asyncio.sleep(0.5)  # of the store
                assert known.issuperset(engine.asked)
                known |= {one.slot for one in batch if isinstance(one, RolloutStarted)}
            assert known == set(engine.asked)
            assert events.state.outcome is not None

    run_virtual(follow())
