"""Bodies of `/v1/batches` and `/v1/files`, and the objects that are answered, in OpenAI's shapes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from mrsa_server.api.errors import BadRequest
from mrsa_server.api.wire import Name, Wire, read, read_object
from mrsa_server.runs.record import RunKind, Spent

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.batch_store import Counts, StoredBatch
    from mrsa_server.runs.file_store import StoredFile

ENDPOINTS: dict[str, RunKind] = {"/v1/chat/completions": "chat.completion", "/v1/responses": "response"}
LONGEST_H = 30 * 24
SHORTEST_S, LONGEST_S = 3_600, LONGEST_H * 3_600  # that a file may be kept
_WINDOW = re.compile(r"([1-9][0-9]{0,3})([hd])", re.ASCII)


def _window(given: str) -> str:
    if not 1 <= hours(given) <= LONGEST_H:
        message = "must be hours or days such as 24h or 7d, and at most 30d, not {given}"
        raise PydanticCustomError("invalid_value", message, {"given": repr(given[:64])})
    return given


def hours(window: str) -> int:
    """A completion window; 0 for what is none."""
    found = _WINDOW.fullmatch(window)
    return int(found[1]) * (24 if found[2] == "d" else 1) if found else 0


class ExpiresAfter(Wire):
    """How long a file is kept."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=SHORTEST_S, le=LONGEST_S)]


class BatchBody(Wire):
    """A body of `POST /v1/batches`."""

    input_file_id: Name
    endpoint: Literal["/v1/chat/completions", "/v1/responses"]
    completion_window: Annotated[str, StringConstraints(max_length=1024), AfterValidator(_window)]
    metadata: (
        Annotated[
            dict[
                Annotated[str, StringConstraints(max_length=64)],
                Annotated[str, StringConstraints(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: ExpiresAfter | None = None


def parse_batch(raw: bytes) -> BatchBody:
    """Read a body.

    Raises:
        BadRequest: Naming the field and what is wrong with it.
    """
    return read(BatchBody, read_object(raw))


def parse_expiry(anchor: str | None, seconds: str | None) -> int | None:
    """How many seconds a file that is uploaded is kept; None where the form says nothing.

    Raises:
        BadRequest: What it says is not understood.
    """
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise BadRequest("expires_after.anchor: must be created_at", "expires_after.anchor")
    given = seconds or ""
    if not (given.isascii() and given.isdigit() and len(given) < 12 and SHORTEST_S <= int(given) <= LONGEST_S):
        raise BadRequest(
            f"expires_after.seconds: must be a whole number between {SHORTEST_S} and {LONGEST_S}",
            "expires_after.seconds",
        )
    return int(given)


def file_object(file: StoredFile) -> dict[str, object]:
    """A file as a client gets it."""
    return {
        "id": file.file_id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "expires_at": _second(file.expires_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def batch_object(batch: StoredBatch, counts: Counts | None) -> dict[str, object]:
    """A batch as a client gets it; `mrsa` says how many of its runs wait and how many are in flight.

    Args:
        batch: The batch.
        counts: Of its runs; None where it has none.
    """
    completed, failed = batch.completed, batch.failed
    if completed is None or failed is None:
        completed, failed = (0, 0) if counts is None else (counts.completed, counts.failed)
    errors = [
        {"code": error.code, "line": error.line, "message": error.message, "param": error.param}
        for error in batch.errors
    ]
    return {
        "id": batch.batch_id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": {"object": "list", "data": errors} if errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": int(batch.created_at),
        "in_progress_at": _second(batch.in_progress_at),
        "expires_at": int(batch.expires_at),
        "finalizing_at": _second(batch.finalizing_at),
        "completed_at": _second(batch.completed_at),
        "failed_at": _second(batch.failed_at),
        "expired_at": _second(batch.expired_at) if batch.status == "expired" else None,
        "cancelling_at": _second(batch.cancelling_at),
        "cancelled_at": _second(batch.cancelled_at),
        "request_counts": {"total": batch.total, "completed": completed, "failed": failed},
        "usage": None if batch.usage is None else _usage(batch.usage),
        "metadata": batch.metadata,
        "mrsa": {"queued": counts.queued if counts else 0, "running": counts.running if counts else 0},
    }


def _usage(spent: Spent) -> dict[str, object]:
    return {
        "input_tokens": spent.input_tokens,
        "input_tokens_details": {"cached_tokens": spent.cached_tokens},
        "output_tokens": spent.output_tokens,
        "output_tokens_details": {"reasoning_tokens": spent.reasoning_tokens},
        "total_tokens": spent.input_tokens + spent.output_tokens,
    }


def spent_of(kind: RunKind, body: dict[str, Any]) -> Spent:
    """What an answer says that it cost."""
    usage = body["usage"]
    before, after = ("prompt", "completion") if kind == "chat.completion" else ("input", "output")
    return Spent(
        usage[f"{before}_tokens"],
        usage[f"{before}_tokens_details"]["cached_tokens"],
        usage[f"{after}_tokens"],
        usage[f"{after}_tokens_details"]["reasoning_tokens"],
    )


def _second(at: float | None) -> int | None:
    return None if at is None else int(at)
