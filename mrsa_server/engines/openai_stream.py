"""What an OpenAI-compatible server streams, read without I/O: bytes -> JSON events -> ids, or text cut at think marks.

Nothing here awaits. Anything that is not of the expected shape is an EngineError: the bytes are another machine's.

Of server-sent events: lines end in LF or CRLF (not in CR alone: such a stream has no line, and is refused as cut);
`data:` with or without a space, one whole JSON object or `[DONE]` a line (an object over several lines is not joined);
`error:` as old llama-servers write it; comments, `event:`, `id:`, `retry:` and empty lines are skipped.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from typing import Any

import orjson

from harness.engine import Delta, EngineError
from harness.types import Finish

OPEN, CLOSE = "<think>", "</think>"
_MARKERS = re.compile(f"({OPEN}|{CLOSE})")
_BROKEN = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
_LONGEST_LINE = 1 << 24  # bytes
_MOST_TOKENS = 1 << 31  # what a server counts beyond is no count
_FILTERED = ("content_filter", "sensitive")
_FAILED = ("abort", "error", "cancelled", "insufficient_system_resource")
_FULL = ("length", "max_tokens", "model_length")

Event = dict[str, Any]


class Frames:
    """Server-sent events out of bytes that are cut anywhere. `done` is set by `[DONE]`."""

    def __init__(self) -> None:
        self._rest = b""
        self.done = False

    def feed(self, data: bytes) -> list[Event]:
        """The events that end in `data`; all others' lines (comments, names) are skipped."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _LONGEST_LINE:
            raise EngineError(f"the engine's stream has a line of more than {_LONGEST_LINE} bytes")
        events: list[Event] = []
        for line in lines:
            if line[:5] == b"data:":
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    self.done = True
                elif payload:
                    events.append(parse(payload))
            elif line[:6] == b"error:":
                raise EngineError(f"the engine failed while it generated: {_line(line[6:].decode(errors='replace'))}")
        return events


def parse(payload: bytes) -> Event:
    """One JSON object; an error object in it is raised."""
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise EngineError("the engine's answer is not JSON") from None
    if not isinstance(event, dict):
        raise EngineError("the engine's answer is not a JSON object")
    if event.get("error") or event.get("object") == "error":
        raise EngineError(f"the engine failed while it generated: {error_text(event)}")
    return event


def error_text(event: Event) -> str:
    """What an error body says, in one short line."""
    error = event.get("error") or event.get("detail") or event.get("message") or ""
    if isinstance(error, dict):
        error = error.get("message", "")
    return _line(str(error))


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


def checked_ids(ids: list[int]) -> list[int]:
    """The ids, each of which fits a trace.

    Raises:
        TypeError, OverflowError: They are no list, or one is no number, negative, or above 32 bits.
    """
    if not isinstance(ids, list):
        raise TypeError("ids are no list")
    array("I", ids)
    return ids


class Markers:
    """Splits text at think markers, which may come in pieces: what may still become a marker is held back."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> list[str]:
        """Pieces of text; a piece that is a marker is equal to OPEN or CLOSE, no other ever is."""
        text = self._held + text
        self._held = ""
        start = text.rfind("<")
        if start >= 0 and (OPEN.startswith(text[start:]) or CLOSE.startswith(text[start:])) and text[-1] != ">":
            self._held, text = text[start:], text[:start]
        if "<" not in text:
            return [text] if text else []
        return [piece for piece in _MARKERS.split(text) if piece]

    def end(self) -> list[str]:
        """What was held back and became no marker."""
        held, self._held = self._held, ""
        return [held] if held else []


class AnswerOnly:
    """Drops the reasoning of a model that thinks again where only its answer was asked for.

    Attributes:
        dropped: Characters of reasoning.
        answered: Whether there was anything else than space besides.

    Args:
        unmarked: Whether the reasoning may begin without OPEN, as the template writes that: text is held back until
            CLOSE shows what it was, or the end that it was the answer.
    """

    def __init__(self, unmarked: bool = False) -> None:
        self.dropped = 0
        self.answered = False
        self._hiding = False
        self._held: list[str] | None = [] if unmarked else None

    def feed(self, pieces: list[str]) -> list[str]:
        """What of the pieces (markers alone) is answer."""
        kept: list[str] = []
        for piece in pieces:
            if piece == OPEN:
                kept += self._release()
                self._hiding = True
            elif piece == CLOSE:
                self.dropped += sum(map(len, self._release()))
                self._hiding = False
            elif self._hiding:
                self.dropped += len(piece)
            elif self._held is not None:
                self._held.append(piece)
            else:
                kept.append(piece)
        return self._seen(kept)

    def end(self) -> list[str]:
        """What was held back and is answer."""
        return self._seen(self._release())

    def _release(self) -> list[str]:
        held, self._held = self._held or [], None
        return held

    def _seen(self, kept: list[str]) -> list[str]:
        self.answered = self.answered or any(piece.strip() for piece in kept)
        return kept


class Reader:
    """What ids and text have in common: how a generation ended and what it cost.

    Attributes:
        finish: STOP or LENGTH once the server said so.
        stop_reason: vLLM's id or string that stopped it; None for the end of the sequence.
        hidden_tokens: Of `completion_tokens`, those of a reasoning that the server did not show.
        answer: What drops the reasoning where only the answer was asked for.
    """

    def __init__(self, answer: AnswerOnly | None = None) -> None:
        self.answer = answer
        self.finish: Finish | None = None
        self.stop_reason: object = None
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.hidden_tokens = 0

    def choice(self, event: Event) -> Event | None:
        """The one choice of an event, after its finish and usage were noted; None where it has none."""
        usage = event.get("usage")
        if usage:
            self._usage(usage)
        choices = event.get("choices")
        if not choices:
            return None
        choice: Event = choices[0]
        reason = choice.get("finish_reason")
        if reason is not None:
            if reason in _FILTERED:
                raise EngineError(f"the engine filtered the answer: {reason}")
            if reason in _FAILED:
                raise EngineError(f"the engine ended the generation: {reason}")
            if not isinstance(reason, str):
                raise TypeError("finish_reason is no text")
            self.finish = Finish.LENGTH if reason in _FULL else Finish.STOP
            self.stop_reason = choice.get("stop_reason")
        return choice

    def _usage(self, usage: Event) -> None:
        self.prompt_tokens = _count(usage.get("prompt_tokens"))
        self.completion_tokens = _count(usage.get("completion_tokens"))
        self.cached_tokens = _count((usage.get("prompt_tokens_details") or {}).get("cached_tokens"))
        self.hidden_tokens = _count((usage.get("completion_tokens_details") or {}).get("reasoning_tokens")) or 0


class IdReader(Reader):
    """Events of vLLM's /v1/completions with `return_token_ids` -> deltas of ids, think markers alone.

    Attributes:
        last: The last id.
        generated: How many ids came.
        dropped: How many of these are reasoning where only the answer was asked for.
    """

    def __init__(
        self, think_open: tuple[int, ...], think_close: tuple[int, ...], answer: AnswerOnly | None = None
    ) -> None:
        super().__init__(answer)
        self._marks = {ids[0]: mark for ids, mark in ((think_open, OPEN), (think_close, CLOSE)) if len(ids) == 1}
        self._owed: list[str] = []
        self._hiding = False
        self._text = Markers()
        self.last: int | None = None
        self.generated = 0
        self.dropped = 0

    def take(self, events: list[Event]) -> list[Delta]:
        """Deltas of all events that came in one read, joined where no marker stands between them."""
        try:
            return self._take(events) if self.answer is None else self._take_answer(events, self.answer)
        except _BROKEN:
            raise EngineError("the engine's answer is not of the shape of /v1/completions") from None

    def end(self) -> list[Delta]:
        """Text that was held back."""
        if self.answer is None:
            return []
        text = "".join(self.answer.feed(self._text.end()) + self.answer.end())
        return [Delta((), text)] if text else []

    def _take_answer(self, events: list[Event], answer: AnswerOnly) -> list[Delta]:
        """Ids and text without reasoning, each by its own markers: text may run behind ids."""
        ids: list[int] = []
        texts: list[str] = []
        for new, text in self._read(events):
            texts += answer.feed(self._text.feed(text))
            if not self._hiding and self._marks.keys().isdisjoint(new):
                ids += new
                continue
            for token in new:
                mark = self._marks.get(token)
                if mark is not None:
                    self._hiding = mark == OPEN
                if mark is not None or self._hiding:
                    self.dropped += 1
                else:
                    ids.append(token)
        return [Delta(ids, "".join(texts))] if ids or texts else []

    def _read(self, events: list[Event]) -> Iterator[tuple[list[int], str]]:
        """New ids and new text of each event that has any."""
        for event in events:
            choice = self.choice(event)
            if choice is None:
                continue
            ids = checked_ids(choice["token_ids"])
            self.generated += len(ids)
            if ids:
                self.last = ids[-1]
            yield ids, choice.get("text") or ""

    def _take(self, events: list[Event]) -> list[Delta]:
        deltas: list[Delta] = []
        ids: list[int] = []
        texts: list[str] = []
        for new, text in self._read(events):
            for mark in self._owed[:]:
                # Text runs behind ids where the server holds it back for stop strings.
                if mark in text:
                    text = text.replace(mark, "", 1)
                    self._owed.remove(mark)
            if self._marks and not self._marks.keys().isdisjoint(new):
                if ids or texts:
                    deltas.append(Delta(ids, "".join(texts)))
                    ids, texts = [], []
                deltas += self._split(new, text)
            else:
                ids += new
                texts.append(text)
        if ids or any(texts):
            deltas.append(Delta(ids, "".join(texts)))
        return deltas

    def _split(self, ids: list[int], text: str) -> list[Delta]:
        """Cut ids, and the text with them, at each marker."""
        deltas: list[Delta] = []
        start = 0
        for at, token in enumerate(ids):
            mark = self._marks.get(token)
            if mark is None:
                continue
            before, found, after = text.partition(mark)
            if found:
                text = after
            else:
                before = "" if at == start else text
                text = text[len(before) :]
                # The text of a stop token never comes.
                if self.finish is None:
                    self._owed.append(mark)
            if at > start or before:
                deltas.append(Delta(ids[start:at], before))
            deltas.append(Delta((token,)))
            start = at + 1
        if start < len(ids) or text:
            deltas.append(Delta(ids[start:], text))
        return deltas


class TextReader(Reader):
    """Events of a chat (or of completions without ids) -> pieces of text, think markers alone.

    Reasoning that the server separates is put between markers; tool calls become text as open models write them.

    Args:
        thinking: Whether the prompt itself ends inside an open `<think>`.
        answer: What drops the reasoning where only the answer was asked for.

    Attributes:
        unmarked: Whether reasoning came in the text without OPEN before it.
    """

    def __init__(self, thinking: bool = False, answer: AnswerOnly | None = None) -> None:
        super().__init__(answer)
        self.unmarked = False
        self._open = thinking
        self._marked = False
        self._separated = False
        self._reasoning = Markers()
        self._content = Markers()
        self._calls: dict[int, list[str]] = {}

    def take(self, events: list[Event]) -> list[str]:
        """Pieces of all events that came in one read, joined where no marker stands between them."""
        try:
            pieces = [piece for event in events for piece in self._take(event)]
            return _join(pieces if self.answer is None else self.answer.feed(pieces))
        except _BROKEN:
            raise EngineError("the engine's answer is not of the shape of /v1/chat/completions") from None

    def _take(self, event: Event) -> list[str]:
        choice = self.choice(event)
        if choice is None:
            return []
        delta: Event = choice.get("delta") or choice.get("message") or {}
        pieces: list[str] = []
        reasoning: str | None = delta.get("reasoning") or delta.get("reasoning_content")
        content: str | None = delta.get("content") or choice.get("text") or delta.get("refusal")
        calls = delta.get("tool_calls")
        if reasoning:
            if not self._separated and not self._open:
                pieces += [*self._content.end(), OPEN]
            self._separated = self._open = True
            pieces += _plain(self._reasoning.feed(reasoning))
        if (content or calls) and self._separated:
            self._separated = self._open = False
            pieces += [*self._reasoning.end(), CLOSE]
        if content:
            pieces += self._follow(self._content.feed(content))
        for at, call in enumerate(calls or ()):
            function = call.get("function") or {}
            index = call.get("index")
            known = self._calls.setdefault(at if index is None else index, ["", ""])
            known[0] += function.get("name") or ""
            known[1] += function.get("arguments") or ""
        return pieces

    def end(self) -> list[str]:
        """What was held back, and the tool calls."""
        pieces = [*self._reasoning.end(), *self._content.end()]
        try:
            calls = [_tool_text(*call) for _, call in sorted(self._calls.items())]
        except _BROKEN:
            raise EngineError("the engine's tool calls are not of the shape of /v1/chat/completions") from None
        if self.answer is not None:
            pieces = self.answer.feed(pieces) + self.answer.end()
            self.answer.answered = self.answer.answered or bool(calls)
        return _join(pieces + calls)

    def _follow(self, pieces: list[str]) -> list[str]:
        for piece in pieces:
            if piece == OPEN:
                self._open = self._marked = True
            elif piece == CLOSE:
                self.unmarked = self.unmarked or not self._marked
                self._open = False
            elif self._open and not self._marked:  # of the prompt
                self.unmarked = True
        return pieces


def has_ids(events: list[Event]) -> bool:
    """Whether a server gave the ids that it was asked for: an old vLLM does not know `return_token_ids`."""
    try:
        choices = [event["choices"][0] for event in events if event.get("choices")]
        return all(isinstance(choice.get("token_ids"), list) for choice in choices)
    except _BROKEN:
        raise EngineError("the engine's answer is not of the shape of /v1/completions") from None


def ends_thinking(ids: tuple[int, ...], think_open: tuple[int, ...], think_close: tuple[int, ...]) -> bool:
    """Whether ids end inside an open think; a marker that is not one id is in no prompt."""
    if len(think_open) != 1 or think_open[0] not in ids:
        return False
    backwards = ids[::-1]
    after = backwards[: backwards.index(think_open[0])]
    return think_close[0] not in after if think_close else True


def _join(pieces: list[str]) -> list[str]:
    """Neighbours that are no markers become one piece."""
    joined: list[str] = []
    run: list[str] = []
    for piece in pieces:
        if piece == OPEN or piece == CLOSE:
            if run:
                joined.append("".join(run))
                run = []
            joined.append(piece)
        else:
            run.append(piece)
    if run:
        joined.append("".join(run))
    return joined


def _plain(pieces: list[str]) -> list[str]:
    """A reasoning of its own field has its structure from the field: a marker in it is noise."""
    return [piece for piece in pieces if piece not in (OPEN, CLOSE)]


def _tool_text(name: str, arguments: str) -> str:
    try:
        value = orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        value = arguments
    return f"<tool_call>{orjson.dumps({'name': name, 'arguments': value}).decode()}</tool_call>"


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and 0 <= value < _MOST_TOKENS else None
