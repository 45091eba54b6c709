"""The Markovian RSA algorithm and its lazy evaluation, without I/O. Nothing here awaits, logs, or reads a clock.

`decide` and `plan` say what follows from a state, `apply` folds a fact into it. A run is the fold over its events, live
and on replay alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from harness.budget import check_budget, floor_tokens, grant
from harness.events import (
    AnswersAgreed,
    AnswersGrouped,
    CandidatesAmended,
    DeadlineReached,
    Event,
    QuorumReached,
    RolloutAborted,
    RolloutFailed,
    RolloutFinished,
    RolloutStarted,
    RunFailed,
    RunFinished,
    RunResumed,
    RunStarted,
    SetAmended,
    SetsDrawn,
    SetSkipped,
    Stopped,
    ToppedUp,
    WentFinal,
)
from harness.lineage import Sets, descendants, draw_sets, needed, seed_of, spare_set
from harness.prompts import Templates, aggregation_messages
from harness.selection import agreeing, decide_vote, extract_answer, group_by_text
from harness.types import (
    AggregationSet,
    Agreement,
    AnswerRules,
    Finish,
    InvalidParams,
    Params,
    Problem,
    Rollout,
    RolloutRequest,
    Selection,
    Slot,
    Usage,
)

_NONE = Usage()
# A run's priorities in its engine: it has so many of its own below the next older run's.
PRIORITIES = 4096
# What cuts everything in flight.
_AT_ONCE = (Stopped.DEADLINE, Stopped.AGREED)


@dataclass(frozen=True, slots=True)
class RoundStats:
    """What one round has cost so far. `failed` ones are lost, `aborted` ones were cut because nothing reads them."""

    started: int = 0
    finished: int = 0
    failed: int = 0
    aborted: int = 0
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True)
class State:
    """A run between two events.

    Attributes:
        started: What was asked for.
        templates: The wording of its prompts.
        sets: `sets[t - 1][i]`, amended ones in place; empty until drawn.
        source: Round that the last stage reads; `rounds - 1` unless tokens ran short.
        wanted: Indices of the last round that the answer is taken from.
        needed: All rollouts that something reads.
        readers: Who reads a rollout.
        descendants: How many of the needed wait for a rollout.
        ready: Needed, all inputs ended, not started.
        emptied: Needed, but every member of their set is lost.
        running: Started and not ended, with their grants in tokens.
        rollouts: Ended with something to show.
        lost: Ended with nothing that could be read: failed, or an empty tail.
        attempts: How often a set was amended.
        errors: Why the first failure of a round failed.
        charged_tokens: Generated at most by lost generations of a run that was taken up again, since those of a lost
            server count with their whole grants; not in `usage`.
        withheld_tokens: Kept out of the budget, since an engine that is cut off or lost may have made tokens that
            nobody saw.
        stats: By round, 0 to T.
        groups: Which of the last candidates agree, once judged.
        first: Rollouts of round 0 that go before all others; empty where all go at once.
        topped_up: The others of round 0, once they were let go.
        shortcuts: By set that was skipped, whose trace stands there.
        stragglers: By round in which a quorum was reached, who was late.
        agreed: Whose equal answers ended the run.
        stopping: Why the run is being ended early.
        outcome: How it ended.
    """

    started: RunStarted
    templates: Templates
    sets: Sets = ()
    source: int = 0
    wanted: tuple[int, ...] = ()
    needed: frozenset[Slot] = frozenset()
    readers: Mapping[Slot, tuple[Slot, ...]] = field(default_factory=dict)
    descendants: Mapping[Slot, int] = field(default_factory=dict)
    ready: tuple[Slot, ...] = ()
    emptied: tuple[Slot, ...] = ()
    running: Mapping[Slot, int] = field(default_factory=dict)
    rollouts: Mapping[Slot, Rollout] = field(default_factory=dict)
    lost: frozenset[Slot] = frozenset()
    attempts: Mapping[Slot, int] = field(default_factory=dict)
    errors: Mapping[int, str] = field(default_factory=dict)
    charged_tokens: int = 0
    withheld_tokens: int = 0
    stats: tuple[RoundStats, ...] = ()
    groups: AnswersGrouped | None = None
    first: tuple[Slot, ...] = ()
    topped_up: tuple[Slot, ...] = ()
    shortcuts: Mapping[Slot, Slot] = field(default_factory=dict)
    stragglers: Mapping[int, tuple[Slot, ...]] = field(default_factory=dict)
    agreed: AnswersAgreed | None = None
    stopping: Stopped | None = None
    outcome: RunFinished | RunFailed | None = None

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.started.run_id

    @property
    def problem(self) -> Problem:
        """The conversation."""
        return self.started.problem

    @property
    def params(self) -> Params:
        """The parameters."""
        return self.started.params

    @property
    def usage(self) -> Usage:
        """Tokens of the whole run so far."""
        return sum((stats.usage for stats in self.stats), Usage())

    @property
    def skipped(self) -> tuple[int, ...]:
        """By round: rollouts of the barrier loop that were never started, because nothing reads them."""
        late = (slot for slots in self.stragglers.values() for slot in slots)
        read = Counter(slot.round for slot in {*self.needed, *self.rollouts, *self.lost, *self.running, *late})
        return tuple(max(0, self.params.count(round) - read[round]) for round in range(self.params.rounds + 1))

    @property
    def finals(self) -> tuple[Slot, ...]:
        """The wanted slots of the last round."""
        return tuple(Slot(self.params.rounds, index) for index in self.wanted)

    def inputs(self, slot: Slot) -> tuple[Slot, ...]:
        """The rollouts whose tails a rollout reads."""
        if slot.round == 0:
            return ()
        before = self.before(slot)
        return tuple(Slot(before, member) for member in self.sets[slot.round - 1][slot.index])

    def before(self, slot: Slot) -> int:
        """The round that a rollout of an aggregation round reads."""
        return self.source if slot.round == self.params.rounds else slot.round - 1

    def ended(self, slot: Slot) -> bool:
        """Whether a rollout has ended, one way or the other."""
        return slot in self.rollouts or slot in self.lost

    def readable(self, slot: Slot) -> bool:
        """Whether a rollout has a tail to read."""
        return slot in self.rollouts and bool(self.rollouts[slot].tail)


def init(
    run_id: str, problem: Problem, params: Params, templates: Templates, priority: int = 0, notes: str = ""
) -> State:
    """A run before its first token.

    Args:
        run_id: Its name.
        problem: The conversation.
        params: The parameters.
        templates: The wording.
        priority: Passed to the engine; lower first.
        notes: Kept in its log, for whoever serves it.

    Raises:
        BudgetTooSmall: If `params.budget_tokens` cannot pay the run, with the figure that can.
        InvalidParams: If answers of any round may end a run whose answer has a form that the last stage alone is given.
    """
    check_budget(params)
    for name, value in (("stop_when_agreed", params.stop_when_agreed), ("start_small", params.start_small)):
        if value is not None and params.rounds and problem.answer != AnswerRules():
            raise InvalidParams(
                name, "cannot be combined with what binds the last answer alone (stop, tools, a format, a length)"
            )
    return _begin(RunStarted(run_id, problem, params, templates.digest, priority, notes), templates)


def _begin(started: RunStarted, templates: Templates) -> State:
    rounds = started.params.rounds
    return State(started, templates, source=max(0, rounds - 1), stats=(RoundStats(),) * (rounds + 1))


def decide(state: State) -> Event | None:
    """The next fact that needs no engine, or None where one has to be waited for."""
    params = state.params
    if state.outcome is not None:
        return None
    if not state.wanted:
        return SetsDrawn(
            tuple(
                draw_sets(seed_of(params.seed, "sets", round), params.population, params.set_size, params.population)
                for round in range(1, params.rounds + 1)
            )
        )
    if state.stopping in _AT_ONCE:
        return None if state.running else _finish(state)
    for slot in state.emptied:
        return _amend(state, slot)
    if (shortcut := _shortcut(state)) is not None:
        return shortcut
    if any(slot not in state.needed for slot in state.running):
        return None  # being cut: what they have cost is still to be counted
    stuck = _stuck(state)
    if stuck or all(state.ended(slot) for slot in state.finals):
        if any(slot in state.rollouts for slot in state.finals):
            return _finish(replace(state, stopping=Stopped.BUDGET) if stuck else state)
        return _go_final(state) if stuck else _stand_in(state)
    return None


def _shortcut(state: State) -> Event | None:
    """The next decision of what saves tokens at the price of exactness, where it was asked for."""
    params = state.params
    if params.stop_when_agreed is not None and not all(state.ended(slot) for slot in state.finals):
        for round in range(params.rounds, -1, -1):
            if agreed := _agreed(state, round, params.stop_when_agreed):
                return agreed
    if state.first and all(state.ended(slot) for slot in state.first):
        if params.stop_when_agreed is None and (agreed := _agreed(state, 0, Agreement(1.0, 2))):
            return agreed
        others = sorted(slot for slot in state.needed if slot.round == 0 and slot not in state.first)
        return ToppedUp(tuple(others))
    if params.skip_agreed_sets:
        for slot in state.ready:
            if (source := _skippable(state, slot)) is not None:
                return SetSkipped(slot, source)
    return None if params.quorum is None else _quorum(state, params.quorum)


def answer_of(state: State, slot: Slot) -> str | None:
    """What a rollout answers, if it wrote its answer to the end."""
    rollout = state.rollouts.get(slot)
    return extract_answer(rollout.answer) if rollout is not None and rollout.finish is Finish.STOP else None


def _agreed(state: State, round: int, agreement: Agreement) -> AnswersAgreed | None:
    ended = tuple(slot for slot in sorted(state.rollouts) if slot.round == round and slot not in state.shortcuts)
    if len(ended) < agreement.min_votes:
        return None
    found = agreeing([answer_of(state, slot) for slot in ended], agreement)
    return AnswersAgreed(tuple(ended[index] for index in found), len(ended)) if found else None


def _skippable(state: State, slot: Slot) -> Slot | None:
    """Whose trace can stand for a rollout: that of its first input, if all have the same answer."""
    last = slot.round == state.params.rounds
    if last and state.problem.answer != AnswerRules():
        return None  # the last answer may have a form, which nobody before it was told
    inputs = state.inputs(slot)
    if len(inputs) < 2:
        return None
    groups = group_by_text([answer_of(state, source) for source in inputs])
    return inputs[0] if set(groups) == {0} else None


def _quorum(state: State, quorum: int) -> QuorumReached | None:
    """The first round in which enough has ended, and not all."""
    params = state.params
    waiting: dict[int, list[Slot]] = {}
    for slot in sorted(state.needed):
        if not state.ended(slot) and slot.round not in state.stragglers:
            waiting.setdefault(slot.round, []).append(slot)
    if state.first:
        waiting.pop(0, None)  # they are to end, so that their answers can be compared
    for round, late in waiting.items():
        # Of a round that began in two parts, the second is measured by itself: it could only be late to the first.
        among = state.topped_up if round == 0 and state.topped_up else state.needed
        slots = [slot for slot in among if slot.round == round]
        good = sum(
            bool(state.rollouts[slot].answer) if round == params.rounds else state.readable(slot)
            for slot in slots
            if slot in state.rollouts
        )
        if good >= math.ceil(quorum * len(slots) / params.population):
            return QuorumReached(round, tuple(late))
    return None


def cuts(state: State) -> dict[Slot, int]:
    """The rollouts in flight that are to go no further than to so many tokens."""
    if state.stopping in _AT_ONCE:
        return dict.fromkeys(state.running, 0)
    found = {slot: 0 for slot in state.running if slot not in state.needed}
    late = {slot for slots in state.stragglers.values() for slot in slots}
    floor = floor_tokens(state.params)
    return found | {slot: floor for slot in state.running if slot in late and slot in state.needed}


def _stuck(state: State) -> bool:
    """Whether rollouts are ready, and the budget can start none of them and waits for none."""
    if not state.ready or state.running:
        return False
    return not any(_grant(state, slot) >= _least(state, slot) for slot in state.ready)


def pending_vote(state: State) -> tuple[Slot, ...]:
    """The candidates whose answers have to be compared before the run can end; empty where nothing has to be."""
    if state.outcome is not None or state.groups is not None or state.params.selection is Selection.FIRST:
        return ()
    if not state.wanted or state.agreed or (state.running and state.stopping is Stopped.DEADLINE):
        return ()
    over = state.stopping is Stopped.DEADLINE or _stuck(state)
    if not over and not all(state.ended(slot) for slot in state.finals):
        return ()
    pool = _pool(state)
    return pool if len(pool) > 1 else ()


def _pool(state: State) -> tuple[Slot, ...]:
    """The slots whose answers are on offer: the last round's, or after a deadline the best that stands."""
    finals = tuple(slot for slot in state.finals if slot in state.rollouts)
    if state.stopping is not Stopped.DEADLINE:
        return tuple(slot for slot in finals if state.rollouts[slot].answer) or finals
    whole = [
        slot for slot, rollout in sorted(state.rollouts.items()) if rollout.answer and rollout.finish is Finish.STOP
    ]
    cut = [slot for slot, rollout in sorted(state.rollouts.items()) if rollout.answer]
    for pool in (whole, cut):
        if pool:
            latest = max(slot.round for slot in pool)
            return tuple(slot for slot in pool if slot.round == latest)
    return ()


def _finish(state: State) -> Event | None:
    if state.agreed is not None:
        slots = state.agreed.slots
        return RunFinished(slots, (len(slots),) * len(slots), stopped=Stopped.AGREED)
    pool = _pool(state)
    if not pool:
        return RunFailed(f"deadline_s={state.params.deadline_s} passed before there was any answer")
    if pending_vote(state):
        return None
    if state.groups is not None and state.groups.candidates == pool:
        vote = decide_vote(state.groups.groups)
        candidates = tuple(pool[index] for index in vote.order)
        votes = vote.votes
    else:
        candidates, votes = pool, (1 if len(pool) == 1 else 0,) * len(pool)
    partial = state.rollouts[candidates[0]].finish is not Finish.STOP
    return RunFinished(candidates, votes, partial, state.stopping)


def _amend(state: State, slot: Slot) -> Event:
    """The next set of a rollout whose set is lost; when its whole round is lost, so is the run."""
    params = state.params
    attempt = state.attempts.get(slot, 0) + 1
    drawn = draw_sets(seed_of(params.seed, "sets", slot.round), params.population, params.set_size, params.population)[
        slot.index
    ]
    members = spare_set(seed_of(params.seed, "spare", *slot), params.population, drawn, attempt)
    if not members:
        before = state.inputs(slot)[0].round
        reason = state.errors.get(before, "no rollout left anything to read")
        return RunFailed(f"every rollout of round {before} failed; the first: {reason}")
    return SetAmended(slot, attempt, members)


def _stand_in(state: State) -> Event:
    """The next candidates of the last round, when all so far have failed."""
    first = len(state.wanted)
    indices = tuple(range(first, min(first + state.params.final_candidates, state.params.population)))
    if not indices:
        reason = state.errors.get(state.params.rounds, "no answer")
        return RunFailed(f"every rollout of the last round failed; the first: {reason}")
    return CandidatesAmended(indices)


def _go_final(state: State) -> Event:
    """What is left pays no further rollout but the last stage: it reads the latest round that has anything."""
    params = state.params
    for round in range(params.rounds - 1, -1, -1):
        survivors = [slot.index for slot in sorted(state.rollouts) if slot.round == round and state.readable(slot)]
        if survivors and state.stopping is None and all(_grant(state, slot) > 0 for slot in state.finals[:1]):
            drawn = draw_sets(seed_of(params.seed, "final", round), len(survivors), params.set_size, params.population)
            return WentFinal(round, tuple(AggregationSet(survivors[member] for member in members) for members in drawn))
    return RunFailed(f"budget_tokens={params.budget_tokens} was spent by failures before any rollout could be read")


def _least(state: State, slot: Slot) -> int:
    """Fewest tokens with which a rollout is worth starting."""
    return 1 if slot.round == state.params.rounds else floor_tokens(state.params)


def _grant(state: State, slot: Slot) -> int:
    """Tokens that a rollout may generate if it starts now."""
    params = state.params
    last = slot.round == params.rounds
    want = params.final_tokens if last else params.rollout_tokens
    if slot in state.stragglers.get(slot.round, ()):
        want = floor_tokens(params)
    if params.budget_tokens is None:
        return grant(want, None, 1)
    waiting = [other for other in state.needed if other not in state.running and not state.ended(other)]
    finals = sum(1 for other in waiting if other.round == params.rounds)
    gone = state.usage.completion_tokens + state.charged_tokens + state.withheld_tokens
    free = params.budget_tokens - gone - sum(state.running.values())
    if last:
        return grant(want, free, finals)
    return grant(want, free - finals * params.final_tokens, len(waiting) - finals)


def plan(state: State) -> tuple[RolloutRequest, ...]:
    """The rollouts that can start now: needed, inputs there, payable. A `RolloutStarted` is owed for each.

    First those that the most needed rollouts wait for.
    """
    if state.outcome is not None or state.stopping in _AT_ONCE:
        return ()
    requests: list[RolloutRequest] = []
    for slot in sorted(state.ready, key=lambda slot: (-state.descendants[slot], slot)):
        tokens = _grant(state, slot)
        if tokens >= _least(state, slot):
            read = tuple(source.index for source in state.inputs(slot) if state.readable(source))
            request = _request(state, slot, tokens, read)
            requests.append(request)
            state = apply(state, RolloutStarted(slot, request.members, tokens))
    return tuple(requests)


def _request(state: State, slot: Slot, tokens: int, members: tuple[int, ...]) -> RolloutRequest:
    params, problem = state.params, state.problem
    last = slot.round == params.rounds
    messages = problem.messages
    if members:
        tails = [state.rollouts[Slot(state.before(slot), member)].tail for member in members]
        messages = aggregation_messages(state.templates, problem, tails, params.seed, slot.round)
    sampling = params.sampling
    if last and params.final_temperature is not None:
        sampling = replace(sampling, temperature=params.final_temperature)
    return RolloutRequest(
        run_id=state.run_id,
        slot=slot,
        messages=messages,
        max_tokens=tokens,
        answer=problem.answer if last else AnswerRules(),
        sampling=sampling,
        seed=seed_of(params.seed, "rollout", *slot) if sampling.seeded else None,
        priority=state.started.priority * PRIORITIES - min(state.descendants[slot], PRIORITIES - 1),
        members=members,
    )


def apply(state: State, event: Event) -> State:
    """The state after an event."""
    match event:
        case RunStarted():
            return _begin(event, state.templates)
        case SetsDrawn(sets):
            return _begin_small(replace(state, sets=sets, wanted=tuple(range(state.params.final_candidates))))
        case RolloutStarted(slot, _, tokens):
            return _count(
                replace(
                    state,
                    ready=tuple(other for other in state.ready if other != slot),
                    running={**state.running, slot: tokens},
                ),
                slot,
                started=1,
            )
        case RolloutFinished(rollout):
            slot = rollout.slot
            if rollout.cut:
                state = _withhold(state, slot, rollout.usage)
            state = _count(_keep(state, rollout), slot, finished=1, usage=rollout.usage)
            if not rollout.tail and slot.round < state.params.rounds:
                state = replace(state, errors={slot.round: "its rollouts left no text", **state.errors})
            return _wake(state, slot)
        case RolloutFailed(slot, error, usage, _, status):
            if usage.completion_tokens or status is None:  # a refusal, with its status, cost no token
                state = _withhold(state, slot, usage)
            state = replace(
                state,
                running=_without(state.running, slot),
                lost=state.lost | {slot},
                errors={slot.round: error} | dict(state.errors),
            )
            return _wake(_count(state, slot, failed=1, usage=usage), slot)
        case RolloutAborted(rollout):
            return _count(_keep(state, rollout), rollout.slot, aborted=1, usage=rollout.usage)
        case RunResumed(slots, charged_tokens):
            granted = sum(tokens for slot, tokens in state.running.items() if slot in slots)
            state = replace(
                state,
                running={slot: tokens for slot, tokens in state.running.items() if slot not in slots},
                ready=(*(slot for slot in slots if slot in state.needed), *state.ready),
                charged_tokens=state.charged_tokens + charged_tokens,
                withheld_tokens=state.withheld_tokens + max(0, granted - charged_tokens),
            )
            for slot in slots:
                state = _count(state, slot, started=-1)
            return state
        case SetAmended(slot, attempt, members):
            row = list(state.sets[slot.round - 1])
            row[slot.index] = members
            sets = (*state.sets[: slot.round - 1], tuple(row), *state.sets[slot.round :])
            return _rewire(replace(state, sets=sets, attempts={**state.attempts, slot: attempt}))
        case CandidatesAmended(indices):
            return _rewire(replace(state, wanted=state.wanted + indices))
        case WentFinal(round, row):
            sets = (*state.sets[:-1], row)
            return _rewire(replace(state, sets=sets, source=round, first=(), stopping=Stopped.BUDGET))
        case DeadlineReached():
            if state.agreed is not None:  # there is an answer already
                return state
            return replace(state, stopping=Stopped.DEADLINE, ready=(), emptied=())
        case AnswersAgreed():
            return replace(state, agreed=event, stopping=Stopped.AGREED, ready=(), emptied=())
        case SetSkipped(slot, source):
            rollout = replace(state.rollouts[source], slot=slot, usage=_NONE, seconds=0.0)
            state = replace(
                state,
                ready=tuple(other for other in state.ready if other != slot),
                rollouts={**state.rollouts, slot: rollout},
                shortcuts={**state.shortcuts, slot: source},
            )
            return _wake(state, slot)
        case QuorumReached(round, stragglers):
            state = replace(state, stragglers={**state.stragglers, round: stragglers})
            if round < state.params.rounds:
                return state
            return _rewire(replace(state, wanted=tuple(slot.index for slot in state.finals if slot not in stragglers)))
        case ToppedUp(slots):
            return _rewire(replace(state, first=(), topped_up=slots))
        case AnswersGrouped():
            return replace(state, groups=event)
        case RunFinished() | RunFailed():
            return replace(state, outcome=event, ready=(), emptied=())


def replay(events: Iterable[Event], templates: Templates) -> State:
    """The state after a log that begins with `RunStarted`, from which the run can go on.

    Rollouts that had started and not ended are in `running`: a driver that takes the run up puts a `RunResumed` first.

    Raises:
        ValueError: If the log does not begin with `RunStarted`, or was written with another wording.
    """
    state = fold(events, templates)
    _check_wording(state.started, templates)
    return state


def fold(events: Iterable[Event], templates: Templates) -> State:
    """The state after a log, for those who only read it: the wording may be another one by now.

    Raises:
        ValueError: If the log does not begin with `RunStarted`.
    """
    log = iter(events)
    state = _begin(_first(log), templates)
    for event in log:
        state = apply(state, event)
    return state


class Retraced(NamedTuple):
    """What a log says: the state after it, and the request of each rollout that was asked for, the last one of each."""

    state: State
    requests: Mapping[Slot, RolloutRequest]


def retrace(events: Iterable[Event], templates: Templates) -> Retraced:
    """`replay`, and what the engine was asked for on the way: the requests that `plan` made, in their first order.

    A request follows from the state in which its rollout started, not from the last one: where tokens ran short, the
    sets of the last round were drawn anew after some of its rollouts had been asked for and lost.

    Raises:
        ValueError: As `replay`.
    """
    log = iter(events)
    state = _begin(_first(log), templates)
    _check_wording(state.started, templates)
    requests: dict[Slot, RolloutRequest] = {}
    for event in log:
        if isinstance(event, RolloutStarted):
            requests[event.slot] = _request(state, event.slot, event.grant, event.members)
        state = apply(state, event)
    return Retraced(state, requests)


def _first(log: Iterator[Event]) -> RunStarted:
    first = next(log, None)
    if not isinstance(first, RunStarted):
        raise ValueError("a log begins with RunStarted")
    return first


def _check_wording(started: RunStarted, templates: Templates) -> None:
    if started.templates != templates.digest:
        raise ValueError(f"the run was started with the prompts {started.templates}, these are {templates.digest}")


def _keep(state: State, rollout: Rollout) -> State:
    """Store what ended; one without a tail is lost to its readers, but a last stage's answer needs none."""
    slot = rollout.slot
    running = _without(state.running, slot)
    if rollout.tail or rollout.answer or slot.round == state.params.rounds:
        return replace(state, running=running, rollouts={**state.rollouts, slot: rollout})
    return replace(state, running=running, lost=state.lost | {slot})


def _withhold(state: State, slot: Slot, usage: Usage) -> State:
    """Count the rest of a grant as spent: what its engine generated after the last delta, nobody knows."""
    rest = state.running.get(slot, 0) - usage.completion_tokens
    return replace(state, withheld_tokens=state.withheld_tokens + max(0, rest))


def _without(mapping: Mapping[Slot, int], slot: Slot) -> dict[Slot, int]:
    return {other: tokens for other, tokens in mapping.items() if other != slot}


def _count(
    state: State,
    slot: Slot,
    started: int = 0,
    finished: int = 0,
    failed: int = 0,
    aborted: int = 0,
    usage: Usage = _NONE,
) -> State:
    old = state.stats[slot.round]
    new = RoundStats(
        old.started + started, old.finished + finished, old.failed + failed, old.aborted + aborted, old.usage + usage
    )
    return replace(state, stats=(*state.stats[: slot.round], new, *state.stats[slot.round + 1 :]))


def _wake(state: State, slot: Slot) -> State:
    """Put the readers of a rollout that has ended among the ready, once all that they read has ended."""
    ready, emptied = list(state.ready), list(state.emptied)
    for reader in state.readers.get(slot, ()):
        _sort(state, reader, ready, emptied)
    return replace(state, ready=tuple(ready), emptied=tuple(emptied))


def _sort(state: State, slot: Slot, ready: list[Slot], emptied: list[Slot]) -> None:
    if slot in state.running or state.ended(slot) or (state.first and slot not in state.first):
        return
    inputs = state.inputs(slot)
    if all(state.ended(source) for source in inputs):
        (ready if not inputs or any(state.readable(source) for source in inputs) else emptied).append(slot)


def _begin_small(state: State) -> State:
    """The lineage of a run that begins; with `start_small`, only the rollouts that the most wait for are ready."""
    state = _rewire(state)
    small = state.params.start_small
    if small is None:
        return state
    order = sorted((slot for slot in state.needed if slot.round == 0), key=lambda slot: -state.descendants[slot])
    return _rewire(replace(state, first=tuple(sorted(order[:small]))))


def _rewire(state: State) -> State:
    """Work the lineage out anew, after the sets or the wanted candidates have changed."""
    last = state.params.rounds
    if state.stopping is Stopped.BUDGET:  # what the last stage reads is there already; nothing below it starts again
        wanted = frozenset(state.finals)
        slots = wanted | {source for slot in wanted for source in state.inputs(slot)}
    else:
        slots = needed(state.sets, (Slot(last, index) for index in state.wanted))
    readers: dict[Slot, tuple[Slot, ...]] = {}
    ready: list[Slot] = []
    emptied: list[Slot] = []
    for slot in sorted(slots):
        for source in state.inputs(slot):
            readers[source] = (*readers.get(source, ()), slot)
    state = replace(state, needed=slots, readers=readers, descendants=descendants(readers, slots))
    for slot in sorted(slots):
        _sort(state, slot, ready, emptied)
    return replace(state, ready=tuple(ready), emptied=tuple(emptied))
