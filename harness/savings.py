"""What a run did without, and by which of its options. Nothing here decides: it reads a state that has ended.

Counts of rollouts are exact; tokens that were never generated can only be estimated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from harness.markovian_rsa import State
from harness.types import Finish, Slot


@dataclass(frozen=True, slots=True)
class Saving:
    """What one option did without.

    Attributes:
        rollouts: Never generated.
        cut: Ended before their end.
        tokens_estimate: Of those never generated, by the mean of the rollouts of their round that ended by themselves
            (of all rounds, where their round has none).
        tokens_at_most: By all that those and the cut ones were still allowed.
    """

    rollouts: int = 0
    cut: int = 0
    tokens_estimate: int = 0
    tokens_at_most: int = 0


def savings(state: State) -> Mapping[str, Saving]:
    """By name of the option, for those that were asked for; `unread` is what exact lazy evaluation alone saves."""
    params = state.params
    found = {"unread": _saving(state, dict(enumerate(state.skipped)), ())}
    missing = [slot for slot in state.needed if not state.ended(slot)] if state.agreed else []
    aborted = [slot for slot, rollout in state.rollouts.items() if rollout.finish is Finish.ABORTED]
    late = {slot for slots in state.stragglers.values() for slot in slots}
    small = params.start_small is not None and bool(state.first)  # it ended before the others were let go
    by_agreement = _saving(state, _by_round(missing), (slot for slot in aborted if slot not in late))
    if params.stop_when_agreed is not None:
        found["stop_when_agreed"] = Saving() if small or not state.agreed else by_agreement
    if params.start_small is not None:
        found["start_small"] = by_agreement if small and state.agreed else Saving()
    if params.skip_agreed_sets:
        found["skip_agreed_sets"] = _saving(state, _by_round(state.shortcuts), ())
    if params.quorum is not None:
        never = (slot for slot in late if slot not in state.needed and not state.ended(slot))
        found["quorum"] = _saving(state, _by_round(never), (slot for slot in aborted if slot in late))
    return found


def _by_round(slots: Iterable[Slot]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for slot in slots:
        counts[slot.round] = counts.get(slot.round, 0) + 1
    return counts


def _saving(state: State, never: Mapping[int, int], cut: Iterable[Slot]) -> Saving:
    params = state.params
    limits = {round: params.final_tokens if round == params.rounds else params.rollout_tokens for round in never}
    short = [state.rollouts[slot] for slot in cut]
    return Saving(
        rollouts=sum(never.values()),
        cut=len(short),
        tokens_estimate=round(sum(count * _mean_tokens(state, number) for number, count in never.items())),
        tokens_at_most=sum(count * limits[number] for number, count in never.items())
        + sum(
            max(0, limit - rollout.usage.completion_tokens)
            for rollout in short
            for limit in (params.final_tokens if rollout.slot.round == params.rounds else params.rollout_tokens,)
        ),
    )


def _mean_tokens(state: State, round: int) -> float:
    """Tokens of a rollout of a round that ended by itself; of any round where this one has none; 0 without any."""
    whole = [
        rollout
        for slot, rollout in state.rollouts.items()
        if rollout.finish is not Finish.ABORTED and slot not in state.shortcuts
    ]
    here = [rollout for rollout in whole if rollout.slot.round == round] or whole
    return sum(rollout.usage.completion_tokens for rollout in here) / len(here) if here else 0.0
