"""The engine over real sockets to a fake server in this process; and its readers over arbitrary cuts."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engine import Delta, EngineDead, EngineError
from harness.types import AnswerRules, Finish, Message, RolloutRequest, Sampling, Slot, Tail
from mrsa_server.engines.openai_http import Level, OpenAIEngine
from mrsa_server.engines.openai_pace import Pace
from mrsa_server.engines.openai_stream import CLOSE, OPEN, AnswerOnly, Frames, IdReader, Markers, TextReader
from tests.helpers.fake_upstream import END_THINK, IM_END, MODEL, THINK, FakeUpstream, Script, decode, encode
from tests.helpers.serving import CHAT, in_memory

REASONING = "Sechs mal sieben: 6·7 = 42 ✓. " * 3
ANSWER = "Die Antwort ist \\boxed{42}."


def request(**changes: Any) -> RolloutRequest:
    values: dict[str, Any] = {
        "run_id": "r",
        "slot": Slot(0, 0),
        "messages": (Message("user", ("What is 6·7?",)),),
        "max_tokens": 10_000,
    }
    return RolloutRequest(**values | changes)


@asynccontextmanager
async def served(script: Script, **options: Any) -> AsyncIterator[tuple[OpenAIEngine, FakeUpstream]]:
    async with FakeUpstream(script) as upstream:
        engine = OpenAIEngine(upstream.url, **options)
        try:
            yield engine, upstream
        finally:
            await engine.aclose()


async def collect(engine: OpenAIEngine, asked: RolloutRequest) -> list[Delta]:
    async with aclosing(engine.generate(asked)) as deltas:
        return [delta async for delta in deltas]


def ids_of(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def shape(engine: OpenAIEngine, deltas: list[Delta]) -> list[str]:
    """Text with the markers in their places; each must stand alone."""
    parts = [""]
    marks = {tuple(engine.vocabulary.think_open): OPEN, tuple(engine.vocabulary.think_close): CLOSE}
    for delta in deltas:
        mark = marks.get(tuple(delta.token_ids)) if delta.token_ids else None
        if mark:
            assert delta.text == ""
            parts += [mark, ""]
        else:
            parts[-1] += delta.text
    return [part for part in parts if part]


async def settled(condition: Any) -> None:
    async with asyncio.timeout(1):
        while not condition():  # noqa: ASYNC110 (the server counts and tells nobody)
            await asyncio.sleep(0.005)


# ---- what a server can do


@pytest.mark.parametrize(("level", "found"), [(1, Level.IDS), (2, Level.TEXT), (3, Level.PLAIN)])
async def test_the_level_is_found_without_a_generation(level: int, found: Level) -> None:
    async with served(Script(level=level)) as (engine, upstream):
        await engine.start()
        assert (engine.level, engine.model, upstream.stats.calls) == (found, "fake", 0)
        assert engine.vocabulary.exact is (level < 3)
        assert engine.vocabulary.context_tokens == (131_072 if level == 1 else None)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_the_url_is_taken_with_and_without_v1(suffix: str) -> None:
    async with FakeUpstream() as upstream:
        engine = OpenAIEngine(upstream.url + suffix)
        await engine.start()
        assert engine.model == "fake"
        assert await engine.healthy()
        await engine.aclose()


async def test_nobody_listening_is_a_dead_engine_and_not_for_ever() -> None:
    async with FakeUpstream() as upstream:
        port = upstream.port
    engine = OpenAIEngine(f"http://127.0.0.1:{port}")
    assert not await engine.healthy()
    with pytest.raises(EngineDead):
        await collect(engine, request())
    async with FakeUpstream(port=port):
        assert await engine.healthy()
        assert text_of(await collect(engine, request()))
        await engine.aclose()


async def test_an_unknown_host_is_a_dead_engine() -> None:
    engine = OpenAIEngine("http://no-such-host.invalid:1")
    with pytest.raises(EngineDead):
        await engine.start()
    await engine.aclose()


async def test_a_server_that_is_still_loading_is_asked_again_and_one_that_refuses_is_not() -> None:
    async with served(Script(down=503)) as (engine, upstream):
        assert not await engine.healthy()
        with pytest.raises(EngineDead):
            await engine.start()
        upstream.change(down=None, api_key="sk-other")
        with pytest.raises(EngineError):
            await engine.start()
        upstream.change(api_key=None)
        await engine.start()
        assert await engine.healthy()


async def test_a_router_without_a_server_behind_it_is_a_dead_engine() -> None:
    async with served(Script(level=1, empty=True)) as (engine, upstream):
        assert not await engine.healthy()
        with pytest.raises(EngineDead):
            await engine.start()
        upstream.change(empty=False)
        await engine.start()
        upstream.change(empty=True)  # scaled to zero
        with pytest.raises(EngineDead, match="No available workers"):
            await collect(engine, request())


async def test_a_stream_that_is_cut_is_a_dead_engine_where_the_router_has_lost_it() -> None:
    async with served(Script(level=1, delay_s=0.4, writes=0)) as (engine, upstream):
        await engine.start()
        generation = asyncio.create_task(collect(engine, request()))
        await settled(lambda: upstream.stats.open)
        upstream.change(empty=True)
        for protocol in list(upstream.protocols):
            protocol.transport.close()
        with pytest.raises(EngineDead):
            await generation


async def test_a_router_is_well_as_long_as_one_of_its_servers_is() -> None:
    async with served(Script(level=1)) as (engine, upstream):
        await engine.start()
        upstream.change(partly=True)
        assert await engine.healthy()
        upstream.change(fault="500", partly=True)
        with pytest.raises(EngineError):  # and so a failure is the rollout's
            await collect(engine, request())


async def test_generations_that_are_cut_are_asked_for_again_and_their_run_goes_on() -> None:
    async with FakeUpstream(Script(level=1, answer=ANSWER, delay_s=0.4, writes=0)) as upstream:
        async with in_memory(OpenAIEngine(upstream.url)) as client:
            sizes = {"population": 4, "rounds": 1, "set_size": 4, "rollout_tokens": 200, "tail_tokens": 32}
            body = {"model": f"{MODEL}-mrsa", "messages": [{"role": "user", "content": "?"}], "mrsa": sizes}
            asking = asyncio.create_task(client.post(CHAT, json=body))
            await settled(lambda: upstream.stats.open == 4)
            for protocol in list(upstream.protocols):
                protocol.transport.close()  # one behind a router that is well; the server itself listens on
            answer = (await asking).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER
    assert answer["mrsa"]["rounds"][0]["finished"] == 4


@pytest.mark.parametrize(("fault", "status"), [("500", 502), ("hang", 502), ("400", 400)])
async def test_what_stops_the_server_from_counting_a_prompt_is_its_own_fault(fault: str, status: int) -> None:
    async with FakeUpstream(Script(level=1)) as upstream:
        async with in_memory(OpenAIEngine(upstream.url, read_timeout_s=0.2)) as client:
            upstream.change(tokens_fault_share=1.0, tokens_faults=(fault,))
            body = {"model": MODEL, "messages": [{"role": "user", "content": "How many?"}]}
            response = await client.post(CHAT, json=body)
    assert response.status_code == status, response.text
    assert ("chat template" in response.json()["error"]["message"]) == (status == 400)


async def test_a_hundred_generations_that_fail_at_once_look_after_the_server_once() -> None:
    async with served(Script(level=1)) as (engine, upstream):
        await engine.start()
        upstream.change(fault="500", delay_s=0.1)
        upstream.stats.paths.clear()
        found = await asyncio.gather(*(collect(engine, request()) for _ in range(100)), return_exceptions=True)
        assert {type(one) for one in found} == {EngineError}
        assert upstream.stats.paths["/health"] < 50


async def test_the_key_is_sent_and_never_shown() -> None:
    async with served(Script(api_key="sk-secret"), api_key="sk-secret") as (engine, upstream):
        assert text_of(await collect(engine, request()))
        upstream.change(api_key="sk-other")
        with pytest.raises(EngineError) as caught:
            await collect(engine, request())
        assert caught.value.status == 401
        assert "secret" not in str(caught.value)


# ---- level 1: ids


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
async def test_ids_are_the_servers_own_and_markers_stand_alone(piece: int) -> None:
    script = Script(level=1, reasoning=REASONING, answer=ANSWER, piece=piece, writes=5)
    async with served(script) as (engine, upstream):
        deltas = await collect(engine, request())
        assert ids_of(deltas) == [THINK, *encode(REASONING), END_THINK, *encode(ANSWER), IM_END]
        assert shape(engine, deltas) == [OPEN, REASONING, CLOSE, ANSWER]
        prompt = encode("<|im_start|>user\nWhat is 6·7?<|im_end|>\n<|im_start|>assistant\n")
        assert upstream.generations[-1]["prompt"] == prompt
        assert (deltas[0].prompt_tokens, deltas[0].thinking) == (len(prompt), False)
        assert (deltas[-1].finish, deltas[-1].cached_tokens) == (Finish.STOP, 16)
        assert all(delta.finish is None for delta in deltas[:-1])
        assert await engine.count(request().messages) == len(prompt)


async def test_a_prompt_that_opens_the_thinking_says_so_but_not_one_that_quotes_it() -> None:
    async with served(Script(level=1, reasoning=REASONING, think="prompt")) as (engine, _):
        deltas = await collect(engine, request())
        assert deltas[0].thinking
        assert THINK not in ids_of(deltas)
        closed = await collect(engine, request(continuation=(*encode("so"), END_THINK)))
        assert not closed[0].thinking
        assert END_THINK not in ids_of(closed)
    async with served(Script(level=1)) as (engine, _):
        quoted = await collect(engine, request(messages=(Message("user", ("Why <think>?",)),)))
        assert not quoted[0].thinking


async def test_a_continuation_stands_after_the_prompt_as_ids() -> None:
    async with served(Script(level=1, reasoning=REASONING, answer=ANSWER)) as (engine, upstream):
        before = (THINK, *encode("hm"), END_THINK)
        deltas = await collect(engine, request(continuation=before))
        assert tuple(upstream.generations[-1]["prompt"][-len(before) :]) == before
        assert ids_of(deltas) == [*encode(ANSWER), IM_END]
        assert deltas[0].prompt_tokens == len(upstream.generations[-1]["prompt"])


async def test_it_stops_at_the_end_of_the_thinking_and_keeps_the_marker() -> None:
    async with served(Script(level=1, reasoning=REASONING, piece=3)) as (engine, upstream):
        await engine.start()
        deltas = await collect(engine, request(stop_ids=engine.vocabulary.think_close))
        assert ids_of(deltas) == [THINK, *encode(REASONING), END_THINK]
        assert (deltas[-1].finish, upstream.stats.aborted) == (Finish.STOP, 0)


async def test_a_stop_id_that_the_server_dropped_is_put_back() -> None:
    reply = {"choices": [{"text": "a", "token_ids": [97], "finish_reason": "stop", "stop_reason": END_THINK}]}
    script = Script(level=1, raw=(b"data: " + orjson.dumps(reply) + b"\n\ndata: [DONE]\n\n",))
    async with served(script) as (engine, _):
        assert ids_of(await collect(engine, request(stop_ids=(END_THINK,)))) == [97, END_THINK]


async def test_a_limit_is_sent_and_its_end_told() -> None:
    for level in (1, 2, 3):
        async with served(Script(level=level, answer=ANSWER, piece=1)) as (engine, upstream):
            deltas = await collect(engine, request(max_tokens=5))
            assert upstream.generations[-1]["max_tokens"] == 5
            assert (text_of(deltas), deltas[-1].finish) == (ANSWER[:5], Finish.LENGTH)


async def test_sampling_and_rules_reach_vllm() -> None:
    async with served(Script(level=1), priority=True) as (engine, upstream):
        rules = AnswerRules(stop=("\n\n",), json_schema='{"type": "object"}')
        sampling = Sampling(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=0.2)
        await collect(engine, request(answer=rules, sampling=sampling, seed=3, priority=-2, watched=False))
        body = upstream.generations[-1]
        assert body["structured_outputs"] == {"json": {"type": "object"}}
        assert (body["stop"], body["seed"], body["priority"], body["stream_interval"]) == (["\n\n"], 3, -2, 128)
        assert (body["temperature"], body["top_p"], body["top_k"], body["min_p"]) == (0.5, 0.9, 7, 0.1)
        assert (body["presence_penalty"], body["frequency_penalty"], body["repetition_penalty"]) == (0.2, 0.0, 1.0)


async def test_priorities_are_sent_until_they_are_refused() -> None:
    async with served(Script(level=1)) as (engine, upstream):
        await collect(engine, request(priority=5))
        assert upstream.generations[-1]["priority"] == 5
        upstream.change(refuses_priority=True)
        assert (await collect(engine, request(priority=6)))[-1].finish is Finish.STOP
        assert "priority" not in upstream.generations[-1]
        asked = len(upstream.generations)
        await collect(engine, request(priority=7))
        assert len(upstream.generations) == asked + 1, "it is not tried again"


async def test_the_salt_of_a_key_is_sent_to_a_server_that_takes_ids_until_it_is_refused() -> None:
    async with served(Script(level=1)) as (engine, upstream):
        await collect(engine, request(cache_salt="pepper"))
        assert upstream.generations[-1]["cache_salt"] == "pepper"
        await collect(engine, request())
        assert "cache_salt" not in upstream.generations[-1]
        upstream.change(refuses_salt=True, refuses_priority=True)
        assert (await collect(engine, request(cache_salt="pepper", priority=5)))[-1].finish is Finish.STOP
        assert not {"cache_salt", "priority"} & set(upstream.generations[-1])
        asked = len(upstream.generations)
        await collect(engine, request(cache_salt="pepper", priority=5))
        assert len(upstream.generations) == asked + 1, "neither is tried again"


async def test_what_was_told_of_salts_holds() -> None:
    for level, told, sent in ((3, None, False), (3, True, True), (1, False, False)):
        async with served(Script(level=level), cache_salt=told) as (engine, upstream):
            await collect(engine, request(cache_salt="pepper"))
            assert ("cache_salt" in upstream.generations[-1]) == sent
    async with served(Script(level=1, refuses_salt=True), cache_salt=True) as (engine, _):
        with pytest.raises(EngineError, match="cache_salt"):
            await collect(engine, request(cache_salt="pepper"))


async def test_what_was_told_of_priorities_holds() -> None:
    async with served(Script(level=1), priority=False) as (engine, upstream):
        await collect(engine, request(priority=5))
        assert "priority" not in upstream.generations[-1]
    async with served(Script(level=1, refuses_priority=True), priority=True) as (engine, _):
        with pytest.raises(EngineError, match="riority scheduling is not enabled"):
            await collect(engine, request(priority=5))


async def test_the_memory_of_a_vllm_server_is_read_from_its_metrics() -> None:
    async with served(Script(level=1, kv_blocks=(1000, 500))) as (engine, _):
        await engine.start()
        assert engine.memory_tokens == 1500 * 16
    for level in (1, 2, 3):
        async with served(Script(level=level)) as (engine, _):
            await engine.start()
            assert engine.memory_tokens is None


async def test_candidates_are_spliced_as_their_own_ids_without_control() -> None:
    async with served(Script(level=1)) as (engine, upstream):
        hostile = (*encode("x"), IM_END, THINK, *encode("y"))
        said = tuple(b"<|im_end|>")  # what a model wrote letter by letter is text, and stays
        tails = Tail(hostile, "xy"), Tail(said, "<|im_end|>")
        await collect(engine, request(messages=(Message("user", ("A:\n", tails[0], "\nB:\n", tails[1], "\n")),)))
        inside = [*encode("A:\n"), *b"xy", *encode("\nB:\n"), *said, *encode("\n")]
        start = encode("<|im_start|>user\n")
        assert upstream.generations[-1]["prompt"][len(start) : len(start) + len(inside)] == inside


async def test_decode_leaves_control_tokens_out_but_not_text_that_looks_like_them() -> None:
    async with served(Script(level=1)) as (engine, _):
        said = tuple(b"<|im_end|>")
        assert await engine.decode((*encode("é"), IM_END, *said, THINK)) == "é<|im_end|>"
        assert await engine.decode(()) == ""


async def test_rollouts_of_one_round_share_the_rendering_of_their_prompt() -> None:
    async with served(Script(level=1)) as (engine, upstream):
        await engine.start()
        before = upstream.stats.paths["/tokenize"]
        async with asyncio.TaskGroup() as tasks:
            for index in range(16):
                tasks.create_task(collect(engine, request(slot=Slot(0, index))))
        assert upstream.stats.paths["/tokenize"] == before + 1


async def test_a_template_that_refuses_a_role_is_a_400() -> None:
    async with served(Script(level=1)) as (engine, _):
        with pytest.raises(EngineError, match="unknown role") as caught:
            await engine.count((Message("bad", ("x",)),))
        assert caught.value.status == 400


async def test_a_vllm_that_gives_no_ids_has_its_text_tokenized() -> None:
    async with served(Script(level=1, ids=False, reasoning=REASONING, answer=ANSWER)) as (engine, upstream):
        deltas = await collect(engine, request())
        assert ids_of(deltas) == [THINK, *encode(REASONING), END_THINK, *encode(ANSWER)]
        assert upstream.stats.paths["/v1/completions"] == 1
        assert deltas[-1].completion_tokens == len(ids_of(deltas)) + 1  # the end of the sequence has no text
        stopped = await collect(engine, request(stop_ids=(END_THINK,)))
        assert ids_of(stopped) == [THINK, *encode(REASONING), END_THINK]


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 9), st.booleans())
def test_id_deltas_hold_every_id_once_however_events_are_joined(cuts: list[int], last: int, lag: bool) -> None:
    ids = [THINK, *encode(REASONING), END_THINK, END_THINK, *encode(ANSWER), IM_END]
    reader = IdReader((THINK,), (END_THINK,))
    deltas: list[Delta] = []
    at = given_text = 0
    for size in [*cuts, *[last] * len(ids)]:
        if at >= len(ids):
            break
        at += size
        seen = decode(ids[: at - 3 if lag and at < len(ids) else at]).rstrip("\ufffd")
        choice = {"token_ids": ids[at - size : at], "text": seen[given_text:], "finish_reason": None}
        given_text = max(given_text, len(seen))
        deltas += reader.take([{"choices": [choice]}])
    assert ids_of(deltas) == ids
    for delta in deltas:
        assert len(delta.token_ids) == 1 or not {THINK, END_THINK} & set(delta.token_ids)
        assert delta.text == "" or not {THINK, END_THINK} & set(delta.token_ids)
    if not lag:
        assert text_of(deltas) == REASONING + ANSWER + "<|im_end|>"


# ---- level 2: text with a tokenizer


@pytest.mark.parametrize("think", ["content", "field"])
async def test_text_comes_live_and_its_ids_are_true(think: str) -> None:
    script = Script(level=2, reasoning=REASONING, answer=ANSWER, think=think)
    async with served(script) as (engine, upstream):
        deltas = await collect(engine, request())
        assert ids_of(deltas) == [THINK, *encode(REASONING), END_THINK, *encode(ANSWER)]
        assert shape(engine, deltas) == [OPEN, REASONING, CLOSE, ANSWER]
        assert deltas[-1].completion_tokens is not None
        assert await engine.decode(encode(ANSWER)) == ANSWER
        assert "prompt" not in upstream.generations[-1]


async def test_long_text_gets_its_ids_before_the_end_and_none_is_lost() -> None:
    words = "so it is   that we\n\n go on " * 1500
    async with served(Script(level=2, answer=words, piece=50, writes=20, delay_s=0.02)) as (engine, _):
        deltas = await collect(engine, request(max_tokens=100_000))
        assert ids_of(deltas) == encode(words)
        assert sum(1 for delta in deltas if delta.token_ids) > 5


async def test_a_template_that_opens_the_thinking_is_known_from_llama_server() -> None:
    async with served(Script(level=2, reasoning=REASONING, answer=ANSWER, think="prompt")) as (engine, _):
        deltas = await collect(engine, request())
        assert deltas[0].thinking
        assert shape(engine, deltas) == [REASONING, CLOSE, ANSWER]


# ---- level 3: characters


@pytest.mark.parametrize("script", [
    Script(reasoning=REASONING, answer=ANSWER, piece=3, writes=7),
    Script(reasoning=REASONING, answer=ANSWER, think="field"),
    Script(reasoning=REASONING, answer=ANSWER, think="field", field="reasoning"),
    Script(reasoning=REASONING, answer=ANSWER, json=True),
    Script(reasoning=REASONING, answer=ANSWER, think="field", json=True),
])  # fmt: skip
async def test_thinking_is_found_wherever_the_server_puts_it(script: Script) -> None:
    async with served(script) as (engine, upstream):
        deltas = await collect(engine, request())
        assert shape(engine, deltas) == [OPEN, REASONING, CLOSE, ANSWER]
        assert ids_of(deltas) == [ord(c) for c in OPEN + REASONING + CLOSE + ANSWER]
        assert await engine.decode(ids_of(deltas)) == OPEN + REASONING + CLOSE + ANSWER
        assert (deltas[-1].finish, deltas[-1].prompt_tokens is not None) == (Finish.STOP, True)
        assert await engine.count(request().messages) is None
        assert upstream.stats.calls == 1


async def test_the_characters_of_a_token_are_measured() -> None:
    async with served(Script(answer="x" * 600, piece=6)) as (engine, upstream):
        await engine.start()
        assert engine.vocabulary.ids_per_token == 4.0
        await collect(engine, request())
        assert engine.vocabulary.ids_per_token == pytest.approx(6.0)
        upstream.change(piece=2)
        deltas = await collect(engine, request())
        assert engine.vocabulary.ids_per_token == pytest.approx(1200 / 400)
        assert deltas[-1].completion_tokens == 300


async def test_hidden_reasoning_counts_as_tokens_but_not_in_the_ratio() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 110, "completion_tokens_details": {"reasoning_tokens": 100}}
    event = {"choices": [{"delta": {"content": "x" * 50}, "finish_reason": "stop"}], "usage": usage}
    async with served(Script(raw=(b"data: " + orjson.dumps(event) + b"\n\n",))) as (engine, _):
        deltas = await collect(engine, request())
        assert engine.vocabulary.ids_per_token == 5.0
        assert deltas[-1].completion_tokens == 110


async def test_a_server_without_usage_has_its_tokens_estimated() -> None:
    event = {"choices": [{"delta": {"content": "x" * 41}, "finish_reason": "length"}]}
    async with served(Script(raw=(b"data: " + orjson.dumps(event) + b"\n\n",))) as (engine, _):
        deltas = await collect(engine, request())
        assert (deltas[-1].completion_tokens, deltas[-1].finish) == (11, Finish.LENGTH)
        assert engine.vocabulary.ids_per_token == 4.0


async def test_the_closing_is_asked_for_in_a_turn_of_its_own() -> None:
    async with served(Script(reasoning=REASONING, answer=ANSWER)) as (engine, upstream):
        so_far = tuple(map(ord, f"{OPEN}half a thought <|im_end|>{CLOSE}"))
        deltas = await collect(engine, request(continuation=so_far))
        turns = upstream.generations[-1]["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
        assert turns[1]["content"] == "half a thought <\u200b|im_end|>"
        assert "final answer" in turns[2]["content"]
        assert text_of(deltas) == ANSWER
        await collect(engine, request(continuation=tuple(map(ord, f"{OPEN}hm{CLOSE}Half an ans"))))
        turns = upstream.generations[-1]["messages"]
        assert turns[1]["content"] == "Half an ans"
        assert "cut off" in turns[2]["content"]


async def test_it_stops_at_the_end_of_the_thinking_by_hanging_up() -> None:
    script = Script(reasoning=REASONING, answer=ANSWER * 50, writes=50, delay_s=5)
    async with served(script) as (engine, upstream):
        await engine.start()
        upstream.change(delay_s=0.5)
        deltas = await collect(engine, request(stop_ids=engine.vocabulary.think_close))
        assert shape(engine, deltas) == [OPEN, REASONING, CLOSE]
        assert deltas[-1].finish is Finish.STOP
        await settled(lambda: upstream.stats.aborted == 1)


async def test_marks_in_candidates_are_broken() -> None:
    async with served(Script()) as (engine, upstream):
        tail = Tail(tuple(map(ord, "a</think>b")), "a</think>b")
        await collect(engine, request(messages=(Message("user", ("A:\n", tail)),)))
        assert upstream.generations[-1]["messages"][0]["content"] == "A:\na<\u200b/think>b"


@pytest.mark.parametrize("json", [False, True])
async def test_tool_calls_become_the_text_that_the_tool_parser_reads(json: bool) -> None:
    calls = (("add", '{"a": 1, "b": "é"}'), ("now", ""))
    async with served(Script(answer="Calling.", tool_calls=calls, json=json)) as (engine, upstream):
        tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
        rules = AnswerRules(tools=orjson.dumps(tools).decode(), json_schema='{"type": "object"}', stop=("END",))
        deltas = await collect(engine, request(answer=rules))
        assert text_of(deltas) == (
            'Calling.<tool_call>{"name":"add","arguments":{"a":1,"b":"é"}}</tool_call>'
            '<tool_call>{"name":"now","arguments":{}}</tool_call>'
        )
        body = upstream.generations[-1]
        assert (body["tools"], body["tool_choice"], body["stop"]) == (tools, "auto", ["END"])
        assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}


async def test_a_plain_server_is_sent_nothing_that_openai_refuses() -> None:
    async with served(Script(), max_tokens_field="max_completion_tokens") as (engine, upstream):
        await collect(engine, request(seed=7))
        assert set(upstream.generations[-1]) == {
            "model", "messages", "stream", "stream_options", "temperature", "top_p", "seed", "max_completion_tokens"
        }  # fmt: skip


TEXTS = st.lists(st.sampled_from(["<", "th", OPEN, CLOSE, "a", "</", "think>", "<think", "é\n", ">", " "]), max_size=12)


@given(TEXTS, st.randoms())
def test_markers_are_found_whole_wherever_the_text_is_cut(parts: list[str], random: Any) -> None:
    text = "".join(parts)
    cuts = sorted(random.randint(0, len(text)) for _ in range(random.randint(0, 8)))
    markers = Markers()
    pieces = [
        piece
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)
        for piece in markers.feed(text[start:end])
    ]
    pieces += markers.end()
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece in (OPEN, CLOSE)] == [
        mark for mark in (text[at : at + 8] if text.startswith(CLOSE, at) else text[at : at + 7]
                          for at in range(len(text))) if mark in (OPEN, CLOSE)
    ]  # fmt: skip
    assert not any(OPEN in piece or CLOSE in piece for piece in pieces if piece not in (OPEN, CLOSE))


@given(st.lists(st.text(max_size=8), max_size=8), st.randoms())
def test_events_are_read_whole_wherever_the_bytes_are_cut(texts: list[str], random: Any) -> None:
    events = [{"choices": [{"delta": {"content": text}}]} for text in texts]
    stream = b": keep-alive\r\n\r\n".join(b"event: x\r\ndata:%b\r\n\r\n" % orjson.dumps(event) for event in events)
    stream += b"data: [DONE]\n\n"
    frames, read = Frames(), []
    while stream:
        size = random.randint(1, 40)
        read += frames.feed(stream[:size])
        stream = stream[size:]
    assert (read, frames.done) == (events, True)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["choices", "delta", "content", "usage", "token_ids", "completion_tokens", "text", "tool_calls", "function",
         "finish_reason", "reasoning", "prompt_tokens_details", "index", "name"]),
    inner, max_size=4), max_leaves=20))  # fmt: skip
def test_whatever_a_server_says_is_read_or_is_an_engine_error(event: Any) -> None:
    marks = (THINK,), (END_THINK,)
    for reader in (IdReader(*marks), IdReader(*marks, AnswerOnly()), TextReader(), TextReader(False, AnswerOnly())):
        try:
            for _ in range(2):
                for said in reader.take([{"choices": [event]}]):
                    assert isinstance(said, str) or array("I", said.token_ids) is not None
                reader.take([event if isinstance(event, dict) else {"usage": event}])
            reader.end()
        except EngineError:
            pass


# ---- a model that thinks again where only its answer is asked for


@pytest.mark.parametrize("piece", [1, 4, 10_000])
@pytest.mark.parametrize("script", [
    Script(level=1),
    Script(level=1, ids=False),
    Script(level=2),
    Script(level=2, think="field"),
    Script(level=3),
    Script(level=3, think="field"),
    Script(level=3, think="field", field="reasoning"),
    Script(level=3, json=True),
    Script(level=3, think="field", json=True),
])  # fmt: skip
async def test_a_reasoning_after_the_thinking_was_closed_is_no_answer(script: Script, piece: int) -> None:
    script = replace(script, reasoning=REASONING, answer=ANSWER, rethink=True, piece=piece, writes=9)
    async with served(script) as (engine, _):
        await engine.start()
        first = tuple(ids_of(await collect(engine, request(stop_ids=engine.vocabulary.think_close))))
        ratio = engine.vocabulary.ids_per_token
        deltas = await collect(engine, request(continuation=first))
        assert text_of(deltas) == ANSWER
        assert (await engine.decode(ids_of(deltas)), deltas[-1].finish) == (ANSWER, Finish.STOP)
        assert all(delta.finish is None for delta in deltas[:-1])
        if script.level == 1:
            spent = len(encode(OPEN + REASONING + CLOSE + ANSWER)) + 1
        else:
            parts = [REASONING, ANSWER] if script.think == "field" else [OPEN + REASONING + CLOSE + ANSWER]
            spent = sum(-(-len(part) // piece) for part in parts)
        assert deltas[-1].completion_tokens == spent
        assert engine.vocabulary.ids_per_token == ratio  # what was dropped is no measure


@pytest.mark.parametrize("finish", [10_000, 12])
@pytest.mark.parametrize(
    ("level", "think"), [(1, "content"), (2, "content"), (2, "field"), (3, "content"), (3, "field")]
)
async def test_a_second_reasoning_without_an_answer_is_an_empty_answer_cut_short(
    level: int, think: str, finish: int
) -> None:
    script = Script(level=level, reasoning=REASONING, answer="", think=think, rethink=True)
    async with served(script) as (engine, _):
        await engine.start()
        so_far = (*engine.vocabulary.think_open, 104, 109, *engine.vocabulary.think_close)
        deltas = await collect(engine, request(continuation=so_far, max_tokens=finish))
        assert (text_of(deltas), await engine.decode(ids_of(deltas)), deltas[-1].finish) == ("", "", Finish.LENGTH)
        assert deltas[-1].completion_tokens


@pytest.mark.parametrize("level", [2, 3])
async def test_a_second_reasoning_that_the_template_opens_is_no_answer(level: int) -> None:
    script = Script(level=level, reasoning=REASONING, answer=ANSWER, think="prompt", rethink=True, writes=9)
    async with served(script) as (engine, upstream):
        first = await collect(engine, request(stop_ids=()))
        deltas = await collect(engine, request(continuation=tuple(ids_of(first))))
        assert (text_of(deltas), await engine.decode(ids_of(deltas))) == (ANSWER, ANSWER)
        upstream.change(rethink=False)
        deltas = await collect(engine, request(continuation=tuple(ids_of(first))))
        assert (text_of(deltas), deltas[-1].finish) == (ANSWER, Finish.STOP)


async def test_tool_calls_after_a_second_reasoning_are_the_answer() -> None:
    script = Script(reasoning=REASONING, answer="", think="field", rethink=True, tool_calls=(("now", "{}"),))
    async with served(script) as (engine, _):
        deltas = await collect(engine, request(continuation=tuple(map(ord, f"{OPEN}hm{CLOSE}"))))
        assert (text_of(deltas), deltas[-1].finish) == (
            '<tool_call>{"name":"now","arguments":{}}</tool_call>', Finish.STOP
        )  # fmt: skip


# ---- what goes wrong


def sse(*events: Any, done: bool = True) -> tuple[bytes, ...]:
    frames = b"".join(b"data: %b\n\n" % orjson.dumps(event) for event in events)
    return (frames + b"data: [DONE]\n\n" * done,)


@pytest.mark.parametrize("continuation", [(), (THINK, END_THINK)])
@pytest.mark.parametrize("ids", [["a"], [-1], [2**40], [1.5], [None], [[1]], {"1": 1}])
async def test_ids_that_are_none_lose_one_rollout(ids: Any, continuation: tuple[int, ...]) -> None:
    good = {"choices": [{"text": "a", "token_ids": [97]}]}
    bad = {"choices": [{"text": "b", "token_ids": ids, "finish_reason": "stop"}]}
    async with served(Script(level=1, raw=sse(good, done=False) + sse(bad))) as (engine, _):
        with pytest.raises(EngineError, match="shape"):
            await collect(engine, request(continuation=continuation))


@pytest.mark.parametrize("ids", [["a"], [-1], [2**40], [1.5], "ab", {"1": 1}, None])
async def test_a_tokenizer_that_gives_no_ids_loses_one_rollout(ids: Any) -> None:
    async with served(Script(level=1)) as (engine, upstream):
        await engine.start()
        upstream.change(token_ids=(ids,))
        with pytest.raises(EngineError, match="/tokenize"):
            await collect(engine, request())


async def test_tool_calls_of_mixed_indices_lose_one_rollout() -> None:
    calls = [{"index": index, "function": {"name": "f"}} for index in (0, "a")]
    event = {"choices": [{"delta": {"tool_calls": calls}, "finish_reason": "tool_calls"}]}
    async with served(Script(raw=sse(event))) as (engine, _):
        with pytest.raises(EngineError, match="tool calls"):
            await collect(engine, request())


async def test_a_count_beyond_any_context_is_no_count() -> None:
    usage = {"prompt_tokens": 2**63, "completion_tokens": 2**62}
    event = {"choices": [{"delta": {"content": "x" * 8}, "finish_reason": "stop"}], "usage": usage}
    async with served(Script(raw=sse(event))) as (engine, _):
        deltas = await collect(engine, request())
        assert (deltas[-1].completion_tokens, deltas[-1].prompt_tokens) == (2, None)


HALF = {"choices": [{"delta": {"content": "Half an ans"}, "text": "Half an ans", "token_ids": [*b"Half an ans"]}]}

FILTERED = {"choices": [{"delta": {}, "text": "", "token_ids": [], "finish_reason": "content_filter"}]}


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(("frames", "said"), [
    (sse(HALF, {"object": "error", "message": "CUDA error", "type": "X", "code": 500}), "CUDA error"),
    (sse(HALF, {"error": {"message": "CUDA error"}}), "CUDA error"),
    ((sse(HALF, done=False)[0] + b'error: {"code":500,"message":"CUDA error"}\n\n',), "CUDA error"),
    (sse(HALF), "finish_reason"),
    (sse(HALF, done=False), "cut"),
    ((sse(HALF)[0].replace(b"\n", b"\r"),), "cut"),
    (sse(HALF, FILTERED), "filtered"),
])  # fmt: skip
async def test_a_cut_answer_is_never_a_whole_one(level: int, frames: tuple[bytes, ...], said: str) -> None:
    async with served(Script(level=level, raw=frames)) as (engine, _):
        with pytest.raises(EngineError, match=said):
            await collect(engine, request())


@pytest.mark.parametrize("level", [1, 3])
async def test_an_answer_that_is_done_does_not_wait_for_its_connection(level: int) -> None:
    async with served(Script(level=level, answer=ANSWER, linger=True)) as (engine, upstream):
        start = time.monotonic()
        deltas = await collect(engine, request())
        assert (text_of(deltas), deltas[-1].finish) == (ANSWER, Finish.STOP)
        assert time.monotonic() - start < 2
        upstream.change(linger=False)
        await collect(engine, request())
        await settled(lambda: upstream.stats.connections == 2 and len(upstream.protocols) == 1)


async def test_a_thousand_marks_in_a_candidate_ask_no_thousand_questions() -> None:
    said = "".join(f"<|m{index}|>" for index in range(1500))
    tail = Tail((*encode(said), IM_END, *encode("so")), said + "so")
    async with served(Script(level=1)) as (engine, upstream):
        await collect(engine, request(messages=(Message("user", ("A:\n", Tail(tuple(b"x"), "x"), "\n")),)))
        before = upstream.stats.paths.copy()
        assert said in await engine.decode(tail.token_ids)
        await collect(engine, request(messages=(Message("user", ("A:\n", tail, "\n")),)))
        asked = upstream.stats.paths - before
        assert asked["/tokenize"] + asked["/detokenize"] <= 6
        prompt = upstream.generations[-1]["prompt"]
        assert (prompt.count(IM_END), "<|m1499|>" in decode(prompt)) == (1, False)
        assert len(prompt) < len(tail.token_ids) + 100
        for index in range(1500):
            await engine.decode(encode(f"<|n{index}|>"))
        assert engine._tokenizer is not None
        assert len(engine._tokenizer._marks) <= 1024


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize(
    ("fault", "status"),
    [("400", 400), ("429", 429), ("500", 500), ("503", 503), ("reset", None), ("truncate", None), ("garbage", None),
     ("error", None)],
)  # fmt: skip
async def test_a_fault_is_this_rollouts_alone(level: int, fault: str, status: int | None) -> None:
    script = Script(level=level, answer=ANSWER, fault=fault, fault_every=2)
    async with served(script) as (engine, upstream):
        assert text_of(await collect(engine, request())) == ANSWER
        with pytest.raises(EngineError) as caught:
            await collect(engine, request())
        assert caught.value.status == status
        assert len(str(caught.value)) < 300
        assert text_of(await collect(engine, request())) == ANSWER
        assert upstream.stats.calls == 3


async def test_silence_is_an_error_after_its_time() -> None:
    async with served(Script(fault="hang"), read_timeout_s=0.1) as (engine, upstream):
        with pytest.raises(EngineError, match="silent"):
            await collect(engine, request())
        await settled(lambda: upstream.stats.open == 0)


async def test_a_server_that_dies_in_the_middle_is_a_dead_engine() -> None:
    async with FakeUpstream(Script(delay_s=60)) as upstream:
        engine = OpenAIEngine(upstream.url)
        task = asyncio.create_task(collect(engine, request()))
        await settled(lambda: upstream.stats.open == 1)
    with pytest.raises(EngineDead):
        await task
    await engine.aclose()


@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("when", ["before", "within"])
async def test_cancelling_reaches_the_server_at_once(level: int, when: str) -> None:
    script = Script(level=level, answer=ANSWER * 9, writes=60, delay_s=60 if when == "before" else 3)
    async with served(script) as (engine, upstream):
        started = asyncio.Event()

        async def consume() -> None:
            async with aclosing(engine.generate(request())) as deltas:
                async for delta in deltas:
                    if delta.text or when == "before":
                        started.set()

        tasks = [asyncio.create_task(consume()) for _ in range(8)]
        await settled(lambda: upstream.stats.open == 8)
        await asyncio.wait_for(started.wait(), 1)
        start = time.monotonic()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await settled(lambda: (upstream.stats.open, upstream.stats.aborted) == (0, 8))
        assert time.monotonic() - start < 1


async def test_closing_the_generator_reaches_the_server_at_once() -> None:
    async with served(Script(answer=ANSWER * 9, writes=60, delay_s=3)) as (engine, upstream):
        deltas = engine.generate(request())
        while not (await anext(deltas)).text:
            pass
        await deltas.aclose()
        await settled(lambda: (upstream.stats.open, upstream.stats.aborted) == (0, 1))
        upstream.change(delay_s=0)
        assert text_of(await collect(engine, request()))


async def beside(engine: OpenAIEngine, others: int, asked: RolloutRequest) -> list[Delta]:
    """The deltas of one of several generations that run at once."""
    async with asyncio.TaskGroup() as tasks:
        for _ in range(others):
            tasks.create_task(collect(engine, asked))
        return await tasks.create_task(collect(engine, asked))


@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize("watched", [True, False])
async def test_of_many_streams_reads_are_joined_and_lose_nothing(level: int, watched: bool) -> None:
    said = "".join(map(chr, range(97, 123))) * 10
    script = Script(level=level, reasoning=REASONING, answer=said, piece=1, writes=0, delay_s=1.0)
    async with served(script) as (engine, _):
        alone = await beside(engine, 0, request(watched=True))
        joined = await beside(engine, 59, request(watched=watched))
        assert ids_of(joined) == ids_of(alone)
        assert (text_of(joined), joined[-1].finish) == (text_of(alone), Finish.STOP)
        assert 2 * len(joined) < len(alone)


async def test_a_stream_that_rests_is_closed_at_once() -> None:
    async with served(Script(level=1, answer="word " * 200, piece=1, writes=0, delay_s=30.0)) as (engine, upstream):
        engine._watched = Pace(reads_per_s=0.01, longest_s=60.0)
        generation = engine.generate(request())
        for _ in range(3):  # what is known of the prompt, and two reads: after the second it rests
            await anext(generation)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await anext(generation)
        await generation.aclose()
        await settled(lambda: upstream.stats.aborted == 1)


async def test_a_connection_that_rested_serves_the_next_generation() -> None:
    async with served(Script(level=1, answer=ANSWER, piece=1, writes=0, delay_s=0.3)) as (engine, upstream):
        engine._watched = Pace(reads_per_s=1.0, longest_s=0.1)
        for _ in range(3):
            assert decode(ids_of(await collect(engine, request()))[:-1]) == ANSWER
        assert upstream.stats.connections == 1


async def test_of_many_watched_streams_vllm_is_asked_to_join_tokens() -> None:
    async with served(Script(level=1, delay_s=60.0, writes=0)) as (engine, upstream):
        tasks = [asyncio.create_task(collect(engine, request())) for _ in range(100)]
        await settled(lambda: upstream.stats.open == 100)
        assert "stream_interval" not in upstream.generations[0]
        tasks.append(asyncio.create_task(collect(engine, request())))
        await settled(lambda: upstream.stats.open == 101)
        assert upstream.generations[-1]["stream_interval"] == 4  # a tenth of a second's tokens
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def test_more_generations_than_connections_wait_for_one() -> None:
    async with served(Script(delay_s=0.02), max_connections=2) as (engine, upstream):
        async with asyncio.TaskGroup() as tasks:
            for _ in range(5):
                tasks.create_task(collect(engine, request()))
        assert (upstream.stats.calls, upstream.stats.most_open) == (5, 2)


async def test_a_connection_serves_one_generation_after_another() -> None:
    async with served(Script(level=1)) as (engine, upstream):
        for _ in range(5):
            await collect(engine, request())
        assert upstream.stats.connections == 1


async def test_a_server_that_is_stopped_and_leaves_its_connections_open_is_found_dead() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"POST /v1/chat/completions" not in head:
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
            writer.close()
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        writer.write(b'data: {"choices":[{"index":0,"delta":{"content":"I"}}]}\n\n')
        await writer.drain()
        began.set()
        await gone.wait()
        writer.close()

    began, gone = asyncio.Event(), asyncio.Event()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    engine = OpenAIEngine(f"http://127.0.0.1:{port}", "m", silence_s=0.3)
    request = RolloutRequest("run", Slot(0, 0), (Message("user", ("hi",)),), 10)

    async def read() -> None:
        async with aclosing(engine.generate(request)) as deltas:
            async for _ in deltas:
                pass

    reading = asyncio.create_task(read())
    await began.wait()
    await asyncio.sleep(0.6)
    assert not reading.done(), "a silent server that listens is waited for"
    server.close()
    with pytest.raises(EngineDead):
        async with asyncio.timeout(5):
            await reading
    gone.set()
    await engine.aclose()
    assert engine._guard is None
