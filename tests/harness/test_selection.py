from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.selection import MathJudge, decide_vote, extract_answer, group_by_text


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{41}, no: \\boxed{42}", "42"),
        ("\\boxed{\\frac{1}{2}} follows.", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("an open \\boxed{4", "an open \\boxed{4"),
        ("empty \\boxed{} then\n12", "12"),
        ("Steps.\n\n**The final answer is: 17.**", "17."),
        ("Answer: (B)", "(B)"),
        ("A\n" + "a long closing sentence " * 10, None),
        ("", None),
        ("  \n ", None),
    ],
)
def test_the_answer_is_boxed_or_else_the_last_short_line(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text", ["\\boxed{", "\\boxed{x", "{", "}", "\\boxed{}", "\\boxed ", "x" * 9 + "\n"])
def test_hostile_text_is_read_in_one_pass(text: str) -> None:
    began = time.perf_counter()
    extract_answer(text * (2_000_000 // len(text)))
    assert time.perf_counter() - began < 5, "quadratic code takes minutes"


def test_of_nested_boxes_the_last_to_open_counts() -> None:
    assert extract_answer("\\boxed{\\boxed{4}}") == "4"
    assert extract_answer("\\boxed{1} and \\boxed{{2} never closed") == "1"


def test_numbers_are_equal_however_written() -> None:
    assert group_by_text(["1,000", "1000.0", "2000/2", "1e3", None, "$ 1000 $", "1001"]) == (0, 0, 0, 1, -1, 0, 2)


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=12))
def test_the_vote_is_the_most_frequent_group_and_ties_go_to_the_first(groups: list[int]) -> None:
    order, votes = decide_vote(groups)
    assert sorted(order) == list(range(len(groups)))
    counts = [groups.count(group) if group >= 0 else 0 for group in groups]
    assert counts[order[0]] == max(counts)
    assert order[0] == counts.index(max(counts))
    assert list(votes) == [counts[index] for index in order]


@given(st.text(max_size=300))
def test_any_text_can_be_asked_for_its_answer(text: str) -> None:
    answer = extract_answer(text)
    group_by_text([answer, answer])


@pytest.fixture(scope="module")
def judge() -> Iterator[MathJudge]:
    judge = MathJudge(timeout_s=20)
    yield judge
    judge.close()


def test_mathematics_is_compared_by_value(judge: MathJudge) -> None:
    answers = ["\\frac{1}{2}", "0.5", "x^2+2x+1", "(x+1)^2", "\\sqrt{8}", "2\\sqrt{2}", None, "x^2", "blue", "Blue."]
    assert judge.group(answers).result(60) == (0, 0, 1, 1, 2, 2, -1, 3, 4, 4)


def test_plain_numbers_and_words_never_reach_the_worker() -> None:
    idle = MathJudge()
    assert idle.group(["42", "42.0", "7", "red", None]).result(0) == (0, 0, 1, 2, -1)
    assert idle._pool is None


def test_an_answer_that_hangs_the_library_is_judged_as_text() -> None:
    slow = MathJudge(timeout_s=0.01)  # the worker's start alone takes longer
    try:
        assert slow.group(["9^{9^{9^9}}", "9^{9^{9^9}}+1", "9^{9^{9^9}}"]).result(60) == (0, 1, 0)
    finally:
        slow.close()


def test_a_worker_that_was_killed_is_replaced() -> None:
    judge, others = MathJudge(timeout_s=20), set(multiprocessing.active_children())
    try:
        assert judge.group(["\\frac{1}{2}", "\\sqrt{8}"]).result(60) == (0, 1)
        (worker,) = set(multiprocessing.active_children()) - others
        worker.kill()  # as by a kernel without memory, while it had nothing to do
        deadline = time.monotonic() + 10
        while judge._pool.active and time.monotonic() < deadline:  # type: ignore[union-attr]
            time.sleep(0.05)
        assert judge.group(["\\frac{1}{2}", "\\frac{2}{4}"]).result(60) == (0, 0)
    finally:
        judge.close()


def test_answers_for_which_nobody_waits_any_more_break_nothing(
    judge: MathJudge, caplog: pytest.LogCaptureFixture
) -> None:
    assert judge.group(["\\frac{1}{2}", "\\sqrt{8}"]).cancel()
    assert judge.group(["\\frac{1}{2}", "\\frac{2}{4}"]).result(60) == (0, 0)
    assert caplog.records == []
