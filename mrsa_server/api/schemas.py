"""JSON schemas of clients: each becomes a grammar in the engine, and hostile grammars have killed engines.

So every schema is bounded here, and known to be one, before anything compiles it. The keywords are those of draft
2020-12, with the spellings of draft 7 that clients still write. Nothing here awaits.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import unquote

import orjson

from mrsa_server.api.errors import BadRequest

MAX_SCHEMA_BYTES = 65_536
MAX_SCHEMA_DEPTH = 32
MAX_TOOLS_BYTES = 524_288  # of all tools of a request together: they stand in its prompt
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
# What JavaScript's patterns have and Python's have not; everything else that matters here is common to both.
_ESCAPE = re.compile(r"\\(?:[pP]\{[^{}]*\}|u\{[0-9a-fA-F]+\}|c[a-zA-Z]|.)", re.DOTALL)
_TYPES = frozenset({"null", "boolean", "object", "array", "number", "integer", "string"})

Json = Mapping[str, object]


def _schema(value: object) -> bool:
    return isinstance(value, dict | bool)


def _schemas(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_schema, value))


def _named_schemas(value: object) -> bool:
    return isinstance(value, dict) and all(map(_schema, value.values()))


def _names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _count(value: object) -> bool:
    return isinstance(value, int | float) and _number(value) and value >= 0 and float(value).is_integer()


def _text(value: object) -> bool:
    return isinstance(value, str)


def _type(value: object) -> bool:
    many = value if isinstance(value, list) else [value]
    return bool(many) and all(isinstance(item, str) and item in _TYPES for item in many)


_ONE = ("a schema", _schema)
_SEVERAL = ("a list of schemas", _schemas)
_NAMED = ("an object of schemas", _named_schemas)
_HOW_MANY = ("a whole number of at least 0", _count)
_LIMIT = ("a number", _number)
_WORDS = ("a list of strings", _names)
_STRING = ("a string", _text)
_KEYWORDS: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "type": (f"one of {', '.join(sorted(_TYPES))}, or a list of these", _type),
    "enum": ("a list of values", lambda value: isinstance(value, list) and bool(value)),
    "properties": _NAMED,
    "patternProperties": _NAMED,
    "dependentSchemas": _NAMED,
    "$defs": _NAMED,
    "definitions": _NAMED,
    "items": ("a schema", lambda value: _schema(value) or _schemas(value)),
    "prefixItems": _SEVERAL,
    "allOf": _SEVERAL,
    "anyOf": _SEVERAL,
    "oneOf": _SEVERAL,
    **dict.fromkeys(("additionalProperties", "additionalItems", "unevaluatedProperties", "unevaluatedItems"), _ONE),
    **dict.fromkeys(("propertyNames", "contains", "not", "if", "then", "else"), _ONE),
    **dict.fromkeys((*_MAX_COUNTS, "minContains", "maxContains"), _HOW_MANY),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _LIMIT),
    "multipleOf": ("a number above 0", lambda value: isinstance(value, int | float) and _number(value) and value > 0),
    "required": _WORDS,
    "uniqueItems": ("true or false", lambda value: isinstance(value, bool)),
    **dict.fromkeys(("pattern", "format", "$ref", "$id", "$schema", "$anchor", "title", "description"), _STRING),
}
_REFERENCES = ("$dynamicRef", "$recursiveRef")


def check_schema(schema: Json, param: str) -> str:
    """The schema as JSON text, once it is known to be one and harmless.

    Raises:
        BadRequest: If it is too large or too deep, is no JSON schema, refers to anything outside itself, or holds a
            pattern or a count that an engine could choke on.
    """
    try:
        text = orjson.dumps(schema)
    except orjson.JSONEncodeError:
        raise _too_deep(param) from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise BadRequest(f"{param}: must be at most {MAX_SCHEMA_BYTES} bytes, not {len(text)}", param)
    _check_depth(schema, param, 0)
    _Check(schema, param).run()
    return text.decode()


def _too_deep(param: str) -> BadRequest:
    return BadRequest(f"{param}: must be at most {MAX_SCHEMA_DEPTH} levels deep", param)


def _check_depth(node: object, param: str, depth: int) -> None:
    if depth > MAX_SCHEMA_DEPTH:
        raise _too_deep(param)
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        if isinstance(child, dict | list):
            _check_depth(child, param, depth + 1)


class _Check:
    """Visits every schema in a schema once: those in its keywords, and what its references point to."""

    def __init__(self, root: Json, param: str) -> None:
        self._root = root
        self._param = param
        self._seen: set[int] = set()
        self._grounded: set[int] = set()  # nodes whose chain of references is known to end

    def run(self) -> None:
        todo: list[object] = [self._root]
        while todo:
            node = todo.pop()
            if isinstance(node, dict) and id(node) not in self._seen:
                self._seen.add(id(node))
                self._check(node)
                todo += _inner(node)
                if "$ref" in node:
                    todo.append(self._follow(node))

    def _error(self, message: str) -> BadRequest:
        return BadRequest(f"{self._param}: {message}", self._param)

    def _check(self, node: Json) -> None:
        for name in _REFERENCES:
            if name in node:
                raise self._error(f"{name} is not supported: use $ref")
        for name, value in node.items():
            words, fits = _KEYWORDS.get(name, ("", None))
            if fits is not None and not fits(value):
                raise self._error(f"{name} must be {words}")
            limit = _MAX_COUNTS.get(name)
            if limit is not None and isinstance(value, int | float) and value > limit:
                raise self._error(f"{name} must be at most {limit}, not {value:g}")
        if isinstance(pattern := node.get("pattern"), str):
            _check_pattern(pattern, self._param)
        if isinstance(patterns := node.get("patternProperties"), dict):
            for pattern in patterns:
                _check_pattern(pattern, self._param)

    def _follow(self, node: Json) -> object:
        """What a reference points to in the end; one that only leads back to itself says nothing at all."""
        path: list[int] = []
        target: object = node
        while isinstance(target, dict) and "$ref" in target and id(target) not in self._grounded:
            if id(target) in path:
                raise self._error("a $ref leads back to itself")
            path.append(id(target))
            target = self._resolve(target["$ref"])
            if len(path) > MAX_SCHEMA_DEPTH:
                raise self._error(f"a chain of $ref must be at most {MAX_SCHEMA_DEPTH} long")
        self._grounded.update(path)
        return self._resolve(node["$ref"])

    def _resolve(self, pointer: object) -> object:
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise self._error("$ref must point into the schema itself (#/...)")
        node: object = self._root
        for step in unquote(pointer).split("/")[1:]:
            name = step.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict):
                node = node.get(name)
            elif isinstance(node, list) and name.isascii() and name.isdecimal() and len(name) < 6:
                node = node[int(name)] if int(name) < len(node) else None
            else:
                node = None
            if node is None:
                break
        if not _schema(node):
            raise self._error(f"$ref {pointer[:64]!r} points to no schema")
        return node


def _inner(node: Json) -> Iterator[object]:
    """The schemas in a schema's keywords; values such as those of `enum` and `default` are none."""
    for name, value in node.items():
        form = _KEYWORDS.get(name)
        if form is _NAMED and isinstance(value, dict):
            yield from value.values()
        elif (form is _SEVERAL or name == "items") and isinstance(value, list):
            yield from value
        elif form is _ONE or name == "items":
            yield value


def _check_pattern(pattern: str, param: str) -> None:
    if len(pattern) > _MAX_PATTERN:
        raise BadRequest(f"{param}: a pattern must be at most {_MAX_PATTERN} characters, not {len(pattern)}", param)
    if _LOOKS.search(pattern):
        raise BadRequest(f"{param}: a pattern must not look around or refer back", param)
    repeats = 1
    for low, high in _COUNT.findall(pattern):
        repeats *= max(1, *(int(count) if len(count) < 6 else 10**6 for count in (low or "1", high or "1")))
        if repeats > _MAX_REPEATS:
            raise BadRequest(f"{param}: the counts of a pattern must multiply to at most {_MAX_REPEATS}", param)
    known = _ESCAPE.sub(lambda match: match[0] if len(match[0]) == 2 else r"\w", pattern)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python may read otherwise one day
            re._parser.parse(known)  # type: ignore[attr-defined]  # to compile it could take a tenth of a second
    except (re.error, OverflowError, RecursionError) as error:
        raise BadRequest(f"{param}: the pattern {pattern[:64]!r} cannot be compiled: {error}", param) from None
