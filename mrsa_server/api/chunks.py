"""What happens in a run -> the chunks of a chat stream. Nothing here awaits.

Every extension rides in a full chunk with one delta, under the one key `mrsa`: that is what both official SDKs accept.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.events import (
    AnswersAgreed,
    DeadlineReached,
    QuorumReached,
    RolloutAborted,
    RolloutDelta,
    RolloutFailed,
    RolloutFinished,
    RunResumed,
    SetSkipped,
    ToppedUp,
)
from harness.markovian_rsa import State
from harness.selection import extract_answer
from harness.types import Params, Rollout, Slot
from mrsa_server.api.completion import (
    Choice,
    Reply,
    call_body,
    call_id,
    choices_of,
    report,
    started,
    usage_of,
)
from mrsa_server.api.errors import EngineFailed
from mrsa_server.api.sse import DONE, frame
from mrsa_server.api.tools import CallReader, Reading, read_forced
from mrsa_server.runs.runner import Item, Prepared, RoundFinished, RoundStarted, Run

_MOST_ENDS = 8  # places that are told apart where characters were sent in pieces
_SNIPPET = 200  # characters of an answer or an error in a progress event


class ChatChunks:
    """Turns one run into one stream, item by item.

    With one candidate its answer is written as it comes; with several only the end tells which is the answer.

    Args:
        run: What is read.
        reply: What it answers.
        late: Whether its beginning is not read: then nothing is written as it comes, and the end holds the answer.
    """

    def __init__(self, run: Run, reply: Reply, late: bool = False) -> None:
        self._late = late
        self._over = False  # a deadline ends it: what is lost now is not begun anew
        self._notes: list[str] = []
        self._run = run
        self._reply = reply
        self._chat = reply.chat
        self._mode = _mode(reply)
        options = reply.chat.body.stream_options
        self._with_usage = bool(options and options.include_usage)
        self._head = reply.head("chat.completion.chunk")
        self._params: Params | None = None
        self._live = _LiveAnswer(reply)
        self._headed = False

    def take(self, item: Item) -> Iterator[bytes]:
        """The frames of an item.

        Raises:
            EngineFailed: What was sent of the answer can no longer become a whole one.
        """
        match item:
            case Prepared(state):
                self._params = state.params
                extension = {"event": "run.started", **started(state, self._reply)}
                yield self._chunk({"role": "assistant", "content": ""}, extension)
            case RoundStarted(round, rollouts):
                yield self._event("round.started", round=round, rollouts=rollouts)
            case RolloutDelta():
                if not self._late:
                    yield from self._delta(item)
            case DeadlineReached():
                self._over = True
            case RolloutFinished(rollout) | RolloutAborted(rollout):
                yield self._rollout(rollout)
            case RolloutFailed(slot, error, usage, seconds):
                if self._live.slot == slot:
                    raise EngineFailed(f"the rollout whose answer was being sent failed: {error}")
                yield self._event(
                    "rollout.failed",
                    round=slot.round,
                    index=slot.index,
                    tokens=usage.completion_tokens,
                    seconds=_ms(seconds),
                    error=error[:_SNIPPET],
                )
            case RunResumed(slots):
                if self._over:  # nothing is asked for again
                    return
                if self._live.slot in slots:
                    raise EngineFailed("the engine was lost after a part of the answer had been sent")
                yield self._event("run.resumed", rollouts=len(slots))
            case AnswersAgreed(slots, ended):
                self._over = True
                yield self._event("answers.agreed", round=slots[0].round, votes=len(slots), ended=ended)
            case SetSkipped(slot, source):
                yield self._event("set.skipped", round=slot.round, index=slot.index, source=source.index)
            case QuorumReached(round, stragglers):
                yield self._event("quorum.reached", round=round, stragglers=len(stragglers))
            case ToppedUp(slots):
                yield self._event("population.topped_up", rollouts=len(slots))
            case RoundFinished(round, stats, seconds):
                yield self._event(
                    "round.finished",
                    round=round,
                    rollouts=stats.started,
                    finished=stats.finished,
                    failed=stats.failed,
                    tokens=stats.usage.completion_tokens,
                    seconds=_ms(seconds),
                )

    def finish(self, state: State) -> Iterator[bytes]:
        """The frames after the run's end.

        Raises:
            EngineFailed: What was sent is not the answer.
        """
        choices = choices_of(state, self._chat)
        live = self._live.slot
        if live is not None and live != choices[0].slot:
            choices = (self._cut(state, live, choices[0]),)
        else:
            for index, choice in enumerate(choices):
                role: dict[str, object] = {"role": "assistant"} if index else {}
                first = index == 0
                reading = (
                    self._live.rest(state.rollouts[choice.slot].answer)
                    if first
                    else Reading(choice.content, choice.calls)
                )
                yield from self._text(reading, index, role)
        found = report(self._run, self._reply)
        yield self._event("run.finished", **{**found, "warnings": [*self._reply.warnings, *self._notes]})
        for index, choice in enumerate(choices):
            yield self._chunk({}, index=index, finish=choice.finish)
        if self._with_usage:
            slots = tuple(choice.slot for choice in choices)
            yield frame({**self._head, "choices": [], "usage": usage_of(state, slots)})
        yield DONE

    def _cut(self, state: State, live: Slot, best: Choice) -> Choice:
        """The answer that was being sent was cut: it stays as it stands, the better one goes into the report."""
        text = f"the answer that was being sent was cut; one of round {best.slot.round} is: {best.content}"
        self._notes.append(text)
        slot = live if live in state.rollouts else best.slot
        return Choice("", (), "length", slot)

    def _delta(self, item: RolloutDelta) -> Iterator[bytes]:
        params = self._params
        assert params is not None  # `Prepared` comes first
        final = item.slot.round == params.rounds and params.final_candidates == 1
        extension: dict[str, object] | None = None
        if self._mode == "rollouts":
            extension = {
                "event": "rollout.delta",
                "round": item.slot.round,
                "index": item.slot.index,
                "tokens": item.tokens,
                "answer": item.answer,
            }
        if final and item.answer:
            yield from self._text(self._live.take(item), 0, {}, extension)
        elif final or extension is not None:
            self._live.thought = self._live.thought or final
            text = item.text
            if final and self._mode == "rounds" and params.rounds and not self._headed:
                self._headed = True
                text = f"[round {params.rounds}, the answer]\n{text.lstrip()}"
            yield self._chunk({"reasoning": text, "reasoning_content": text}, extension)

    def _text(
        self, reading: Reading, index: int, role: dict[str, object], extension: dict[str, object] | None = None
    ) -> Iterator[bytes]:
        if reading.text:
            yield self._chunk({**role, "content": reading.text}, extension, index=index)
        first = self._live.calls - len(reading.calls) if index == 0 else 0
        for number, call in enumerate(reading.calls, first):
            body = {"index": number, **call_body(call, call_id(self._reply, index, number))}
            yield self._chunk({**role, "tool_calls": [body]}, extension, index=index)

    def _rollout(self, rollout: Rollout) -> bytes:
        params, slot = self._params, rollout.slot
        assert params is not None  # `Prepared` comes first
        extension: dict[str, object] = {
            "event": "rollout.finished",
            "round": slot.round,
            "index": slot.index,
            "tokens": rollout.usage.completion_tokens,
            "seconds": _ms(rollout.seconds),
            "finish": rollout.finish.value,
        }
        answer = extract_answer(rollout.answer) if rollout.answer else None
        if answer is not None:
            extension["answer"] = answer[:_SNIPPET]
        if self._mode != "rounds" or slot.round == params.rounds or not rollout.tail:
            return self._chunk({}, extension)
        tokens = f"{rollout.usage.completion_tokens:,}"
        heading = f"[round {slot.round}, rollout {slot.index}: {tokens} tokens]"
        text = f"{heading}\n{rollout.tail.text}\n\n"
        return self._chunk({"reasoning": text, "reasoning_content": text}, extension)

    def _event(self, name: str, **fields: object) -> bytes:
        return self._chunk({}, {"event": name, **fields})

    def _chunk(
        self,
        delta: dict[str, object],
        extension: dict[str, object] | None = None,
        *,
        index: int = 0,
        finish: str | None = None,
    ) -> bytes:
        chunk: dict[str, object] = {
            **self._head,
            "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}],
        }
        if self._with_usage:
            chunk["usage"] = None
        if extension is not None:
            chunk["mrsa"] = extension
        return frame(chunk)


class _LiveAnswer:
    """The answer that is sent while it is written: what of it may go out, and whether the end confirms it.

    Attributes:
        slot: The rollout that it comes from, once anything was sent.
        calls: Tool calls sent so far.
        thought: Whether the thinking before it was seen.
    """

    def __init__(self, reply: Reply) -> None:
        self.slot: Slot | None = None
        self.calls = 0
        self.thought = False
        self._reply = reply
        self._chat = reply.chat
        rules = reply.chat.problem.answer
        # Rules reach the engine after the thinking alone: without any, the model may still be asked a second time.
        self._bound = rules.json_schema is not None or bool(rules.stop)
        self._reader = CallReader(reply.chat.tools) if reply.chat.tools and not reply.chat.forced else None
        self._seen: list[str] = []
        self._blank: list[str] = []  # space at the end is not sent before something follows it: answers are stripped

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


def _mode(reply: Reply) -> str:
    """Which reasoning is streamed: what of `mrsa.stream` stands in the request."""
    mrsa = reply.chat.body.mrsa
    return "rounds" if mrsa is None or isinstance(mrsa, bool) else mrsa.stream or "rounds"


def _ms(seconds: float) -> float:
    return round(seconds, 3)
