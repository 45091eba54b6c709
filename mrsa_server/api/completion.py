"""A run that has ended -> the parts of a chat completion: choices, usage, and the report under `mrsa`."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import NamedTuple

import orjson

from harness.engine import Engine, EngineDead, EngineError
from harness.events import RunFinished
from harness.markovian_rsa import State
from harness.savings import savings
from harness.types import Finish, Rollout, Slot, TraceHeaders, Usage
from mrsa_server.api.responses_wire import ResponseForm
from mrsa_server.api.tools import Call, Reading, read_forced, read_free
from mrsa_server.api.wire import Chat, echo
from mrsa_server.runs.runner import Run
from mrsa_server.settings import Effort
from mrsa_server.tracing import noted


class Choice(NamedTuple):
    """One answer as a client gets it; `finish` is OpenAI's reason."""

    content: str
    calls: tuple[Call, ...]
    finish: str
    slot: Slot


@dataclass(slots=True)
class Reply:
    """A request, and what was made of it once the engine was up.

    Attributes:
        chat: The request.
        id: Of the response; the run's is in `mrsa`.
        created: Unix time in seconds.
        effort: The preset that filled the gaps.
        divisor: What the preset was divided by to fit the context.
        warnings: What was not taken literally.
        exact: Whether tails are cut in the model's own tokens.
        thinks: Whether the model has marks for its thinking.
        form: What `/v1/responses` alone knows of a request.
        trace: Of its run; none where nothing is traced.
    """

    chat: Chat
    id: str
    created: int
    effort: Effort = Effort.NONE
    divisor: int = 1
    warnings: tuple[str, ...] = ()
    exact: bool = True
    thinks: bool = False
    form: ResponseForm | None = None
    trace: TraceHeaders = ()

    @property
    def background(self) -> bool:
        """Whether its run goes on without a reader."""
        return self.form is not None and self.form.background

    @property
    def stored(self) -> bool:
        """Whether its run may be kept."""
        return self.form.stored if self.form is not None else self.chat.body.store is not False

    @property
    def metadata(self) -> dict[str, str]:
        """The client's own words about the request, those that are text."""
        given = self.form.metadata if self.form is not None else self.chat.body.metadata or {}
        return {name: value for name, value in given.items() if isinstance(value, str)}

    @property
    def notes(self) -> str:
        """What the engine decided of it, for those who tell the run again, and its trace, for who takes it up."""
        found = {"divisor": self.divisor, "warnings": self.warnings, "exact": self.exact, "thinks": self.thinks}
        return orjson.dumps(found | noted(self.trace)).decode()

    def recall(self, notes: str) -> None:
        """Take over what was noted; a run that was stored without notes has the usual ones."""
        if notes:
            found = orjson.loads(notes)
            self.divisor, self.warnings = found["divisor"], tuple(found["warnings"])
            self.exact, self.thinks = found["exact"], found["thinks"]

    @property
    def name(self) -> str:
        """The id without the word before it: what all that belongs to the response is named after."""
        return re.split("[-_]", self.id, maxsplit=1)[-1]

    def head(self, kind: str) -> dict[str, object]:
        """The fields that a completion and each of its chunks begin with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.chat.model}


def finish_reason(rollout: Rollout) -> str:
    """OpenAI's word for why an answer ended."""
    return "stop" if rollout.finish is Finish.STOP else "length"


def read_answer(chat: Chat, answer: str) -> Reading:
    """An answer taken apart by the rules that it was given."""
    if chat.forced:
        return read_forced(answer, chat.tools)
    return read_free(answer, chat.tools) if chat.tools else Reading(answer, ())


def chosen(state: State, count: int) -> tuple[Slot, ...]:
    """The slots whose answers become choices, the chosen one first; fewer than `count` where others were lost."""
    assert isinstance(state.outcome, RunFinished)  # anything else is an error response
    return state.outcome.candidates[:count]


def choices_of(state: State, chat: Chat) -> tuple[Choice, ...]:
    """The answers of a run that has ended."""
    found = []
    for slot in chosen(state, chat.body.n or 1):
        rollout = state.rollouts[slot]
        reading = read_answer(chat, rollout.answer)
        finish = "tool_calls" if reading.calls else finish_reason(rollout)
        found.append(Choice(reading.text, reading.calls, finish, slot))
    return tuple(found)


def answer_tokens(state: State, slots: tuple[Slot, ...]) -> int:
    """Tokens of the answers of these slots; all others of the run are reasoning."""
    return sum(
        state.rollouts[slot].usage.completion_tokens - state.rollouts[slot].usage.reasoning_tokens for slot in slots
    )


def usage_of(state: State, slots: tuple[Slot, ...]) -> dict[str, object]:
    """Every token of the run; all but the answers shown are reasoning."""
    usage = state.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.completion_tokens - answer_tokens(state, slots),
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def started(state: State, reply: Reply) -> dict[str, object]:
    """The report's part that is known before the first token."""
    return {
        "run_id": state.run_id,
        "params": echo(state.params, reply.effort),
        "preset_divisor": reply.divisor,
        "tails": "exact" if reply.exact else "approximate",
        "warnings": list(reply.warnings),
    }


def report(run: Run, reply: Reply) -> dict[str, object]:
    """The whole of `mrsa` in a response."""
    state = run.state
    assert state is not None  # it has ended
    assert isinstance(state.outcome, RunFinished)
    outcome = state.outcome
    skipped = state.skipped
    rounds: list[dict[str, object]] = []
    usage: list[dict[str, object]] = []
    taken = Counter(slot.round for slot in state.shortcuts)
    for number, stats in enumerate(state.stats):
        rounds.append(
            {
                "round": number,
                "rollouts": stats.started,
                "finished": stats.finished,
                "failed": stats.failed,
                "aborted": stats.aborted,
                "skipped": skipped[number],
                "agreed": taken[number],
                "looped": sum(rollout.loop for slot, rollout in state.rollouts.items() if slot.round == number),
                "tokens": stats.usage.completion_tokens,
                "seconds": round(run.seconds(number), 3),
            }
        )
        usage.append({"round": number, **_plain_usage(stats.usage)})
    return {
        **started(state, reply),
        "rounds": rounds,
        "answers": [
            {
                "round": slot.round,
                "index": slot.index,
                "votes": votes,
                "finish": state.rollouts[slot].finish.value,
            }
            for slot, votes in zip(outcome.candidates, outcome.votes, strict=True)
        ],
        "stopped": outcome.stopped.value if outcome.stopped else None,
        "saved": _saved(state),
        "lost_tokens": state.charged_tokens,  # at most so many: nobody knows what a lost server had generated
        "usage": usage,
    }


def _saved(state: State) -> dict[str, object]:
    """What lazy evaluation did without, and what each approximation that was asked for did."""
    found = dict(savings(state))
    unread = found.pop("unread")
    return {
        "rollouts": unread.rollouts,
        "tokens_estimate": unread.tokens_estimate,
        **{name: asdict(saving) for name, saving in found.items()},
    }


def _plain_usage(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
    }


def call_body(call: Call, id: str) -> dict[str, object]:
    """A tool call in OpenAI's shape."""
    return {"id": id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def call_id(reply: Reply, index: int, number: int) -> str:
    """The name of a call, unlike any other's."""
    return f"call_{reply.name[:24]}_{index}_{number}"


async def completion(run: Run, state: State, reply: Reply, engine: Engine) -> dict[str, object]:
    """The body of a response that is not streamed."""
    choices: list[dict[str, object]] = []
    found = choices_of(state, reply.chat)
    for index, choice in enumerate(found):
        message: dict[str, object] = {
            "role": "assistant",
            "content": choice.content if choice.content or not choice.calls else None,
            "refusal": None,
            "annotations": [],
        }
        if choice.calls:
            message["tool_calls"] = [
                call_body(call, call_id(reply, index, number)) for number, call in enumerate(choice.calls)
            ]
        reasoning = await thinking_of(run, choice.slot, engine)
        if reasoning:
            message["reasoning"] = message["reasoning_content"] = reasoning
        choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish})
    return {
        **reply.head("chat.completion"),
        "choices": choices,
        "usage": usage_of(state, tuple(choice.slot for choice in found)),
        "mrsa": report(run, reply),
    }


async def thinking_of(run: Run, slot: Slot, engine: Engine) -> str:
    """The thinking before an answer; empty where there is none, or none that could be decoded."""
    try:
        return await read_thinking(run, slot, engine)
    except EngineDead:
        return ""  # the answer is there: it is worth more than its thinking


async def read_thinking(run: Run, slot: Slot, engine: Engine) -> str:
    """The thinking before an answer; empty where there is none, or none that the engine can read.

    Raises:
        EngineDead: It cannot be told now.
    """
    trace = run.traces.get(slot)
    if trace is None or trace.reasoning == trace.answer:
        return ""
    start, stop = trace.reasoning
    try:
        return (await engine.decode(trace.token_ids[start:stop])).strip()
    except EngineError:
        return ""
