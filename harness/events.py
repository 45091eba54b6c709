"""The facts of a run, in the order in which they came about. State is the fold over them; nothing else is output.

Decisions (sets, grants, amended sets) are recorded and never computed again. `RolloutDelta` alone is not a fact: it
passes by for those who watch, and is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from harness.types import AggregationSet, Params, Problem, Rollout, Slot, Trace, Usage


class Stopped(StrEnum):
    """Why a run ended otherwise than by its last round."""

    DEADLINE = "deadline"
    BUDGET = "budget"
    AGREED = "agreed"


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run was asked for. `templates` is the digest of the prompts that it uses.

    `notes` are for whoever serves the run, and nothing is made of them here.
    """

    run_id: str
    problem: Problem
    params: Params
    templates: str
    priority: int = 0
    notes: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class SetsDrawn:
    """Every set of the run, drawn at once: `sets[t - 1][i]` is what rollout (t, i) reads; N sets in each round.

    Of the last round the first F are wanted; the others stand in if all of these fail.
    """

    sets: tuple[tuple[AggregationSet, ...], ...]


@dataclass(frozen=True, slots=True)
class RolloutStarted:
    """A rollout was asked for. `members` of its set are what it reads, `grant` is the most tokens it may generate."""

    slot: Slot
    members: tuple[int, ...]
    grant: int


@dataclass(frozen=True, slots=True)
class RolloutFinished:
    """A rollout ended; its whole trace comes along once and is not kept in the state."""

    rollout: Rollout
    trace: Trace | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class RolloutFailed:
    """A rollout was lost: the population is smaller by one. Tokens that it had generated are spent.

    `status` is the HTTP status of a remote engine, or 400 of one that refused the request for what stands in it.
    """

    slot: Slot
    error: str
    usage: Usage
    seconds: float
    status: int | None = None


@dataclass(frozen=True, slots=True)
class RolloutAborted:
    """A rollout was cut because nothing reads it any more; `rollout` is what stood there."""

    rollout: Rollout


@dataclass(frozen=True, slots=True)
class RunResumed:
    """A run goes on after its engine or its owner was lost: `slots` are asked for again.

    `charged_tokens` is what their lost generations count against the budget: their whole grants where nobody knows.
    """

    slots: tuple[Slot, ...]
    charged_tokens: int


@dataclass(frozen=True, slots=True)
class SetAmended:
    """All members of a set failed, so it reads the next ones of its drawn order."""

    slot: Slot
    attempt: int
    members: AggregationSet


@dataclass(frozen=True, slots=True)
class CandidatesAmended:
    """All candidates of the last round failed, so the next ones stand in."""

    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WentFinal:
    """Tokens ran short (losses cost extra work): the last stage reads round `round` as it stands, others are cut."""

    round: int
    sets: tuple[AggregationSet, ...]


@dataclass(frozen=True, slots=True)
class DeadlineReached:
    """The wall deadline passed: everything in flight is cut, the best answer so far is the answer."""


@dataclass(frozen=True, slots=True)
class AnswersAgreed:
    """Enough answers of one round are equal (`Params.stop_when_agreed`, `start_small`): everything in flight is cut.

    `slots` gave that answer, of `ended` rollouts of the round.
    """

    slots: tuple[Slot, ...]
    ended: int


@dataclass(frozen=True, slots=True)
class SetSkipped:
    """All members of a set gave one answer (`Params.skip_agreed_sets`): `slot` takes over what `source` left."""

    slot: Slot
    source: Slot


@dataclass(frozen=True, slots=True)
class QuorumReached:
    """Enough of a round has ended (`Params.quorum`): the stragglers go on to `tail_tokens` at most, then are cut.

    In the last round they have no say: what has ended is the answer's choice.
    """

    round: int
    stragglers: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class ToppedUp:
    """The first rollouts of round 0 did not agree (`Params.start_small`): the others start."""

    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class AnswersGrouped:
    """Which of the last candidates' answers are equal: a group number each, -1 for one with no answer to compare."""

    candidates: tuple[Slot, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The run has an answer.

    Attributes:
        candidates: The slots whose answers are on offer, the chosen one first.
        votes: Candidates that agree with each entry of `candidates`, itself included; 0 where nothing was compared.
        partial: Whether the chosen answer was cut before its end.
        stopped: Why, where the run did not end by its last round.
    """

    candidates: tuple[Slot, ...]
    votes: tuple[int, ...]
    partial: bool = False
    stopped: Stopped | None = None


@dataclass(frozen=True, slots=True)
class RunFailed:
    """The run has no answer and never will; `reason` says why."""

    reason: str


@dataclass(frozen=True, slots=True)
class RolloutDelta:
    """New text of a rollout, for those who watch. `answer` says on which side of the thinking it stands."""

    slot: Slot
    text: str
    answer: bool
    tokens: int


Event = (
    RunStarted
    | SetsDrawn
    | RolloutStarted
    | RolloutFinished
    | RolloutFailed
    | RolloutAborted
    | RunResumed
    | SetAmended
    | CandidatesAmended
    | WentFinal
    | DeadlineReached
    | AnswersAgreed
    | SetSkipped
    | QuorumReached
    | ToppedUp
    | AnswersGrouped
    | RunFinished
    | RunFailed
)
