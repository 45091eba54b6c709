"""The answer that is sent while it is written, whichever way it is sent. Nothing here awaits."""

from __future__ import annotations

from typing import NamedTuple

from harness.events import AnswersAgreed, DeadlineReached, RolloutDelta, RolloutFailed, RunResumed
from harness.markovian_rsa import State
from harness.types import Slot
from mrsa_server.api.completion import Choice, Reply
from mrsa_server.api.errors import EngineFailed
from mrsa_server.api.tools import CallReader, Reading, read_forced
from mrsa_server.runs.runner import Item

_MOST_ENDS = 8  # places that are told apart where characters were sent in pieces


class Cut(NamedTuple):
    """An answer that was cut while it was sent: it stays as it stands, the better one goes into the report."""

    choice: Choice
    warning: str


class LiveAnswer:
    """The answer that is sent while it is written: what of it may go out, and whether the end confirms it.

    Attributes:
        slot: The rollout that it comes from, once anything was sent.
        calls: Tool calls sent so far.
        thought: Whether the thinking before it was seen.
        over: Whether the run is to end: what is lost now is not begun anew.
    """

    def __init__(self, reply: Reply) -> None:
        self.slot: Slot | None = None
        self.calls = 0
        self.thought = False
        self.over = False
        self._reply = reply
        self._chat = reply.chat
        rules = reply.chat.problem.answer
        # Rules reach the engine after the thinking alone: without any, the model may still be asked a second time.
        self._bound = rules.json_schema is not None or bool(rules.stop)
        self._reader = CallReader(reply.chat.tools) if reply.chat.tools and not reply.chat.forced else None
        self._seen: list[str] = []
        self._blank: list[str] = []  # space at the end is not sent before something follows it: answers are stripped

    def follow(self, item: Item) -> None:
        """Notice what happens to the rollout whose answer is being sent.

        Raises:
            EngineFailed: What was sent of it can no longer become a whole answer.
        """
        match item:
            case DeadlineReached() | AnswersAgreed():
                self.over = True
            case RolloutFailed(slot, error) if slot == self.slot:
                raise EngineFailed(f"the rollout whose answer was being sent failed: {error}")
            case RunResumed(slots) if not self.over and self.slot in slots:
                raise EngineFailed("the engine was lost after a part of the answer had been sent")

    def cut(self, state: State, best: Choice) -> Cut | None:
        """What stands of the answer that was being sent, where another one was chosen in the end."""
        if self.slot is None or self.slot == best.slot:
            return None
        slot = self.slot if self.slot in state.rollouts else best.slot
        warning = f"the answer that was being sent was cut; one of round {best.slot.round} is: {best.content}"
        return Cut(Choice("", (), "length", slot), warning)

    def take(self, item: RolloutDelta) -> Reading:
        """What may be sent after a delta of the answer."""
        if self._chat.forced or (self._bound and self._reply.thinks and not self.thought):
            return Reading("", ())
        text = item.text if self._seen else item.text.lstrip()
        written = text.rstrip()
        blank = text[len(written) :]
        if not written:
            if self._seen:
                self._blank.append(blank)
            return Reading("", ())
        text = "".join((*self._blank, written))
        self._blank = [blank]
        self.slot = item.slot
        return self._send(text)

    def rest(self, answer: str) -> Reading:
        """What is left to send of the whole answer.

        Raises:
            EngineFailed: What was sent is no part of it.
        """
        if self._chat.forced:
            reading = read_forced(answer, self._chat.tools)
            self.calls = len(reading.calls)
            return reading
        end = _end_of("".join(self._seen), answer)
        if end is None:
            raise EngineFailed("the answer became another one while it was sent")
        rest = answer[end:]
        first = self._send(rest) if rest else Reading("", ())
        if self._reader is None:
            return first
        last = self._count(self._reader.close())
        return Reading(first.text + last.text, first.calls + last.calls)

    def _send(self, text: str) -> Reading:
        self._seen.append(text)
        return self._count(self._reader.feed(text)) if self._reader else Reading(text, ())

    def _count(self, reading: Reading) -> Reading:
        self.calls += len(reading.calls)
        # Space between two calls is no text.
        return reading if reading.text.strip() or not self.calls else Reading("", reading.calls)


def _end_of(sent: str, answer: str) -> int | None:
    """Where in an answer ends what was sent of it; None where it is none of it.

    Text decoded piece by piece may differ in its spaces and in characters that were cut into pieces, each of which was
    sent as U+FFFD; and a string that stops the answer may have been sent before it was known as one.
    """
    sent = sent.rstrip("\ufffd")
    if answer.startswith(sent):
        return len(sent)
    ends: tuple[int, ...] = (
        0,
    )  # where it may end so far, ascending: a piece of a character is one of the answer's, or part of one
    for character in sent:
        if character.isspace():
            continue
        if len(ends) == 1 and answer[ends[0] : ends[0] + 1] == character:
            ends = (ends[0] + 1,)
            continue
        ends = tuple(sorted({_skip(answer, end) for end in ends}))
        if ends[0] == len(answer):
            break
        if character == "\ufffd":
            ends = tuple(sorted({*ends, *(min(end + 1, len(answer)) for end in ends)}))[-_MOST_ENDS:]
            continue
        ends = tuple(end + 1 for end in ends if answer[end : end + 1] == character)
        if not ends:
            return None
    return ends[-1]


def _skip(answer: str, at: int) -> int:
    while at < len(answer) and answer[at].isspace():
        at += 1
    return at
