"""Events and traces <-> bytes, exactly: what is decoded equals what was encoded. Nothing here awaits or reads a clock.

A body is JSON, each dataclass as an object of all its fields, so that a default that changes later changes no run that
was stored before; a field that a body lacks is newer than it and takes its default. Above a few hundred bytes it is
deflated, which its first byte tells. Token ids are packed (see `_pack`). The trace of a `RolloutFinished` is no part of
its body.

The JSON is the standard library's: orjson makes floats of large integers and refuses lone surrogates, and beside zlib
its speed does not count. A run of 5.5 million tokens (N=32, T=8, some 200 rollouts with tails of 4,096 ids and 16 KB of
text) is 3.5 MB so, read and replayed in 0.07 s on one core; its traces are 13 MB more (`python -m tests.bench.store`).
"""

from __future__ import annotations

import binascii
import json
import struct
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from harness.events import (
    AnswersAgreed,
    AnswersGrouped,
    CandidatesAmended,
    DeadlineReached,
    Event,
    QuorumReached,
    RolloutAborted,
    RolloutFailed,
    RolloutFinished,
    RolloutStarted,
    RunFailed,
    RunFinished,
    RunResumed,
    RunStarted,
    SetAmended,
    SetsDrawn,
    SetSkipped,
    ToppedUp,
    WentFinal,
)
from harness.types import TokenIds, Trace

# Written out, since they are in every store: a class may be renamed, its kind may not.
KINDS: Mapping[type[Event], str] = {
    RunStarted: "run_started",
    SetsDrawn: "sets_drawn",
    RolloutStarted: "rollout_started",
    RolloutFinished: "rollout_finished",
    RolloutFailed: "rollout_failed",
    RolloutAborted: "rollout_aborted",
    RunResumed: "run_resumed",
    SetAmended: "set_amended",
    CandidatesAmended: "candidates_amended",
    WentFinal: "went_final",
    DeadlineReached: "deadline_reached",
    AnswersAgreed: "answers_agreed",
    SetSkipped: "set_skipped",
    QuorumReached: "quorum_reached",
    ToppedUp: "topped_up",
    AnswersGrouped: "answers_grouped",
    RunFinished: "run_finished",
    RunFailed: "run_failed",
}

_LEVEL = 3  # of zlib: a third of the time of 6 for 3 % more bytes
_DEFLATE_FROM = 512  # bytes; below it there is little to save
_ID = 4  # bytes
_SPANS = struct.Struct("<4Q")

_Read = Callable[[Any], Any]  # from JSON to the value of a field


class Undecodable(ValueError):
    """A body that this version cannot read: it is damaged, or a newer version wrote it."""


def encode(event: Event) -> tuple[str, bytes]:
    """The kind of an event and its body, without a trace.

    Raises:
        TypeError: If it holds what no event declares, such as ids in an array that is not of type `I`.
    """
    return KINDS[type(event)], deflate(json.dumps(event, default=_plain, separators=(",", ":")).encode())


def decode(kind: str, body: bytes) -> Event:
    """The event of a body.

    Ids that were no array come back as a tuple.

    Raises:
        Undecodable: The kind or a field of it is unknown here, or the body is damaged.
    """
    read = _EVENTS.get(kind)
    if read is None:
        raise Undecodable(f"no event is called {kind!r} in this version")
    try:
        return cast(Event, read(json.loads(inflate(body))))
    except (ValueError, TypeError, AttributeError, LookupError, zlib.error) as error:
        raise Undecodable(f"a body of {kind}: {error}") from error


def encode_trace(trace: Trace) -> bytes:
    """A whole trace: its spans, and its ids deflated."""
    return _SPANS.pack(*trace.reasoning, *trace.answer) + zlib.compress(_planes(trace.token_ids), _LEVEL)


def decode_trace(body: bytes) -> Trace:
    """The trace of a body.

    Raises:
        Undecodable: The body is damaged.
    """
    try:
        a, b, c, d = _SPANS.unpack_from(body)
        return Trace(_unplanes(zlib.decompress(body[_SPANS.size :])), (a, b), (c, d))
    except (ValueError, struct.error, zlib.error) as error:
        raise Undecodable(f"a trace: {error}") from error


def deflate(body: bytes) -> bytes:
    """JSON or text, smaller where that pays; for bodies that do not begin with `x`, the first byte of zlib's."""
    return zlib.compress(body, _LEVEL) if len(body) >= _DEFLATE_FROM or body[:1] == b"x" else body


def inflate(body: bytes) -> bytes:
    """What `deflate` was given."""
    return zlib.decompress(body) if body[:1] == b"x" else body


def _plain(value: object) -> object:
    """What JSON has no word for. Tuples of every kind are lists in it, enums are their text."""
    if isinstance(value, array):
        return _pack(value)
    if is_dataclass(value):
        cls: type = type(value)
        return {name: getattr(value, name) for name in _stored(cls)}
    raise TypeError(f"no event holds a {type(value).__name__}")


@cache
def _stored(cls: type) -> tuple[str, ...]:
    """The fields of a dataclass that are stored: all but the trace."""
    return tuple(field.name for field in fields(cls) if (cls, field.name) != (RolloutFinished, "trace"))


def _planes(ids: array[int]) -> bytes:
    """Ids as bytes: the lowest of all, then the second of all, and so on.

    So the two upper ones, nearly all zero, cost nothing once deflated: a third less than ids one after the other.
    """
    if ids.typecode != "I" or ids.itemsize != _ID:
        raise TypeError(f"ids are in an array of type I, not {ids.typecode}")
    raw = ids.tobytes()
    return b"".join(raw[plane::_ID] for plane in _ORDER)


def _unplanes(planes: bytes) -> array[int]:
    if len(planes) % _ID:
        raise ValueError(f"{len(planes)} bytes are no whole number of ids")
    count = len(planes) // _ID
    raw = bytearray(len(planes))
    for position, plane in enumerate(_ORDER):
        raw[plane::_ID] = planes[position * count : (position + 1) * count]
    ids = array("I")
    ids.frombytes(raw)
    return ids


# Where the bytes of an id lie in memory, the lowest first.
_ORDER = tuple(array("I", [0x03020100]).tobytes().index(byte) for byte in range(_ID))


def _pack(ids: array[int]) -> str:
    return binascii.b2a_base64(_planes(ids), newline=False).decode("ascii")


def _unpack(value: str | list[int]) -> TokenIds:
    """An array was packed; ids in a tuple are a list."""
    return _unplanes(binascii.a2b_base64(value)) if isinstance(value, str) else tuple(value)


def _same(value: Any) -> Any:
    return value


def _reader(hint: Any) -> _Read:
    """How a field of this type is read; every type in an event has a case."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (int, float, str, bool):
        return _same
    if origin is UnionType:
        return _union([argument for argument in arguments if argument is not NoneType])
    if origin is Sequence:
        return _unpack
    if origin is tuple:
        return _tuple(arguments)
    if is_dataclass(hint) and isinstance(hint, type):
        return _dataclass(hint)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint
    if isinstance(hint, type) and issubclass(hint, tuple):
        return hint._make if hasattr(hint, "_make") else hint
    raise TypeError(f"no rule for {hint}")


def _union(hints: list[Any]) -> _Read:
    """One type or None; or a text or what is an object in JSON."""
    texts, others = [hint for hint in hints if hint is str], [hint for hint in hints if hint is not str]
    if not others:
        return _same
    (other,) = others
    read = _reader(other)
    if texts:
        return lambda value: value if value is None or isinstance(value, str) else read(value)
    return lambda value: None if value is None else read(value)


def _tuple(arguments: tuple[Any, ...]) -> _Read:
    (item,) = {argument for argument in arguments if argument is not Ellipsis}
    read = _reader(item)
    if read is _same:
        return tuple
    return lambda value: tuple(map(read, value))


def _dataclass(cls: type) -> _Read:
    hints = get_type_hints(cls)
    readers = {name: _reader(hints[name]) for name in _stored(cls)}

    def read(value: dict[str, Any]) -> Any:
        return cls(**{name: readers[name](item) for name, item in value.items()})

    return read


_EVENTS: Mapping[str, _Read] = {kind: _dataclass(cls) for cls, kind in KINDS.items()}
