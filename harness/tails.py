"""What survives a rollout, in token ids: its reasoning is found by the think markers, and its end is cut off."""

from __future__ import annotations

import zlib
from array import array

from harness.engine import Delta, Vocabulary
from harness.types import Carry, TokenIds, Trace

_CHUNK = 2048  # characters
_REPETITIVE = 0.05  # ZAYA1-8B report: flagged below this ratio


class TraceBuilder:
    """Joins the deltas of one rollout, over one request or several, into its `Trace`.

    A trace without any marker is both reasoning and answer: the model did not think apart. One with `</think>` alone
    began inside the thinking, as some chat templates open it in the prompt.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._open = tuple(vocabulary.think_open)
        self._close = tuple(vocabulary.think_close)
        self._longest = max(len(self._open), len(self._close))
        self.token_ids = array("I")
        self.inserted = 0  # ids that nobody generated: a forced end of the thinking
        self._reasoning_start = 0
        self._reasoning_end: int | None = None
        self._opened = False

    @property
    def thinking(self) -> bool:
        """Whether the thinking is open."""
        return self._opened and self._reasoning_end is None

    @property
    def thought(self) -> bool:
        """Whether the thinking has ended."""
        return self._reasoning_end is not None

    @property
    def answer_start(self) -> int:
        """Where the answer begins: after the thinking, or at 0 where there is none."""
        return 0 if self._reasoning_end is None else self._reasoning_end + len(self._close)

    def add(self, delta: Delta) -> None:
        """Append a delta; a marker in it comes alone (see `Delta`)."""
        if delta.thinking and not self.token_ids:
            self._opened = True
        ids = tuple(delta.token_ids) if len(delta.token_ids) <= self._longest else None
        if ids and ids == self._open and not self._opened and not self.thought:
            self._opened = True
            self._reasoning_start = len(self.token_ids) + len(ids)
        elif ids and ids == self._close and not self.thought:
            self._reasoning_end = len(self.token_ids)
        self.token_ids.extend(delta.token_ids)

    def close_thinking(self) -> None:
        """Put `</think>` where the thinking stands."""
        self._reasoning_end = len(self.token_ids)
        self.token_ids.extend(self._close)
        self.inserted += len(self._close)

    def bound_answer(self, most_ids: int) -> None:
        """Forget what a trace without any thinking has beyond its first ids."""
        if not self._opened and self._reasoning_end is None:
            del self.token_ids[most_ids:]

    def trace(self) -> Trace:
        """The trace as it stands."""
        end = len(self.token_ids)
        if self._reasoning_end is not None:
            return Trace(self.token_ids, (self._reasoning_start, self._reasoning_end), (self.answer_start, end))
        if self._opened:
            return Trace(self.token_ids, (self._reasoning_start, end), (end, end))
        return Trace(self.token_ids, (0, end), (0, end))


def reasoning_of(trace: Trace) -> TokenIds:
    """The ids of the thinking; where the model closed it without a word, those of the answer."""
    start, stop = trace.reasoning if trace.reasoning[1] > trace.reasoning[0] else trace.answer
    return trace.token_ids[start:stop]


def cut_tail(trace: Trace, tail_ids: int, carry: Carry = Carry.REASONING) -> TokenIds:
    """The last `tail_ids` ids of what a rollout passes on.

    Args:
        trace: The rollout, finished or not.
        tail_ids: Most ids to keep, tau; the whole where it is shorter.
        carry: Reasoning, answer, or the answer where there is one.

    Returns:
        Ids; empty where there is nothing to pass on (`answer` of a rollout that wrote none).

    Raises:
        ValueError: If `tail_ids` is below 1.
    """
    if tail_ids < 1:
        raise ValueError(f"tail_ids={tail_ids} must be at least 1")
    answer = trace.token_ids[trace.answer[0] : trace.answer[1]]
    source = answer if carry is Carry.ANSWER or (carry is Carry.HYBRID and answer) else reasoning_of(trace)
    return source[-tail_ids:]


class LoopDetector:
    """Says when text repeats itself, by how well it compresses (after the ZAYA1-8B report: zlib, sync flush, 5 %).

    Two chunks of 2,048 characters in a row that compress below 5 % are a loop. The report's window of 1 KiB at level 1
    sees no period above some 90 characters at that ratio; 4 KiB at level 4 (the first with lazy matching) sees 1.5 % at
    periods up to 2,500. Saying a thing twice is no loop: in two whole chunks a copy would have to reach back further
    than the window.
    """

    def __init__(self) -> None:
        self._pending: list[str] = []
        self._length = 0
        self._flagged = False
        self._compressor: zlib._Compress | None = None

    def feed(self, text: str) -> bool:
        """Whether the text so far has begun to repeat itself."""
        self._pending.append(text)
        self._length += len(text)
        if self._length < _CHUNK:
            return False
        chunk = "".join(self._pending).encode("utf-8", "replace")
        self._pending.clear()
        self._length = 0
        if self._compressor is None:  # not before it is needed: 48 KB each, and most rollouts alive are young
            self._compressor = zlib.compressobj(level=4, wbits=-12, memLevel=6)
        size = len(self._compressor.compress(chunk)) + len(self._compressor.flush(zlib.Z_SYNC_FLUSH))
        before, self._flagged = self._flagged, size < _REPETITIVE * len(chunk)
        return before and self._flagged
