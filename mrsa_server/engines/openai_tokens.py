"""A tokenizer behind a URL: vLLM's and llama-server's /tokenize and /detokenize, found by asking."""

from __future__ import annotations

import asyncio
import re
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from enum import Enum
from hashlib import blake2b
from typing import Any

import orjson

from harness.engine import EngineError
from harness.types import Tail, TokenIds
from mrsa_server.engines.openai_stream import checked_ids
from mrsa_server.engines.prompting import MARK, ChatMessage, neutralise, tool_definitions

Post = Callable[[str, bytes], Awaitable[dict[str, Any]]]

# Statuses of a server that does not know a path or a body; any other error says nothing about what it knows.
_UNKNOWN = frozenset((400, 401, 403, 404, 405, 422, 501))
# Control tokens that open models write an answer with: the tool parser has to see them.
# A text with more marks that are not known yet is not asked about: whoever writes it would multiply our calls.
_MOST_MARKS = 8
_REMEMBERED_MARKS = 1024
_SPOKEN = re.compile(r"tool|function|parameter", re.IGNORECASE)


class Dialect(Enum):
    """Whose words a server's tokenizer speaks: the field of text in, and that of text out."""

    VLLM = ("prompt", "prompt")
    SGLANG = ("prompt", "text")
    LLAMA = ("content", "content")


class RemoteTokenizer:
    """Text to ids and back over HTTP.

    Args:
        post: Sends a JSON body to a path at the server's root; raises EngineError or EngineDead.
        model: The model's name, which vLLM wants to hear.
        dialect: How the server speaks.
    """

    def __init__(self, post: Post, model: str, dialect: Dialect) -> None:
        self._post = post
        self._model = model
        self._dialect = dialect
        self._flights: dict[bytes, asyncio.Task[list[int]]] = {}
        self._marks: OrderedDict[str, int | None] = OrderedDict()
        self._control: set[int] = set()
        self._plain: OrderedDict[bytes, frozenset[int]] = OrderedDict()
        self.context_tokens: int | None = None

    @classmethod
    async def find(cls, post: Post, model: str) -> RemoteTokenizer | None:
        """The server's tokenizer, or None where it shows none."""
        for dialect in Dialect:
            tokenizer = cls(post, model, dialect)
            try:
                ids = await tokenizer.encode("Hi")
                if ids and await tokenizer.detokenize(ids):
                    return tokenizer
            except EngineError as error:
                if error.status is not None and error.status not in _UNKNOWN:
                    raise
        return None

    async def renders(self) -> bool:
        """Whether the server renders a chat to ids."""
        try:
            return bool(await self.encode_chat([{"role": "user", "content": "Hi"}], None))
        except EngineError as error:
            if error.status is not None and error.status not in _UNKNOWN:
                raise
            return False

    async def prompt_end(self) -> tuple[int, ...]:
        """Ids that follow the last message of every chat: the end of its turn and the generation prompt."""
        one, other = [await self.encode_chat([{"role": "user", "content": text}], None) for text in ("Hi", "2")]
        same = 0
        while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
            same += 1
        return tuple(one[len(one) - same :])

    async def opens_thinking(self, mark: str) -> bool:
        """Whether the generation prompt itself ends with `mark`, where the server tells (llama-server does)."""
        if self._dialect is not Dialect.LLAMA:
            return False
        try:
            body = {"messages": [{"role": "user", "content": "Hi"}]}
            prompt = (await self._post("/apply-template", orjson.dumps(body))).get("prompt")
        except EngineError:
            return False
        return isinstance(prompt, str) and prompt.rstrip().endswith(mark)

    async def encode(self, text: str) -> list[int]:
        """Ids of text, nothing added."""
        name = "add_special" if self._dialect is Dialect.LLAMA else "add_special_tokens"
        return await self._tokenize({"model": self._model, self._dialect.value[0]: text, name: False})

    async def encode_chat(self, messages: list[ChatMessage], tools: str | None) -> list[int]:
        """Ids of the rendered chat template, generation prompt included."""
        body: dict[str, object] = {"model": self._model, "messages": messages, "add_generation_prompt": True}
        if tools is not None:
            body["tools"] = tool_definitions(tools)
        return await self._tokenize(body)

    async def detokenize(self, ids: TokenIds) -> str:
        """The text of ids, control tokens included."""
        body = {"model": self._model, "tokens": list(ids)}
        text = (await self._post("/detokenize", orjson.dumps(body))).get(self._dialect.value[1])
        if not isinstance(text, str):
            raise EngineError("the engine's /detokenize gives no text")
        return text

    async def decode(self, ids: TokenIds) -> str:
        """The text of ids without control tokens, but with those that tool calls are written with."""
        kept = [token for token in ids if token not in self._control] if self._control else ids
        if not kept:
            return ""
        text = await self.detokenize(kept)
        marks = await self._known(text)
        if marks is None:  # Whatever looks like a mark in it stays; as a candidate, `plain_ids` breaks it.
            return text
        silent = {token for mark, token in marks.items() if token in kept and not _SPOKEN.search(mark)}
        self._remember(ids, frozenset(marks.values()))
        if silent:
            self._control |= silent
            return await self.detokenize([token for token in kept if token not in silent])
        return text

    async def plain_ids(self, tail: Tail) -> tuple[int, ...]:
        """A candidate's ids without control tokens: whatever it says, it cannot end its own turn.

        One with more marks than are asked about gets the ids of its text with every mark broken, no more than it had.
        """
        found = self._plain.get(_digest(tail.token_ids))
        if found is None:
            text = await self.detokenize(tail.token_ids)
            marks = await self._known(text)
            if marks is None:
                broken = [token for token in await self.encode(neutralise(text)) if token not in self._control]
                return tuple(broken[-len(tail.token_ids) :])
            found = frozenset(marks.values())
            self._remember(tail.token_ids, found)
        control = found | self._control
        if control.isdisjoint(tail.token_ids):
            return tuple(tail.token_ids)
        return tuple(token for token in tail.token_ids if token not in control)

    async def single(self, mark: str) -> int | None:
        """The one id that `mark` is; None where it is none or several."""
        if mark in self._marks:
            self._marks.move_to_end(mark)
            return self._marks[mark]
        ids = await self.encode(mark)
        found = self._marks[mark] = ids[0] if len(ids) == 1 else None
        while len(self._marks) > _REMEMBERED_MARKS:
            self._marks.popitem(last=False)
        return found

    def add_control(self, ids: Iterable[int]) -> None:
        """Ids that are known to be control tokens: think markers, the end of a turn."""
        self._control.update(ids)

    async def _known(self, text: str) -> dict[str, int] | None:
        """Everything in `text` that looks like a control mark and is one id, with that id; None if too many are new."""
        marks: set[str] = set()
        for match in MARK.finditer(text):
            end = text.find("]" if match.group(0) == "[" else ">", match.start())
            marks.add(text[match.start() : end + 1])
        if sum(mark not in self._marks for mark in marks) > _MOST_MARKS:
            return None
        known = {mark: await self.single(mark) for mark in sorted(marks)}
        return {mark: token for mark, token in known.items() if token is not None}

    def _remember(self, ids: TokenIds, control: frozenset[int]) -> None:
        self._plain[_digest(ids)] = control
        while len(self._plain) > 8192:
            self._plain.popitem(last=False)

    async def _tokenize(self, body: dict[str, object]) -> list[int]:
        """One request for callers who ask the same at once, as all rollouts of a round do."""
        key = orjson.dumps(body)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = asyncio.create_task(self._ask(key))
            flight.add_done_callback(lambda task: self._land(key, task))
        return await asyncio.shield(flight)

    async def _ask(self, body: bytes) -> list[int]:
        answer = await self._post("/tokenize", body)
        try:
            ids = checked_ids(answer["tokens"])
        except (KeyError, OverflowError, TypeError):
            raise EngineError("the engine's /tokenize gives no ids") from None
        longest = answer.get("max_model_len")
        if isinstance(longest, int) and longest > 0:
            self.context_tokens = longest
        return ids

    def _land(self, key: bytes, task: asyncio.Task[list[int]]) -> None:
        del self._flights[key]
        if not task.cancelled():
            task.exception()  # Where every caller has left, nobody else looks at it.


def _digest(ids: TokenIds) -> bytes:
    return blake2b(array("q", ids).tobytes(), digest_size=16).digest()
