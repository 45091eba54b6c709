"""How many tokens the next rollout may generate: the last stage is reserved first, the rest is shared."""

from __future__ import annotations

from harness.lineage import needed_at_most
from harness.types import InvalidParams, Params

_ANSWER_TOKENS = 4_096  # most tokens kept back for the answer while a last stage thinks


class BudgetTooSmall(InvalidParams):
    """The budget cannot pay the run; `needed` is the smallest that can."""

    def __init__(self, budget_tokens: int, needed: int) -> None:
        super().__init__(
            "budget_tokens",
            f"{budget_tokens} generated tokens cannot pay this run; the smallest budget that can is {needed}",
        )
        self.needed = needed


def floor_tokens(params: Params) -> int:
    """Fewest tokens with which a rollout before the last stage is worth starting: its tail's, or all it may have."""
    return min(params.tail_tokens, params.rollout_tokens)


def smallest_budget(params: Params) -> int:
    """Generated tokens that surely pay the whole run: the last stage in full, all that it can need at the floor."""
    before = needed_at_most(params.population, params.set_size, params.rounds, params.final_candidates)
    return params.final_candidates * params.final_tokens + before * floor_tokens(params)


def most_tokens(params: Params) -> int:
    """Generated tokens that a run costs at most, as long as none of its rollouts fails and has to be replaced."""
    before = needed_at_most(params.population, params.set_size, params.rounds, params.final_candidates)
    most = params.final_candidates * params.final_tokens + before * params.rollout_tokens
    return most if params.budget_tokens is None else min(most, params.budget_tokens)


def most_read_tokens(params: Params) -> int:
    """Tokens of candidates in all prompts of a run at most, likewise."""
    if not params.rounds:
        return 0
    readers = needed_at_most(params.population, params.set_size, params.rounds - 1, params.final_candidates)
    return (readers + params.final_candidates) * min(params.set_size, params.population) * params.tail_tokens


def check_budget(params: Params) -> None:
    """Refuse before any work what cannot be paid.

    Raises:
        BudgetTooSmall: With the figure that would do.
    """
    need = smallest_budget(params)
    if params.budget_tokens is not None and params.budget_tokens < need:
        raise BudgetTooSmall(params.budget_tokens, need)


def grant(want: int, free: int | None, sharers: int) -> int:
    """Tokens that the next rollout may generate.

    Args:
        want: What it may have at most.
        free: Tokens neither spent, nor granted, nor reserved; None where there is no budget.
        sharers: Rollouts that still have to share them, this one included.

    Returns:
        `want` or its equal share, whichever is less; below 0 never.
    """
    return want if free is None else max(0, min(want, free // max(1, sharers)))


def answer_share(grant_tokens: int, answer_max: int | None) -> int:
    """Tokens of a rollout's grant that are kept for its answer while it thinks: a quarter, at most 4,096, at least 1.

    An answer that is bounded by the caller gets what it may have, up to half of the grant.
    """
    if answer_max is not None:
        return max(1, min(answer_max, grant_tokens // 2))
    return max(1, min(_ANSWER_TOKENS, grant_tokens // 4))
