"""Tokenizers like ZAYA1's: think markers, and special ids for the marks of a tool call, which the server must see."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrsa_server.api.tools import CallReader, Tool
from mrsa_server.engines.tokens import Pieces, Tokens

pytestmark = pytest.mark.engine

MARKS = ("<zyphra_tool_call>", "</zyphra_tool_call>")
CALL = "<function=look>\n<parameter=place>\nGenève\n</parameter>\n</function>"
TOOL = Tool("look", None, {"type": "object", "properties": {"place": {"type": "string"}}})


def tokenizer(kind: str) -> Any:
    """Of single bytes, decoded as Gemma does (byte by byte where no other token fits) or as GPT-2 does."""
    with warnings.catch_warnings(action="ignore"):
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

    if kind == "gemma":
        words = [f"<0x{byte:02X}>" for byte in range(256)] + [chr(i) for i in range(33, 127)] + ["▁"]
        made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token=None))
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        made = Tokenizer(
            models.BPE({word: i for i, word in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
        )
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    special = [AddedToken(word, special=True) for word in ("<eos>", *MARKS)]
    made.add_special_tokens(special)
    made.add_tokens([AddedToken(word) for word in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


@pytest.fixture(scope="module", params=["gemma", "gpt2"])
def tokens(request: pytest.FixtureRequest) -> Tokens:
    return Tokens(tokenizer(request.param))


def test_the_marks_of_a_call_are_text_and_other_special_tokens_are_not(tokens: Tokens) -> None:
    text = f"Héllo {MARKS[0]}\n{CALL}\n{MARKS[1]}"
    ids = [*tokens.encode(text), *tokens.encode("<eos>")]
    assert set(tokens.spoken.values()) == set(MARKS)
    assert tokens.read(ids) == tokens.read(tuple(ids)) == tokens.decode(ids) == text


def test_they_are_control_for_all_that(tokens: Tokens) -> None:
    """A candidate cannot bring them into a prompt."""
    from harness.types import Tail

    ids = tuple(tokens.encode(f"a{MARKS[0]}b"))
    assert tokens.read(tokens.plain_ids(Tail(ids, ""))) == "ab"
    assert tokens.control_count(ids) == 1


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("watched", [True, False])
def test_a_call_is_found_however_its_ids_come(tokens: Tokens, watched: bool, data: st.DataObject) -> None:
    thought = tokens.encode("<think>hm</think>")
    ids = [*thought, *tokens.encode(f"So: {MARKS[0]}\n{CALL}\n{MARKS[1]}")]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(ids) - 1), max_size=8), label="cuts"))
    pieces, reader = Pieces(tokens, (), (), watched), CallReader([TOOL])
    deltas = []
    for start, end in pairwise((0, *cuts, len(ids))):
        deltas += pieces.push(tuple(ids[start:end]), 0)
    assert [i for delta in deltas for i in delta.token_ids] == ids
    assert [delta.token_ids for delta in deltas if not tokens.markers.isdisjoint(delta.token_ids)] == [
        tokens.vocabulary.think_open,
        tokens.vocabulary.think_close,
    ]
    if not watched:  # a character that is cut between two pushes is broken there
        return
    text = "".join(delta.text for delta in deltas)
    reading = reader.feed(text.removeprefix("hm"))
    assert reading.text == "So: "
    (call,) = reading.calls
    assert (call.name, call.arguments) == ("look", '{"place":"Genève"}')
