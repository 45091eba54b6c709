"""Parameters of a URL, checked: an error names the parameter and what it may be. And the pages that they ask for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from fastapi import Request

from mrsa_server.api.errors import BadRequest

MOST_CHARACTERS = 256  # of a value
_SECONDS = re.compile(r"\d{1,12}(?:\.\d{1,9})?", re.ASCII)
_DATE = re.compile(r"(?:19|20)\d{6}", re.ASCII)  # ISO 8601 without its dashes: no run is from early 1970


def query(request: Request, known: set[str]) -> dict[str, str]:
    """The parameters of a request; of one that is repeated, the last.

    Raises:
        BadRequest: One is not among those that are known, or is too long.
    """
    for name in request.query_params:
        if name not in known:
            raise BadRequest(f"{name[:64]}: is no parameter here; known are {', '.join(sorted(known))}", name[:64])
        if any(len(value) > MOST_CHARACTERS for value in request.query_params.getlist(name)):
            raise BadRequest(f"{name}: must be at most {MOST_CHARACTERS} characters", name)
    return dict(request.query_params)


def integer(asked: Mapping[str, str], name: str, low: int, high: int, usual: int) -> int:
    """A whole number within its bounds.

    Raises:
        BadRequest: It is none.
    """
    given = asked.get(name)
    if given is None:
        return usual
    if not (given.isascii() and given.isdigit() and len(given) < 12 and low <= int(given) <= high):
        raise BadRequest(f"{name}: must be a whole number between {low} and {high}, not {given[:64]!r}", name)
    return int(given)


def moment(asked: Mapping[str, str], name: str) -> float | None:
    """A time in Unix seconds, which is given so or as ISO 8601, in UTC where it names no zone; None for none.

    Raises:
        BadRequest: It is neither.
    """
    given = asked.get(name)
    if given is None:
        return None
    try:
        if _SECONDS.fullmatch(given) and not _DATE.fullmatch(given):
            return float(given)
        at = datetime.fromisoformat(given[:64])
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        message = f"{name}: must be Unix seconds or a date such as 2026-07-01 or 2026-07-01T12:00Z, not {given[:64]!r}"
        raise BadRequest(message, name) from None


def boolean(asked: Mapping[str, str], name: str) -> bool:
    """Whether a switch is on.

    Raises:
        BadRequest: It is neither on nor off.
    """
    return one_of(asked.get(name, "false"), name, ("true", "false")) == "true"


def one_of(given: str, name: str, known: Sequence[str]) -> str:
    """One of some words.

    Raises:
        BadRequest: It is none of them.
    """
    if given not in known:
        raise BadRequest(f"{name}: must be one of {', '.join(known)}, not {given[:64]!r}", name)
    return given


def page(data: Sequence[Mapping[str, object]], *, more: bool) -> dict[str, object]:
    """A page of a list as OpenAI has it; `more` tells whether another follows."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more}
