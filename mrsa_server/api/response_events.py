"""What happens in a run -> the events of a response, and the response itself. Nothing here awaits.

The order is the official one: one item after the other, each closed before the next is opened. Rounds are parts of the
reasoning item's summary, in their order, though rollouts of a later round may run before an earlier one has ended: what
they have to say waits. A response that is not streamed is what the last event of a late stream holds, so both are one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from harness.events import RolloutAborted, RolloutDelta, RolloutFinished, RunFinished, RunResumed, Stopped
from harness.markovian_rsa import RoundStats, State
from harness.types import Finish, Params, Rollout, Usage
from mrsa_server.api.completion import Choice, Reply, answer_tokens, call_id, choices_of, report, started
from mrsa_server.api.errors import ApiError
from mrsa_server.api.live import LiveAnswer
from mrsa_server.api.progress import answer_of, tail_text, told
from mrsa_server.api.responses_wire import ResponseForm
from mrsa_server.api.sse import DONE, named_frame
from mrsa_server.api.tools import Call, Reading
from mrsa_server.runs.runner import Item, Prepared, RoundFinished, RoundStarted, Run

_MOST_ANSWERS = 5  # different ones that a round's summary names
_SNIPPET = 80  # characters of one of them
_PIECE = 100  # characters

Fields = dict[str, object]


@dataclass(slots=True)
class _Part:
    """The part of the summary that is open."""

    round: int
    index: int
    texts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Round:
    """What waits for the part of a round to open."""

    texts: list[str] = field(default_factory=list)
    figures: str | None = None  # it has ended


class ResponseEvents:
    """Turns one run into the events of one response, item by item.

    With one candidate its answer is written as it comes; with several only the end tells which is the answer.

    Args:
        run: What is read.
        reply: What it answers.
        late: Whether its beginning is not read: then nothing is written as it comes, and the end holds everything.
        after: The number of the last event that its reader has; those up to it are counted, and not written.
    """

    def __init__(self, run: Run, reply: Reply, late: bool = False, after: int = -1) -> None:
        assert reply.form is not None  # `read_response` gives it one
        self._late = late
        self._after = after
        self._run = run
        self._reply = reply
        self._form: ResponseForm = reply.form
        self._live = LiveAnswer(reply)
        self._params: Params | None = None
        self._number = 0  # of the next event
        self._output: list[Fields] = []  # items that are closed
        self._begun = False
        # The reasoning item.
        self._reasoning: list[Fields] | None = None  # its parts that are closed; None while it is not open
        self._reasoned = False  # it is closed for good
        self._part: _Part | None = None
        self._waiting: dict[int, _Round] = {}
        self._answers: dict[int, Counter[str]] = {}
        # The message item.
        self._text: list[str] | None = None  # None while none is open
        self._messages = 0
        self._calls = 0
        self._body: Fields = {}

    @property
    def body(self) -> Fields:
        """The response, once its last event was written."""
        return self._body

    @property
    def last(self) -> int:
        """The number of the last event so far; -1 before the first."""
        return self._number - 1

    def so_far(self, status: str) -> Fields:
        """The response while its run goes on."""
        return self._response(status, mrsa=started(state, self._reply) if (state := self._run.state) else None)

    def queued(self) -> Iterator[bytes]:
        """The first frames of a response whose run goes on in the background."""
        yield self._event("response.created", response=self._response("queued"))
        yield self._event("response.queued", response=self._response("queued"))

    def take(self, item: Item) -> Iterator[bytes]:
        """The frames of an item.

        Raises:
            EngineFailed: What was sent of the answer can no longer become a whole one.
        """
        self._live.follow(item)
        if isinstance(item, Prepared):
            self._params = item.state.params
            yield from self._begin()
            yield from self._own({"event": "run.started", **started(item.state, self._reply)})
            return
        if isinstance(item, RunResumed) and self._live.over:  # nothing is asked for again
            return
        if isinstance(item, RolloutDelta):
            if self._form.own_deltas:
                yield from self._own({**(told(item) or {}), "text": item.text})
        elif self._form.own_events and (event := told(item)) is not None:
            yield from self._own(event)
        if self._late:
            return
        match item:
            case RolloutDelta():
                yield from self._delta(item)
            case RoundStarted(round):
                if not self._answering(round):
                    yield from self._open_round(round)
            case RolloutFinished(rollout) | RolloutAborted(rollout):
                yield from self._rollout(rollout)
            case RoundFinished(round, stats, seconds):
                if not self._answering(round):
                    yield from self._end_round(round, self._figures(round, stats, seconds))

    def finish(self, state: State, thinking: str = "") -> Iterator[bytes]:
        """The frames after the run's end.

        Args:
            state: The run's last.
            thinking: Before the answer, for a reader who has not seen it written.

        Raises:
            EngineFailed: What was sent is not the answer.
        """
        choice = choices_of(state, self._reply.chat)[0]
        warnings = self._reply.warnings
        cut = self._live.cut(state, choice)
        if cut is not None:
            choice, warnings = cut.choice, (*warnings, cut.warning)
            reading = Reading("", ())
        elif self._live.slot is None:
            reading = Reading(choice.content, choice.calls)
        else:
            reading = self._live.rest(state.rollouts[choice.slot].answer)
        if self._late:
            yield from self._rounds_of(state, thinking)
        elif not self._live.thought:  # else it was written as it came
            yield from self._think(state.params.rounds, thinking)
        yield from self._say_answer(reading)
        if not self._messages and not self._calls:
            yield from self._open_message()
        whole = choice.finish != "length"
        yield from self._close_reasoning()
        yield from self._close_message("completed" if whole else "incomplete")
        found = {**report(self._run, self._reply), "warnings": list(warnings)}
        yield from self._own({"event": "run.finished", **found})
        status = "completed" if whole else "incomplete"
        self._body = self._response(
            status,
            completed_at=int(self._run.ended_at or time.time()) if whole else None,
            incomplete_details=None if whole else {"reason": _reason(state, choice)},
            usage=_usage(state.usage, answer_tokens(state, (choice.slot,))),
            mrsa=found,
        )
        yield self._event(f"response.{status}", response=self._body)
        yield DONE

    def fail(self, error: ApiError) -> bytes:
        """The frames after an error: both SDKs raise at the first of them, the second ends the response."""
        return b"".join(
            (
                *self._begin(),
                *self._break_off(),
                self._event("error", error=error.body()["error"]),
                self._end("failed", "failed", {"code": error.code or "server_error", "message": error.message}),
                DONE,
            )
        )

    def cancel(self) -> bytes:
        """The frames after a run that was cancelled; no event is called so, and both SDKs choke on unknown ones."""
        return b"".join((*self._begin(), *self._break_off(), self._end("incomplete", "cancelled"), DONE))

    def _break_off(self) -> Iterator[bytes]:
        yield from self._close_reasoning("incomplete")
        yield from self._close_message("incomplete")

    def _end(self, event: str, status: str, error: Fields | None = None) -> bytes:
        """The last event of a response without an answer."""
        state = self._run.state
        usage = _usage(state.usage, 0) if state is not None else None
        self._body = self._response(status, error=error, usage=usage)
        return self._event(f"response.{event}", response=self._body)

    def _begin(self) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            if not self._form.background:  # one in the background has begun as `queued`
                yield self._event("response.created", response=self._response("in_progress"))
            yield self._event("response.in_progress", response=self._response("in_progress"))

    # The rounds, as parts of the reasoning item.

    def _answering(self, round: int) -> bool:
        """Whether a round is the answer alone: what is said of it is its thinking, and that as it comes."""
        params = self._params
        assert params is not None  # `Prepared` comes first
        return round == params.rounds and params.final_candidates == 1

    def _heading(self, round: int) -> str:
        params = self._params
        assert params is not None  # `Prepared` comes first
        if not params.rounds and self._answering(round):
            return ""
        what = ", the answer" if self._answering(round) else f" of {params.rounds}"
        return f"**Round {round}{what}**\n\n"

    def _open_round(self, round: int) -> Iterator[bytes]:
        if self._reasoned or round in self._waiting:
            return
        if self._part is not None:
            self._waiting[round] = _Round()
            return
        if self._reasoning is None:
            self._reasoning = []
            yield self._event("response.output_item.added", output_index=len(self._output), item=self._reasoning_item())
        self._part = _Part(round, len(self._reasoning))
        yield self._part_event("response.reasoning_summary_part.added", part=_summary(""))
        yield from self._say(round, self._heading(round))

    def _say(self, round: int, text: str) -> Iterator[bytes]:
        """Text of a round; it waits where the part of an earlier one is open."""
        part = self._part
        if not text or part is None:
            return
        if round > part.round:
            if round in self._waiting:
                self._waiting[round].texts.append(text)
            return
        part.texts.append(text)
        if self._form.summary is not None:
            yield self._part_event("response.reasoning_summary_text.delta", delta=text)

    def _end_round(self, round: int, figures: str) -> Iterator[bytes]:
        if (waiting := self._waiting.get(round)) is not None:
            waiting.figures = figures
            return
        if self._part is None or self._part.round != round:
            return
        yield from self._say(round, figures)
        yield from self._close_part()
        if self._waiting:
            following = min(self._waiting)
            held = self._waiting.pop(following)
            yield from self._open_round(following)
            yield from self._say(following, "".join(held.texts))
            if held.figures is not None:
                yield from self._end_round(following, held.figures)

    def _close_part(self) -> Iterator[bytes]:
        part = self._part
        assert part is not None  # asked for where one is open
        assert self._reasoning is not None  # and so is its item
        text = "".join(part.texts).rstrip()
        if self._form.summary is not None:
            yield self._part_event("response.reasoning_summary_text.done", text=text)
        yield self._part_event("response.reasoning_summary_part.done", part=_summary(text))
        self._reasoning.append(_summary(text))
        self._part = None

    def _close_rounds(self) -> Iterator[bytes]:
        """End every round that is open: an answer is there, or none will be."""
        while self._part is not None:
            round = self._part.round
            yield from self._end_round(round, "" if self._answering(round) else self._figures_now(round))

    def _close_reasoning(self, status: str = "completed") -> Iterator[bytes]:
        yield from self._close_rounds()
        self._reasoned = True
        if self._reasoning is not None:
            item = self._reasoning_item(status)
            yield self._event("response.output_item.done", output_index=len(self._output), item=item)
            self._output.append(item)
            self._reasoning = None

    def _reasoning_item(self, status: str = "in_progress") -> Fields:
        return {
            "id": f"rs_{self._reply.name}",
            "type": "reasoning",
            "status": status,
            "summary": list(self._reasoning or ()),
        }

    def _part_event(self, name: str, **fields: object) -> bytes:
        assert self._part is not None  # asked for where one is open
        place: Fields = {"item_id": f"rs_{self._reply.name}", "output_index": len(self._output)}
        return self._event(name, **place, summary_index=self._part.index, **fields)

    def _rollout(self, rollout: Rollout) -> Iterator[bytes]:
        round = rollout.slot.round
        self._count(rollout)
        if self._form.summary == "detailed" and not self._last(round) and rollout.tail:
            yield from self._say(round, tail_text(rollout))

    def _count(self, rollout: Rollout) -> None:
        if (answer := answer_of(rollout)) is not None:
            self._answers.setdefault(rollout.slot.round, Counter())[answer[:_SNIPPET]] += 1

    def _last(self, round: int) -> bool:
        assert self._params is not None  # `Prepared` comes first
        return round == self._params.rounds

    def _figures(self, round: int, stats: RoundStats, seconds: float) -> str:
        """A round in one line or two: what has ended, what it took, which answers were seen."""
        words = [f"{stats.finished:,} rollout{'' if stats.finished == 1 else 's'} ended"]
        words += [f"{stats.failed:,} failed"] if stats.failed else []
        words += [f"{stats.aborted:,} cut"] if stats.aborted else []
        line = f"{', '.join(words)}; {stats.usage.completion_tokens:,} tokens in {seconds:.1f} s."
        answers = self._answers.get(round)
        if not answers:
            return line
        shown = ", ".join(f"{answer} ({count})" for answer, count in answers.most_common(_MOST_ANSWERS))
        more = len(answers) - _MOST_ANSWERS
        return f"{line}\nAnswers: {shown}{f', and {more} more' if more > 0 else ''}."

    def _figures_now(self, round: int) -> str:
        state = self._run.state
        stats = state.stats[round] if state is not None and round < len(state.stats) else RoundStats()
        return self._figures(round, stats, self._run.seconds(round))

    def _rounds_of(self, state: State, thinking: str) -> Iterator[bytes]:
        """The whole reasoning of a run that has ended, for a reader who has not seen it."""
        slots = sorted(state.rollouts)
        for slot in slots:
            self._count(state.rollouts[slot])
        for round in sorted(self._run.clocks):
            if self._answering(round):
                continue
            yield from self._open_round(round)
            for slot in slots:
                rollout = state.rollouts[slot]
                if slot.round == round and not self._last(round) and rollout.tail and self._form.summary == "detailed":
                    yield from self._say(round, tail_text(rollout))
            yield from self._end_round(round, self._figures_now(round))
        yield from self._think(state.params.rounds, thinking)

    def _think(self, round: int, thinking: str) -> Iterator[bytes]:
        """The whole thinking before the answer, for a reader who has not seen it written."""
        if thinking and self._shows_thinking and self._answering(round):
            yield from self._close_rounds()
            yield from self._open_round(round)
            for piece in self._pieces(thinking):
                yield from self._say(round, piece)

    # The answer.

    @property
    def _shows_thinking(self) -> bool:
        return self._form.summary in ("auto", "detailed")

    @property
    def reads_thinking(self) -> bool:
        """Whether `finish` makes anything of the thinking before the answer; known once the run has begun."""
        return self._shows_thinking and self._params is not None and self._answering(self._params.rounds)

    def _delta(self, item: RolloutDelta) -> Iterator[bytes]:
        round = item.slot.round
        if not self._answering(round):
            return
        if item.answer:
            yield from self._say_answer(self._live.take(item))
            return
        self._live.thought = True
        if self._shows_thinking and not self._reasoned:
            if self._part is None or self._part.round != round:
                yield from self._close_rounds()
                yield from self._open_round(round)
            assert self._part is not None  # it is open now
            fresh = len(self._part.texts) <= bool(self._heading(round))
            yield from self._say(round, item.text.lstrip() if fresh else item.text)

    def _say_answer(self, reading: Reading) -> Iterator[bytes]:
        if reading.text:
            yield from self._open_message()
            assert self._text is not None  # it is open now
            for piece in self._pieces(reading.text):
                self._text.append(piece)
                yield self._message_event("response.output_text.delta", delta=piece, logprobs=[])
        for call in reading.calls:
            yield from self._call(call)

    def _pieces(self, text: str) -> Iterator[str]:
        """A long text as a stream in the background has it, which may be cut and gone on with; else as it is."""
        if not self._form.background:
            yield text
            return
        for start in range(0, len(text), _PIECE):
            yield text[start : start + _PIECE]

    def _open_message(self) -> Iterator[bytes]:
        if self._text is not None:
            return
        yield from self._close_reasoning()
        self._text = []
        self._messages += 1
        item = self._message("in_progress", [])
        yield self._event("response.output_item.added", output_index=len(self._output), item=item)
        yield self._message_event("response.content_part.added", part=_output_text(""))

    def _close_message(self, status: str) -> Iterator[bytes]:
        if self._text is None:
            return
        text = "".join(self._text)
        yield self._message_event("response.output_text.done", text=text, logprobs=[])
        yield self._message_event("response.content_part.done", part=_output_text(text))
        item = self._message(status, [_output_text(text)])
        yield self._event("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)
        self._text = None

    def _message(self, status: str, content: list[Fields]) -> Fields:
        return {
            "id": self._message_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    @property
    def _message_id(self) -> str:
        return f"msg_{self._reply.name}" + (f"_{self._messages}" if self._messages > 1 else "")

    def _message_event(self, name: str, **fields: object) -> bytes:
        place: Fields = {"item_id": self._message_id, "output_index": len(self._output)}
        return self._event(name, **place, content_index=0, **fields)

    def _call(self, call: Call) -> Iterator[bytes]:
        yield from self._close_reasoning()
        yield from self._close_message("completed")
        id, index = f"fc_{self._reply.name}_{self._calls}", len(self._output)
        item: Fields = {
            "id": id,
            "type": "function_call",
            "status": "in_progress",
            "call_id": call_id(self._reply, 0, self._calls),
            "name": call.name,
            "arguments": "",
        }
        self._calls += 1
        place: Fields = {"item_id": id, "output_index": index}
        yield self._event("response.output_item.added", output_index=index, item=item)
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        yield self._event("response.function_call_arguments.done", **place, name=call.name, arguments=call.arguments)
        done = {**item, "status": "completed", "arguments": call.arguments}
        yield self._event("response.output_item.done", output_index=index, item=done)
        self._output.append(done)

    # The response.

    def _own(self, event: Fields) -> Iterator[bytes]:
        """An event of ours: what chunks of chat hold under `mrsa`, for those who have asked."""
        if self._form.own_events:
            yield self._event(f"mrsa:{event['event']}", mrsa=event)

    def _event(self, type: str, /, **fields: object) -> bytes:
        number, self._number = self._number, self._number + 1
        if number <= self._after:
            return b""
        return named_frame(type, {"type": type, "sequence_number": number, **fields})

    def _response(
        self,
        status: str,
        *,
        completed_at: int | None = None,
        error: Fields | None = None,
        incomplete_details: Fields | None = None,
        usage: Fields | None = None,
        mrsa: Fields | None = None,
    ) -> Fields:
        """The response as it stands."""
        body: Fields = {
            "id": self._reply.id,
            "object": "response",
            "created_at": self._reply.created,
            "status": status,
            "completed_at": completed_at,
            "error": error,
            "incomplete_details": incomplete_details,
            "model": self._reply.chat.model,
            "output": list(self._output),
            **self._form.echo,
            "usage": usage,
        }
        return body if mrsa is None else {**body, "mrsa": mrsa}


def _summary(text: str) -> Fields:
    return {"type": "summary_text", "text": text}


def _output_text(text: str) -> Fields:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _reason(state: State, choice: Choice) -> str:
    """Why an answer is not whole: what the run was stopped by, else its own limit."""
    assert isinstance(state.outcome, RunFinished)  # anything else is an error
    stopped, finish = state.outcome.stopped, state.rollouts[choice.slot].finish
    if stopped is Stopped.BUDGET or (stopped is not None and finish is not Finish.LENGTH):
        return stopped.value
    return "max_output_tokens" if finish is Finish.LENGTH else finish.value


def _usage(usage: Usage, answer_tokens: int) -> Fields:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.completion_tokens - answer_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
