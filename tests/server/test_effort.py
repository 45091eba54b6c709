"""Presets, what a client overrides, and what a context can hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.types import Params, Sampling
from mrsa_server.api.effort import PRESETS, Wishes, check_limits, decide_params
from mrsa_server.api.errors import BadRequest
from mrsa_server.settings import Effort, Settings

SETTINGS = Settings(engine="scripted")
K = 1024


def decide(wishes: Wishes, context: int | None = None, question: int = 100) -> Params:
    return decide_params(wishes, SETTINGS, Sampling(), 1, context, question).params


@pytest.mark.parametrize(
    ("effort", "shape"),
    [
        ("low", (8, 2, 8 * K, 4 * K)),
        ("medium", (16, 2, 16 * K, 4 * K)),
        ("high", (16, 2, 40 * K, 4 * K)),
        ("xhigh", (16, 8, 16 * K, 4 * K)),
        ("max", (32, 8, 32 * K, 4 * K)),
    ],
)
def test_the_presets_are_those_of_the_report(effort: str, shape: tuple[int, int, int, int]) -> None:
    params = decide(Wishes(Effort(effort)))
    assert (params.population, params.rounds, params.rollout_tokens, params.tail_tokens) == shape
    assert (params.set_size, params.final_tokens, params.final_candidates) == (4, 40 * K, 1)


def test_a_context_of_128k_holds_every_preset_undivided() -> None:
    for effort in PRESETS:
        assert decide(Wishes(effort), 128 * K) == decide(Wishes(effort))


def test_parallel_sampling_shows_all_candidates_by_default() -> None:
    assert decide(Wishes(Effort.LOW, rounds=0)).final_candidates == 8
    assert decide(Wishes(Effort.NONE)).final_candidates == 1


@given(
    st.sampled_from(sorted(set(Effort) - {Effort.NONE, Effort.MINIMAL})),
    st.integers(1_000, 200_000),
    st.integers(1, 5_000),
)
def test_what_is_decided_fits_the_context_or_is_refused(effort: Effort, context: int, question: int) -> None:
    try:
        decided = decide_params(Wishes(effort), SETTINGS, Sampling(), 1, context, question)
    except BadRequest as refusal:
        code = refusal.code
    else:
        code = None
    if code is not None:
        assert code == "context_length_exceeded"
        return
    params = decided.params
    longest = params.set_size * params.tail_tokens + max(params.rollout_tokens, params.final_tokens)
    assert question + longest <= context
    divisor = decided.divisor
    assert divisor & (divisor - 1) == 0
    if divisor > 1:  # the smallest power of two that will do
        assert question + longest * 2 + 512 > context - 2 * divisor * 6


def test_what_the_client_set_is_never_divided() -> None:
    params = decide(Wishes(Effort.MEDIUM, tail_tokens=1000), 16 * K)
    assert params.tail_tokens == 1000
    assert params.final_tokens < 40 * K
    with pytest.raises(BadRequest) as caught:
        decide(Wishes(Effort.MEDIUM, rollout_tokens=20 * K), 16 * K)
    assert caught.value.param == "mrsa.rollout_tokens"
    with pytest.raises(BadRequest) as caught:
        decide(Wishes(Effort.NONE, final_tokens=20 * K, final_field="max_tokens"), 16 * K)
    assert caught.value.param == "max_tokens"


def test_long_tails_and_zero_temperature_are_worth_a_warning() -> None:
    decided = decide_params(Wishes(Effort.MEDIUM, set_size=5), SETTINGS, Sampling(temperature=0), 1, None, 1)
    assert any("trained" in warning for warning in decided.warnings)
    assert any("temperature 0" in warning for warning in decided.warnings)
    assert decide_params(Wishes(Effort.MEDIUM), SETTINGS, Sampling(), 1, None, 1).warnings == ()


def test_limits_name_the_field_and_the_limit() -> None:
    with pytest.raises(BadRequest, match="must be at most 86400 on this server"):
        check_limits(Wishes(Effort.LOW, deadline_s=1e6), SETTINGS)
