"""What a keeper of batches is given: how a line's body becomes a run, and a run that has ended a body."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from mrsa_server.api.errors import ApiError
from mrsa_server.runs.record import RunKind, Spent

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.store import StoredRun


@dataclass(frozen=True, slots=True)
class Checked:
    """What is known of a body before its run begins; with an error, it never will.

    Attributes:
        kind: What its answer will be.
        body: As it is stored.
        model: That it asks; empty where it cannot be read.
        effort: As it was worked out.
        metadata: The client's.
        error: Why it cannot be honoured.
    """

    kind: RunKind
    body: bytes = field(repr=False)
    model: str
    effort: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    error: ApiError | None = None


class Answered(NamedTuple):
    """The body of a response, as JSON, and what it cost."""

    body: bytes
    spent: Spent


@dataclass(frozen=True, slots=True)
class Requests:
    """How requests are read and responses are made.

    Attributes:
        ready: Returns once both can be done here.
        check: The endpoint of a batch and a body -> what is known of it.
        answer: A run that has ended -> its response; raises ApiError where it has none.
        max_body_bytes: Longest body.
    """

    ready: Callable[[], Awaitable[None]]
    check: Callable[[str, bytes], Awaitable[Checked]]
    answer: Callable[[StoredRun], Awaitable[Answered]]
    max_body_bytes: int
