"""Requests written for Zyphra's example proxy for ZAYA1 (`examples/markovian_rsa` in its vLLM fork) -> ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mrsa_server.api.errors import BadRequest

# Its T counts aggregation rounds, as ours does; it takes two names for most.
_FIELDS = {
    "rsa_t": "rounds",
    "rsa_k": "set_size",
    "rsa_n": "population",
    "short_resp_len": "rollout_tokens",
    "rsa_short_resp_len": "rollout_tokens",
    "tail_window_len": "tail_tokens",
    "rsa_tail_window_len": "tail_tokens",
    "rsa_final_n": "final_candidates",
    "final_aggregation_prompts": "final_candidates",
    "final_temperature": "final_temperature",
    "rsa_final_temperature": "final_temperature",
}
_PACORE = ("use_pacore", "rsa_use_pacore")
_TAILS = ("rsa_tail_window", "rsa_use_tail_window")
_SUMMARIES = ("rsa_summarize", "summarize")
# Without influence on the answer here: our prompts, our concurrency, our report under `mrsa`.
_IGNORED = (
    "summary_prompt",
    "rsa_summary_prompt",
    "return_rsa_metadata",
    "rsa_return_metadata",
    "rsa_max_concurrency",
    "rsa_debug",
)
_WARNED = (
    "final_top_p",
    "rsa_final_top_p",
    "final_top_k",
    "rsa_final_top_k",
    "return_aggregation_prompt",
    "rsa_return_aggregation_prompt",
)
_ALL = frozenset((*_FIELDS, *_PACORE, *_TAILS, *_SUMMARIES, *_IGNORED, *_WARNED))


def translate(data: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, str], list[str]]:
    """Turn a request for Zyphra's proxy into one of ours.

    Args:
        data: The body; it is not changed.

    Returns:
        The body with `mrsa` in place of their fields, the name that the client used for each field, and warnings.

    Raises:
        BadRequest: If it asks for summaries in place of tails, or names a field in both ways.
    """
    theirs = data.keys() & _ALL
    if not theirs:
        return data, {}, []
    mrsa: dict[str, Any] = {"effort": "max"}  # their defaults: T=8, K=4, N=32, 32K tokens, tails of 4K
    names: dict[str, str] = {}
    warnings: list[str] = []
    if isinstance(data.get("mrsa"), dict):
        mrsa |= data["mrsa"]
    for name in sorted(theirs):
        value = data[name]
        ours = _FIELDS.get(name)
        if ours is not None and value is not None:
            if ours in mrsa:
                raise BadRequest(
                    f"{name}: mrsa.{ours} or {names.get(ours, 'mrsa')} says the same: give one of them", name
                )
            mrsa[ours], names[ours] = value, name
        elif name in _SUMMARIES and value not in (False, None):
            raise BadRequest(f"{name}: summaries in place of tails are not supported", name, "unsupported_parameter")
        elif name in _PACORE and value not in (False, None):
            mrsa.setdefault("carry", "answer")
        elif name in _WARNED and value not in (False, None):
            warnings.append(f"{name} is not supported and was ignored")
    if any(data.get(name) is False for name in _TAILS):
        mrsa["tail_tokens"] = mrsa.get("rollout_tokens", 32_768)
    elif "tail_tokens" in names:
        warnings.append(f"{names['tail_tokens']} counts tokens of the reasoning here, not words of the answer")
    if mrsa.get("rounds") == 0 and "rounds" in names:
        mrsa = {"effort": "none"}  # there, T=0 is one ordinary generation
    if mrsa.get("final_candidates") == 0 and "final_candidates" in names:
        mrsa["final_candidates"] = mrsa.get("population", 32)
    rest = {name: value for name, value in data.items() if name not in _ALL}
    return {**rest, "mrsa": mrsa}, names, warnings
