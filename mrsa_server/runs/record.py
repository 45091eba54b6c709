"""What is stored of a request. Apart from the store, so that a server without one loads no database."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

RunKind = Literal["chat.completion", "response"]
Ended = Literal["finished", "stopped", "failed", "cancelled", "refused"]
StoredStatus = Literal["queued", "running", "finished", "stopped", "failed", "cancelled", "refused"]
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
FilePurpose = Literal["batch", "batch_output"]
Held = Callable[[Sequence[str]], Collection[str]]  # of some keys those whose lines of batches are left alone
BATCH_ENDED: tuple[BatchStatus, ...] = ("failed", "completed", "expired", "cancelled")


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run to be stored.

    Attributes:
        run_id: Its name.
        kind: What was asked for, and so what its result is.
        body: The request as it came.
        model: As the request names it.
        effort: As it was worked out; None where there is none.
        priority: That of its events, for those who take it up before it has any.
        background: Whether it goes on when its reader leaves.
        created_at: Unix seconds.
        deadline_at: When it has to have ended, Unix seconds.
        idempotency_key: The client's, no two runs have the same.
        body_digest: Tells whether a request with the same key is the same request.
        metadata: The client's.
        key_id: The API key that asked; None on a server without keys.
        batch_id: Of which batch it is a line; None for none.
        batch_line: Which, from 1 on.
        custom_id: Its name in the batch, the client's.
    """

    run_id: str
    kind: RunKind
    body: bytes = field(repr=False)
    model: str
    effort: str | None = None
    priority: int = 0
    background: bool = False
    created_at: float = 0.0
    deadline_at: float | None = None
    idempotency_key: str | None = None
    body_digest: bytes = field(default=b"", repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)
    key_id: str | None = None
    batch_id: str | None = None
    batch_line: int | None = None
    custom_id: str | None = None


class Spent(NamedTuple):
    """Tokens of a batch's answers."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Spent) -> Spent:  # type: ignore[override]  # a sum, where tuples would be joined
        return Spent(*(one + two for one, two in zip(self, other, strict=True)))
