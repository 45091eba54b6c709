"""A model's own tokenizer: prompts to ids, ids to text, which ids are control. Nothing here awaits."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from harness.engine import Delta, EngineError, Vocabulary
from harness.types import Finish, Tail, TokenIds
from mrsa_server.engines.prompting import ChatMessage, neutralise, tool_definitions, with_arguments

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.decoders import DecodeStream
    from transformers import PreTrainedTokenizerFast

# Ids of the prompt that a decoder sees before the output: some tokenizers write a space only between words.
_PRIMING = 4

# Marks of a tool call are part of the answer, also where a tokenizer counts them as special (ZAYA1's has ids for them).
_SPOKEN = frozenset({"<tool_call>", "</tool_call>", "<zyphra_tool_call>", "</zyphra_tool_call>"})


class Tokens:
    """A fast tokenizer of transformers, and the one place that knows which of its ids are control.

    Attributes:
        vocabulary: Think markers count where each is one id; else the model is taken as one that does not think.
        markers: The ids of the think markers.
        spoken: Special ids that are text all the same, and the text.

    Raises:
        ValueError: It is no fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise ValueError(
                f"{type(tokenizer).__name__} is no fast tokenizer; the engine argument tokenizer_mode=hf gives one"
            )
        self._tokenizer = tokenizer
        ids = tokenizer.get_vocab()
        thinks = "<think>" in ids and "</think>" in ids
        self.vocabulary = Vocabulary((ids["<think>"],), (ids["</think>"],)) if thinks else Vocabulary()
        self.markers = frozenset(self.vocabulary.think_open + self.vocabulary.think_close)
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        unread = {i for i, token in added.items() if token.special}
        special = frozenset(tokenizer.all_special_ids) | unread
        self._bounds = special | self.markers
        self.spoken = {i: added[i].content for i in unread if added[i].content in _SPOKEN}
        self._bytes = _bytes_of(tokenizer.backend_tokenizer, unread - self.spoken.keys())
        # Not every added token is control: Gemma's hold runs of spaces and newlines, which a candidate needs.
        self._control = self._bounds | {i for i, token in added.items() if neutralise(token.content) != token.content}

    def encode_chat(self, messages: list[ChatMessage], tools: str | None) -> Sequence[int]:
        """Ids of the rendered chat template, generation prompt included.

        Raises:
            EngineError: The template refuses the messages.
        """
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                [with_arguments(message) for message in messages],
                tools=tool_definitions(tools),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise EngineError(f"the chat template of the model refuses these messages: {error}", 400) from error
        return ids

    def encode(self, text: str) -> Sequence[int]:
        """Ids of a text, nothing added; special tokens in it are parsed."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def plain_ids(self, tail: Tail) -> tuple[int, ...]:
        """A candidate without control ids."""
        return tuple(i for i in tail.token_ids if i not in self._control)

    def control_count(self, token_ids: TokenIds) -> int:
        """How many of some ids are control."""
        return sum(i in self._control for i in token_ids)

    def decode(self, token_ids: TokenIds) -> str:
        """Text of some ids, special tokens and think markers left out."""
        if not self.markers.isdisjoint(token_ids):
            token_ids = [i for i in token_ids if i not in self.markers]
        return self.read(token_ids)

    def thinking(self, prompt: TokenIds) -> bool:
        """Whether a prompt ends inside an open `<think>`; a user's does not count, for a bound of a turn follows it."""
        last = next((i for i in reversed(prompt) if i in self._bounds), None)
        return last in self.vocabulary.think_open

    def read(self, token_ids: TokenIds) -> str:
        """Text of some ids by themselves: a character that they hold a part of is U+FFFD."""
        if self._bytes is not None:
            try:
                return b"".join(map(self._bytes.__getitem__, token_ids)).decode("utf-8", "replace")
            except IndexError:  # some models have more rows than their tokenizer has ids
                pass
        if not self.spoken or self.spoken.keys().isdisjoint(token_ids):
            return self._decode(token_ids)
        parts: list[str] = []
        start = 0
        for at in (at for at, token_id in enumerate(token_ids) if token_id in self.spoken):
            parts += self._decode(token_ids[start:at]), self.spoken[token_ids[at]]
            start = at + 1
        return "".join((*parts, self._decode(token_ids[start:])))

    def _decode(self, token_ids: TokenIds) -> str:
        ids = token_ids if isinstance(token_ids, list) else list(token_ids)
        text: str = self._tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def stream(self, before: TokenIds = ()) -> DecodeStream:
        """A decoder of ids that follow `before`."""
        from tokenizers.decoders import DecodeStream

        return DecodeStream(ids=list(before), skip_special_tokens=True)

    def step(self, stream: DecodeStream, more: int | list[int]) -> str:
        """Text that one or more ids complete; bytes of an unfinished character wait in the stream."""
        return stream.step(self._tokenizer.backend_tokenizer, more) or ""


def _bytes_of(tokenizer: Tokenizer, special: Set[int]) -> list[bytes] | None:
    """The bytes of each id, those of special ones left out, where the tokenizer is byte-level BPE; else None.

    Joining them is what its decoder does, in a third of the time.
    """
    from tokenizers.decoders import ByteLevel

    if not isinstance(tokenizer.decoder, ByteLevel):
        return None
    # GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on.
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)}
    others = itertools.count(256)
    alphabet = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}

    def bytes_of(token: str) -> bytes:
        try:
            return bytes(map(alphabet.__getitem__, token))
        except KeyError:  # an added token is what it looks like
            return token.encode()

    tokens = map(tokenizer.id_to_token, range(tokenizer.get_vocab_size()))
    return [b"" if i in special or token is None else bytes_of(token) for i, token in enumerate(tokens)]


class Pieces:
    """Ids of one generation -> deltas: think markers alone, what may begin a stop string held back.

    Args:
        tokens: The model's.
        prompt: Its ids.
        stop: Strings that end the generation.
        watched: Whether the text is read. Where nobody does, it is decoded push by push, for a third of the work: a
            character that is cut between two pushes is broken, the ids are what counts.
    """

    def __init__(self, tokens: Tokens, prompt: TokenIds, stop: tuple[str, ...], watched: bool = True) -> None:
        self._tokens = tokens
        self._watched = watched or bool(stop)
        self._stream = tokens.stream(prompt[-_PRIMING:])
        self._hold = max((len(text) - 1 for text in stop), default=0)
        self._held = ""
        self._head: Delta | None = Delta(prompt_tokens=len(prompt), thinking=tokens.thinking(prompt))

    def push(
        self, token_ids: TokenIds, cached_tokens: int | None, finish: Finish | None = None, stop: str | None = None
    ) -> list[Delta]:
        """Deltas of some new ids.

        Args:
            token_ids: The ids.
            cached_tokens: Of the prompt; read once.
            finish: Why the generation ends with them, if it does.
            stop: The stop string that ended it, which is no part of the text.
        """
        if finish:
            self._hold = sys.maxsize
        deltas = list(self._split(token_ids))
        if finish:
            last = deltas.pop() if deltas else Delta()
            text, self._held = self._held, ""
            deltas.append(replace(last, text=last.text + (text.partition(stop)[0] if stop else text), finish=finish))
        if deltas and self._head:
            head, self._head = self._head, None
            deltas[0] = replace(
                deltas[0], prompt_tokens=head.prompt_tokens, cached_tokens=cached_tokens, thinking=head.thinking
            )
        return deltas

    def _split(self, token_ids: TokenIds) -> Iterator[Delta]:
        start = 0
        markers, spoken = self._tokens.markers, self._tokens.spoken
        if not markers.isdisjoint(token_ids) or (spoken and not spoken.keys().isdisjoint(token_ids)):
            for at, token_id in enumerate(token_ids):
                if token_id in spoken:
                    ids = token_ids[start : at + 1]
                    self._held += self._read(ids[:-1]) + spoken[token_id]
                    yield Delta(ids, self._release(self._hold))
                    start, self._stream = at + 1, self._tokens.stream()
                if token_id not in markers:
                    continue
                ids = token_ids[start:at]
                self._held += self._read(ids)
                if ids or self._held:
                    yield Delta(ids, self._release(0))
                yield Delta((token_id,))
                start, self._stream = at + 1, self._tokens.stream()
        if start < len(token_ids):
            ids = token_ids[start:] if start else token_ids
            self._held += self._read(ids)
            yield Delta(ids, self._release(self._hold))

    def _read(self, ids: TokenIds) -> str:
        """The text of some ids, all in one call where that works: half the work of one by one."""
        if not self._watched:
            return self._tokens.read(ids)
        if len(ids) > 1:
            try:
                return self._tokens.step(self._stream, list(ids))
            except Exception:
                self._stream = self._tokens.stream()
        return "".join(map(self._step, ids))

    def _step(self, token_id: int) -> str:
        try:
            return self._tokens.step(self._stream, token_id)
        except Exception:  # tokenizers has no type of its own for bytes that are no text (vLLM issue 17448)
            self._stream = self._tokens.stream()
            return self._tokens.step(self._stream, token_id)

    def _release(self, hold: int) -> str:
        cut = max(len(self._held) - hold, 0)
        text, self._held = self._held[:cut], self._held[cut:]
        return text
