"""What happens in a run -> the chunks of a chat stream. Nothing here awaits.

Every extension rides in a full chunk with one delta, under the one key `mrsa`: that is what both official SDKs accept.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.events import RolloutAborted, RolloutDelta, RolloutFinished, RunResumed
from harness.markovian_rsa import State
from harness.types import Params, Rollout
from mrsa_server.api.completion import (
    Reply,
    call_body,
    call_id,
    choices_of,
    report,
    started,
    usage_of,
)
from mrsa_server.api.errors import ApiError
from mrsa_server.api.live import LiveAnswer
from mrsa_server.api.progress import tail_text, told
from mrsa_server.api.sse import DONE, error_frame, frame
from mrsa_server.api.tools import Reading
from mrsa_server.runs.runner import Item, Prepared, Run


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
        self._run = run
        self._reply = reply
        self._chat = reply.chat
        self._mode = _mode(reply)
        options = reply.chat.body.stream_options
        self._with_usage = bool(options and options.include_usage)
        self._head = reply.head("chat.completion.chunk")
        self._params: Params | None = None
        self._live = LiveAnswer(reply)
        self._headed = False

    def take(self, item: Item) -> Iterator[bytes]:
        """The frames of an item.

        Raises:
            EngineFailed: What was sent of the answer can no longer become a whole one.
        """
        self._live.follow(item)
        match item:
            case Prepared(state):
                self._params = state.params
                extension = {"event": "run.started", **started(state, self._reply)}
                yield self._chunk({"role": "assistant", "content": ""}, extension)
            case RolloutDelta():
                if not self._late:
                    yield from self._delta(item)
            case RolloutFinished(rollout) | RolloutAborted(rollout):
                yield self._rollout(item, rollout)
            case RunResumed() if self._live.over:  # nothing is asked for again
                return
            case _:
                if (event := told(item)) is not None:
                    yield self._chunk({}, event)

    def finish(self, state: State) -> Iterator[bytes]:
        """The frames after the run's end.

        Raises:
            EngineFailed: What was sent is not the answer.
        """
        choices, warnings = choices_of(state, self._chat), self._reply.warnings
        if (cut := self._live.cut(state, choices[0])) is not None:
            choices, warnings = (cut.choice,), (*warnings, cut.warning)
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
        yield self._chunk({}, {"event": "run.finished", **found, "warnings": list(warnings)})
        for index, choice in enumerate(choices):
            yield self._chunk({}, index=index, finish=choice.finish)
        if self._with_usage:
            slots = tuple(choice.slot for choice in choices)
            yield frame({**self._head, "choices": [], "usage": usage_of(state, slots)})
        yield DONE

    def fail(self, error: ApiError) -> bytes:
        """The frame after an error."""
        return error_frame(error)

    def _delta(self, item: RolloutDelta) -> Iterator[bytes]:
        params = self._params
        assert params is not None  # `Prepared` comes first
        final = item.slot.round == params.rounds and params.final_candidates == 1
        extension: dict[str, object] | None = None
        if self._mode == "rollouts":
            extension = told(item)
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

    def _rollout(self, item: Item, rollout: Rollout) -> bytes:
        params = self._params
        assert params is not None  # `Prepared` comes first
        if self._mode != "rounds" or rollout.slot.round == params.rounds or not rollout.tail:
            return self._chunk({}, told(item))
        text = tail_text(rollout)
        return self._chunk({"reasoning": text, "reasoning_content": text}, told(item))

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


def _mode(reply: Reply) -> str:
    """Which reasoning is streamed: what of `mrsa.stream` stands in the request."""
    mrsa = reply.chat.body.mrsa
    return "rounds" if mrsa is None or isinstance(mrsa, bool) else mrsa.stream or "rounds"
