"""Who may do what: a dependency of every route, and the rule of each route beside it. A route without a rule refuses.

What decides is the route that was found, never a path or a host that the client wrote (CVE-2026-48746 of vLLM).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from mrsa_server.api.errors import ApiError
from mrsa_server.keyring import ANYBODY, Caller, KeyRing, Scope
from mrsa_server.metrics import Metrics

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Rule:
    """What a route asks for: nothing where it is `public`, else a key, which has to have `scope` if there is one."""

    scope: Scope | None = None
    public: bool = False


_RULES: dict[object, Rule] = {}


def public(endpoint: _Endpoint) -> _Endpoint:
    """Let anybody in."""
    _RULES[endpoint] = Rule(public=True)
    return endpoint


def any_key(endpoint: _Endpoint) -> _Endpoint:
    """Let everybody in who has a key."""
    _RULES[endpoint] = Rule()
    return endpoint


def needs(scope: Scope) -> Callable[[_Endpoint], _Endpoint]:
    """Let those in whose key has a scope."""

    def decorate(endpoint: _Endpoint) -> _Endpoint:
        _RULES[endpoint] = Rule(scope)
        return endpoint

    return decorate


def rule_of(endpoint: object) -> Rule | None:
    """The rule of a route; None where it has none and refuses everybody."""
    return _RULES.get(endpoint)


class Unauthorized(ApiError):
    """No key, or one that is not known; what was sent is never repeated."""

    def __init__(self, message: str) -> None:
        super().__init__(401, "invalid_api_key", message, headers=(("www-authenticate", "Bearer"),))


class Forbidden(ApiError):
    """The key is good, and not for this."""

    def __init__(self, message: str) -> None:
        super().__init__(403, "insufficient_scope", message)


@dataclass(frozen=True, slots=True)
class Gate:
    """What the rules are judged with.

    Attributes:
        ring: The keys.
        metrics: Counts who was turned away.
        metrics_open: Whether anybody may read metrics.
    """

    ring: KeyRing
    metrics: Metrics
    metrics_open: bool = False

    def judge(self, request: Request, rule: Rule | None) -> Caller:
        """Who asks, if that one may.

        Raises:
            ApiError: It may not.
        """
        if rule is None:
            raise Forbidden("This route is for nobody: it says not who may use it.")
        if rule.public or self.ring.open or (self.metrics_open and rule.scope is Scope.METRICS):
            return ANYBODY
        caller = self._find(request.headers.getlist("authorization"))
        if rule.scope is not None and not caller.may(rule.scope):
            raise Forbidden(f"The key {caller.key_id} lacks the scope {rule.scope}.")
        return caller

    def _find(self, given: list[str]) -> Caller:
        if not given:
            raise Unauthorized("A key is needed: send it as `Authorization: Bearer KEY`.")
        scheme, _, secret = given[0].partition(" ")
        if len(given) > 1 or scheme.lower() != "bearer":
            raise Unauthorized("The key must be sent once, as `Authorization: Bearer KEY`.")
        caller = self.ring.find(secret.strip())
        if caller is None:
            raise Unauthorized("The key is not known here.")
        return caller


async def authorize(request: Request) -> None:
    """Find out who asks, and let that one by or not.

    Raises:
        ApiError: It may not.
    """
    gate: Gate = request.app.state.gate
    try:
        request.state.caller = gate.judge(request, rule_of(request.scope["endpoint"]))
    except Unauthorized:
        gate.metrics.count_rejection("unauthorized")
        raise
    except Forbidden:
        gate.metrics.count_rejection("forbidden")
        raise


def caller_of(request: Request) -> Caller:
    """Who asks."""
    caller: Caller = request.state.caller
    return caller
