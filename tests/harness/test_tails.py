from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engine import Delta, Vocabulary
from harness.tails import LoopDetector, TraceBuilder, cut_tail, reasoning_of
from harness.types import Carry

OPEN, CLOSE = 256, 257
VOCABULARY = Vocabulary((OPEN,), (CLOSE,))


def built(*deltas: Delta, vocabulary: Vocabulary = VOCABULARY) -> TraceBuilder:
    builder = TraceBuilder(vocabulary)
    for delta in deltas:
        builder.add(delta)
    return builder


ids = st.lists(st.integers(0, 255), max_size=50)


@given(ids, ids, st.integers(1, 60))
def test_a_tail_is_the_end_of_the_reasoning_and_holds_no_marker(
    thinking: list[int], answer: list[int], tail: int
) -> None:
    trace = built(Delta((OPEN,)), *(Delta((token,)) for token in thinking), Delta((CLOSE,)), Delta(answer)).trace()
    assert list(trace.token_ids[slice(*trace.reasoning)]) == thinking
    assert list(trace.token_ids[slice(*trace.answer)]) == answer
    assert list(cut_tail(trace, tail)) == (thinking or answer)[-tail:]
    assert list(cut_tail(trace, tail, Carry.ANSWER)) == answer[-tail:]
    assert list(cut_tail(trace, tail, Carry.HYBRID)) == (answer or thinking)[-tail:]


@given(ids, st.integers(0, 60))
def test_an_answer_without_thinking_is_cut_at_its_bound_and_no_other(answer: list[int], most: int) -> None:
    plain, thought = built(Delta(answer)), built(Delta((OPEN,)), Delta((CLOSE,)), Delta(answer))
    for builder in (plain, thought):
        builder.bound_answer(most)
    assert list(plain.trace().token_ids) == answer[:most]
    assert list(thought.trace().token_ids) == [OPEN, CLOSE, *answer]


@given(ids, st.integers(1, 60))
def test_the_tail_of_an_unfinished_rollout_is_its_open_reasoning(thinking: list[int], tail: int) -> None:
    builder = built(Delta((OPEN,)), Delta(thinking))
    assert builder.thinking
    assert list(cut_tail(builder.trace(), tail)) == thinking[-tail:]
    assert list(cut_tail(builder.trace(), tail, Carry.ANSWER)) == []


def test_thinking_that_the_prompt_opened_is_reasoning_from_the_first_id() -> None:
    builder = built(Delta((1, 2), thinking=True), Delta((CLOSE,)), Delta((3,)))
    assert list(reasoning_of(builder.trace())) == [1, 2]
    open_still = built(Delta((1, 2), thinking=True))
    assert open_still.thinking
    assert list(reasoning_of(open_still.trace())) == [1, 2]


def test_a_close_without_an_open_ends_reasoning_that_began_at_the_start() -> None:
    trace = built(Delta((1, 2)), Delta((CLOSE,)), Delta((3,))).trace()
    assert trace.reasoning == (0, 2)
    assert trace.answer == (3, 4)


def test_a_model_that_does_not_think_passes_on_what_it_wrote() -> None:
    trace = built(Delta((1, 2, 3)), vocabulary=Vocabulary()).trace()
    assert list(cut_tail(trace, 2)) == [2, 3]
    assert trace.answer == (0, 3)


def test_closing_the_thinking_by_force_is_no_generated_token() -> None:
    builder = built(Delta((OPEN,)), Delta((1, 2)))
    builder.close_thinking()
    builder.add(Delta((3,)))
    assert builder.inserted == 1
    assert builder.trace().reasoning == (1, 3)
    assert list(builder.trace().token_ids) == [OPEN, 1, 2, CLOSE, 3]


def test_markers_of_several_ids_are_recognised() -> None:
    vocabulary = Vocabulary(tuple(map(ord, "<think>")), tuple(map(ord, "</think>")))
    deltas = (Delta(tuple(map(ord, part))) for part in ("<think>", "why", "</think>", "so"))
    trace = built(*deltas, vocabulary=vocabulary).trace()
    assert "".join(map(chr, reasoning_of(trace))) == "why"


def test_a_tail_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="tail_ids=0"):
        cut_tail(built(Delta((1,))).trace(), 0)


@given(st.integers(1, 2500), st.integers(0, 99))
def test_a_loop_is_seen_within_five_chunks(period: int, seed: int) -> None:
    stream = random.Random(seed)
    unit = "".join(stream.choice("abcdefgh ijklmnop\n") for _ in range(period))
    detector = LoopDetector()
    assert any(detector.feed(unit[at % period]) for at in range(5 * 2048))


@given(st.integers(0, 99), st.integers(200, 12_000))
def test_saying_a_thing_twice_is_no_loop(seed: int, length: int) -> None:
    stream = random.Random(seed)
    said = "".join(stream.choice("abcdefgh ijklmnop\n") for _ in range(length))
    detector = LoopDetector()
    text = said * 2 + "and so on"
    assert not any(detector.feed(text[at : at + 9]) for at in range(0, len(text), 9))


def test_prose_mathematics_and_tables_are_no_loop() -> None:
    stream = random.Random(5)
    words = "the sum of all n such that x_i = y_i mod 7 is then \\frac{a}{b} hence we find".split()
    prose = " ".join(stream.choice(words) for _ in range(8000))
    table = "\n".join(f"| {row} | {row * row % 97} | {row * 3 % 11} |" for row in range(2000))
    for text in (prose, table):
        detector = LoopDetector()
        assert not any(detector.feed(text[at : at + 7]) for at in range(0, len(text), 7))
