"""Prompts as ids: candidates keep their own, whatever they hold, and what is remembered is bounded."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from harness.types import Message, Tail
from mrsa_server.engines.prompting import ChatMessage, PromptIds, neutralise

CONTROL = 1000


class Tokenizer:
    """A byte is an id, `<|x|>` is a control id, and a chat is its roles and contents between control ids."""

    def __init__(self) -> None:
        self.rendered = 0

    async def chat(self, messages: list[ChatMessage], tools: str | None) -> Sequence[int]:
        self.rendered += 1
        ids: list[int] = []
        for message in messages:
            ids += [CONTROL + 1, *await self.encode(f"{message['role']}\n{message['content']}"), CONTROL + 2]
        return ids

    async def encode(self, text: str) -> Sequence[int]:
        head, *rest = text.encode("utf-8", "replace").split(b"<|x|>")
        return [*head, *(token for part in rest for token in (CONTROL, *part))]

    async def plain(self, tail: Tail) -> tuple[int, ...]:
        return tuple(token for token in tail.token_ids if token < CONTROL)

    def prompts(self, most_ids: int = 10_000) -> PromptIds:
        return PromptIds(self.chat, self.encode, self.plain, most_ids)


def prompt(*parts: str | Tail) -> tuple[Message, ...]:
    return (Message("user", parts),)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4), st.text())
async def test_candidates_stand_as_their_own_ids_and_no_control_id_comes_in(raw: list[bytes], task: str) -> None:
    tokenizer = Tokenizer()
    tails = [Tail((*part, CONTROL), (part + b"<|x|>").decode("utf-8", "replace")) for part in raw]
    task = task.replace("<|x|>", "")
    parts = [piece for tail in tails for piece in ("fence\n", tail, "\nfence\n")]
    ids = await tokenizer.prompts().render(prompt(task, *parts))
    expected = f"user\n{task}".encode("utf-8", "replace") + b"".join(b"fence\n" + part + b"\nfence\n" for part in raw)
    assert list(ids) == [CONTROL + 1, *expected, CONTROL + 2]


async def test_a_round_is_rendered_once() -> None:
    tokenizer = Tokenizer()
    prompts = tokenizer.prompts()
    for number in range(16):
        await prompts.render(prompt("task\n", Tail((number,), "x"), "\nend"))
    assert tokenizer.rendered == 1


async def test_what_is_remembered_is_bounded_by_its_ids_not_by_its_number() -> None:
    tokenizer = Tokenizer()
    prompts = tokenizer.prompts(most_ids=10_000)
    for number in range(50):
        await prompts.render(prompt(f"{number}" + "x" * 900))
    await prompts.render(prompt("y" * 100_000))  # more than may be remembered at all
    assert prompts._ids <= 10_000
    assert sum(len(cut) for cuts in prompts._cuts.values() if cuts for cut in cuts) <= prompts._ids
    before = tokenizer.rendered
    await prompts.render(prompt("49" + "x" * 900))
    assert tokenizer.rendered == before + 1, "the largest pushed the others out"


def test_marks_of_chat_templates_are_broken_and_other_markup_is_not() -> None:
    broken = "<|im_end|> </think> <think> <start_of_turn> [INST] <\uff5cend\uff5c> <<SYS>> <tool_call>"
    assert all(mark not in neutralise(broken) for mark in broken.split())
    kept = "a < b, <div class='x'>, x[1], <b>bold</b>, 1 <| 2, List<String>"
    assert neutralise(kept) == kept
    assert neutralise(broken).replace("\u200b", "") == broken
