"""The lines of a batch's input file, piece by piece: where they begin and end, and whether they are requests.

Whether a request can be honoured is another question, and one of its run. Nothing here awaits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import orjson

from mrsa_server.runs.batch_store import LineError

MOST_LINES = 50_000  # as OpenAI's
_MOST_ERRORS = 100  # that are told of a file
_MOST_ID = 512  # characters of a custom_id
_AROUND = 16_384  # bytes of a line around its body
_BOM = b"\xef\xbb\xbf"


class Raw(NamedTuple):
    """A line as it stands in the file, from 1 on; None for one that is longer than a line may be."""

    number: int
    data: bytes | None


class Line(NamedTuple):
    """A request.

    Attributes:
        number: Where it stands in the file, from 1 on.
        custom_id: Its name.
        body: What would be sent to the batch's endpoint.
    """

    number: int
    custom_id: str
    body: bytes


class LineReader:
    """Cuts pieces into lines, and holds no more than one line and one piece. Blank lines are counted and left out.

    Args:
        max_body_bytes: As of a request that is sent by itself.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self._most = max_body_bytes + _AROUND
        self._number = 0
        self._rest = b""
        self._too_long = False

    def feed(self, piece: bytes) -> list[Raw]:
        """The lines that end in a piece."""
        *ended, rest = piece.split(b"\n")
        found: list[Raw] = []
        for part in ended:
            found += self._end(part)
        self._grow(rest)
        return found

    def end(self) -> list[Raw]:
        """The last line, where nothing ends it."""
        return list(self._end(b""))

    def _grow(self, part: bytes) -> None:
        if self._too_long or len(self._rest) + len(part) > self._most:
            self._too_long, self._rest = True, b""
        else:
            self._rest += part

    def _end(self, part: bytes) -> Iterator[Raw]:
        self._grow(part)
        self._number += 1
        data = self._rest.strip()
        if self._number == 1:
            data = data.removeprefix(_BOM)
        if self._too_long:
            yield Raw(self._number, None)
        elif data:
            yield Raw(self._number, data)
        self._rest, self._too_long = b"", False


class Validation:
    """Whether all lines of a file are requests, and which of them are not.

    Args:
        endpoint: Where all of them have to go.
        max_body_bytes: As of `LineReader`.

    Attributes:
        total: Lines so far.
        errors: What is wrong, the first hundred.
    """

    def __init__(self, endpoint: str, max_body_bytes: int) -> None:
        self.total = 0
        self.errors: list[LineError] = []
        self._endpoint = endpoint
        self._max_body_bytes = max_body_bytes
        self._seen: set[str] = set()

    @property
    def over(self) -> bool:
        """Whether more need not be read."""
        return len(self.errors) >= _MOST_ERRORS or self.total > MOST_LINES

    def take(self, lines: Sequence[Raw]) -> None:
        """The next lines."""
        for raw in lines:
            self.total += 1
            if self.total == MOST_LINES + 1:
                message = f"The file must have at most {MOST_LINES} lines."
                self.errors.append(LineError("too_many_lines", message, raw.number))
            if self.over:
                return
            found = read_line(raw, self._endpoint, self._max_body_bytes)
            if isinstance(found, Line) and found.custom_id in self._seen:
                message = f"custom_id: {found.custom_id!r} is the name of an earlier line"
                found = LineError("duplicate_custom_id", message, raw.number, "custom_id")
            if isinstance(found, LineError):
                self.errors.append(found)
            else:
                self._seen.add(found.custom_id)

    def end(self) -> None:
        """There are no more."""
        if not self.total:
            self.errors.append(LineError("empty_file", "The file has no lines."))


def read_line(raw: Raw, endpoint: str, max_body_bytes: int) -> Line | LineError:
    """The request in a line, or what is wrong with it."""

    def wrong(code: str, message: str, param: str | None = None) -> LineError:
        return LineError(code, message, raw.number, param)

    if raw.data is None:
        return wrong("line_too_long", f"body: must be at most {max_body_bytes} bytes", "body")
    try:
        line = orjson.loads(raw.data)
    except orjson.JSONDecodeError as error:
        return wrong("invalid_json_line", f"The line is not JSON: {error}")
    if not isinstance(line, dict):
        return wrong("invalid_json_line", "The line must be a JSON object.")
    for name in ("custom_id", "method", "url", "body"):
        if name not in line:
            return wrong("missing_required_parameter", f"{name}: is required", name)
    name = line["custom_id"]
    if not isinstance(name, str) or not 1 <= len(name) <= _MOST_ID or "\0" in name:
        return wrong("invalid_value", f"custom_id: must be a text of 1 to {_MOST_ID} characters, none NUL", "custom_id")
    if line["method"] != "POST":
        return wrong("invalid_method", "method: must be POST", "method")
    if line["url"] != endpoint:
        return wrong("invalid_url", f"url: must be the batch's endpoint, {endpoint}", "url")
    if not isinstance(line["body"], dict):
        return wrong("invalid_value", "body: must be an object", "body")
    body = orjson.dumps(line["body"])
    if len(body) > max_body_bytes:
        return wrong("line_too_long", f"body: must be at most {max_body_bytes} bytes, not {len(body)}", "body")
    return Line(raw.number, name, body)
