"""The embedded engine: a real model through vLLM, and what every engine owes the method."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from harness.engine import EngineError
from harness.types import AnswerRules, Finish, Message, Sampling, ToolCall
from mrsa_server.engines import embedded
from mrsa_server.engines.embedded import EmbeddedEngine
from tests.engine.conftest import Generation, ask, busy, generate

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

COLD = Sampling(temperature=0)
INTEGER = json.dumps(
    {
        "type": "object",
        "properties": {"answer": {"type": "integer", "minimum": 0, "maximum": 999}},
        "required": ["answer"],
        "additionalProperties": False,
    }
)


async def whole(engine: EmbeddedEngine, made: Generation) -> str:
    """What the ids say, without the beginning of a character that the bound on tokens cut."""
    return (await engine.decode(made.ids)).rstrip("\ufffd")


async def test_ids_and_text_are_the_same_tokens(engine: EmbeddedEngine) -> None:
    made = await generate(engine, ask("Write a poem about the sea, with emoji.", max_tokens=64))
    assert len(made.ids) <= 64
    assert await whole(engine, made) == made.text
    assert "<|" not in made.text


async def test_the_first_delta_knows_the_prompt(engine: EmbeddedEngine) -> None:
    request = ask(max_tokens=2)
    made = await generate(engine, request)
    assert made.deltas[0].prompt_tokens == await engine.count(request.messages)
    assert made.deltas[0].cached_tokens is not None
    assert all(delta.prompt_tokens is None for delta in made.deltas[1:])
    assert not made.deltas[0].thinking


async def test_max_tokens_is_hard(engine: EmbeddedEngine) -> None:
    made = await generate(engine, ask("Write a long story.", max_tokens=7))
    assert (len(made.ids), made.finish) == (7, Finish.LENGTH)


async def test_the_model_ends_its_answer(engine: EmbeddedEngine) -> None:
    made = await generate(engine, ask("Say hello.", max_tokens=200, sampling=COLD))
    assert made.finish is Finish.STOP
    assert "<|im_end|>" not in made.text


async def test_a_stop_id_is_kept_and_ends(engine: EmbeddedEngine) -> None:
    free = await generate(engine, ask(max_tokens=24, sampling=COLD))
    stop = free.ids[12]
    made = await generate(engine, ask(max_tokens=24, sampling=COLD, stop_ids=(stop,)))
    assert made.ids == free.ids[: free.ids.index(stop) + 1]
    assert made.finish is Finish.STOP
    assert made.text == await engine.decode(made.ids)


async def test_a_stop_string_is_no_part_of_the_text(engine: EmbeddedEngine) -> None:
    free = await generate(engine, ask(max_tokens=24, sampling=COLD))
    stop = free.text[20:28]
    made = await generate(engine, ask(max_tokens=24, sampling=COLD, answer=AnswerRules(stop=("never said", stop))))
    assert made.text == free.text[: free.text.index(stop)]
    assert made.finish is Finish.STOP


async def test_text_held_back_for_a_stop_string_comes_at_the_end(engine: EmbeddedEngine) -> None:
    free = await generate(engine, ask(max_tokens=16, sampling=COLD))
    made = await generate(engine, ask(max_tokens=16, sampling=COLD, answer=AnswerRules(stop=("never said" * 9,))))
    assert made.text == free.text


async def test_an_answer_matches_its_schema(engine: EmbeddedEngine) -> None:
    made = await generate(engine, ask("What is 6 times 7?", max_tokens=64, answer=AnswerRules(json_schema=INTEGER)))
    assert made.finish is Finish.STOP
    assert isinstance(json.loads(made.text)["answer"], int)


@pytest.mark.parametrize(
    "schema",
    ['{"type": "nonsense"}', "{", '{"$ref": "#/$defs/none"}', '{"type": "string", "pattern": "("}', "[]", '""', "7"],
)
async def test_a_bad_schema_fails_its_request_alone(engine: EmbeddedEngine, schema: str) -> None:
    other = asyncio.create_task(generate(engine, ask(max_tokens=8)))
    with pytest.raises(EngineError, match="refused"):
        await generate(engine, ask(max_tokens=8, answer=AnswerRules(json_schema=schema)))
    assert (await other).ids
    assert await engine.healthy()


async def test_a_prompt_too_long_is_an_error_with_figures(engine: EmbeddedEngine) -> None:
    with pytest.raises(EngineError, match=r"prompt of \d+ tokens .* 4096"):
        await generate(engine, ask("word " * 9000))


async def test_a_role_without_a_place_in_the_template_is_rendered(engine: EmbeddedEngine) -> None:
    call = ToolCall("call_1", "weather", '{"city": "Oslo"}')
    messages = (
        Message("developer", ("Be brief.",)),
        Message("user", ("How is the weather?",)),
        Message("assistant", ("",), tool_calls=(call,)),
        Message("tool", ("12 degrees",), tool_call_id="call_1"),
    )
    tools = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}])
    request = replace(ask(max_tokens=4), messages=messages, answer=AnswerRules(tools=tools))
    assert (await generate(engine, request)).ids
    prompt = await engine.decode(await engine._prompts.render(messages, tools))
    assert '[{"name": "weather", "arguments": {"city": "Oslo"}}]' in prompt
    assert "12 degrees" in prompt
    assert prompt.index("Be brief.") < prompt.index("<tools>") < prompt.index("How is")


async def test_a_seed_repeats(engine: EmbeddedEngine) -> None:
    one, two, other = [await generate(engine, ask(seed=seed)) for seed in (7, 7, 8)]
    assert one.ids == two.ids
    assert one.ids != other.ids


async def test_a_seed_repeats_when_the_prompt_is_cut_into_chunks(engine: EmbeddedEngine) -> None:
    """Of this vLLM 0.32 died on CPU: a seeded request that did not fit into one step killed the engine."""

    async def crowd(mark: str) -> list[Generation]:
        requests = [ask(f"{mark} {i}: " + "tell me more. " * 130, max_tokens=8, seed=i) for i in range(3)]
        return await asyncio.gather(*(generate(engine, request) for request in requests))

    crowded = await crowd("Question")
    alone = [
        await generate(engine, ask(f"Question {i}: " + "tell me more. " * 130, max_tokens=8, seed=i)) for i in range(3)
    ]
    assert [made.ids for made in crowded] == [made.ids for made in alone]
    assert await engine.healthy()


async def test_a_prefix_is_computed_once(engine: EmbeddedEngine) -> None:
    request = ask("A prompt of its own, and long enough for some blocks. " * 8, max_tokens=2)
    first, second = await generate(engine, request), await generate(engine, request)
    assert second.deltas[0].cached_tokens is not None
    assert second.deltas[0].cached_tokens > (first.deltas[0].cached_tokens or 0)


async def test_a_prefix_is_computed_again_for_another_key(engine: EmbeddedEngine) -> None:
    text = "A prompt of one key, and long enough for some blocks of the cache. " * 8
    salts = ["one", "other", "one", None, "other"]
    cached = []
    for salt in salts:
        made = await generate(engine, ask(text, max_tokens=2, cache_salt=salt))
        cached.append(bool(made.deltas[0].cached_tokens))
    assert cached == [False, False, True, False, True]


async def test_a_prompt_far_beyond_the_context_holds_nobody_up_while_it_is_counted(engine: EmbeddedEngine) -> None:
    counting = asyncio.create_task(engine.count((Message("user", ("The quick brown fox, 13 dogs;\n" * 70_000,)),)))
    longest, before = 0.0, time.perf_counter()
    while not counting.done():
        await asyncio.sleep(0.01)
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    assert (counting.result() or 0) > 500_000
    assert longest < 0.5


async def test_eight_at_once(engine: EmbeddedEngine) -> None:
    made = await asyncio.gather(*(generate(engine, ask(f"Count from {i}.", priority=i)) for i in range(8)))
    assert all(one.finish for one in made)
    for one in made:
        assert await whole(engine, one) == one.text


async def test_what_nobody_watches_comes_in_larger_pieces(engine: EmbeddedEngine) -> None:
    watched = await generate(engine, ask(max_tokens=64, sampling=COLD))
    joined = await generate(engine, ask(max_tokens=64, sampling=COLD, watched=False))
    assert joined.ids == watched.ids
    assert joined.text == watched.text
    assert len(joined.deltas) * 8 < len(watched.deltas)


async def test_closing_frees_the_scheduler_within_a_second(engine: EmbeddedEngine) -> None:
    generations = [engine.generate(ask("Count to a million.", max_tokens=4000)) for _ in range(8)]
    for generation in generations:
        await anext(generation)
    assert await busy(engine)
    begun = time.monotonic()
    for generation in generations:
        await generation.aclose()
    while await busy(engine):
        assert time.monotonic() - begun < 1
    assert time.monotonic() - begun < 1


async def test_cancelling_a_consumer_frees_the_scheduler_within_a_second(engine: EmbeddedEngine) -> None:
    async def consume() -> None:
        async with aclosing(engine.generate(ask("Count to a million.", max_tokens=4000))) as deltas:
            async for _ in deltas:
                pass

    for pause in (0.0, 0.001, 0.01, 0.5):  # before, while and after the request is handed over
        tasks = [asyncio.create_task(consume()) for _ in range(4)]
        await asyncio.sleep(pause)
        begun = time.monotonic()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while await busy(engine):
            assert time.monotonic() - begun < 1


async def test_two_processes_may_convert_at_once(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from mrsa_server.engines import embedded;"
        f"embedded.convert(embedded.model_folder(Path({str(tmp_path)!r})))"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]  # noqa: ASYNC220
    assert [process.wait() for process in processes] == [0, 0]
    folder = embedded.model_folder(tmp_path)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / "model.safetensors").stat().st_size > 500_000_000
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
