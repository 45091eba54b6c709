"""Approximate savings: off unless asked for, decided once, recorded, and reported."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.budget import floor_tokens, smallest_budget
from harness.engine import Delta, EngineDead, Vocabulary
from harness.events import (
    AnswersAgreed,
    Event,
    QuorumReached,
    RolloutAborted,
    RolloutDelta,
    RolloutFinished,
    RolloutStarted,
    RunFailed,
    RunFinished,
    RunResumed,
    SetSkipped,
    Stopped,
    ToppedUp,
)
from harness.markovian_rsa import PRIORITIES, State, apply, decide, init, plan, replay
from harness.prompts import Templates
from harness.run import Watch, open_run
from harness.savings import savings
from harness.scripted import Script, ScriptedEngine, Speed, run_virtual
from harness.types import (
    Agreement,
    AnswerRules,
    Finish,
    InvalidParams,
    Params,
    RolloutRequest,
    Selection,
    Slot,
    TokenIds,
)
from tests.helpers.runs import PROBLEM, TextJudge, World, go, params_of_runs, property_of_runs, run

SMALL = Params(population=8, set_size=3, rounds=2, rollout_tokens=400, tail_tokens=60, final_tokens=400, seed=5)
APPROXIMATE = (AnswersAgreed, SetSkipped, QuorumReached, ToppedUp)


def saying(answer: str = "42", tokens: int = 100, **by_slot: tuple[int, str]) -> ScriptedEngine:
    """An engine whose rollouts think for `tokens` bytes and answer alike, but for `r0i3=(tokens, answer)`."""

    def say(request: RolloutRequest) -> Script:
        length, text = by_slot.get("r{}i{}".format(*request.slot), (tokens, answer))
        return Script("abcdefghij"[request.slot.index % 10] * length, f"\\boxed{{{text}}}" if text else "")

    return ScriptedEngine(say, speed=Speed(step_s=0.01), chunk_tokens=5)


def logged(params: Params, engine: ScriptedEngine, templates: Templates) -> tuple[State, list[Event]]:
    return run_virtual(go(init("run", PROBLEM, params, templates), engine))


def started(events: list[Event]) -> set[Slot]:
    return {event.slot for event in events if isinstance(event, RolloutStarted)}


options_of_runs = st.fixed_dictionaries(
    {
        "stop_when_agreed": st.none() | st.builds(Agreement, st.floats(0.1, 1.0), st.integers(2, 3)),
        "skip_agreed_sets": st.booleans(),
        "quorum": st.none() | st.integers(1, 7),
        "start_small": st.none() | st.integers(2, 7),
        "deadline_s": st.none() | st.floats(1, 4000),
        "selection": st.sampled_from([Selection.FIRST, Selection.VOTE]),
    }
)


def with_options(params: Params, options: dict[str, object]) -> Params:
    """The options as far as they fit the run."""
    agreement, population = options["stop_when_agreed"], params.population
    fitting = dict(options)
    if isinstance(agreement, Agreement) and agreement.min_votes > population:
        fitting["stop_when_agreed"] = None
    fitting["skip_agreed_sets"] = bool(options["skip_agreed_sets"]) and params.set_size > 1 and params.rounds > 0
    for name in ("quorum", "start_small"):
        value = options[name]
        fitting[name] = value if isinstance(value, int) and value <= population else None
    return replace(params, **fitting)  # type: ignore[arg-type]


class Agreeing(World):
    """A world in which few answers differ, and thinking is short enough to come to them."""

    def say(self, request: RolloutRequest) -> Script:
        script = super().say(request)
        return replace(script, answer=f"\\boxed{{{len(script.thinking) % 3}}}")


@property_of_runs
@given(params_of_runs, options_of_runs, st.integers(0, 2**32), st.sampled_from([0, 0, 30, 70]), st.integers(0, 10_000))
def test_every_run_ends_and_its_log_makes_the_same_decisions_again(
    templates: Templates, params: Params, options: dict[str, object], key: int, failing: int, cut: int
) -> None:
    params = with_options(params, options)

    async def twice() -> None:
        fresh = init("run", PROBLEM, params, templates)
        engine = Agreeing(key, failing)
        state, events = await go(fresh, engine, judge=TextJudge())
        assert state.outcome is not None
        assert engine.open_requests == 0
        assert replay([fresh.started, *events], templates) == state
        used = [rollout.usage.completion_tokens for rollout in state.rollouts.values()]
        assert state.usage.completion_tokens >= sum(used)
        log = [fresh.started, *events]
        kept = log[: 1 + cut % len(log)]
        resumed, more = await go(replay(kept, templates), Agreeing(key, failing), judge=TextJudge())
        assert resumed.outcome is not None
        assert replay([*kept, *more], templates) == resumed

    run_virtual(twice())


@property_of_runs
@given(params_of_runs, options_of_runs, st.integers(0, 2**32), st.sampled_from([0, 40]))
def test_no_option_breaks_the_budget(
    templates: Templates, params: Params, options: dict[str, object], key: int, failing: int
) -> None:
    params = with_options(replace(params, final_tokens=300, tail_tokens=1 + params.tail_tokens), options)
    params = replace(params, budget_tokens=smallest_budget(params) + key % 500)
    state, _ = run_virtual(go(init("run", PROBLEM, params, templates), Agreeing(key, failing), judge=TextJudge()))
    assert state.usage.completion_tokens <= params.budget_tokens  # type: ignore[operator]


@property_of_runs
@given(params_of_runs, st.integers(0, 2**32), st.sampled_from([0, 40]))
def test_where_no_answers_agree_nothing_is_approximated(
    templates: Templates, params: Params, key: int, failing: int
) -> None:
    wish = {"stop_when_agreed": Agreement(0.5, 2), "skip_agreed_sets": True, "start_small": 3, "quorum": None}
    wish["deadline_s"] = 1e9
    # All come to an answer, each to another; and all are read to their ends, where some break.
    params = replace(params, rollout_tokens=400, final_tokens=400, deadline_s=1e9)
    plain = run(params, World(key, failing), templates)
    state, events = logged(with_options(params, wish), World(key, failing), templates)
    assert not any(isinstance(event, AnswersAgreed | SetSkipped) for event in events)
    if isinstance(plain.outcome, RunFailed):  # of several failures, it names the one that came first
        assert isinstance(state.outcome, RunFailed)
    else:
        assert state.outcome == plain.outcome
    assert {slot: rollout.tail for slot, rollout in state.rollouts.items()} == {
        slot: rollout.tail for slot, rollout in plain.rollouts.items()
    }


def test_without_any_option_no_such_decision_is_made(templates: Templates) -> None:
    _, events = logged(SMALL, saying(), templates)
    assert not any(isinstance(event, APPROXIMATE) for event in events)


# stop_when_agreed


def test_a_run_stops_when_enough_of_a_round_agrees(templates: Templates) -> None:
    params = replace(SMALL, stop_when_agreed=Agreement(0.6, 4))
    engine = saying(r0i0=(10, "7"), r0i7=(350, "42"))
    state, events = logged(params, engine, templates)
    (agreed,) = (event for event in events if isinstance(event, AnswersAgreed))
    assert isinstance(state.outcome, RunFinished)
    assert state.outcome.stopped is Stopped.AGREED
    assert state.outcome.candidates == agreed.slots
    assert len(agreed.slots) >= 4
    assert len(agreed.slots) / agreed.ended >= 0.6
    assert {state.rollouts[slot].answer for slot in agreed.slots} == {"\\boxed{42}"}
    assert max(slot.round for slot in started(events)) == 0
    assert engine.open_requests == 0
    saved = savings(state)["stop_when_agreed"]
    in_need = {slot for slot in state.needed if slot.round > 0}
    assert saved.rollouts == len(in_need)
    assert saved.tokens_estimate > 0


def test_a_share_that_is_not_reached_stops_nothing(templates: Templates) -> None:
    answers = {f"r{round}i{index}": (50, str(index // 2)) for round in range(3) for index in range(8)}
    state, events = logged(
        replace(SMALL, stop_when_agreed=Agreement(0.6, 2), final_candidates=8), saying(**answers), templates
    )
    assert isinstance(state.outcome, RunFinished)
    ended: list[str] = []
    for event in events:  # the rule, read off the log
        if isinstance(event, AnswersAgreed):
            round = event.slots[0].round
            ended = [state.rollouts[slot].answer for slot in state.rollouts if slot.round == round]
            assert len(event.slots) / event.ended >= 0.6
    if state.outcome.stopped is None:
        assert not ended


def test_tokens_of_what_was_cut_by_an_agreement_are_counted(templates: Templates) -> None:
    params = replace(SMALL, stop_when_agreed=Agreement(0.5, 3))
    state, _ = logged(params, saying(r0i6=(390, "42"), r0i7=(390, "42")), templates)
    cut = [rollout for rollout in state.rollouts.values() if rollout.finish is Finish.ABORTED]
    assert cut
    assert all(rollout.usage.completion_tokens > 0 for rollout in cut)
    whole = sum(rollout.usage.completion_tokens for rollout in state.rollouts.values())
    assert state.usage.completion_tokens == whole


def test_an_answer_that_has_a_form_cannot_come_from_an_earlier_round(templates: Templates) -> None:
    problem = replace(PROBLEM, answer=AnswerRules(json_schema='{"type":"object"}'))
    for name, value in (("stop_when_agreed", Agreement(0.5, 2)), ("start_small", 2)):
        params = replace(SMALL, **{name: value})  # type: ignore[arg-type]
        with pytest.raises(InvalidParams, match=f"{name}: cannot be combined"):
            init("run", problem, params, templates)
        init("run", problem, replace(params, rounds=0, final_candidates=8), templates)


# skip_agreed_sets


def test_a_set_that_agrees_is_not_generated_again(templates: Templates) -> None:
    state, events = logged(replace(SMALL, skip_agreed_sets=True), saying(), templates)
    assert {slot.round for slot in started(events)} == {0}
    skipped = [event for event in events if isinstance(event, SetSkipped)]
    assert {event.slot for event in skipped} == {slot for slot in state.needed if slot.round > 0}
    for event in skipped:
        assert event.source in state.inputs(event.slot)
        assert state.rollouts[event.slot].tail == state.rollouts[event.source].tail
        assert state.rollouts[event.slot].usage.completion_tokens == 0
    assert isinstance(state.outcome, RunFinished)
    assert state.outcome.stopped is None
    assert state.rollouts[state.outcome.candidates[0]].answer == "\\boxed{42}"
    assert savings(state)["skip_agreed_sets"].rollouts == len(skipped)
    assert sum(state.skipped) == 8 + 8 + 1 - len(state.needed), "what nobody reads is told apart"


def test_a_set_with_one_other_answer_or_none_is_generated(templates: Templates) -> None:
    params = replace(SMALL, population=4, set_size=4, rounds=1, skip_agreed_sets=True)
    for odd in ("43", ""):
        _, events = logged(params, saying(r0i2=(50, odd)), templates)
        assert Slot(1, 0) in started(events)


def test_a_last_stage_whose_answer_has_a_form_is_never_skipped(templates: Templates) -> None:
    problem = replace(PROBLEM, answer=AnswerRules(stop=("END",)))
    state = init("run", problem, replace(SMALL, skip_agreed_sets=True), templates)
    _, events = run_virtual(go(state, saying()))
    assert [slot for slot in started(events) if slot.round == 2] == [Slot(2, 0)]
    assert any(isinstance(event, SetSkipped) and event.slot.round == 1 for event in events)


# quorum


def test_stragglers_are_cut_where_they_stand_but_have_a_whole_tail(templates: Templates) -> None:
    params = replace(SMALL, rounds=1, final_candidates=8, quorum=5)
    slow = {f"r0i{index}": (390, "42") for index in (0, 1)}
    state, events = logged(params, saying(**slow), templates)
    (reached,) = (event for event in events if isinstance(event, QuorumReached) and event.round == 0)
    first = [event for event in events if isinstance(event, RolloutFinished)][:5]
    assert events.index(reached) > events.index(first[-1])
    for slot in reached.stragglers:
        rollout = state.rollouts[slot]
        if slot.index in (0, 1):
            assert rollout.finish is Finish.ABORTED
            assert floor_tokens(params) <= rollout.usage.completion_tokens < 200
            assert len(rollout.tail.token_ids) == params.tail_tokens
        assert state.stats[0].failed == 0
    assert isinstance(state.outcome, RunFinished)
    assert savings(state)["quorum"].cut >= 2


def test_a_straggler_that_stands_below_a_tail_goes_on_to_one(templates: Templates) -> None:
    params = replace(SMALL, rounds=1, final_candidates=8, quorum=5, tail_tokens=150)
    slow = {f"r0i{index}": (390, "42") for index in (0, 1)}
    state, _ = logged(params, saying(tokens=20, **slow), templates)
    for index in (0, 1):
        rollout = state.rollouts[Slot(0, index)]
        assert rollout.finish is Finish.ABORTED
        assert 150 <= rollout.usage.completion_tokens < 160
        assert rollout.cut


def test_in_the_last_round_stragglers_have_no_say(templates: Templates) -> None:
    params = replace(SMALL, rounds=0, final_candidates=8, quorum=5)
    slow = {f"r0i{index}": (390, "7") for index in (0, 1, 2)}
    engine = saying(**slow)
    state, _ = logged(params, engine, templates)
    assert isinstance(state.outcome, RunFinished)
    assert {slot.index for slot in state.outcome.candidates} == {3, 4, 5, 6, 7}
    assert state.outcome.votes == (5,) * 5
    assert state.stats[0].aborted == 3
    assert state.usage.completion_tokens == sum(rollout.usage.completion_tokens for rollout in state.rollouts.values())
    assert engine.open_requests == 0


def test_a_quorum_is_a_share_of_what_is_needed(templates: Templates) -> None:
    """3 inputs are needed of 8: a quorum of 4 of 8 is 2 of these 3."""
    params = replace(SMALL, rounds=1, quorum=4)
    state, events = logged(params, saying(), templates)
    (reached,) = (event for event in events if isinstance(event, QuorumReached))
    assert len([slot for slot in state.needed if slot.round == 0]) == 3
    assert len(reached.stragglers) == 1


# start_small


def test_an_easy_question_costs_only_the_first_rollouts(templates: Templates) -> None:
    state, events = logged(replace(SMALL, start_small=3), saying(), templates)
    assert len(started(events)) == 3
    assert isinstance(state.outcome, RunFinished)
    assert state.outcome.stopped is Stopped.AGREED
    assert state.outcome.votes == (3, 3, 3)
    assert savings(state)["start_small"].rollouts == len(state.needed) - 3


def test_a_hard_question_gets_the_whole_population(templates: Templates) -> None:
    answers = {f"r0i{index}": (20 + index, str(index)) for index in range(8)}
    state, events = logged(replace(SMALL, start_small=3), saying(**answers), templates)
    (topped,) = (event for event in events if isinstance(event, ToppedUp))
    before = started(events[: events.index(topped)])
    assert len(before) == 3
    assert all(slot.round == 0 for slot in before)
    most = max(state.descendants[slot] for slot in topped.slots)
    assert min(state.descendants[slot] for slot in before) >= most, "what the most wait for went first"
    assert started(events) == set(state.needed)
    assert savings(state)["start_small"].rollouts == 0


# The critical path.


def test_what_the_most_wait_for_goes_first(templates: Templates) -> None:
    state = init("run", PROBLEM, replace(SMALL, population=16, rounds=3), templates, priority=7)
    while (event := decide(state)) is not None:
        state = replay([state.started, event], templates)
    requests = plan(state)
    assert len(requests) > 3
    waiting = [state.descendants[request.slot] for request in requests]
    assert waiting == sorted(waiting, reverse=True)
    assert [request.priority for request in requests] == [7 * PRIORITIES - count for count in waiting]
    below: dict[Slot, set[Slot]] = {}
    for slot in sorted(state.needed, reverse=True):  # counted anew, by sets
        below[slot] = set()
        for reader in (other for other in state.needed if slot in state.inputs(other)):
            below[slot] |= {reader, *below[reader]}
    assert state.descendants == {slot: len(found) for slot, found in below.items()}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"quorum": 9}, "quorum"),
        ({"quorum": 0}, "quorum"),
        ({"start_small": 1}, "start_small"),
        ({"start_small": 9}, "start_small"),
        ({"skip_agreed_sets": True, "set_size": 1}, "skip_agreed_sets"),
        ({"skip_agreed_sets": True, "rounds": 0}, "skip_agreed_sets"),
        ({"stop_when_agreed": Agreement(1.0, 9)}, "stop_when_agreed.min_votes"),
    ],
)
def test_an_option_out_of_its_range_is_named(changes: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidParams, match=f"^{field}: ") as error:
        replace(SMALL, **changes)  # type: ignore[arg-type]
    assert error.value.field == field


@pytest.mark.parametrize(("share", "min_votes", "field"), [(0.0, 2, "share"), (1.1, 2, "share"), (0.5, 1, "min_votes")])
def test_an_agreement_out_of_its_range_is_named(share: float, min_votes: int, field: str) -> None:
    with pytest.raises(InvalidParams, match=rf"^stop_when_agreed\.{field}: "):
        Agreement(share, min_votes)


def test_what_was_cut_says_nothing_after_its_end(templates: Templates) -> None:
    params = replace(SMALL, quorum=5, stop_when_agreed=Agreement(0.9, 7))
    engine = saying(**{f"r0i{index}": (390, "42") for index in range(3)})

    async def follow() -> tuple[int, State]:
        deltas, over = 0, set[Slot]()
        state = init("run", PROBLEM, params, templates)
        async with open_run(state, engine, watch=Watch.ALL) as events:
            async for event in events:
                match event:
                    case RolloutDelta(slot):
                        deltas += 1
                        assert slot not in over
                    case RolloutFinished(rollout) | RolloutAborted(rollout):
                        over.add(rollout.slot)
            return deltas, events.state

    deltas, state = run_virtual(follow())
    assert deltas > 0
    assert any(rollout.finish is Finish.ABORTED for rollout in state.rollouts.values())


def test_a_straggler_that_never_started_is_told_apart_from_what_nobody_reads(templates: Templates) -> None:
    """Of the last round's four, those whose inputs come late have not begun when the quorum is there."""
    params = replace(SMALL, set_size=2, rounds=1, final_candidates=8, quorum=1)
    slow = {f"r0i{index}": (390, "42") for index in range(4, 8)}
    params = replace(params, tail_tokens=390)
    state, events = logged(params, saying(tokens=20, **slow), templates)
    reached = next(event for event in events if isinstance(event, QuorumReached) and event.round == 1)
    never = [slot for slot in reached.stragglers if not state.ended(slot)]
    assert never, "the case is there"
    assert savings(state)["quorum"].rollouts == len(never)
    assert state.skipped[1] == 0


def test_a_run_is_taken_up_after_a_quorum_of_its_last_round(templates: Templates) -> None:
    """Who was late is in flight there and needed no more: it is not started again."""
    params = replace(SMALL, rounds=0, final_candidates=8, quorum=5, selection=Selection.VOTE)
    slow = {f"r0i{index}": (390, "7") for index in (0, 1, 2)}
    fresh = init("run", PROBLEM, params, templates)
    state, events = run_virtual(go(fresh, saying(**slow), judge=TextJudge()))
    at = next(index for index, event in enumerate(events) if isinstance(event, QuorumReached))
    resumed, more = run_virtual(
        go(replay([fresh.started, *events[: at + 1]], templates), saying(**slow), judge=TextJudge())
    )
    assert resumed.outcome == state.outcome
    assert started(more) == set()


def test_the_rest_of_a_round_that_began_small_is_late_only_to_itself(templates: Templates) -> None:
    answers = {f"r0i{index}": (300 if index == 7 else 100 + index, str(index)) for index in range(8)}
    params = replace(SMALL, rounds=1, final_candidates=8, start_small=4, quorum=6)
    state, events = logged(params, saying(**answers), templates)
    (topped,) = (event for event in events if isinstance(event, ToppedUp))
    reached = next(event for event in events if isinstance(event, QuorumReached) and event.round == 0)
    assert len(topped.slots) == 4
    assert reached.stragglers == (topped.slots[-1],), "three of the four are six of eight"
    for event in events:
        if isinstance(event, RolloutStarted) and event.slot.round == 0:
            assert event.grant == params.rollout_tokens
    assert state.rollouts[topped.slots[-1]].finish is Finish.ABORTED


def test_a_straggler_of_a_middle_round_that_never_started_is_reported(templates: Templates) -> None:
    params = Params(
        population=2,
        set_size=1,
        rounds=3,
        final_candidates=2,
        rollout_tokens=1000,
        tail_tokens=1000,
        final_tokens=300,
        quorum=1,
        selection=Selection.FIRST,
    )
    state, events = logged(params, saying(tokens=20, r0i0=(900, "1")), templates)
    barrier = sum(params.count(round) for round in range(params.rounds + 1))
    assert len(started(events)) + sum(saving.rollouts for saving in savings(state).values()) == barrier
    assert savings(state)["quorum"].rollouts > 1


def test_where_the_last_round_has_ended_there_is_nothing_to_stop(templates: Templates) -> None:
    params = replace(
        SMALL, rounds=0, final_candidates=8, stop_when_agreed=Agreement(0.75, 3), selection=Selection.FIRST
    )
    state, events = logged(params, saying(r0i0=(50, "7"), r0i1=(50, "7"), r0i2=(390, "42")), templates)
    assert isinstance(state.outcome, RunFinished)
    assert state.outcome.stopped is None, "six of eight agree, when the last of them ends"
    assert len(state.outcome.candidates) == 8
    assert not any(isinstance(event, AnswersAgreed) for event in events)


class Holding:
    """Makes a token in 10 ms and shows them 128 at a time where nobody watches, as an engine in process does."""

    vocabulary = Vocabulary()

    def __init__(self, dies_at: tuple[int, ...] = ()) -> None:
        self.made = 0
        self.dies_at = list(dies_at)
        self.lives = 0

    async def decode(self, token_ids: TokenIds) -> str:
        return "\\boxed{1}" if token_ids else ""

    async def count(self, messages: object) -> int | None:
        return 1

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        held, life = 0, self.lives
        length = request.max_tokens if self.dies_at or request.slot.index >= 3 else 40
        for number in range(length):
            await asyncio.sleep(0.01)
            if life != self.lives or (self.dies_at and self.made >= self.dies_at[0]):
                if life == self.lives:
                    self.lives += 1
                    self.dies_at.pop(0)
                raise EngineDead("gone")
            self.made, held = self.made + 1, held + 1
            if request.watched or held == 128:
                yield Delta((7,) * held, "".join(chr(97 + (number * 7 + step) % 26) for step in range(held)))
                held = 0
        yield Delta((7,) * held, "y" * held, finish=Finish.STOP)


@pytest.mark.parametrize(
    "changes", [{"stop_when_agreed": Agreement(0.75, 3)}, {"quorum": 3}, {"start_small": 3}, {"deadline_s": 1.2}]
)
def test_what_was_cut_has_cost_what_the_engine_made(templates: Templates, changes: dict[str, object]) -> None:
    params = Params(population=16, rounds=0, final_candidates=16, final_tokens=400, **changes)  # type: ignore[arg-type]
    engine = Holding()
    state, _ = run_virtual(
        go(init("run", PROBLEM, params, templates), engine, watch=Watch.NONE, judge=TextJudge())  # type: ignore[arg-type]
    )
    assert state.usage.completion_tokens <= engine.made <= state.usage.completion_tokens + 16
    assert any(rollout.finish is Finish.ABORTED for rollout in state.rollouts.values()) != ("start_small" in changes)


@pytest.mark.parametrize("dies_at", [(1000,), (300, 600), (127 * 8, 1500, 1600)])
def test_an_engine_that_dies_again_and_again_breaks_no_budget(templates: Templates, dies_at: tuple[int, ...]) -> None:
    params = Params(population=8, set_size=8, rounds=1, rollout_tokens=200, tail_tokens=200, final_tokens=200)
    params = replace(params, budget_tokens=smallest_budget(params) + 2300)
    engine = Holding(dies_at)

    async def keep_on() -> State:
        state, lost = init("run", PROBLEM, params, templates), None
        while True:
            async with open_run(
                state,
                engine,
                watch=Watch.NONE,
                judge=TextJudge(),
                lost_tokens=lost,  # type: ignore[arg-type]
            ) as events:
                try:
                    async for _ in events:
                        pass
                    return events.state
                except EngineDead:
                    state, lost = events.state, events.lost_tokens

    state = run_virtual(keep_on())
    assert not engine.dies_at or state.outcome is not None
    assert engine.made <= params.budget_tokens  # type: ignore[operator]


class DiesWithTheAnswer(ScriptedEngine):
    """Three rollouts end, and its process is gone in the same turn."""

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary = Vocabulary()
        self.over = asyncio.Event()

    async def decode(self, token_ids: TokenIds) -> str:
        return "\\boxed{1}"

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        if request.slot.index < 3:
            await asyncio.sleep(1 + request.slot.index)
            if request.slot.index == 2:
                self.over.set()
            yield Delta((1,), "x", finish=Finish.STOP)
        else:
            yield Delta((1, 1), "xy")
            await self.over.wait()
            raise EngineDead("gone")


def test_a_run_that_has_agreed_needs_no_engine_any_more(templates: Templates) -> None:
    params = Params(population=8, set_size=4, rounds=1, final_candidates=8, stop_when_agreed=Agreement(0.75, 3))

    async def agree() -> tuple[State, list[Event]]:
        return await go(init("run", PROBLEM, params, templates), DiesWithTheAnswer(), judge=TextJudge())

    state, events = run_virtual(agree())
    assert isinstance(state.outcome, RunFinished)
    assert state.outcome.stopped is Stopped.AGREED
    assert state.outcome.votes == (3, 3, 3)
    (given_up,) = (event for event in events if isinstance(event, RunResumed))
    assert len(given_up.slots) == 5
    assert given_up.charged_tokens == 10
    assert replay([state.started, *events], templates) == state


@property_of_runs
@given(params_of_runs, options_of_runs, st.integers(0, 2**32), st.sampled_from([0, 30]))
def test_the_state_of_a_run_is_that_of_the_event_handed_out_last(
    templates: Templates, params: Params, options: dict[str, object], key: int, failing: int
) -> None:
    async def follow() -> None:
        folded = init("run", PROBLEM, with_options(params, options), templates)
        async with open_run(folded, Agreeing(key, failing), watch=Watch.ALL, judge=TextJudge()) as events:
            async for event in events:
                if not isinstance(event, RolloutDelta):
                    folded = apply(folded, event)
                assert events.state == folded
        assert folded.outcome is not None

    run_virtual(follow())
