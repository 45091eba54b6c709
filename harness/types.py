"""The values that the method works on, frozen and validated in the constructor: a bad value gets no further.

Token counts are in the engine's own tokens, times in seconds.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

TokenIds = Sequence[int]
TraceHeaders = tuple[tuple[str, str], ...]  # W3C trace context: traceparent, and tracestate where there is one


class InvalidParams(ValueError):
    """A parameter of a run is out of its range; `field` is its name, the message says the limit."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class Carry(StrEnum):
    """What of a rollout the next round reads."""

    REASONING = "reasoning"  # the last tokens of the reasoning, finished or not (ZAYA1-8B report, VI-A)
    ANSWER = "answer"  # the text after the thinking (PaCoRe)
    HYBRID = "hybrid"  # the answer where there is one, else the reasoning


class Selection(StrEnum):
    """How the last population becomes one answer."""

    VOTE = "vote"
    FIRST = "first"


class Finish(StrEnum):
    """Why a rollout ended."""

    STOP = "stop"  # the model ended it
    LENGTH = "length"  # its tokens were spent
    THOUGHT = "thought"  # its thinking ended and nothing reads what would follow
    LOOP = "loop"  # it repeated itself and was cut
    ABORTED = "aborted"  # a deadline, a quorum or a stop cut it


class Slot(NamedTuple):
    """The place of one rollout in a run: round 0 is the first, the last is `Params.rounds`."""

    round: int
    index: int  # type: ignore[assignment]  # the paper's name; nobody searches a slot by tuple.index


class AggregationSet(tuple[int, ...]):
    """Indices into the previous round, ascending, that one rollout reads."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one or more generations; `reasoning_tokens` are part of `completion_tokens`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.completion_tokens + other.completion_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


@dataclass(frozen=True, slots=True)
class Tail:
    """What survives a rollout: ids of the engine's own vocabulary, and the same as text.

    `token_ids` may be characters where an engine has no ids (`Vocabulary.ids_per_token`). An empty tail is one that
    nobody can read: it counts as lost.
    """

    token_ids: TokenIds
    text: str

    def __bool__(self) -> bool:
        return len(self.token_ids) > 0


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an earlier assistant turn made; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is text; where a candidate stands in it, its `Tail` is a part of its own.

    Engines with token ids splice a tail's ids in; others insert its text with special tokens made harmless. So
    nothing in a candidate is ever parsed as structure.
    """

    role: str
    content: tuple[str | Tail, ...]
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The content with its candidates as text, for people and golden files."""
        return "".join(part if isinstance(part, str) else part.text for part in self.content)


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """What binds the answer of the last stage, and nothing before it.

    Attributes:
        max_tokens: Tokens of the answer alone, after the thinking; None for what `final_tokens` leaves.
        stop: Strings that end the answer.
        json_schema: JSON text of a schema that the answer must match; None for free text.
        tools: JSON text of the tool definitions that the chat template shows; None for none.
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    json_schema: str | None = None
    tools: str | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidParams("max_completion_tokens", f"must be at least 1, not {self.max_tokens}")


@dataclass(frozen=True, slots=True)
class Problem:
    """The whole conversation, and what binds its answer."""

    messages: tuple[Message, ...]
    answer: AnswerRules = AnswerRules()

    def __post_init__(self) -> None:
        if not self.messages:
            raise InvalidParams("messages", "must hold at least one message")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. `seeded` gives each rollout a seed of its own from the run's, for repeatable runs."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seeded: bool = False

    def __post_init__(self) -> None:
        bounds: tuple[tuple[str, float, float], ...] = (
            ("temperature", 0.0, 2.0),
            ("top_p", 0.0, 1.0),
            ("top_k", 0, 1_000_000),
            ("min_p", 0.0, 1.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
            ("repetition_penalty", 0.0, 10.0),
        )
        for name, low, high in bounds:
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidParams(name, f"must be between {low} and {high}, not {value}")
        if self.top_p == 0:
            raise InvalidParams("top_p", "must be above 0")
        if self.repetition_penalty == 0:
            raise InvalidParams("repetition_penalty", "must be above 0")


@dataclass(frozen=True, slots=True)
class Agreement:
    """When equal answers are enough: `min_votes` of them, and `share` of the round's rollouts that have ended.

    A rollout that ended without an answer counts against the share; one that failed or left no text does not count.
    """

    share: float = 0.75
    min_votes: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise InvalidParams("stop_when_agreed.share", f"must be above 0 and at most 1, not {self.share}")
        if self.min_votes < 2:
            raise InvalidParams("stop_when_agreed.min_votes", f"must be at least 2, not {self.min_votes}")


@dataclass(frozen=True, slots=True)
class Params:
    """The parameters of a run, as the ZAYA1-8B report names them (section VI; symbols in brackets).

    Attributes:
        population: [N] rollouts in each round but perhaps the last.
        set_size: [C] tails in one aggregation prompt; 1 means that rollout i refines tail i.
        rounds: [T] aggregation rounds; round 0 is not counted, so 0 is plain parallel sampling.
        rollout_tokens: [beta] tokens that a rollout before the last stage may generate.
        tail_tokens: [tau] last tokens of the reasoning that a rollout passes on.
        final_tokens: tokens that a rollout of the last stage may generate, answer included.
        final_candidates: [F] rollouts in the last round, 1 to N.
        carry: what of a rollout is passed on.
        selection: how F candidates become one answer.
        budget_tokens: bound on all generated tokens of the run; None for none.
        deadline_s: seconds after which the run ends with the best answer so far; None for none.
        seed: source of every random choice of the run.
        sampling: how tokens are drawn.
        final_temperature: temperature of the last stage; None for that of `sampling`.
        stop_when_agreed: approximate: end the run once answers of one round agree; None for never.
        skip_agreed_sets: approximate: a rollout whose set agrees is not generated, it takes over a member's trace.
        quorum: approximate: once so many of `population` have ended (in proportion, where fewer are needed), the
            stragglers of a round are cut where they stand, though not below `tail_tokens`; None for never.
        start_small: approximate: so many rollouts of round 0 go first, and the others only if these disagree; None for
            all at once.
    """

    population: int = 16
    set_size: int = 4
    rounds: int = 2
    rollout_tokens: int = 16_384
    tail_tokens: int = 4_096
    final_tokens: int = 40_960
    final_candidates: int = 1
    carry: Carry = Carry.REASONING
    selection: Selection = Selection.VOTE
    budget_tokens: int | None = None
    deadline_s: float | None = None
    seed: int = 0
    sampling: Sampling = Sampling()
    final_temperature: float | None = None
    stop_when_agreed: Agreement | None = None
    skip_agreed_sets: bool = False
    quorum: int | None = None
    start_small: int | None = None

    def __post_init__(self) -> None:
        for name, low in (
            ("population", 1),
            ("set_size", 1),
            ("rounds", 0),
            ("rollout_tokens", 1),
            ("tail_tokens", 1),
            ("final_tokens", 1),
            ("final_candidates", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value < low:
                raise InvalidParams(name, f"must be at least {low}, not {value}")
        if self.final_candidates > self.population:
            raise InvalidParams(
                "final_candidates", f"must be at most population ({self.population}), not {self.final_candidates}"
            )
        if self.budget_tokens is not None and self.budget_tokens < 1:
            raise InvalidParams("budget_tokens", f"must be at least 1, not {self.budget_tokens}")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise InvalidParams("deadline_s", f"must be above 0, not {self.deadline_s}")
        if self.final_temperature is not None and not 0 <= self.final_temperature <= 2:
            raise InvalidParams("final_temperature", f"must be between 0 and 2, not {self.final_temperature}")
        if self.stop_when_agreed is not None and self.stop_when_agreed.min_votes > self.population:
            raise InvalidParams(
                "stop_when_agreed.min_votes",
                f"must be at most population ({self.population}), not {self.stop_when_agreed.min_votes}",
            )
        if self.skip_agreed_sets and (self.set_size < 2 or self.rounds < 1):
            raise InvalidParams("skip_agreed_sets", "needs a set_size of at least 2 and at least 1 round")
        for name, value, low in (("quorum", self.quorum, 1), ("start_small", self.start_small, 2)):
            if value is not None and not low <= value <= self.population:
                raise InvalidParams(name, f"must be between {low} and population ({self.population}), not {value}")

    def count(self, round: int) -> int:
        """Rollouts that the barrier loop would run in `round`: F in the last, N before it."""
        return self.final_candidates if round == self.rounds else self.population

    @property
    def reads_answers(self) -> bool:
        """Whether anything reads what a rollout before the last stage writes after its thinking.

        A deadline does: it may have to end the run with one of these answers. So does what compares them.
        """
        compares = self.stop_when_agreed is not None or self.skip_agreed_sets or self.start_small is not None
        return self.carry is not Carry.REASONING or self.deadline_s is not None or compares

    @property
    def may_cut(self) -> bool:
        """Whether a rollout may be ended before its end, and what stands there then be read or counted."""
        agrees = self.stop_when_agreed is not None or self.start_small is not None
        return self.deadline_s is not None or self.quorum is not None or agrees


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One generation that an engine is asked for.

    Attributes:
        run_id: The run, for logs and for request ids.
        slot: Its place in the run.
        messages: The prompt.
        continuation: Ids that stand after the rendered prompt: what an earlier request of the same rollout
            generated, with the thinking closed.
        max_tokens: Most tokens to generate; a hard bound.
        stop_ids: End the generation with this sequence of ids (kept in the output); empty for none.
        answer: Rules of the answer; empty rules while the model may still think.
        sampling: How tokens are drawn.
        seed: The engine's seed for this generation; None leaves it free.
        priority: Lower runs first where the engine schedules by priority: older runs before younger ones, and within
            a run what the most of its rollouts wait for.
        watched: Whether the deltas are wanted as they come; an engine may join them where nobody reads them and nothing
            may end the generation between two of them.
        members: Indices into the previous round whose tails stand in the prompt.
        cache_salt: Keeps the prompt apart in caches that hold others' too; None for one cache of all.
        trace_headers: By which what the engine traces joins the trace of the rollout; none where nothing is traced.
    """

    run_id: str
    slot: Slot
    messages: tuple[Message, ...]
    max_tokens: int
    continuation: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    answer: AnswerRules = AnswerRules()
    sampling: Sampling = Sampling()
    seed: int | None = None
    priority: int = 0
    watched: bool = True
    members: tuple[int, ...] = ()
    cache_salt: str | None = field(default=None, repr=False)
    trace_headers: TraceHeaders = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """All ids that one rollout generated: `token_ids[reasoning]` is the thinking, `token_ids[answer]` the answer.

    Spans are half-open; an empty one means that there is none.
    """

    token_ids: array[int] = field(repr=False)
    reasoning: tuple[int, int]
    answer: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout that ended with something to show.

    Attributes:
        slot: Its place.
        tail: What the next round may read.
        answer: Text after the thinking; empty where it wrote none.
        finish: Why it ended.
        usage: Its tokens; prompts of all its requests.
        seconds: From its first request to its end.
        loop: Whether it repeated itself at some point (a last stage still closes with an answer).
        cut: Whether a generation was ended from outside: its engine may have made tokens that nobody saw.
    """

    slot: Slot
    tail: Tail
    answer: str
    finish: Finish
    usage: Usage
    seconds: float
    loop: bool = False
    cut: bool = False
