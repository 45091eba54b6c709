"""A file of problems, as people write them -> the lines of a batch. Nothing here talks to a server.

A line is one of:
    {"custom_id": ..., "method": "POST", "url": ..., "body": {...}}   a line of a batch, as OpenAI has it
    {"messages": [...]}                                               a conversation
    {"problem": "text"}, or "prompt", "question", "input"             one question
The last two may have an `id` or a `custom_id`; all else that they have is no part of the request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
_TEXT = ("problem", "prompt", "question", "input")
_ASKED = "messages", "body", *_TEXT
_MOST_ERRORS = 10  # that are told


class BadProblems(Exception):
    """The file cannot be sent; the message is for a person, and names lines."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What flags say of every line; a line's own body goes before it.

    Attributes:
        model: To be asked.
        mrsa: Parameters of the method.
        max_tokens: Of an answer.
        temperature: How freely tokens are drawn.
    """

    model: str
    mrsa: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    temperature: float | None = None


class Problems(NamedTuple):
    """The names of all lines in their order, and where they are sent."""

    ids: tuple[str, ...]
    endpoint: str


def write_batch(path: Path, wanted: Wanted, to: BinaryIO) -> Problems:
    """Write the lines of a batch.

    Args:
        path: The problems.
        wanted: What they lack.
        to: Where to.

    Raises:
        BadProblems: Some lines are none, or do not go together.
        OSError: A file cannot be read or written.
    """
    ids: dict[str, int] = {}
    endpoint: str | None = None
    errors: list[str] = []
    for number, data in _lines(path):
        try:
            line = _request(_object(data), number, wanted)
            if line["custom_id"] in ids:
                raise ValueError(f"its id {line['custom_id']!r} is that of line {ids[line['custom_id']]}")
            endpoint = endpoint or line["url"]
            if line["url"] != endpoint:
                raise ValueError(f"it goes to {line['url']}, and those before it to {endpoint}")
        except ValueError as error:
            errors.append(f"{path}:{number}: {error}")
            if len(errors) >= _MOST_ERRORS:
                break
            continue
        ids[line["custom_id"]] = number
        to.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    if errors:
        raise BadProblems("\n".join(errors))
    if endpoint is None:
        raise BadProblems(f"{path} has no problems")
    return Problems(tuple(ids), endpoint)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            stripped = data.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else data.strip()
            if stripped:
                yield number, stripped


def _object(data: bytes) -> dict[str, Any]:
    try:
        found: object = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError("it must be a JSON object")
    return found


def _request(line: dict[str, Any], number: int, wanted: Wanted) -> dict[str, Any]:
    kind = next((name for name in _ASKED if name in line), None)
    url = CHAT
    if kind is None:
        raise ValueError(f"it has none of {', '.join(_ASKED)}")
    if kind == "body":
        url = line.get("url", CHAT)
        if not isinstance(line["body"], dict):
            raise ValueError("its body must be an object")
        if url not in (CHAT, RESPONSES):
            raise ValueError(f"its url must be {CHAT} or {RESPONSES}, not {url!r}")
        body = dict(line["body"])
    elif kind == "messages":
        body = {"messages": line["messages"]}
    else:
        if not isinstance(line[kind], str):
            raise ValueError(f"its {kind} must be text")
        body = {"messages": [{"role": "user", "content": line[kind]}]}
    name = line.get("custom_id", line.get("id", f"line-{number}"))
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError("its id must be text or a number")
    return {"custom_id": str(name), "method": "POST", "url": url, "body": _completed(body, url, wanted)}


def _completed(body: dict[str, Any], url: str, wanted: Wanted) -> dict[str, Any]:
    body.setdefault("model", wanted.model)
    if wanted.mrsa and isinstance(own := body.get("mrsa", {}), dict):  # `mrsa: false` stays so
        body["mrsa"] = {**wanted.mrsa, **own}
    most = "max_completion_tokens" if url == CHAT else "max_output_tokens"
    if wanted.max_tokens is not None and not {most, "max_tokens"} & body.keys():
        body[most] = wanted.max_tokens
    if wanted.temperature is not None:
        body.setdefault("temperature", wanted.temperature)
    return body
