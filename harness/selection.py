"""The last population -> one answer: what each candidate answers, which answers are equal, and the vote."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from fractions import Fraction
from typing import NamedTuple

from harness.types import Agreement

_SHORT = 100  # characters: a longer last line is prose, not an answer that could be compared
_LONGEST_LINE = 4 * _SHORT  # with its label and its marks
_LABEL = re.compile(r"^(?:(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*:?|therefore,?|so,?|thus,?)\s*", re.IGNORECASE)
_BRACE = re.compile(r"\\f?boxed\s{0,9}\{|\\[{}]|[{}]")
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:/[-+]?\d[\d,]*)?")
_MATHEMATICAL = re.compile(r"[\d\\^_=+*/<>|√π∞-]")


class Vote(NamedTuple):
    """Candidates in the order in which they are offered, the chosen one first, and how many agree with each."""

    order: tuple[int, ...]
    votes: tuple[int, ...]


def extract_answer(text: str) -> str | None:
    """The answer that a candidate's text ends in, for comparison with others: boxed, else its last line when short."""
    boxed = _last_box(text)
    if boxed is not None:
        return boxed
    last = text.rstrip().rpartition("\n")[2]
    if len(last) > _LONGEST_LINE:
        return None
    last = _LABEL.sub("", last.strip().strip("*_#> ")).strip("*_ ")
    return last if 0 < len(last) <= _SHORT else None


def _last_box(text: str) -> str | None:
    """The content of the last box that is closed and not empty. One pass: the text is a model's and may be hostile."""
    open_braces: list[tuple[int, bool]] = []
    found: tuple[int, str] = (-1, "")
    for match in _BRACE.finditer(text):
        mark = match.group()
        if mark == "}":
            start, is_box = open_braces.pop() if open_braces else (-1, False)
            if is_box and start > found[0] and (content := text[start : match.start()].strip()):
                found = (start, content)
        elif mark not in ("\\{", "\\}"):
            open_braces.append((match.end(), mark != "{"))
    return found[1] or None


def normal_form(answer: str) -> str:
    """An answer without what never changes its meaning: case, spaces, dollar signs, a final full stop."""
    return re.sub(r"\s+|\\[ ,;!]|\\left|\\right|\$", "", answer).rstrip(".").casefold()


def group_by_text(answers: Sequence[str | None]) -> tuple[int, ...]:
    """Group answers that are equal as text or as plain numbers: from 0 by first sight, -1 where there is none."""
    seen: dict[str | Fraction, int] = {}
    return tuple(-1 if answer is None else seen.setdefault(_key(answer), len(seen)) for answer in answers)


def _key(answer: str) -> str | Fraction:
    form = normal_form(answer)
    if len(form) <= _SHORT and _NUMBER.fullmatch(form):
        try:
            top, _, bottom = form.replace(",", "").partition("/")
            return Fraction(top) / Fraction(bottom or 1)
        except (ValueError, ZeroDivisionError):
            return form
    return form


def agreeing(answers: Sequence[str | None], agreement: Agreement) -> tuple[int, ...]:
    """Which of a round's answers are equal and enough of it; empty where none are.

    Text and plain numbers decide: nothing has to be waited for, and a doubt never ends a run.

    Args:
        answers: Of all rollouts of the round that have ended with something, None for those without an answer.
        agreement: What is enough.
    """
    groups = group_by_text(answers)
    sizes = Counter(group for group in groups if group >= 0)
    if not sizes:
        return ()
    best, votes = max(sizes.items(), key=lambda item: (item[1], -item[0]))
    if votes < agreement.min_votes or votes / len(answers) < agreement.share:
        return ()
    return tuple(index for index, group in enumerate(groups) if group == best)


def decide_vote(groups: Sequence[int]) -> Vote:
    """The most frequent group wins, ties go to its first candidate; without any comparable answer, to the first of all.

    Args:
        groups: Group of each candidate's answer, -1 for none.

    Raises:
        ValueError: If there is no candidate.
    """
    if not groups:
        raise ValueError("a vote needs at least one candidate")
    sizes = Counter(group for group in groups if group >= 0)
    votes = [sizes[group] if group >= 0 else 0 for group in groups]
    best = max(range(len(groups)), key=lambda index: (votes[index], -index))
    order = (best, *(index for index in range(len(groups)) if index != best))
    return Vote(order, tuple(votes[index] for index in order))


def merge_equal(answers: Sequence[str]) -> tuple[int, ...]:
    """Group distinct answers by mathematical equality (math-verify). Runs in a process of its own: it may never return.

    Args:
        answers: Pairwise different as text and as numbers.

    Returns:
        A group number each, counted from 0 by first sight.
    """
    from math_verify import parse, verify  # sympy costs 40 MB and a second: only where answers must be judged

    parsed = [parse(f"\\boxed{{{answer}}}", parsing_timeout=2) for answer in answers]
    groups: list[int] = []
    leaders: list[int] = []
    for index, value in enumerate(parsed):
        for group, leader in enumerate(leaders):
            # verify is not symmetric: it lets a target be laxer than its gold.
            if value and parsed[leader] and verify(parsed[leader], value, timeout_seconds=2):
                groups.append(group)
                break
        else:
            groups.append(len(leaders))
            leaders.append(index)
    return tuple(groups)


class MathJudge:
    """Judges equality of mathematical answers in a worker process, within a time limit.

    What text and plain numbers decide never goes there. One that hangs is killed, and text decides.

    Args:
        timeout_s: For all candidates of one run together.
    """

    def __init__(self, timeout_s: float = 10.0) -> None:
        self._timeout_s = timeout_s
        self._pool: object | None = None

    def group(self, answers: Sequence[str | None]) -> Future[tuple[int, ...]]:
        """Group equal answers; -1 where there is none."""
        by_text = group_by_text(answers)
        leaders = {group: answers[index] for index, group in reversed(list(enumerate(by_text))) if group >= 0}
        open_groups = [
            group
            for group in sorted(leaders)
            if _MATHEMATICAL.search(leaders[group] or "") and len(leaders[group] or "") <= 4 * _SHORT
        ]
        out: Future[tuple[int, ...]] = Future()
        if len(open_groups) < 2 or all(isinstance(_key(leaders[group] or ""), Fraction) for group in open_groups):
            out.set_result(by_text)
            return out

        def settle(done: Future[tuple[int, ...]]) -> None:
            if not out.set_running_or_notify_cancel():  # nobody waits for it any more
                return
            merged = {group: group for group in leaders}
            if not done.cancelled() and done.exception() is None:
                merged |= {
                    group: open_groups[done.result().index(number)]
                    for group, number in zip(open_groups, done.result(), strict=True)
                }
            renumber: dict[int, int] = {}
            out.set_result(
                tuple(-1 if group < 0 else renumber.setdefault(merged[group], len(renumber)) for group in by_text)
            )

        self._submit([leaders[group] or "" for group in open_groups]).add_done_callback(settle)
        return out

    def _submit(self, answers: list[str]) -> Future[tuple[int, ...]]:
        import multiprocessing

        from pebble import ProcessPool

        if isinstance(self._pool, ProcessPool) and not self._pool.active:  # a worker died while it had nothing to do
            self.close()
        if self._pool is None:
            # spawn: a fork of a server with threads may deadlock
            self._pool = ProcessPool(max_workers=1, context=multiprocessing.get_context("spawn"))
        assert isinstance(self._pool, ProcessPool)
        future: Future[tuple[int, ...]] = self._pool.schedule(merge_equal, args=[answers], timeout=self._timeout_s)
        return future

    def close(self) -> None:
        """End the worker."""
        if self._pool is not None:
            self._pool.stop()  # type: ignore[attr-defined]
            self._pool.join()  # type: ignore[attr-defined]
            self._pool = None
