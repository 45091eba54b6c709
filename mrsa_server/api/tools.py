"""Tool calls: what a client may ask of the last answer, and the calls found in an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from mrsa_server.api.errors import BadRequest

# Of the grammar of a call: tools by the dozen are each harmless, and together none that an engine should compile.
MAX_CALL_BYTES = 131_072
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


def call_schema(tools: Sequence[Tool], several: bool) -> str:
    """The schema of an answer that must be a call: `{"name", "arguments"}`, or an array of such.

    Raises:
        BadRequest: The tools together are more than a grammar should hold.
    """
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
    text = orjson.dumps({**schema, "$defs": shared} if shared else schema)
    if len(text) > MAX_CALL_BYTES:
        raise BadRequest(
            f"tools: the schemas of a call that must be made may have {MAX_CALL_BYTES} bytes together, not {len(text)}",
            "tools",
        )
    return text.decode()


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
_OPEN = re.compile("|".join(re.escape(mark) for mark, _ in _BLOCKS))
_FUNCTION = re.compile(r"\s*<function=([^<>\s]{1,64})>(.*?)(?:</function>|\Z)\s*\Z", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^<>\s]{1,256})>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


class CallReader:
    """Takes calls out of an answer as it comes, holding back no more text than could be the start of one.

    A block that is no call of a known tool stays text: the client sees what the model wrote.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        self._tools = tuple(tools)
        self._held = ""  # the end of the text: what could be the start of a mark
        self._block: list[str] = []  # what stands of an open block before `_held`
        self._close = ""  # the mark that ends it; empty outside of a block
        self._calls = 0

    def feed(self, text: str) -> Reading:
        """Text and calls that are certain after `text`. Each character is looked at a few times, however they come."""
        text = self._held + text
        out: list[str] = []
        calls: list[Call] = []
        at = 0
        while True:
            if not self._close:
                match = _OPEN.search(text, at)
                if match is None:
                    keep = _partial_suffix(text[at:], [mark for mark, _ in _BLOCKS])
                    out.append(text[at : len(text) - keep])
                    break
                out.append(text[at : match.start()])
                self._close = dict(_BLOCKS)[match[0]]
                self._block.append(match[0])
                at = match.end()
            end = text.find(self._close, at)
            if end < 0:
                keep = min(len(text) - at, len(self._close) - 1)
                self._block.append(text[at : len(text) - keep])
                break
            self._block.append(text[at : end + len(self._close)])
            at = end + len(self._close)
            self._take(out, calls)
        self._held = text[len(text) - keep :]
        return Reading("".join(out), tuple(calls))

    def close(self) -> Reading:
        """What is left at the end; a call whose closing mark is missing counts if it is whole otherwise."""
        held, self._held = self._held, ""
        if not self._close:
            return Reading(held, ())
        self._block.append(held)
        out: list[str] = []
        calls: list[Call] = []
        self._take(out, calls)
        return Reading("".join(out), tuple(calls))

    def _take(self, out: list[str], calls: list[Call]) -> None:
        block, close = "".join(self._block), self._close
        self._block, self._close = [], ""
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
        arguments = {key: _typed(value, key, tool) for key, value in _PARAMETER.findall(body)}
        return Call(name, orjson.dumps(arguments).decode())


_PYTHON = {"True": True, "False": False, "None": None}  # chat templates have shown models these, for JSON's


def _typed(text: str, name: str, tool: Tool) -> object:
    """A parameter's text as the type that the tool's schema gives it; as text where it does not fit."""
    text = text.removeprefix("\n").removesuffix("\n")  # those of the notation; others are the value's own
    properties = tool.parameters.get("properties")
    schema = properties.get(name) if isinstance(properties, dict) else None
    kinds = _kinds(schema)
    word = text.strip()
    if "string" in kinds:
        return None if "null" in kinds and word in {"null", "None"} else text
    if word in _PYTHON and kinds & {"boolean", "null"}:
        return _PYTHON[word]
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _kinds(schema: object) -> set[str]:
    """The types that a schema names, itself and as alternatives."""
    if not isinstance(schema, dict):
        return set()
    several = [schema.get(word) for word in ("anyOf", "oneOf")]
    shapes = [schema, *(shape for shapes in several if isinstance(shapes, list) for shape in shapes)]
    named = [shape.get("type") for shape in shapes if isinstance(shape, dict)]
    kinds = [kind for one in named for kind in (one if isinstance(one, list) else [one])]
    return {kind for kind in kinds if isinstance(kind, str)}


def _partial_suffix(text: str, marks: Sequence[str]) -> int:
    """Characters at the end of `text` that could be the start of a mark."""
    longest = max(len(mark) for mark in marks) - 1
    end = text[-longest:]
    for size in range(len(end), 0, -1):
        if any(mark.startswith(end[-size:]) for mark in marks):
            return size
    return 0


def read_free(answer: str, tools: Sequence[Tool]) -> Reading:
    """The calls of an answer that was free to make some or none."""
    reader = CallReader(tools)
    first, last = reader.feed(answer), reader.close()
    calls = first.calls + last.calls
    text = first.text + last.text
    return Reading(text.strip() if calls else text, calls)
