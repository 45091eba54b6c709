"""How much work a request gets: the presets of `reasoning_effort`, what a client overrides, what the context can hold.

Presets are written for a context of 128K tokens. In a smaller one they are divided; what a client set never is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from harness.engine import Vocabulary
from harness.types import Agreement, Carry, Params, Sampling, Selection
from mrsa_server.api.errors import BadRequest
from mrsa_server.settings import Effort, Settings

# The wording of an aggregation prompt, its fences, and what the chat template adds: measured below 300 tokens.
_WORDING_TOKENS = 512
# The longest aggregation prompts that ZAYA1-8B was trained on hold about so many tokens of tails (report, section VI).
TRAINED_TAILS_TOKENS = 16_384
_TOKENS = ("rollout_tokens", "tail_tokens", "final_tokens")
# Below this a tail says nothing, and a context that asks for it is too small for the method.
_LEAST_TOKENS = 16


class Preset(NamedTuple):
    """The shape of a run, in the symbols of the report: N, T, beta, tau."""

    population: int
    rounds: int
    rollout_tokens: int
    tail_tokens: int


_FINAL_TOKENS = 40_960
_SET_SIZE = 4
_PLAIN = Preset(1, 0, 16_384, 4_096)
PRESETS: Mapping[Effort, Preset] = {
    Effort.NONE: _PLAIN,
    Effort.MINIMAL: _PLAIN,
    Effort.LOW: Preset(8, 2, 8_192, 4_096),
    Effort.MEDIUM: Preset(16, 2, 16_384, 4_096),
    Effort.HIGH: Preset(16, 2, 40_960, 4_096),
    Effort.XHIGH: Preset(16, 8, 16_384, 4_096),
    Effort.MAX: Preset(32, 8, 32_768, 4_096),
}


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a client asks of the method; None where it says nothing.

    Attributes:
        effort: The preset that fills the gaps.
        choices: Answers that it wants to see, OpenAI's `n`.
        final_field: The name under which the client knows `final_tokens`.
        ignored: What cannot be honoured and does not forbid an answer, as warnings.
    """

    effort: Effort
    choices: int = 1
    population: int | None = None
    rounds: int | None = None
    set_size: int | None = None
    rollout_tokens: int | None = None
    tail_tokens: int | None = None
    final_tokens: int | None = None
    final_candidates: int | None = None
    carry: Carry = Carry.REASONING
    selection: Selection = Selection.VOTE
    budget_tokens: int | None = None
    deadline_s: float | None = None
    final_temperature: float | None = None
    stop_when_agreed: Agreement | None = None
    skip_agreed_sets: bool = False
    quorum: int | None = None
    start_small: int | None = None
    final_field: str = "mrsa.final_tokens"
    ignored: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether this is one ordinary generation per choice, without the method."""
        return PRESETS[self.effort] is _PLAIN and not self.population and not self.rounds


class Decided(NamedTuple):
    """Parameters with every gap filled; `divisor` is what the preset was divided by to fit the context."""

    params: Params
    divisor: int
    warnings: tuple[str, ...]


def check_limits(wishes: Wishes, settings: Settings) -> None:
    """Refuse what this server does not do for anyone.

    Raises:
        BadRequest: Naming the field and the limit.
    """
    limits: tuple[tuple[str, float | None, float], ...] = (
        ("population", wishes.population, settings.max_population),
        ("rounds", wishes.rounds, settings.max_rounds),
        ("set_size", wishes.set_size, settings.max_population),
        ("rollout_tokens", wishes.rollout_tokens, settings.max_rollout_tokens),
        ("tail_tokens", wishes.tail_tokens, settings.max_tail_tokens),
        ("final_tokens", wishes.final_tokens, settings.max_rollout_tokens),
        ("deadline_s", wishes.deadline_s, settings.max_deadline_s),
        ("budget_tokens", wishes.budget_tokens, settings.max_budget_tokens),
    )
    for name, value, limit in limits:
        if value is not None and value > limit:
            param = wishes.final_field if name == "final_tokens" else f"mrsa.{name}"
            raise BadRequest(f"{param}: must be at most {limit:g} on this server, not {value:g}", param)
    if wishes.choices > settings.max_population:
        raise BadRequest(f"n: must be at most {settings.max_population} on this server, not {wishes.choices}", "n")


def check_thinking(params: Params, vocabulary: Vocabulary) -> None:
    """Refuse rollouts that would end before the first thought, at the mark that opens it.

    Raises:
        BadRequest: With the least that does.
    """
    least = len(vocabulary.think_open) + 1
    if vocabulary.think_close and params.rounds and params.rollout_tokens < least:
        param = "mrsa.rollout_tokens"
        raise BadRequest(
            f"{param}: must be at least {least} with a model that thinks, not {params.rollout_tokens}", param
        )


def check_unstreamed(params: Params, tokens_per_s: float | None, limit_s: float) -> None:
    """Refuse a response that its client would give up waiting for.

    Args:
        params: Of the run.
        tokens_per_s: The most that a rollout was seen to make; None where none was yet, and nothing is refused.
        limit_s: Seconds that clients wait for the first byte.

    Raises:
        BadRequest: With what would do.
    """
    if tokens_per_s is None or (params.deadline_s is not None and params.deadline_s <= limit_s):
        return
    tokens = params.rounds * params.rollout_tokens + params.final_tokens
    seconds = tokens / tokens_per_s
    if seconds > limit_s:
        raise BadRequest(
            f"stream: this run can take {tokens} tokens one after the other, {seconds:.0f} s at {tokens_per_s:.0f} "
            f"tokens/s, and clients give up without a first byte: set stream to true, or mrsa.deadline_s to at most "
            f"{limit_s:g}, or ask for less effort",
            "stream",
            "stream_required",
        )


def decide_params(
    wishes: Wishes,
    settings: Settings,
    sampling: Sampling,
    seed: int,
    context_tokens: int | None,
    question_tokens: int,
) -> Decided:
    """Fill the gaps from the preset, as far as the context can hold it.

    Args:
        wishes: What the client asks for.
        settings: The server's limits bound presets too.
        sampling: How tokens are drawn.
        seed: The run's.
        context_tokens: Longest prompt and generation together; None where not known.
        question_tokens: Tokens of the conversation as it stands.

    Raises:
        BadRequest: If it cannot fit, naming the field that is to blame.
        InvalidParams: If two values contradict each other.
    """
    preset = PRESETS[wishes.effort]
    choices = wishes.choices
    rounds = min(preset.rounds, settings.max_rounds) if wishes.rounds is None else wishes.rounds
    population = wishes.population or min(
        max(preset.population, choices if wishes.plain else 1), settings.max_population
    )
    if choices > population:
        raise BadRequest(f"n: must be at most the population ({population}), not {choices}", "n")
    candidates = wishes.final_candidates or (population if rounds == 0 else 1)
    size = min(wishes.set_size or _SET_SIZE, population)
    tokens, divisor = _fit(wishes, settings, rounds, size, context_tokens, question_tokens)
    warnings = list(wishes.ignored)
    if divisor > 1:
        warnings.append(
            f"the preset {wishes.effort} was divided by {divisor} to fit the context of {context_tokens} tokens"
        )
    if rounds and size * tokens["tail_tokens"] > TRAINED_TAILS_TOKENS:
        warnings.append(
            f"set_size x tail_tokens is {size * tokens['tail_tokens']}, "
            f"above the {TRAINED_TAILS_TOKENS} that ZAYA1-8B was trained on"
        )
    if sampling.temperature == 0 and population > 1:
        warnings.append("at temperature 0 the rollouts of a round hardly differ")
    for name in ("stop_when_agreed", "start_small", "quorum"):
        if choices > 1 and getattr(wishes, name) is not None:
            warnings.append(f"{name} may end the run with fewer answers than n={choices}")
    params = Params(
        population=population,
        set_size=wishes.set_size or _SET_SIZE,
        rounds=rounds,
        rollout_tokens=tokens["rollout_tokens"],
        tail_tokens=tokens["tail_tokens"],
        final_tokens=tokens["final_tokens"],
        final_candidates=max(candidates, choices),
        carry=wishes.carry,
        selection=Selection.FIRST if wishes.plain else wishes.selection,
        budget_tokens=wishes.budget_tokens,
        deadline_s=wishes.deadline_s,
        seed=seed,
        sampling=sampling,
        final_temperature=wishes.final_temperature,
        stop_when_agreed=wishes.stop_when_agreed,
        skip_agreed_sets=wishes.skip_agreed_sets,
        quorum=wishes.quorum,
        start_small=wishes.start_small,
    )
    return Decided(params, divisor, tuple(warnings))


def _tokens(wishes: Wishes, settings: Settings, divisor: int) -> dict[str, int]:
    preset = PRESETS[wishes.effort]
    limit = settings.max_rollout_tokens
    return {
        "rollout_tokens": wishes.rollout_tokens or min(preset.rollout_tokens, limit) // divisor,
        "tail_tokens": wishes.tail_tokens or min(preset.tail_tokens, settings.max_tail_tokens) // divisor,
        "final_tokens": wishes.final_tokens or min(_FINAL_TOKENS, limit) // divisor,
    }


def _need(tokens: Mapping[str, int], rounds: int, set_size: int) -> int:
    """Context that the longest prompt of a run takes beside the question, generation included."""
    if rounds == 0:
        return tokens["final_tokens"]
    tails = set_size * tokens["tail_tokens"] + _WORDING_TOKENS
    last = tails + tokens["final_tokens"]
    return max(last, tokens["rollout_tokens"] + (tails if rounds > 1 else 0))


def _fit(
    wishes: Wishes, settings: Settings, rounds: int, set_size: int, context_tokens: int | None, question_tokens: int
) -> tuple[dict[str, int], int]:
    """The token counts, divided by the smallest power of two that makes them fit."""
    tokens = _tokens(wishes, settings, 1)
    if context_tokens is None:
        return tokens, 1
    room = context_tokens - question_tokens
    fixed = {name for name in _TOKENS if getattr(wishes, name) is not None}
    divisor = 1
    while _need(tokens, rounds, set_size) > room:
        divisor *= 2
        smaller = _tokens(wishes, settings, divisor)
        if smaller == tokens or any(smaller[name] < _LEAST_TOKENS for name in _TOKENS if name not in fixed):
            raise _too_long(wishes, tokens, fixed, rounds, set_size, context_tokens, question_tokens)
        tokens = smaller
    return tokens, divisor


def _too_long(
    wishes: Wishes,
    tokens: Mapping[str, int],
    fixed: set[str],
    rounds: int,
    set_size: int,
    context_tokens: int,
    question_tokens: int,
) -> BadRequest:
    """Name what takes most of the context among the things that the client can change."""
    shares = {"messages": question_tokens}
    if "final_tokens" in fixed:
        shares[wishes.final_field] = tokens["final_tokens"]
    if rounds and "tail_tokens" in fixed:
        shares["mrsa.tail_tokens"] = set_size * tokens["tail_tokens"]
    if rounds and "rollout_tokens" in fixed:
        shares["mrsa.rollout_tokens"] = tokens["rollout_tokens"]
    if rounds and wishes.set_size is not None:
        shares.setdefault("mrsa.set_size", set_size * tokens["tail_tokens"])
    param = max(shares, key=lambda name: shares[name])
    need = _need(tokens, rounds, set_size)
    return BadRequest(
        f"{param}: the model's context is {context_tokens} tokens; the conversation takes {question_tokens} of them, "
        f"and the longest prompt with its generation {need} more",
        param,
        "context_length_exceeded",
    )
