"""Tool calls and JSON schemas: what a client may ask of the last answer, and the calls found in an answer.

A client's schema becomes a grammar in the engine, and hostile grammars have killed engines: so every schema is bounded
here before anything compiles it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from mrsa_server.api.errors import BadRequest

MAX_SCHEMA_BYTES = 65_536
MAX_SCHEMA_DEPTH = 32
_MAX_PATTERN = 256  # characters
_MAX_REPEATS = 1_024  # product of all counts in a pattern: what its automaton can grow to
_MAX_COUNTS: Mapping[str, int] = {
    "minLength": 16_384,
    "maxLength": 16_384,
    "minItems": 1_024,
    "maxItems": 1_024,
    "minProperties": 1_024,
    "maxProperties": 1_024,
}
_COUNT = re.compile(r"\{(\d*),?(\d*)\}")
_LOOKS = re.compile(r"\(\?[=!<]|\\[1-9]|\(\?P")
_MAX_CALLS = 16

Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str | None
    parameters: Json

    def definition(self) -> dict[str, object]:
        """The tool in OpenAI's shape, as chat templates take it."""
        function: dict[str, object] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": self.parameters}}


class Call(NamedTuple):
    """A call of the model; `arguments` is JSON text."""

    name: str
    arguments: str


class Reading(NamedTuple):
    """An answer taken apart: its text without calls, and the calls in their order."""

    text: str
    calls: tuple[Call, ...]


def check_schema(schema: Json, param: str) -> str:
    """The schema as JSON text, once it is known to be harmless.

    Raises:
        BadRequest: If it is too large or too deep, refers to anything outside itself, or holds a pattern or a count
            that an engine could choke on.
    """
    _check_node(schema, param, 0)
    text = orjson.dumps(schema).decode()
    if len(text) > MAX_SCHEMA_BYTES:
        raise BadRequest(f"{param}: must be at most {MAX_SCHEMA_BYTES} bytes, not {len(text)}", param)
    return text


def _check_node(node: object, param: str, depth: int) -> None:
    if depth > MAX_SCHEMA_DEPTH:
        raise BadRequest(f"{param}: must be at most {MAX_SCHEMA_DEPTH} levels deep", param)
    if isinstance(node, list):
        for child in node:
            _check_node(child, param, depth + 1)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(value, str) and not value.startswith("#"):
            raise BadRequest(f"{param}: {key} must point into the schema itself (#/...)", param)
        if key == "pattern" and isinstance(value, str):
            _check_pattern(value, param)
        if key == "patternProperties" and isinstance(value, dict):
            for pattern in value:
                _check_pattern(pattern, param)
        limit = _MAX_COUNTS.get(key)
        if limit is not None and isinstance(value, int | float) and value > limit:
            raise BadRequest(f"{param}: {key} must be at most {limit}, not {value:g}", param)
        _check_node(value, param, depth + 1)


def _check_pattern(pattern: str, param: str) -> None:
    if len(pattern) > _MAX_PATTERN:
        raise BadRequest(f"{param}: a pattern must be at most {_MAX_PATTERN} characters, not {len(pattern)}", param)
    if _LOOKS.search(pattern):
        raise BadRequest(f"{param}: a pattern must not look around or refer back", param)
    repeats = 1
    for low, high in _COUNT.findall(pattern):
        repeats *= max(1, int(low or 1), int(high or 1))
        if repeats > _MAX_REPEATS:
            raise BadRequest(f"{param}: the counts of a pattern must multiply to at most {_MAX_REPEATS}", param)


def call_schema(tools: Sequence[Tool], several: bool) -> str:
    """The schema of an answer that must be a call: `{"name", "arguments"}`, or an array of such."""
    shared: dict[str, object] = {}
    shapes: list[Json] = []
    for tool in tools:
        arguments: Json = tool.parameters or {"type": "object"}
        if b'"$ref"' in orjson.dumps(arguments):  # its pointers are from its own root: keep it whole, point into it
            shared[tool.name] = _repoint(arguments, f"#/$defs/{tool.name}")
            arguments = {"$ref": f"#/$defs/{tool.name}"}
        shapes.append(
            {
                "type": "object",
                "properties": {"name": {"type": "string", "enum": [tool.name]}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    shape: Json = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
    schema: Json = {"type": "array", "minItems": 1, "maxItems": _MAX_CALLS, "items": shape} if several else shape
    return orjson.dumps({**schema, "$defs": shared} if shared else schema).decode()


def _repoint(node: object, root: str) -> object:
    if isinstance(node, list):
        return [_repoint(child, root) for child in node]
    if isinstance(node, dict):
        return {
            key: root + value[1:] if key == "$ref" and isinstance(value, str) else _repoint(value, root)
            for key, value in node.items()
        }
    return node


def read_forced(answer: str, tools: Sequence[Tool]) -> Reading:
    """The calls of an answer that was bound by `call_schema`; the answer as text where it was cut before its end."""
    try:
        value = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return Reading(answer, ())
    calls = [_call(item, tools) for item in (value if isinstance(value, list) else [value])]
    found = tuple(call for call in calls if call is not None)
    return Reading("", found) if found and len(found) == len(calls) else Reading(answer, ())


def _call(value: object, tools: Sequence[Tool]) -> Call | None:
    """A call in Hermes' shape, if it names one of the tools."""
    if not isinstance(value, dict):
        return None
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            return None
    if not isinstance(arguments, dict) or not any(tool.name == name for tool in tools):
        return None
    return Call(str(name), orjson.dumps(arguments).decode())


# The two ways in which today's open models write a call: Hermes and Qwen, and ZAYA1.
_BLOCKS = (("<tool_call>", "</tool_call>"), ("<zyphra_tool_call>", "</zyphra_tool_call>"))
_FUNCTION = re.compile(r"\s*<function=([^<>\s]{1,64})>(.*?)(?:</function>|\Z)\s*\Z", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^<>\s]{1,256})>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


class CallReader:
    """Takes calls out of an answer as it comes, holding back no more text than could be the start of one.

    A block that is no call of a known tool stays text: the client sees what the model wrote.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._tools = tuple(tools)
        self._held = ""
        self._calls = 0

    def feed(self, text: str) -> Reading:
        """Text and calls that are certain after `text`."""
        self._held += text
        out: list[str] = []
        calls: list[Call] = []
        while True:
            start, close = self._find_open()
            if start < 0:
                keep = _partial_suffix(self._held, [mark for mark, _ in _BLOCKS])
                out.append(self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
                break
            out.append(self._held[:start])
            self._held = self._held[start:]
            end = self._held.find(close)
            if end < 0:
                break
            block, self._held = self._held[: end + len(close)], self._held[end + len(close) :]
            self._take(block, close, out, calls)
        return Reading("".join(out), tuple(calls))

    def close(self) -> Reading:
        """What is left at the end; a call whose closing mark is missing counts if it is whole otherwise."""
        block, self._held = self._held, ""
        out: list[str] = []
        calls: list[Call] = []
        close = next((close for mark, close in _BLOCKS if block.startswith(mark)), None)
        if close is None:
            return Reading(block, ())
        self._take(block, close, out, calls)
        return Reading("".join(out), tuple(calls))

    def _find_open(self) -> tuple[int, str]:
        found = [(self._held.find(mark), close) for mark, close in _BLOCKS if mark in self._held]
        return min(found, default=(-1, ""))

    def _take(self, block: str, close: str, out: list[str], calls: list[Call]) -> None:
        inner = block[len(close) - 1 :].removesuffix(close)
        call = self._parse(inner)
        if call is None or self._calls >= _MAX_CALLS:
            out.append(block)
        else:
            self._calls += 1
            calls.append(call)

    def _parse(self, inner: str) -> Call | None:
        match = _FUNCTION.match(inner)
        if match is None:
            try:
                return _call(orjson.loads(inner.strip()), self._tools)
            except orjson.JSONDecodeError:
                return None
        name, body = match.groups()
        tool = next((tool for tool in self._tools if tool.name == name), None)
        if tool is None:
            return None
        arguments = {key: _typed(value.strip("\n"), key, tool) for key, value in _PARAMETER.findall(body)}
        return Call(name, orjson.dumps(arguments).decode())


def _typed(text: str, name: str, tool: Tool) -> object:
    """A parameter's text as the type that the tool's schema gives it; as text where it does not fit."""
    properties = tool.parameters.get("properties")
    schema = properties.get(name) if isinstance(properties, dict) else None
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string":
        return text
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _partial_suffix(text: str, marks: Sequence[str]) -> int:
    """Characters at the end of `text` that could be the start of a mark."""
    longest = max(len(mark) for mark in marks) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0


def read_free(answer: str, tools: Sequence[Tool]) -> Reading:
    """The calls of an answer that was free to make some or none."""
    reader = CallReader(tools)
    first, last = reader.feed(answer), reader.close()
    calls = first.calls + last.calls
    text = first.text + last.text
    return Reading(text.strip() if calls else text, calls)
