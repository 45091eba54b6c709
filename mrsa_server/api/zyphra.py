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
FIELDS_OF_PROXY = frozenset((*_FIELDS, *_PACORE, *_TAILS, *_SUMMARIES, *_IGNORED, *_WARNED))


def translate(data: dict[str, Any]) -> tuple[dict[str, Any], Mapping[str, str], list[str]]:
    """Turn a request for Zyphra's proxy into one of ours.

    Args:
        data: The body; it is not changed.

    Returns:
        The body with `mrsa` in place of their fields, the name that the client used for each `mrsa.` field, and
        warnings.

    Raises:
        BadRequest: If it asks for summaries in place of tails, or contradicts `mrsa`.
    """
    theirs = data.keys() & FIELDS_OF_PROXY
    if not theirs:
        return data, {}, []
    rest = {name: value for name, value in data.items() if name not in FIELDS_OF_PROXY}
    warnings = [
        f"{name} is not supported and was ignored"
        for name in sorted(theirs)
        if name in _WARNED and data[name] not in (False, None)
    ]
    for name in _SUMMARIES:
        if data.get(name) not in (False, None):
            raise BadRequest(f"{name}: summaries in place of tails are not supported", name, "unsupported_parameter")
    asking = sorted(name for name in theirs if _asks(name, data[name]))
    if not asking:
        return rest, {}, warnings
    given = data.get("mrsa")
    if given is False:
        raise BadRequest(f"{asking[0]}: mrsa is false, which says that the method is not to run", asking[0])
    if given is not None and given is not True and not isinstance(given, dict):
        raise BadRequest(f"mrsa: must be an object beside {asking[0]}", "mrsa")
    own: dict[str, Any] = given if isinstance(given, dict) else {}
    mrsa: dict[str, Any] = {"effort": "max", **own}  # their defaults: T=8, K=4, N=32, 32K tokens, tails of 4K
    names: dict[str, str] = {}
    for name in asking:
        ours = _FIELDS.get(name)
        if ours is not None:
            if ours in mrsa:
                raise BadRequest(
                    f"{name}: mrsa.{ours} or {names.get(ours, 'mrsa')} says the same: give one of them", name
                )
            mrsa[ours], names[ours] = data[name], name
        elif name in _PACORE:
            mrsa.setdefault("carry", "answer")
    whole = next((name for name in _TAILS if data.get(name) is False), None)
    if whole is not None:
        if "tail_tokens" in own:
            raise BadRequest(f"{whole}: false says that rollouts are read whole, mrsa.tail_tokens that not", whole)
        mrsa["tail_tokens"], names["tail_tokens"] = mrsa.get("rollout_tokens", 32_768), whole
    elif "tail_tokens" in names:
        warnings.append(f"{names['tail_tokens']} counts tokens of the reasoning here, not words of the answer")
    if mrsa.get("rounds") == 0 and "rounds" in names:  # there, T=0 is one ordinary generation
        if "effort" in own:
            raise BadRequest(f"{names['rounds']}: 0 is one ordinary generation, mrsa.effort says more", names["rounds"])
        mrsa = {**own, "effort": "none"}
    if mrsa.get("final_candidates") == 0 and "final_candidates" in names:
        mrsa["final_candidates"] = mrsa.get("population", 32)
    return {**rest, "mrsa": mrsa}, {f"mrsa.{ours}": theirs for ours, theirs in names.items()}, warnings


def _asks(name: str, value: object) -> bool:
    """Whether a field asks for the method: one that only says how to report on it does not."""
    if name in _FIELDS or name in _TAILS:
        return value is not None
    return name in _PACORE and value not in (False, None)
