"""One generation's events -> the deltas that the harness reads, with or without ids from the server."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

from harness.engine import Delta, Vocabulary
from harness.types import Finish, RolloutRequest
from mrsa_server.engines.openai_stream import CLOSE, OPEN, Event, IdReader, TextReader

_CHARACTERS_PER_TOKEN = 4.0  # of text that is dropped unseen by any tokenizer, where the server counts nothing
_FLUSH_CHARACTERS = 1024  # what a rollout that is cut loses of its ids at most


class IdReply:
    """An answer in ids, to the deltas of one generation."""

    stopped = False

    def __init__(self, request: RolloutRequest, reader: IdReader) -> None:
        self.reader = reader
        self._request = request

    @property
    def end_id(self) -> int | None:
        """The id that ended the sequence, where it was not one that we asked to stop at."""
        ended = self.reader.finish is Finish.STOP and self.reader.stop_reason is None
        return self.reader.last if ended and not self._request.answer.stop else None

    async def take(self, events: list[Event]) -> list[Delta]:
        return self.reader.take(events)

    async def end(self) -> list[Delta]:
        deltas = self.reader.end()
        stop_ids = self._request.stop_ids
        if len(stop_ids) == 1 and self.reader.stop_reason == stop_ids[0] != self.reader.last:
            deltas.append(Delta(stop_ids))  # Not every server shows the id that it stopped at.
        reader = self.reader
        finish = reader.finish or Finish.STOP
        counted = reader.generated if reader.dropped else None
        if reader.dropped and reader.answer is not None and not reader.answer.answered:
            finish = Finish.LENGTH  # It thought to its end, and came to no answer.
        return [*deltas, Delta(finish=finish, cached_tokens=reader.cached_tokens, completion_tokens=counted)]


class TextReply:
    """An answer in text, to the deltas of one generation: with ids of a tokenizer, asked for in runs, or code points.

    Attributes:
        characters: Of everything shown, markers not among them.
        thought: Whether it showed a reasoning.
        stopped: Whether it came to the ids at which it was to stop.
    """

    def __init__(
        self,
        request: RolloutRequest,
        reader: TextReader,
        vocabulary: Vocabulary,
        tokenize: Callable[[str], Awaitable[list[int]]] | None,
    ) -> None:
        self.reader = reader
        self.characters = 0
        self.thought = False
        self.stopped = False
        self._stop_ids = request.stop_ids
        self._vocabulary = vocabulary
        self._tokenize = tokenize
        self._pending = ""
        self._ids = 0

    async def take(self, events: list[Event]) -> list[Delta]:
        return await self._write(self.reader.take(events))

    async def end(self) -> list[Delta]:
        deltas: list[Delta] = []
        if not self.stopped:
            deltas = await self._write(self.reader.end()) + await self._flush()
            if self._stop_ids and self.reader.stop_reason == self._stop_ids[-1]:
                deltas.append(Delta(self._stop_ids))
        reader = self.reader
        counted = reader.completion_tokens
        dropped = 0 if reader.answer is None else reader.answer.dropped
        if counted is None and self._tokenize:
            counted = self._ids + math.ceil(dropped / _CHARACTERS_PER_TOKEN)
        elif counted is None:
            counted = math.ceil((self.characters + dropped) / self._vocabulary.ids_per_token)
        finish = Finish.STOP if self.stopped or reader.finish is None else reader.finish
        if dropped and reader.answer is not None and not reader.answer.answered:
            finish = Finish.LENGTH  # It thought to its end, and came to no answer.
        return [*deltas, Delta((), "", finish, reader.prompt_tokens, reader.cached_tokens, False, counted)]

    async def _write(self, pieces: list[str]) -> list[Delta]:
        deltas: list[Delta] = []
        for piece in pieces:
            if piece in (OPEN, CLOSE):
                self.thought = True
                ids = self._vocabulary.think_open if piece == OPEN else self._vocabulary.think_close
                deltas += await self._flush()
                if ids:
                    deltas.append(Delta(ids))
                    self._ids += len(ids)
                if ids and ids == self._stop_ids:
                    self.stopped = True
                    break
                continue
            self.characters += len(piece)
            if self._tokenize is None:
                deltas.append(Delta(list(map(ord, piece)), piece))
            else:
                deltas.append(Delta((), piece))
                self._pending += piece
                if len(self._pending) > _FLUSH_CHARACTERS:
                    deltas += await self._flush(self._boundary())
        return deltas

    def _boundary(self) -> int:
        """Where the text may be cut without another cut of its tokens: before the space of a word."""
        at = self._pending.rfind(" ")
        while at > 0 and self._pending[at - 1].isspace():
            at = self._pending.rfind(" ", 0, at)
        return max(at, 0)

    async def _flush(self, end: int | None = None) -> list[Delta]:
        text = self._pending[:end]
        if not text or self._tokenize is None:
            return []
        self._pending = self._pending[len(text) :]
        ids = await self._tokenize(text)
        self._ids += len(ids)
        return [Delta(ids)]
