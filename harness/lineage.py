"""Who reads whom: the graph of a run, drawn before its first token. Indices only."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence

from harness.types import AggregationSet, Slot

Sets = tuple[tuple[AggregationSet, ...], ...]


def seed_of(seed: int, *path: str | int) -> int:
    """The seed of one stream of random choices: 63 bits, the same for the same seed and path on every machine."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def draw_sets(seed: int, population: int, set_size: int, count: int) -> tuple[AggregationSet, ...]:
    """Draw which earlier rollouts each new rollout reads.

    Uniform without replacement inside a set, independent between sets (ZAYA1-8B report, section VI-A). With
    `set_size` 1 nothing is drawn: each rollout refines its own predecessor (Delethink's chunk continuation).

    Args:
        seed: Stream of this round, from `seed_of`.
        population: Rollouts of the previous round, N.
        set_size: Members per set, C; all N when the population is smaller.
        count: Sets to draw.

    Returns:
        `[count][min(C, N)]` indices, ascending within a set.

    Raises:
        ValueError: If `population` or `set_size` is below 1.
    """
    if population < 1 or set_size < 1:
        raise ValueError(f"population={population} and set_size={set_size} must be at least 1")
    if set_size == 1:
        return tuple(AggregationSet((index % population,)) for index in range(count))
    stream = random.Random(seed)
    size = min(set_size, population)
    return tuple(AggregationSet(sorted(stream.sample(range(population), size))) for _ in range(count))


def spare_set(seed: int, population: int, members: Sequence[int], attempt: int) -> AggregationSet:
    """What a rollout reads after every member of its set has failed, for the `attempt`-th time (from 1).

    The rest of the population is put into one random order, and each attempt takes the next `len(members)` of it. So
    the choice depends on who failed, never on who ended first.

    Args:
        seed: Stream of this rollout, from `seed_of`.
        population: Rollouts of the previous round, N.
        members: The set that was drawn first.
        attempt: Sets that came to nothing before.

    Returns:
        Indices, ascending; empty when the population is used up.
    """
    rest = [index for index in range(population) if index not in members]
    random.Random(seed).shuffle(rest)
    size = len(members)
    return AggregationSet(sorted(rest[(attempt - 1) * size : attempt * size]))


def needed(sets: Sequence[Sequence[Sequence[int]]], wanted: Iterable[Slot]) -> frozenset[Slot]:
    """The rollouts that something reads: `wanted` ones and, walking back, the members of their sets.

    Args:
        sets: `sets[t - 1][i]` is what rollout (t, i) reads.
        wanted: Where to start, the candidates of the last round.
    """
    found: set[Slot] = set()
    open_slots = list(wanted)
    while open_slots:
        slot = open_slots.pop()
        if slot in found:
            continue
        found.add(slot)
        if slot.round > 0:
            open_slots += (Slot(slot.round - 1, member) for member in sets[slot.round - 1][slot.index])
    return frozenset(found)


def needed_at_most(population: int, set_size: int, rounds: int, final_candidates: int) -> int:
    """Most rollouts before the last round that the final candidates can need, whatever the draws."""
    total, readers = 0, final_candidates
    for _ in range(rounds):
        readers = min(population, readers * set_size)
        total += readers
    return total


def descendants(readers: Mapping[Slot, Sequence[Slot]], slots: Iterable[Slot]) -> dict[Slot, int]:
    """How many rollouts wait for each of `slots`, readers of readers included: the critical path goes first.

    Args:
        readers: Who reads a rollout; a reader's round is always later.
        slots: All rollouts of the graph.
    """
    below: dict[Slot, int] = {}  # bit sets: a graph of 2,000 rollouts would be slow with real ones
    bits = {slot: 1 << bit for bit, slot in enumerate(sorted(slots))}
    for slot in sorted(bits, reverse=True):
        found = 0
        for reader in readers.get(slot, ()):
            found |= bits[reader] | below[reader]
        below[slot] = found
    return {slot: found.bit_count() for slot, found in below.items()}
