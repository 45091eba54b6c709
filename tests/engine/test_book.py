"""Think markers, priorities and a dead engine, on a model whose every token is known."""

from __future__ import annotations

import asyncio

import psutil
import pytest

from harness.engine import EngineDead, EngineError
from harness.types import Finish, Message, RolloutRequest, Sampling, Slot
from mrsa_server.engines.vllm import VllmEngine
from tests.engine.conftest import Generation, ask, generate

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

COLD = Sampling(temperature=0)


def recite(**rest: object) -> RolloutRequest:
    return ask("Recite.", max_tokens=16, sampling=COLD, **rest)


def parts(made: Generation) -> list[tuple[int, str]]:
    return [(len(delta.token_ids), delta.text) for delta in made.deltas]


async def test_markers_come_alone_with_an_empty_text(book: VllmEngine) -> None:
    made = await generate(book, recite())
    assert book.vocabulary.think_open
    assert made.text == "Perhaps so.Yes!"
    markers = (book.vocabulary.think_open, book.vocabulary.think_close)
    assert [tuple(delta.token_ids) for delta in made.deltas if not delta.text][:2] == list(markers)
    assert made.finish is Finish.STOP


async def test_a_delta_that_straddles_a_marker_is_split(book: VllmEngine) -> None:
    made = await generate(book, recite(watched=False))
    assert parts(made) == [(1, ""), (3, "Perhaps so."), (1, ""), (3, "Yes!")]
    assert made.ids == (await generate(book, recite())).ids
    assert made.deltas[0].prompt_tokens is not None


async def test_a_marker_as_stop_id_is_kept(book: VllmEngine) -> None:
    made = await generate(book, recite(stop_ids=book.vocabulary.think_close))
    assert tuple(made.deltas[-1].token_ids) == book.vocabulary.think_close
    assert (made.text, made.finish) == ("Perhaps so.", Finish.STOP)


async def test_a_sequence_as_stop_ids_is_refused(book: VllmEngine) -> None:
    with pytest.raises(EngineError, match="2 ids"):
        await generate(book, recite(stop_ids=(1, 2)))


async def test_an_open_think_at_the_end_of_the_prompt_is_thinking(book: VllmEngine) -> None:
    opened, closed = book.vocabulary.think_open, book.vocabulary.think_close
    newline = book._tokens.encode("\n")
    for continuation, thinking in (
        ((), False),
        (opened, True),
        ((*opened, *newline), True),
        ((*opened, *newline, *closed), False),
    ):
        made = await generate(book, recite(continuation=tuple(continuation)))
        assert made.deltas[0].thinking is thinking


async def test_a_think_mark_of_the_user_opens_nothing(book: VllmEngine) -> None:
    made = await generate(book, ask("What does <think> mean?", max_tokens=2))
    assert not made.deltas[0].thinking


async def test_a_continuation_goes_on_where_it_ends(book: VllmEngine) -> None:
    first = await generate(book, recite(stop_ids=book.vocabulary.think_close))
    rest = await generate(book, recite(continuation=tuple(first.ids)))
    assert (rest.text, rest.finish) == ("Yes!", Finish.STOP)


async def test_decode_leaves_markers_and_special_tokens_out(book: VllmEngine) -> None:
    made = await generate(book, recite())
    assert await book.decode(made.ids) == "Perhaps so.Yes!"


async def test_lower_priority_waits(book: VllmEngine) -> None:
    ended: list[str] = []

    async def run(name: str, tokens: int, priority: int) -> None:
        loop = tuple(book._tokens.encode(" round"))
        messages = (Message("user", (name,)),)
        request = RolloutRequest("run", Slot(0, 0), messages, tokens, loop, sampling=COLD, priority=priority)
        await generate(book, request)
        ended.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(run("running", 200, 0))
        await asyncio.sleep(0.1)
        group.create_task(run("late", 2, 9))
        await asyncio.sleep(0.1)
        group.create_task(run("urgent", 2, 1))
    assert ended == ["running", "urgent", "late"]


async def test_zz_a_dead_engine_says_so(book: VllmEngine) -> None:
    """Last of the file: it kills the model's process."""
    loop = tuple(book._tokens.encode(" round"))
    generation = book.generate(ask("Go on.", max_tokens=400, sampling=COLD, continuation=loop))
    await anext(generation)
    assert book._llm is not None
    for process in book._llm.engine_core.resources.engine_manager.processes:
        psutil.Process(process.pid).kill()
    with pytest.raises(EngineDead):
        async for _ in generation:
            pass
    assert not await book.healthy()
    with pytest.raises(EngineDead):
        await generate(book, recite())
