"""Stored runs -> rows of training data: the prompts that the server sent, and what the model wrote to them.

The rows are trl's (version 1.16; its page "Dataset formats and types", https://huggingface.co/docs/trl/dataset_formats).
`SFTTrainer` takes conversational prompt-completion, `{"prompt": [message, ...], "completion": [message]}`, and learns
the completion alone; `tools` may be JSON text. `GRPOTrainer` and `RLOOTrainer` take conversational prompt-only,
`{"prompt": [message, ...]}`. All further columns are ours: SFT drops them, GRPO hands them to its reward functions.
Every row has the same columns of the same types and none is null, since `datasets` takes a column's type from the
first rows of a file.

Nothing is approximated: what cannot be told exactly is left out and counted.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import orjson

from harness.engine import Engine, EngineError
from harness.events import RunFinished, RunStarted
from harness.markovian_rsa import Retraced, State, answer_of, retrace
from harness.prompts import Templates
from harness.run import Judge, judged
from harness.types import Finish, Rollout, RolloutRequest, Slot, Trace
from mrsa_server.engines.openai_stream import CLOSE, OPEN
from mrsa_server.engines.prompting import ChatMessage, chat_messages, neutralise, with_arguments
from mrsa_server.runs.codec import Undecodable

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.store import RunStore, RunSummary

# JSON text of no tools: trl reads a text as JSON, and a text in every row keeps the column's type.
_NO_TOOLS = "null"


class Form(StrEnum):
    """For which kind of training."""

    SFT = "sft"
    RL = "rl"


class Rounds(StrEnum):
    """Which rounds give rows."""

    AGGREGATION = "aggregation"  # all but round 0
    FINAL = "final"  # the last one, be it round 0
    ALL = "all"


class Only(StrEnum):
    """Which rollouts give rows of `Form.SFT`."""

    WHOLE = "whole"  # those that the model ended itself: trl puts an end of turn after every completion
    AGREEING = "agreeing"  # of these, those with the run's own answer
    ALL = "all"  # those that were cut too


class Thinking(StrEnum):
    """Where the thinking of a completion goes."""

    INLINE = "inline"  # into the content, in its marks
    FIELD = "field"  # into `reasoning_content`
    NONE = "none"  # nowhere


class Skipped(StrEnum):
    """Why a run or one of its rollouts gives no row."""

    GOING_ON = "going_on"
    NO_LOG = "no_log"  # it ended before it began
    OTHER_VERSION = "other_version"
    OTHER_PROMPTS = "other_prompts"
    NO_ROUND = "no_round"
    NO_TRACES = "no_traces"
    NO_ANSWER = "no_answer"  # nothing that a reward could compare with
    # of one rollout
    CUT = "cut"
    OTHER_ANSWER = "other_answer"
    NO_TRACE = "no_trace"
    OTHER_WORDS = "other_words"  # this engine does not read its ids as the words that were stored
    NOT_UNICODE = "not_unicode"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is exported; `only` and `thinking` are for `Form.SFT`."""

    form: Form
    rounds: Rounds = Rounds.AGGREGATION
    only: Only = Only.WHOLE
    thinking: Thinking = Thinking.INLINE


@dataclass(slots=True)
class Tally:
    """What came of an export so far; `runs` are those that gave a row."""

    rows: int = 0
    runs: int = 0
    skipped_runs: Counter[Skipped] = field(default_factory=Counter)
    skipped_rollouts: Counter[Skipped] = field(default_factory=Counter)

    def body(self) -> dict[str, object]:
        """As a client reads it."""
        return {
            "object": "export.summary",
            "rows": self.rows,
            "runs": self.runs,
            "skipped_runs": {reason.value: count for reason, count in sorted(self.skipped_runs.items())},
            "skipped_rollouts": {reason.value: count for reason, count in sorted(self.skipped_rollouts.items())},
        }


class Exporter:
    """Makes rows of runs, one run after the other.

    Args:
        store: Where they are.
        engine: Reads the ids of traces; used for `Form.SFT` alone.
        templates: This server's wording.
        judge: Says which answers are equal.
        wanted: What is exported.
    """

    def __init__(self, store: RunStore, engine: Engine, templates: Templates, judge: Judge, wanted: Wanted) -> None:
        self.tally = Tally()
        self._store = store
        self._engine = engine
        self._templates = templates
        self._judge = judge
        self._wanted = wanted

    async def lines(self, run: RunSummary) -> AsyncGenerator[bytes, None]:
        """The rows of a run.

        Raises:
            EngineDead: The engine is gone.
            StoreUnavailable: The database does not answer.
        """
        found = await self._read(run)
        if isinstance(found, Skipped):
            self.tally.skipped_runs[found] += 1
            return
        slots = [slot for slot in sorted(found.requests) if self._in_rounds(slot, found.state)]
        if not slots:
            self.tally.skipped_runs[Skipped.NO_ROUND] += 1
            return
        make = self._sft if self._wanted.form is Form.SFT else self._rl
        first = True
        async with aclosing(make(run, found, slots)) as lines:
            async for line in lines:
                self.tally.rows += 1
                self.tally.runs += first
                first = False
                yield line

    async def _read(self, run: RunSummary) -> Retraced | Skipped:
        if run.ended_at is None:
            return Skipped.GOING_ON
        try:
            first = await self._store.events(run.run_id, limit=1)
            if not first:
                return Skipped.NO_LOG
            started = first[0].event
            if isinstance(started, RunStarted) and started.templates != self._templates.digest:
                return Skipped.OTHER_PROMPTS
            log = [stored.event for stored in await self._store.events(run.run_id)]
        except Undecodable:
            return Skipped.OTHER_VERSION
        if not log:  # it was deleted meanwhile
            return Skipped.NO_LOG
        return await asyncio.to_thread(retrace, log, self._templates)

    def _in_rounds(self, slot: Slot, state: State) -> bool:
        match self._wanted.rounds:
            case Rounds.AGGREGATION:
                return slot.round > 0
            case Rounds.FINAL:
                return slot.round == state.params.rounds
        return True

    async def _sft(self, run: RunSummary, found: Retraced, slots: Collection[Slot]) -> AsyncGenerator[bytes, None]:
        state, left_out = found.state, Counter[Skipped]()
        # One that took over another's words was not asked, or was lost before it was.
        slots = [slot for slot in slots if slot in state.rollouts and slot not in state.shortcuts]
        agreeing = await _agreeing(state, slots, self._judge)
        for slot in slots:
            rollout = state.rollouts[slot]
            if self._wanted.only is not Only.ALL and rollout.finish is not Finish.STOP:
                left_out[Skipped.CUT] += 1
                continue
            if self._wanted.only is Only.AGREEING and slot not in agreeing:
                left_out[Skipped.OTHER_ANSWER] += 1
                continue
            trace = await self._store.trace(run.run_id, slot)
            if trace is None:
                left_out[Skipped.NO_TRACE] += 1
                continue
            request = found.requests[slot]
            completion = await self._completion(trace, rollout, request)
            if completion is None:
                left_out[Skipped.OTHER_WORDS] += 1
                continue
            row = {
                "prompt": prompt_of(request),
                "completion": [completion],
                "tools": request.answer.tools or _NO_TOOLS,
                **_place(run, slot),
                "finish": rollout.finish,
                "answer": answer_of(state, slot) or "",
                "agrees": slot in agreeing,
                **_votes(state),
            }
            if (line := _line(row)) is None:
                left_out[Skipped.NOT_UNICODE] += 1
            else:
                yield line
        if slots and left_out[Skipped.NO_TRACE] == len(slots):
            self.tally.skipped_runs[Skipped.NO_TRACES] += 1
        else:
            self.tally.skipped_rollouts += left_out

    async def _rl(self, run: RunSummary, found: Retraced, slots: Collection[Slot]) -> AsyncGenerator[bytes, None]:
        state = found.state
        answer = answer_of(state, state.outcome.candidates[0]) if isinstance(state.outcome, RunFinished) else None
        if answer is None:
            self.tally.skipped_runs[Skipped.NO_ANSWER] += 1
            return
        prompts: dict[bytes, dict[str, object]] = {}
        rollouts = Counter[bytes]()
        for slot in slots:
            request = found.requests[slot]
            row: dict[str, object] = {
                "prompt": prompt_of(request),
                "answer": answer,
                **_votes(state),
                "tools": request.answer.tools or _NO_TOOLS,
            }
            if (line := _line(row)) is None:
                self.tally.skipped_rollouts[Skipped.NOT_UNICODE] += 1
                continue
            name = hashlib.blake2b(line, digest_size=16).digest()
            rollouts[name] += 1
            prompts.setdefault(name, row | _place(run, slot))
        for name, row in prompts.items():
            yield orjson.dumps(row | {"rollouts": rollouts[name]}, option=orjson.OPT_APPEND_NEWLINE)

    async def _completion(self, trace: Trace, rollout: Rollout, request: RolloutRequest) -> ChatMessage | None:
        """The turn of the assistant, or None where the engine reads other words in the ids than were stored."""
        ids, engine = trace.token_ids, self._engine
        thought = trace.reasoning != trace.answer
        try:
            answer = await engine.decode(ids[slice(*trace.answer)])
            if not _is_its_answer(answer, rollout, request):
                return None
            if not rollout.answer and rollout.tail and await engine.decode(rollout.tail.token_ids) != rollout.tail.text:
                return None
            if not thought:
                return _turn(self._wanted.thinking, "", "", answer)
            mark = len(engine.vocabulary.think_open)
            before = await engine.decode(ids[: max(0, trace.reasoning[0] - mark)])
            thinking = await engine.decode(ids[slice(*trace.reasoning)])
        except EngineError:
            return None
        # A mark that the prompt opened belongs to the turn too: a chat template that finds the end of the thinking
        # without its begin may write an empty one before it (trl issue 6361).
        marked = f"{before}{OPEN}{thinking}" + (CLOSE if trace.answer[0] > trace.reasoning[1] else "")
        return _turn(self._wanted.thinking, marked, thinking, answer)


def prompt_of(request: RolloutRequest) -> list[ChatMessage]:
    """The messages of a prompt as text, control marks in candidates broken as they are for engines without ids."""
    return [with_arguments(message) for message in chat_messages(request.messages, lambda tail: neutralise(tail.text))]


def _turn(where: Thinking, marked: str, thinking: str, answer: str) -> ChatMessage:
    match where:
        case Thinking.INLINE:
            return {"role": "assistant", "content": marked + answer}
        case Thinking.FIELD:
            return {"role": "assistant", "content": answer, "reasoning_content": thinking}
    return {"role": "assistant", "content": answer}


def _is_its_answer(text: str, rollout: Rollout, request: RolloutRequest) -> bool:
    text = text.strip()
    for stop in request.answer.stop:
        text = text.partition(stop)[0]
    return text == rollout.answer


async def _agreeing(state: State, slots: Collection[Slot], judge: Judge) -> frozenset[Slot]:
    """The rollouts with the answer that the run chose, as its judge said; it is asked about those of earlier rounds."""
    if not isinstance(state.outcome, RunFinished):
        return frozenset()
    chosen = state.outcome.candidates[0]
    answers = {slot: answer_of(state, slot) for slot in (chosen, *slots)}
    if answers[chosen] is None:
        return frozenset()
    said: Mapping[Slot, int] = {}
    if state.groups is not None and chosen in state.groups.candidates:
        said = dict(zip(state.groups.candidates, state.groups.groups, strict=True))
    asked = [slot for slot in answers if slot == chosen or slot not in said]
    groups = await judged(judge, [answers[slot] for slot in asked])
    equal = {slot for slot, group in zip(asked, groups, strict=True) if group == groups[0]}
    equal |= {slot for slot, group in said.items() if group == said[chosen] and answers.get(slot) is not None}
    return frozenset(equal)


def _place(run: RunSummary, slot: Slot) -> dict[str, object]:
    return {"run_id": run.run_id, "model": run.model, "round": slot.round, "index": slot.index}


def _votes(state: State) -> dict[str, object]:
    """How many of the run's candidates agree with the chosen one; nothing where it has none, or compared none."""
    outcome, votes, candidates = state.outcome, 0, 0
    if isinstance(outcome, RunFinished):
        votes = outcome.votes[0]
        candidates = len(outcome.candidates) if state.agreed is None else state.agreed.ended
    return {"agreement": votes / candidates if candidates else 0.0, "votes": votes, "candidates": candidates}


def _line(row: dict[str, object]) -> bytes | None:
    """A row as JSON; None for a text with half a character in it, as a remote engine may send one."""
    try:
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        return None
