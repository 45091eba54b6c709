"""A file of problems, as people write them -> the lines of a batch. Nothing here talks to a server.

A line is one of:
    {"custom_id": ..., "method": "POST", "url": ..., "body": {...}}   a line of a batch, as OpenAI has it
    {"messages": [...]}                                               a conversation
    {"problem": "text"}, or "prompt", "question", "input"             one question
The last two may have an `id` or a `custom_id`, and fields of a request of their own, which go before the flags
(`TAKEN`). All else is no part of the request, since data sets have columns of many names; it is told which those are.
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
_NAMES = "custom_id", "id"
# What says how a line is to be answered. Not `metadata`, `user`, `tools` and their like: as columns they are something
# else more often than not; who means them writes a `body`.
TAKEN = (
    "model",
    "mrsa",
    "reasoning_effort",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "max_completion_tokens",
    "max_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "response_format",
)
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
    """What was read.

    Attributes:
        ids: The names of all lines in their order, and where in the file each stands, from 1 on.
        endpoint: Where they are sent.
        unused: Fields of lines that are no part of their requests.
    """

    ids: Mapping[str, int]
    endpoint: str
    unused: tuple[str, ...] = ()


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
    unused: dict[str, None] = {}
    for number, data in _lines(path):
        try:
            given = _object(data)
            line = _request(given, number, wanted)
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
        unused |= dict.fromkeys(_unused(given))
        to.write(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
    if errors:
        raise BadProblems("\n".join(errors))
    if endpoint is None:
        raise BadProblems(f"{path} has no problems")
    return Problems(ids, endpoint, tuple(unused))


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
    kind = _kind(line)
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
        body = {"messages": line["messages"], **_taken(line)}
    else:
        if not isinstance(line[kind], str):
            raise ValueError(f"its {kind} must be text")
        body = {"messages": [{"role": "user", "content": line[kind]}], **_taken(line)}
    name = line.get("custom_id", line.get("id", f"line-{number}"))
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError("its id must be text or a number")
    return {"custom_id": str(name), "method": "POST", "url": url, "body": _completed(body, url, wanted)}


def _kind(line: dict[str, Any]) -> str | None:
    return next((name for name in _ASKED if name in line), None)


def _taken(line: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request in a line; a column that is empty is none."""
    return {name: line[name] for name in TAKEN if line.get(name) is not None}


def _unused(line: dict[str, Any]) -> Iterator[str]:
    kind = _kind(line)
    used = {kind, *_NAMES, *(("method", "url") if kind == "body" else TAKEN)}
    return (name for name in line if name not in used)


def _completed(body: dict[str, Any], url: str, wanted: Wanted) -> dict[str, Any]:
    body.setdefault("model", wanted.model)
    flags = dict(wanted.mrsa)
    if {"reasoning_effort", "reasoning"} & body.keys():  # the line's own effort, before which `mrsa.effort` would go
        flags.pop("effort", None)
    if flags and isinstance(own := body.get("mrsa", {}), dict):  # `mrsa: false` stays so
        body["mrsa"] = {**flags, **own}
    most = "max_completion_tokens" if url == CHAT else "max_output_tokens"
    if wanted.max_tokens is not None and not {most, "max_tokens"} & body.keys():
        body[most] = wanted.max_tokens
    if wanted.temperature is not None:
        body.setdefault("temperature", wanted.temperature)
    return body
