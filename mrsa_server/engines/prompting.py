"""Messages with candidates -> what an engine takes: token ids with the candidates' own ids spliced in, or plain text.

A candidate is hostile text: `<|im_end|>` in it must stay letters and bars. With ids that holds by construction, since a
candidate never meets the tokenizer again. Without, its special-looking marks are broken with a zero-width space.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import string
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from harness.types import Message, Tail

ChatMessage = dict[str, object]

# Marks that chat templates of today's open models turn into control tokens.
MARK = re.compile(
    r"<(?=\|[^<>|\s]{1,64}\|>)"
    r"|<(?=\uff5c[^<>\uff5c\n]{1,64}\uff5c>)"  # DeepSeek's full-width bars
    r"|<(?=/?(?:think|thinking|s|bos|eos|pad|unk|mask|start_of_turn|end_of_turn|start_of_image|end_of_image"
    r"|tool_call|tool_response|tools|zyphra_tool_call|zyphra_tool_response|function|parameter)(?:=[^<>]{0,64})?>)"
    r"|<(?=<?/?SYS>)|\[(?=/?(?:INST|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS|SYSTEM_PROMPT)\])"
)


def neutralise(text: str) -> str:
    """Break every mark that a chat template could read as control, by a zero-width space after its first character."""
    return MARK.sub(lambda match: match.group(0) + "\u200b", text)


def chat_messages(messages: Sequence[Message], fill: Callable[[Tail], str]) -> list[ChatMessage]:
    """The messages in OpenAI's shape, each candidate as `fill` gives it."""
    out: list[ChatMessage] = []
    for message in messages:
        text = "".join(part if isinstance(part, str) else fill(part) for part in message.content)
        body: ChatMessage = {"role": message.role, "content": text}
        if message.name is not None:
            body["name"] = message.name
        if message.tool_call_id is not None:
            body["tool_call_id"] = message.tool_call_id
        if message.tool_calls:
            body["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        out.append(body)
    return out


def tool_definitions(tools: str | None) -> list[dict[str, object]] | None:
    """The tools of `AnswerRules` as the chat template takes them."""
    return None if tools is None else json.loads(tools)


def with_arguments(message: ChatMessage) -> ChatMessage:
    """Arguments of tool calls as an object, which is what chat templates take."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return message | {"tool_calls": [call | {"function": _parsed(call["function"])} for call in calls]}


def _parsed(function: dict[str, Any]) -> dict[str, Any]:
    try:
        return function | {"arguments": json.loads(function["arguments"])}
    except ValueError:
        return function


class PromptIds:
    """Renders prompts to ids through a tokenizer, here or behind a URL, and remembers what many rollouts share.

    All prompts of a round differ in their candidates alone. So a prompt is rendered once with a sentinel where
    candidates stand, cut at the sentinels' ids, and each rollout splices its candidates' ids into the cuts.

    Args:
        encode_chat: `(messages, tools as JSON text) -> ids` of the rendered chat template, generation prompt included.
        encode: Text to ids, nothing added, special tokens parsed or not.
        plain_ids: Ids of a candidate that are safe to splice: its own without control tokens.
        most_ids: How many ids of rendered prompts to remember, all together.
    """

    def __init__(
        self,
        encode_chat: Callable[[list[ChatMessage], str | None], Awaitable[Sequence[int]]],
        encode: Callable[[str], Awaitable[Sequence[int]]],
        plain_ids: Callable[[Tail], Awaitable[tuple[int, ...]]],
        most_ids: int = 2_000_000,
    ) -> None:
        self._encode_chat = encode_chat
        self._encode = encode
        self._plain_ids = plain_ids
        self._most_ids = most_ids
        self._cuts: OrderedDict[bytes, tuple[array[int], ...] | None] = OrderedDict()
        self._ids = 0
        # Letters that no text can hold on purpose: they never leave this process but to its tokenizer.
        self._sentinel = "slot" + "".join(secrets.choice(string.ascii_lowercase) for _ in range(12))
        self._sentinel_ids: tuple[int, ...] | None = None

    async def render(self, messages: tuple[Message, ...], tools: str | None = None) -> tuple[int, ...]:
        """The ids of a prompt, every candidate as its own ids."""
        tails = [part for message in messages for part in message.content if isinstance(part, Tail)]
        cuts = await self._cut(messages, tools, len(tails))
        if cuts is None:  # The tokenizer joins the sentinel with its neighbours: fall back to text made harmless.
            return tuple(await self._encode_chat(chat_messages(messages, lambda tail: neutralise(tail.text)), tools))
        ids = list(cuts[0])
        for tail, cut in zip(tails, cuts[1:], strict=True):
            ids += await self._plain_ids(tail)
            ids += cut
        return tuple(ids)

    async def _cut(self, messages: tuple[Message, ...], tools: str | None, slots: int) -> tuple[array[int], ...] | None:
        shared = [self._with_sentinels(message) for message in messages]
        key = hashlib.blake2b(repr((shared, tools)).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in self._cuts:
            self._cuts.move_to_end(key)
            return self._cuts[key]
        ids = tuple(await self._encode_chat(chat_messages(shared, lambda tail: tail.text), tools))
        parts = _split(ids, await self._mark()) if slots else (ids,)
        cuts = tuple(array("I", part) for part in parts) if len(parts) == slots + 1 else None
        if key not in self._cuts:  # another rollout of the round may have been first
            self._cuts[key] = cuts
            self._ids += _length(cuts)
        while self._ids > self._most_ids and self._cuts:
            self._ids -= _length(self._cuts.popitem(last=False)[1])
        return cuts

    async def _mark(self) -> tuple[int, ...]:
        """Ids of the sentinel as it stands after a newline, where every candidate stands."""
        if self._sentinel_ids is None:
            newline = tuple(await self._encode("\n"))
            both = tuple(await self._encode(f"\n{self._sentinel}"))
            self._sentinel_ids = both[len(newline) :] if both[: len(newline)] == newline else ()
        return self._sentinel_ids

    def _with_sentinels(self, message: Message) -> Message:
        parts = tuple(part if isinstance(part, str) else self._sentinel for part in message.content)
        return replace(message, content=parts)


def _length(cuts: tuple[array[int], ...] | None) -> int:
    return 1 if cuts is None else 1 + sum(map(len, cuts))


def _split(ids: tuple[int, ...], mark: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Cut `ids` at each occurrence of `mark`."""
    if not mark:
        return (ids,)
    parts: list[tuple[int, ...]] = []
    start = at = 0
    while at <= len(ids) - len(mark):
        if ids[at] == mark[0] and ids[at : at + len(mark)] == mark:
            parts.append(ids[start:at])
            at = start = at + len(mark)
        else:
            at += 1
    parts.append(ids[start:])
    return tuple(parts)
