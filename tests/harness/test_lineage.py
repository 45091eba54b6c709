from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.lineage import draw_sets, needed, needed_at_most, seed_of, spare_set
from harness.types import Slot

sizes = st.integers(1, 12)


@given(st.integers(0, 2**63), sizes, sizes, st.integers(0, 20))
def test_a_set_is_ascending_without_doubles_and_of_the_asked_size(
    seed: int, population: int, set_size: int, count: int
) -> None:
    sets = draw_sets(seed, population, set_size, count)
    assert len(sets) == count
    for members in sets:
        assert list(members) == sorted(set(members))
        assert len(members) == min(set_size, population)
        assert all(0 <= member < population for member in members)


def test_sets_are_uniform_over_all_subsets() -> None:
    draws = 42_000
    seen = Counter(members for seed in range(draws // 30) for members in draw_sets(seed_of(seed, "sets", 1), 7, 3, 30))
    subsets = list(itertools.combinations(range(7), 3))
    assert set(seen) == set(subsets)
    expected = draws / len(subsets)
    chi_square = sum((seen[subset] - expected) ** 2 / expected for subset in subsets)
    assert chi_square < 65.2  # 34 degrees of freedom, p = 0.001; the draws are fixed, so this cannot flicker


def test_sets_of_one_round_are_independent() -> None:
    pairs = Counter(draw_sets(seed_of(seed, "sets", 1), 4, 2, 2) for seed in range(18_000))
    expected = 18_000 / 36
    assert len(pairs) == 36
    assert sum((count - expected) ** 2 / expected for count in pairs.values()) < 66.6  # 35 degrees, p = 0.001


def test_set_size_one_refines_its_own_predecessor() -> None:
    assert draw_sets(99, 5, 1, 5) == ((0,), (1,), (2,), (3,), (4,))


def test_a_stream_depends_on_its_path_and_not_on_the_machine() -> None:
    assert seed_of(7, "sets", 1) == 6550459804589732976
    assert len({seed_of(7, "sets", round) for round in range(100)}) == 100


@given(st.integers(0, 999), sizes, sizes)
def test_spare_sets_walk_through_the_rest_of_the_population_once(seed: int, population: int, set_size: int) -> None:
    first = draw_sets(seed, population, set_size, 1)[0]
    seen = list(first)
    for attempt in itertools.count(1):
        spare = spare_set(seed, population, first, attempt)
        if not spare:
            break
        seen += spare
    assert sorted(seen) == list(range(population))


@given(st.integers(0, 999), st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_needed_is_what_can_be_reached_and_never_more_than_the_bound(
    seed: int, population: int, set_size: int, rounds: int, finals: int
) -> None:
    finals = min(finals, population)
    sets = [draw_sets(seed_of(seed, round), population, set_size, population) for round in range(rounds)]
    found = needed(sets, (Slot(rounds, index) for index in range(finals)))
    for round in range(rounds):
        readers = [slot for slot in found if slot.round == round + 1]
        assert {slot.index for slot in found if slot.round == round} == {
            member for reader in readers for member in sets[round][reader.index]
        }
    assert len(found) - finals <= needed_at_most(population, set_size, rounds, finals)


def test_an_empty_population_has_no_sets() -> None:
    with pytest.raises(ValueError, match="population=0"):
        draw_sets(1, 0, 4, 1)
