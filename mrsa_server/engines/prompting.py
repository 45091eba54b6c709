"""Messages with candidates -> what an engine takes: token ids with the candidates' own ids spliced in, or plain text.

A candidate is hostile text: `<|im_end|>` in it must stay letters and bars. With ids that holds by construction, since a
candidate never meets the tokenizer again. Without, its special-looking marks are broken with a zero-width space.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

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
_SENTINEL = "candidateslot"


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


class PromptIds:
    """Renders prompts to ids through a tokenizer, here or behind a URL, and remembers what many rollouts share.

    All prompts of a round differ in their candidates alone. So a prompt is rendered once with a sentinel where
    candidates stand, cut at the sentinels' ids, and each rollout splices its candidates' ids into the cuts.

    Args:
        encode_chat: `(messages, tools as JSON text) -> ids` of the rendered chat template, generation prompt included.
        encode: Text to ids, nothing added, special tokens parsed or not.
        plain_ids: Ids of a candidate that are safe to splice: its own without control tokens.
        size: How many rendered prompts to remember.
    """

    def __init__(
        self,
        encode_chat: Callable[[list[ChatMessage], str | None], Awaitable[Sequence[int]]],
        encode: Callable[[str], Awaitable[Sequence[int]]],
        plain_ids: Callable[[Tail], Awaitable[tuple[int, ...]]],
        size: int = 512,
    ) -> None:
        self._encode_chat = encode_chat
        self._encode = encode
        self._plain_ids = plain_ids
        self._size = size
        self._cuts: OrderedDict[tuple[tuple[Message, ...], str | None], tuple[tuple[int, ...], ...] | None]
        self._cuts = OrderedDict()
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

    async def _cut(
        self, messages: tuple[Message, ...], tools: str | None, slots: int
    ) -> tuple[tuple[int, ...], ...] | None:
        key = (tuple(_with_sentinels(message) for message in messages), tools)
        if key in self._cuts:
            self._cuts.move_to_end(key)
            return self._cuts[key]
        ids = tuple(await self._encode_chat(chat_messages(key[0], lambda tail: tail.text), tools))
        cuts = _split(ids, await self._sentinel()) if slots else (ids,)
        found = cuts if len(cuts) == slots + 1 else None
        self._cuts[key] = found
        while len(self._cuts) > self._size:
            self._cuts.popitem(last=False)
        return found

    async def _sentinel(self) -> tuple[int, ...]:
        """Ids of the sentinel as it stands after a newline, where every candidate stands."""
        if self._sentinel_ids is None:
            newline = tuple(await self._encode("\n"))
            both = tuple(await self._encode(f"\n{_SENTINEL}"))
            self._sentinel_ids = both[len(newline) :] if both[: len(newline)] == newline else ()
        return self._sentinel_ids


def _with_sentinels(message: Message) -> Message:
    return replace(message, content=tuple(part if isinstance(part, str) else _SENTINEL for part in message.content))


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
