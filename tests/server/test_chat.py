"""`POST /v1/chat/completions` over the scripted engine: what a client gets, streamed and not."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest

from harness.engine import Delta, EngineDead, EngineError
from harness.scripted import Script, ScriptedEngine, Speed
from harness.types import Finish, RolloutRequest, Slot
from mrsa_server.settings import Settings
from tests.helpers.serving import CHAT, SMALL, ask, chunks, events, frames, in_memory, joined

GOLDEN = Path(__file__).parent.parent / "data" / "chat_stream.txt"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def saying(answer: str, thinking: str = "Let me see.") -> Callable[[RolloutRequest], Script]:
    return lambda request: Script(thinking, answer)


async def complete(engine: ScriptedEngine | None = None, **fields: Any) -> dict[str, Any]:
    async with in_memory(engine) as client:
        response = await client.post(CHAT, json=ask(**fields))
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body


async def stream(engine: ScriptedEngine | None = None, **fields: Any) -> list[dict[str, Any]]:
    async with in_memory(engine) as client:
        response = await client.post(CHAT, json=ask(stream=True, **fields))
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        assert list(frames(response.text))[-1] == "[DONE]"
        return chunks(response.text)


async def refuse(engine: ScriptedEngine | None = None, **fields: Any) -> dict[str, Any]:
    async with in_memory(engine) as client:
        response = await client.post(CHAT, json=ask(**fields))
        error: dict[str, Any] = response.json()["error"]
        return {**error, "status": response.status_code, "headers": response.headers}


async def test_an_answer_comes_with_the_fields_that_clients_read() -> None:
    body = await complete(ScriptedEngine(saying("It is \\boxed{42}.")), mrsa=SMALL)
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert body["model"] == "scripted-mrsa"
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    assert choice["message"] == {
        "role": "assistant",
        "content": "It is \\boxed{42}.",
        "refusal": None,
        "annotations": [],
        "reasoning": "Let me see.",
        "reasoning_content": "Let me see.",
    }


async def test_the_plain_name_runs_one_generation_and_the_alias_the_method() -> None:
    engine = ScriptedEngine()
    plain = await complete(engine, model="scripted")
    assert engine.total_requests == 1
    assert plain["mrsa"]["params"]["population"] == 1
    assert plain["mrsa"]["params"]["rounds"] == 0
    method = await complete(engine, model="scripted-mrsa")
    assert method["mrsa"]["params"]["population"] == 16
    assert method["mrsa"]["params"]["rounds"] == 2
    assert method["mrsa"]["params"]["effort"] == "medium"
    assert (await complete(engine, model="scripted-mrsa", mrsa=False))["mrsa"]["params"]["effort"] == "none"
    assert (await complete(engine, model="scripted", mrsa=True))["mrsa"]["params"]["effort"] == "medium"
    assert (await complete(engine, model="scripted", reasoning_effort="low"))["mrsa"]["params"]["population"] == 8


async def test_usage_counts_every_token_of_the_run_once() -> None:
    body = await complete(ScriptedEngine(saying("42", "abc")), mrsa=SMALL)
    rounds, usage = body["mrsa"]["usage"], body["usage"]
    assert usage["completion_tokens"] == sum(round["completion_tokens"] for round in rounds)
    assert usage["prompt_tokens"] == sum(round["prompt_tokens"] for round in rounds)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    answer = len("42") + 1  # and the end of the turn
    assert usage["completion_tokens_details"]["reasoning_tokens"] == usage["completion_tokens"] - answer
    assert body["mrsa"]["rounds"][1]["rollouts"] == 1
    assert sum(round["rollouts"] + round["skipped"] for round in body["mrsa"]["rounds"]) == 4 + 1


async def test_a_stream_and_a_whole_answer_say_the_same() -> None:
    fields = {"mrsa": SMALL, "stream_options": {"include_usage": True}}
    found = await stream(**fields)
    body = await complete(**fields)
    assert joined(found) == body["choices"][0]["message"]["content"]
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == body["usage"]
    last = events(found)[-1]
    assert last.pop("event") == "run.finished"
    for report in (last, body["mrsa"]):
        report.pop("run_id")
        for round in report["rounds"]:
            round.pop("seconds")
    assert last == body["mrsa"]


async def test_every_chunk_of_a_stream_has_one_choice_with_a_delta() -> None:
    found = await stream(mrsa=SMALL)
    assert {chunk["object"] for chunk in found} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in found}) == 1
    assert all(len(chunk["choices"]) == 1 and "delta" in chunk["choices"][0] for chunk in found)
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert found[0]["mrsa"]["event"] == "run.started"
    assert [chunk["choices"][0]["finish_reason"] for chunk in found if chunk["choices"][0]["finish_reason"]] == ["stop"]


async def test_the_golden_stream() -> None:
    """One whole stream as it stands, but for ids, times and what the prompts' wording costs.

    To renew the file delete it, run the test, and read what it wrote.
    """

    def script(request: RolloutRequest) -> Script:
        place = f"{request.slot.round}.{request.slot.index}"
        error = EngineError("out of luck") if request.slot == Slot(0, 2) else None
        return Script(f"The thoughts of {place}. " * (3 + request.slot.index), f"It is \\boxed{{{place}}}.", error)

    async with in_memory(ScriptedEngine(script, chunk_tokens=24)) as client:
        mrsa = {**SMALL, "tail_tokens": 16, "set_size": 3}
        body = ask(mrsa=mrsa, stream=True, stream_options={"include_usage": True})
        text = (await client.post(CHAT, json=body)).text
    text = re.sub(r'"created":\d+', '"created":0', re.sub(r"(chatcmpl-|run_)[0-9a-f]{32}", r"\1ID", text))
    text = re.sub(r'"(seconds|prompt_tokens|total_tokens)":[0-9.e-]+', r'"\1":0', text)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


async def test_events_come_in_the_order_of_the_run() -> None:
    names = [event["event"] for event in events(await stream(mrsa=SMALL))]
    assert names[0] == "run.started"
    assert names[1] == "round.started"
    assert names[-1] == "run.finished"
    assert names.index("round.finished") < names.index("run.finished")
    assert names.count("round.started") == names.count("round.finished") == 2


@pytest.mark.parametrize("mode", ["final", "rounds", "rollouts"])
async def test_the_reasoning_that_is_streamed(mode: str) -> None:
    def script(request: RolloutRequest) -> Script:
        return Script(f"thought of {request.slot.round}.{request.slot.index}", "42")

    found = await stream(ScriptedEngine(script), mrsa={**SMALL, "stream": mode})
    reasoning = joined(found, "reasoning")
    assert reasoning == joined(found, "reasoning_content")
    assert "thought of 1.0" in reasoning
    assert ("thought of 0." in reasoning) is (mode != "final")
    assert ("[round 0, rollout" in reasoning) is (mode == "rounds")
    assert any(event["event"] == "rollout.delta" for event in events(found)) is (mode == "rollouts")
    assert joined(found) == "42"


async def test_the_final_answer_comes_piece_by_piece_with_one_candidate_alone() -> None:
    def engine() -> ScriptedEngine:
        return ScriptedEngine(saying("a long answer that takes several deltas"), chunk_tokens=4)

    one = await stream(engine(), mrsa=SMALL)
    assert sum("content" in chunk["choices"][0]["delta"] for chunk in one) > 5
    several = await stream(engine(), mrsa={**SMALL, "final_candidates": 2})
    assert joined(several) == joined(one) == "a long answer that takes several deltas"
    assert sum(bool(chunk["choices"][0]["delta"].get("content")) for chunk in several) == 1


async def test_n_choices_are_candidates_of_one_run() -> None:
    def script(request: RolloutRequest) -> Script:
        return Script("hm", f"\\boxed{{{5 if request.slot.index == 0 else 6}}}")

    body = await complete(ScriptedEngine(script), n=3, mrsa=SMALL)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in body["choices"]] == ["\\boxed{6}", "\\boxed{5}", "\\boxed{6}"]
    assert [answer["votes"] for answer in body["mrsa"]["answers"]] == [2, 1, 2]
    found = await stream(ScriptedEngine(script), n=3, mrsa=SMALL)
    assert [joined(found, index=index) for index in range(3)] == ["\\boxed{6}", "\\boxed{5}", "\\boxed{6}"]
    plain = await complete(model="scripted", n=3)
    assert len(plain["choices"]) == 3
    assert plain["mrsa"]["params"]["population"] == 3
    assert (await refuse(n=5, mrsa=SMALL))["param"] == "n"


async def test_max_completion_tokens_bounds_the_answer_of_the_method_and_all_of_a_plain_generation() -> None:
    engine = ScriptedEngine(saying("x" * 50, "y" * 50))
    body = await complete(engine, max_completion_tokens=10, mrsa=SMALL)
    assert body["choices"][0]["message"]["content"] == "x" * 10
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["message"]["reasoning"] == "y" * 50
    plain = await complete(engine, model="scripted", max_tokens=40)
    assert plain["usage"]["completion_tokens"] <= 40
    assert plain["choices"][0]["finish_reason"] == "length"


async def test_the_same_seed_gives_the_same_answer_and_is_echoed() -> None:
    first, second, other = [await complete(ScriptedEngine(), seed=seed) for seed in (5, 5, 6)]
    assert first["mrsa"]["params"]["seed"] == 5
    assert first["usage"] == second["usage"] != other["usage"]
    random = [await complete(ScriptedEngine()) for _ in range(2)]
    assert random[0]["mrsa"]["params"]["seed"] != random[1]["mrsa"]["params"]["seed"]


async def test_the_echoed_parameters_can_be_sent_back() -> None:
    first = await complete(n=2, mrsa={"effort": "low"}, temperature=0.5, seed=3)
    params = first["mrsa"]["params"]
    second = await complete(model="scripted", n=2, mrsa=params, temperature=0.5)
    assert second["mrsa"]["params"] == params
    assert second["choices"] == first["choices"]


async def test_a_required_tool_is_called() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        body = await complete(tools=[TOOL], tool_choice=choice, mrsa=SMALL)
        (answer,) = body["choices"]
        assert answer["finish_reason"] == "tool_calls"
        assert answer["message"]["content"] is None
        (call,) = answer["message"]["tool_calls"]
        assert call["type"] == "function"
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "text"}
        found = await stream(tools=[TOOL], tool_choice=choice, mrsa=SMALL)
        (delta,) = [chunk["choices"][0]["delta"] for chunk in found if "tool_calls" in chunk["choices"][0]["delta"]]
        assert delta["tool_calls"][0]["index"] == 0
        assert delta["tool_calls"][0]["function"] == call["function"]
        assert joined(found) == ""
        assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "written",
    [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>',
        "<zyphra_tool_call>\n<function=get_weather>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</zyphra_tool_call>",
    ],
)
@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
async def test_a_free_tool_call_is_found_in_the_answer(written: str, chunk_tokens: int) -> None:
    def engine() -> ScriptedEngine:
        return ScriptedEngine(saying(f"I look it up < now.\n{written}\n"), chunk_tokens=chunk_tokens)

    (choice,) = (await complete(engine(), tools=[TOOL], mrsa=SMALL))["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Bern", "days": 2}
    assert choice["message"]["content"] == "I look it up < now."
    assert choice["finish_reason"] == "tool_calls"
    found = await stream(engine(), tools=[TOOL], mrsa=SMALL)
    assert joined(found).strip() == "I look it up < now."
    (delta,) = [chunk["choices"][0]["delta"] for chunk in found if "tool_calls" in chunk["choices"][0]["delta"]]
    assert delta["tool_calls"][0]["function"] == call["function"]
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_tools_are_shown_to_the_last_stage_alone() -> None:
    seen: dict[Slot, str | None] = {}

    def script(request: RolloutRequest) -> Script:
        seen[request.slot] = request.answer.tools
        return Script("hm", "no call")

    await complete(ScriptedEngine(script), tools=[TOOL], mrsa=SMALL)
    assert {slot.round for slot, tools in seen.items() if tools} == {1}
    assert {slot.round for slot, tools in seen.items() if not tools} == {0}


async def test_a_schema_binds_the_answer() -> None:
    schema = {"type": "object", "properties": {"result": {"type": "integer"}}, "required": ["result"]}
    shape = {"type": "json_schema", "json_schema": {"name": "out", "schema": schema}}
    body = await complete(response_format=shape, mrsa=SMALL)
    assert json.loads(body["choices"][0]["message"]["content"]) == {"result": 1}
    found = await stream(response_format=shape, mrsa=SMALL)
    assert json.loads(joined(found)) == {"result": 1}
    assert (
        json.loads((await complete(response_format={"type": "json_object"}))["choices"][0]["message"]["content"]) == {}
    )


async def test_words_before_the_answer_has_its_form_are_never_sent() -> None:
    class Unthinking(ScriptedEngine):
        """Has marks for thinking, and answers at once all the same."""

        async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
            text = "Sure!" if request.answer.json_schema is None else '{"a": 1}'
            yield Delta(tuple(text.encode()), text, prompt_tokens=1)
            yield Delta(finish=Finish.STOP)

    found = await stream(Unthinking(), model="scripted", response_format={"type": "json_object"})
    assert joined(found) == '{"a": 1}'


async def test_an_inline_image_becomes_a_note_and_a_warning() -> None:
    asked: list[str] = []

    def script(request: RolloutRequest) -> Script:
        asked.append(request.messages[0].text)
        return Script("hm", "nice")

    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGFsbG8="}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]
    body = await complete(ScriptedEngine(script), model="scripted", messages=messages)
    assert asked == ["What is it?\n[image/png, 5 bytes: not shown, this model reads text only]"]
    assert "not shown" in body["mrsa"]["warnings"][0]
    async with in_memory(inline_images="refuse") as client:
        response = await client.post(CHAT, json=ask(messages=messages))
        assert response.status_code == 400


async def test_failed_rollouts_shrink_the_population_and_are_told() -> None:
    def script(request: RolloutRequest) -> Script:
        lost = request.slot.round == 0 and request.slot.index % 2 == 0
        return Script("hm", "42", EngineError("out of luck") if lost else None)

    mrsa = {**SMALL, "set_size": 4}
    body = await complete(ScriptedEngine(script), mrsa=mrsa)
    assert body["mrsa"]["rounds"][0]["failed"] == 2
    found = events(await stream(ScriptedEngine(script), mrsa=mrsa))
    failed = [event for event in found if event["event"] == "rollout.failed"]
    assert {event["index"] for event in failed} == {0, 2}
    assert all(event["error"] == "out of luck" for event in failed)


async def test_a_run_without_any_answer_is_an_error_and_never_an_answer() -> None:
    def engine() -> ScriptedEngine:
        return ScriptedEngine(lambda request: Script("hm", "42", EngineError("out of luck")))

    error = await refuse(engine(), mrsa=SMALL)
    assert (error["status"], error["code"]) == (502, "engine_error")
    assert "out of luck" in error["message"]
    assert error["headers"]["x-should-retry"] == "false"
    async with in_memory(engine()) as client:
        text = (await client.post(CHAT, json=ask(stream=True, mrsa=SMALL))).text
    assert "[DONE]" not in text
    found = chunks(text)
    assert found[-1]["error"]["code"] == "engine_error"
    assert joined(found[:-1]) == ""


async def test_what_the_engine_itself_refuses_is_a_400() -> None:
    engine = ScriptedEngine(lambda request: Script("hm", "42", EngineError("a grammar that cannot be", 400)))
    error = await refuse(engine, mrsa=SMALL)
    assert (error["status"], error["code"]) == (400, "engine_refused")
    assert "a grammar that cannot be" in error["message"]


async def test_an_answer_that_breaks_while_it_is_sent_ends_in_an_error() -> None:
    def script(request: RolloutRequest) -> Script:
        error = EngineError("cut") if request.slot == Slot(1, 0) else None
        return Script("hm", "a long answer that is cut in its middle", error, fail_after=25)

    async with in_memory(ScriptedEngine(script, chunk_tokens=4)) as client:
        found = chunks((await client.post(CHAT, json=ask(stream=True, mrsa=SMALL))).text)
    assert found[-1]["error"]["code"] == "engine_error"
    assert 0 < len(joined(found[:-1])) < 39


async def test_a_deadline_before_any_answer_is_a_504_that_is_not_retried() -> None:
    slow = ScriptedEngine(speed=Speed(step_s=0.01))
    error = await refuse(slow, mrsa={**SMALL, "deadline_s": 0.05})
    assert (error["status"], error["code"]) == (504, "deadline_exceeded")
    assert error["headers"]["x-should-retry"] == "false"


async def test_a_deadline_ends_in_the_best_answer_so_far() -> None:
    def script(request: RolloutRequest) -> Script:
        return Script("hm" * (5000 if request.slot.round else 1), "42")

    engine = ScriptedEngine(script, speed=Speed(step_s=0.0005))
    body = await complete(engine, mrsa={**SMALL, "deadline_s": 0.3})
    assert body["choices"][0]["message"]["content"] == "42"
    assert body["mrsa"]["stopped"] == "deadline"


async def test_a_deadline_cuts_an_answer_that_is_being_sent_where_it_stands() -> None:
    def script(request: RolloutRequest) -> Script:
        return Script("hm", "whole" if request.slot.round == 0 else "x" * 4000)

    engine = ScriptedEngine(script, speed=Speed(step_s=0.001), chunk_tokens=8)
    found = await stream(engine, mrsa={**SMALL, "deadline_s": 0.3})
    assert set(joined(found)) == {"x"}
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    last = events(found)[-1]
    assert last["stopped"] == "deadline"
    assert "whole" in last["warnings"][-1]


async def test_a_dead_engine_is_waited_for_and_the_run_goes_on() -> None:
    engine = ScriptedEngine(speed=Speed(step_s=0.0002), chunk_tokens=16)
    async with in_memory(engine, engine_wait_s=5) as client:
        task = asyncio.create_task(client.post(CHAT, json=ask(stream=True, mrsa={**SMALL, "rounds": 2})))
        await asyncio.sleep(0.1)
        engine.kill()
        await asyncio.sleep(0.1)
        engine.revive()
        response = await task
    found = chunks(response.text)
    assert joined(found)
    assert events(found)[-1]["event"] == "run.finished"
    assert any(event["event"] == "run.resumed" for event in events(found))


async def test_an_engine_that_stays_dead_is_a_503_that_may_be_retried() -> None:
    engine = ScriptedEngine()
    engine.kill()
    async with in_memory(engine, engine_wait_s=0.2) as client:
        response = await client.post(CHAT, json=ask())
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_unavailable"
        assert int(response.headers["retry-after"]) > 0
        assert (await client.get("/health/ready")).status_code == 503
        assert (await client.get("/health/live")).status_code == 200


async def test_a_deadline_holds_while_a_run_waits_for_a_place() -> None:
    engine = ScriptedEngine(speed=Speed(step_s=0.05))
    async with in_memory(engine, max_runs=1) as client:
        first = asyncio.create_task(client.post(CHAT, json=ask(mrsa=SMALL)))
        await asyncio.sleep(0.05)
        async with asyncio.timeout(1):
            response = await client.post(CHAT, json=ask(mrsa={**SMALL, "deadline_s": 0.2}))
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert engine.total_requests == 2
        first.cancel()


async def test_a_deadline_holds_while_the_engine_starts() -> None:
    async with in_memory(LateEngine(9, EngineDead("still loading")), up=False, engine_wait_s=30) as client:
        async with asyncio.timeout(1):
            response = await client.post(CHAT, json=ask(mrsa={**SMALL, "deadline_s": 0.1}))
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")


class Mortal(ScriptedEngine):
    """Dies with the first rollout of its last round, at once or after some text of the answer."""

    def __init__(self, last: int, text: str = "", speed: Speed | None = None) -> None:
        super().__init__(lambda request: Script("hm", f"\\boxed{{{request.slot.round}}}"), speed=speed)
        self._last = last
        self._text = text

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        if self._dead:
            raise EngineDead("killed")
        if request.slot.round == self._last:
            if self._text:
                yield Delta((256,))
                yield Delta((257,))
                yield Delta(tuple(self._text.encode()), self._text)
            self.kill()
            raise EngineDead("killed")
        async for delta in super().generate(request):
            yield delta


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("text", ["", "half an answer"])
async def test_a_deadline_while_a_dead_engine_is_waited_for_ends_in_the_best_answer_so_far(
    streamed: bool, text: str
) -> None:
    async with in_memory(Mortal(1, text), engine_wait_s=30) as client:
        async with asyncio.timeout(2):
            response = await client.post(CHAT, json=ask(stream=streamed, mrsa={**SMALL, "deadline_s": 0.4}))
    assert response.status_code == 200
    if not streamed:
        assert response.json()["choices"][0]["message"]["content"] == "\\boxed{0}"
        assert response.json()["mrsa"]["stopped"] == "deadline"
        return
    found = chunks(response.text)
    assert joined(found) == (text or "\\boxed{0}")
    assert events(found)[-1]["stopped"] == "deadline"
    assert ("boxed{0}" in str(events(found)[-1]["warnings"])) is bool(text)


async def test_a_deadline_while_a_dead_engine_is_waited_for_and_no_answer_is_a_504() -> None:
    async with in_memory(Mortal(0), engine_wait_s=30) as client:
        async with asyncio.timeout(2):
            response = await client.post(CHAT, json=ask(mrsa={**SMALL, "deadline_s": 0.4}))
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")


async def test_what_breaks_after_tokens_were_spent_is_not_to_be_repeated() -> None:
    async with in_memory(Mortal(1), engine_wait_s=0.2) as client:
        response = await client.post(CHAT, json=ask(mrsa=SMALL))
        assert (response.status_code, response.headers["x-should-retry"]) == (503, "false")
        assert "retry-after" not in response.headers

    class Broken(ScriptedEngine):
        async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
            yield Delta((256,))
            raise RuntimeError("a bug")

    async with in_memory(Broken()) as client:
        response = await client.post(CHAT, json=ask(mrsa=SMALL))
        assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")


async def test_a_response_that_its_client_would_not_wait_for_is_told_to_stream() -> None:
    engine = ScriptedEngine(saying("42" * 300), speed=Speed(step_s=0.0001))
    async with in_memory(engine, max_unstreamed_s=2) as client:
        body = ask(mrsa={**SMALL, "final_tokens": 60_000, "rollout_tokens": 60_000, "carry": "answer"})
        assert (await client.post(CHAT, json=body)).status_code == 200  # nothing is known of the speed yet
        response = await client.post(CHAT, json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "stream_required", "stream")
        assert "120000 tokens" in error["message"]
        assert (await client.post(CHAT, json={**body, "stream": True})).status_code == 200
        assert (await client.post(CHAT, json={**body, "mrsa": {**body["mrsa"], "deadline_s": 2}})).status_code == 200
        assert (await client.post(CHAT, json=ask("scripted", max_tokens=60_000))).status_code == 200
        assert (
            await client.post(CHAT, json=ask(mrsa={**SMALL, "final_tokens": 600, "rollout_tokens": 600}))
        ).is_success


@pytest.mark.parametrize("carry", ["reasoning", "answer", "hybrid"])
async def test_rollouts_of_two_tokens_are_enough_for_a_model_that_thinks(carry: str) -> None:
    body = await complete(mrsa={**SMALL, "rollout_tokens": 2, "carry": carry})
    assert body["choices"][0]["message"]["content"]


async def test_characters_that_came_in_pieces_do_not_break_a_stream() -> None:
    class Cutting(ScriptedEngine):
        """Decodes each delta by itself."""

        async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
            yield Delta((256,), prompt_tokens=1)
            yield Delta((257,))
            answer = "caf\u00e9, \U0001f600 end".encode()
            for at in range(len(answer)):
                yield Delta((answer[at],), answer[at : at + 1].decode("utf-8", "replace"))
            yield Delta(finish=Finish.STOP)

    found = await stream(Cutting(), model="scripted")
    assert joined(found) == "caf\ufffd\ufffd, \ufffd\ufffd\ufffd\ufffd end"
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


class LateEngine(ScriptedEngine):
    """Comes up after some tries."""

    def __init__(self, tries: int, error: Exception) -> None:
        super().__init__()
        self._tries = tries
        self._error = error

    async def start(self) -> None:
        self._tries -= 1
        if self._tries >= 0:
            raise self._error


async def test_requests_wait_for_an_engine_that_is_starting() -> None:
    async with in_memory(LateEngine(1, EngineDead("still loading")), up=False, engine_wait_s=5) as client:
        ready = await client.get("/health/ready")
        assert ready.status_code == 503
        assert (await client.post(CHAT, json=ask(mrsa=SMALL))).status_code == 200
        assert (await client.get("/health/ready")).status_code == 200


async def test_an_engine_that_cannot_start_is_a_503_at_once() -> None:
    async with in_memory(LateEngine(1, ValueError("no such model")), up=False, engine_wait_s=60) as client:
        for _ in range(2):  # while it fails, and once it has failed
            async with asyncio.timeout(10):
                response = await client.post(CHAT, json=ask())
            assert response.status_code == 503
            assert "no such model" in response.json()["error"]["message"]


async def test_a_silent_stream_says_that_it_lives() -> None:
    engine = ScriptedEngine(speed=Speed(step_s=0.001))
    async with in_memory(engine, keep_alive_s=0.05) as client:
        text = (await client.post(CHAT, json=ask(stream=True, mrsa={**SMALL, "stream": "final"}))).text
    assert text.count(": keep-alive\n\n") > 2
    assert text.startswith("data: ")


async def test_a_full_server_says_so_and_when_to_come_back() -> None:
    engine = ScriptedEngine(speed=Speed(step_s=0.0005))
    async with in_memory(engine, max_runs=1, max_queued=1) as client:
        tasks = [asyncio.create_task(client.post(CHAT, json=ask(mrsa=SMALL))) for _ in range(3)]
        responses = await asyncio.gather(*tasks)
        text = (await client.get("/metrics")).text
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [200, 200, 503]
    full = next(response for response in responses if response.status_code == 503)
    assert full.json()["error"]["code"] == "server_overloaded"
    assert 0 < int(full.headers["retry-after"]) <= 120
    assert 'mrsa_admission_rejections_total{reason="overloaded"} 1.0' in text
    assert 'mrsa_runs_total{status="finished"} 2.0' in text


async def test_a_small_context_divides_the_preset_and_says_so() -> None:
    body = await complete(ScriptedEngine(context_tokens=16_384, mean_tokens=50))
    params = body["mrsa"]["params"]
    assert body["mrsa"]["preset_divisor"] == 4
    assert (params["rollout_tokens"], params["tail_tokens"], params["final_tokens"]) == (4096, 1024, 10_240)
    assert any("divided by 4" in warning for warning in body["mrsa"]["warnings"])
    error = await refuse(ScriptedEngine(context_tokens=16_384), mrsa={"final_tokens": 20_000})
    assert (error["status"], error["param"], error["code"]) == (400, "mrsa.final_tokens", "context_length_exceeded")
    long = [{"role": "user", "content": "x" * 17_000}]
    error = await refuse(ScriptedEngine(context_tokens=16_384), messages=long)
    assert (error["status"], error["param"], error["code"]) == (400, "messages", "context_length_exceeded")


async def test_a_conversation_that_the_template_refuses_is_a_400() -> None:
    class Picky(ScriptedEngine):
        async def count(self, messages: object) -> int:
            raise EngineError("roles must alternate", 400)

    error = await refuse(Picky())
    assert (error["status"], error["param"]) == (400, "messages")
    assert "roles must alternate" in error["message"]


async def test_a_request_for_zyphras_proxy_runs_as_it_would_there() -> None:
    body = await complete(
        model="scripted",
        rsa_t=1,
        rsa_k=2,
        rsa_n=4,
        short_resp_len=64,
        tail_window_len=16,
        rsa_final_n=0,
        final_top_p=0.9,
    )
    params = body["mrsa"]["params"]
    assert (params["rounds"], params["set_size"], params["population"]) == (1, 2, 4)
    assert (params["rollout_tokens"], params["tail_tokens"], params["final_candidates"]) == (64, 16, 4)
    assert any("final_top_p" in warning for warning in body["mrsa"]["warnings"])
    assert (await complete(rsa_t=0))["mrsa"]["params"]["population"] == 1


async def test_every_response_has_a_request_id() -> None:
    async with in_memory() as client:
        assert (await client.get("/v1/models")).headers["x-request-id"].startswith("req_")
        given = {"x-request-id": "abc-123"}
        assert (await client.post(CHAT, json={}, headers=given)).headers["x-request-id"] == "abc-123"
        hostile = {"x-request-id": 'a"b c'}
        assert (await client.get("/nowhere", headers=hostile)).headers["x-request-id"].startswith("req_")
        response = await client.post(CHAT, json=ask(stream=True, mrsa=SMALL), headers=given)
        assert response.headers["x-request-id"] == "abc-123"


@pytest.mark.parametrize(("settings", "temperature"), [({}, 1.0), ({"default_temperature": 0.25}, 0.25)])
async def test_a_request_that_names_no_temperature_gets_the_server_s(
    settings: dict[str, float], temperature: float
) -> None:
    seen: list[float] = []

    def say(request: RolloutRequest) -> Script:
        seen.append(request.sampling.temperature)
        return Script("", "42")

    async with in_memory(ScriptedEngine(say), **settings) as client:
        await client.post(CHAT, json=ask("scripted"))
        await client.post(CHAT, json=ask("scripted", temperature=0.5))
    assert seen == [temperature, 0.5]


def test_the_embedded_model_is_too_small_for_temperature_one() -> None:
    assert Settings(engine="embedded").usual_temperature == 0.3
    assert Settings(engine="embedded", default_temperature=1.0).usual_temperature == 1.0


@pytest.mark.parametrize(
    ("mrsa", "rounds"), [({"seed": 3, "stream": "final"}, 1), ({"deadline_s": 9}, 1), ({"rounds": 1}, 2), (True, 3)]
)
async def test_the_plain_name_runs_the_method_only_where_its_shape_is_asked_for(mrsa: Any, rounds: int) -> None:
    async with in_memory(default_effort="low") as client:
        response = await client.post(CHAT, json=ask("scripted", mrsa=mrsa))
    assert len(response.json()["mrsa"]["rounds"]) == rounds


async def test_the_report_says_how_its_answers_ended_and_what_looped() -> None:
    engine = ScriptedEngine(lambda _: Script("over and over, " * 9000, "42"), chunk_tokens=64)
    async with in_memory(engine) as client:
        mrsa = {**SMALL, "rollout_tokens": 40_000, "final_tokens": 60_000}
        report = (await client.post(CHAT, json=ask(mrsa=mrsa))).json()["mrsa"]
    assert [row["looped"] for row in report["rounds"]] == [2, 1]
    assert [answer["finish"] for answer in report["answers"]] == ["stop"]
