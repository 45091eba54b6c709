"""Every error that a client can see, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

ApiError
    BadRequest         400  the request cannot be honoured as it stands; names the field and the limit
    UnknownModel       404  no such model is served here
    KeyInUse           409  the idempotency key stands for another body
    KeyBusy            409  another request with the key has just begun; a retry finds its run
    RunCancelled       409  somebody ended the run
    TakenOver          503  another server goes on with the run
    StoreAway          503  the store does not answer; a retry may succeed
    RateLimited        429  the key has used what it may; a retry after that many seconds may succeed
    Overloaded         503  too many runs at once; a retry may succeed
    OverBudget         503  the runs in flight may cost too much already; likewise
    Crowded            503  too many connections at once; likewise
    ShuttingDown       503  this server is about to leave; another one may answer
    EngineUnavailable  503  the engine is starting or gone; a retry may succeed
    EngineRefused      400  the engine refused every rollout for what stands in the request (a grammar, its length)
    EngineFailed       502  the run has no answer; a retry costs a second run, so the SDKs are told not to
    DeadlinePassed     504  the run's own deadline came before any answer; likewise
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

import orjson
from starlette.responses import Response

from harness.types import InvalidParams

# Fields of `Params` that a client knows under another name than `mrsa.<field>`.
_TOP_LEVEL = frozenset(
    {
        "max_completion_tokens",
        "messages",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    }
)
# Where a retry of the SDK's would cost a second run.
NO_RETRY = (("x-should-retry", "false"),)
_RETRY_AFTER_S = 5
_LONGEST_RETRY_S = 120  # the SDKs do not retry what is to wait longer
_RETRY = (("retry-after", str(_RETRY_AFTER_S)),)


class ApiError(Exception):
    """An error with its place in HTTP; `param` is the field of the request that is to blame, if one is."""

    def __init__(
        self,
        status: int,
        code: str | None,
        message: str,
        param: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers

    @property
    def final(self) -> bool:
        """Whether a client is told not to ask again."""
        return NO_RETRY[0] in self.headers

    def copy(self) -> ApiError:
        """The same without the frames that it came through."""
        return ApiError(self.status, self.code, self.message, self.param, self.headers)

    def unretried(self) -> ApiError:
        """The same error where work was done already: the SDKs are told not to repeat it."""
        headers = tuple(header for header in self.headers if header[0] != "retry-after")
        return ApiError(self.status, self.code, self.message, self.param, (*headers, *NO_RETRY))

    def body(self) -> dict[str, object]:
        """What the client reads, in a response and in a stream alike."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class BadRequest(ApiError):
    """The request cannot be honoured as it stands."""

    def __init__(self, message: str, param: str | None = None, code: str | None = "invalid_value") -> None:
        super().__init__(400, code, message, param)


class UnknownModel(ApiError):
    """No such model is served here."""

    def __init__(self, model: str) -> None:
        super().__init__(404, "model_not_found", f"The model {model!r} is not served here.", "model")


class TakenOver(ApiError):
    """Another server goes on with the run."""

    def __init__(self) -> None:
        super().__init__(503, "run_taken_over", "The run goes on at another server.", headers=NO_RETRY)


class StoreAway(ApiError):
    """The store does not answer."""

    def __init__(self, reason: str) -> None:
        message = f"The store is not available: {reason}"
        super().__init__(503, "store_unavailable", message, headers=_RETRY)


class RunCancelled(ApiError):
    """Somebody ended the run."""

    def __init__(self) -> None:
        super().__init__(409, "run_cancelled", "The run was cancelled.", headers=NO_RETRY)


class KeyInUse(ApiError):
    """The idempotency key stands for another body."""

    def __init__(self) -> None:
        message = "This Idempotency-Key was used with another body: give each request a key of its own."
        super().__init__(409, "idempotency_key_in_use", message, headers=NO_RETRY)


class KeyBusy(ApiError):
    """Another request with the key has just begun, at another server perhaps."""

    def __init__(self) -> None:
        message = "Another request with this Idempotency-Key has just begun: ask again."
        super().__init__(409, "idempotency_key_busy", message, headers=(("retry-after", "1"),))


class RateLimited(ApiError):
    """The key has used what it may for now."""

    def __init__(self, message: str, wait_s: float) -> None:
        seconds = min(_LONGEST_RETRY_S, max(1, ceil(wait_s)))
        super().__init__(429, "rate_limit_exceeded", message, headers=(("retry-after", str(seconds)),))


def _limit(name: str, most: int, left: int) -> tuple[tuple[str, str], ...]:
    """How the whole server stands, in OpenAI's words."""
    figures = (("limit", str(most)), ("remaining", str(max(0, left))), ("reset", f"{_RETRY_AFTER_S}s"))
    return tuple((f"x-ratelimit-{what}-{name}", figure) for what, figure in figures)


class Overloaded(ApiError):
    """Too many runs at once."""

    def __init__(self, running: int, queued: int) -> None:
        message = f"{running} runs are in flight and {queued} wait: try again in {_RETRY_AFTER_S} s."
        headers = (*_RETRY, *_limit("requests", running + queued, 0))
        super().__init__(503, "server_overloaded", message, headers=headers)


class OverBudget(ApiError):
    """The runs in flight may cost so much already that another one has to wait."""

    def __init__(self, need: int, committed: int, most: int) -> None:
        message = (
            f"This run may cost {need} tokens, and those in flight {committed} of the {most} that this server takes on "
            f"at once: try again in {_RETRY_AFTER_S} s, or bound it by less effort or mrsa.budget_tokens."
        )
        headers = (*_RETRY, *_limit("tokens", most, most - committed))
        super().__init__(503, "server_overloaded", message, headers=headers)


class Crowded(ApiError):
    """Too many connections at once; this one is closed."""

    def __init__(self, connections: int) -> None:
        message = f"{connections} connections are open, as many as this server has places for."
        super().__init__(503, "server_overloaded", message, headers=(*_RETRY, ("connection", "close")))


class ShuttingDown(ApiError):
    """This server is about to leave.

    Args:
        handed_on: The run that goes on elsewhere, or when the server is back; without an `Idempotency-Key`, who asks
            again has another one.
    """

    def __init__(self, handed_on: str | None = None) -> None:
        message = "This server is shutting down: ask again."
        if handed_on is not None:
            message = f"This server is shutting down; {handed_on} goes on: GET /v1/runs/{handed_on}, or ask again."
        super().__init__(503, "server_shutting_down", message, headers=(("retry-after", "1"),))


class EngineUnavailable(ApiError):
    """The engine is starting or gone, and did not come within the time that a request may wait for it."""

    def __init__(self, reason: str) -> None:
        super().__init__(503, "engine_unavailable", f"The engine is not available: {reason}", headers=_RETRY)


class EngineRefused(ApiError):
    """The engine refused every rollout for what stands in the request."""

    def __init__(self, reason: str) -> None:
        super().__init__(400, "engine_refused", f"The engine refuses this request: {reason}")


class EngineFailed(ApiError):
    """The run has no answer and never will."""

    def __init__(self, reason: str) -> None:
        super().__init__(502, "engine_error", f"The run has no answer: {reason}", headers=NO_RETRY)


class DeadlinePassed(ApiError):
    """The run's own deadline came before any answer."""

    def __init__(self, deadline_s: float) -> None:
        message = f"No answer within mrsa.deadline_s={deadline_s:g}."
        super().__init__(504, "deadline_exceeded", message, "mrsa.deadline_s", NO_RETRY)


def to_stored(error: ApiError) -> bytes:
    """The error as it is kept with the run that ended with it."""
    return orjson.dumps({**error.body(), "status": error.status})


def of_stored(raw: bytes) -> ApiError:
    """The error of a run that has ended: asking for it again changes nothing."""
    found = orjson.loads(raw)
    error = found["error"]
    return ApiError(found.get("status", 500), error["code"], error["message"], error["param"], NO_RETRY)


def of_params(error: InvalidParams) -> BadRequest:
    """A parameter that the method refuses, under the name that the client gave it."""
    param = error.field if error.field in _TOP_LEVEL else f"mrsa.{error.field}"
    return BadRequest(f"{param}: {str(error).partition(': ')[2]}", param)


def renamed(error: BadRequest, names: Mapping[str, str]) -> BadRequest:
    """The error under the name that the client wrote, where that is another one than ours.

    Args:
        error: It may blame a field.
        names: The client's name for each field that it knows under another one; it counts for what is inside too.
    """
    path = (error.param or "").split(".")
    for length in range(len(path), 0, -1):
        ours = ".".join(path[:length])
        if (theirs := names.get(ours)) is not None:
            param = ".".join((theirs, *path[length:]))
            return BadRequest(error.message.replace(ours, theirs), param, error.code)
    return error


def to_response(error: ApiError) -> Response:
    """The error as a whole response."""
    return Response(
        orjson.dumps(error.body()), error.status, headers=dict(error.headers), media_type="application/json"
    )
