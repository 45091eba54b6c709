"""`POST /v1/responses` over the scripted engine: what a client gets, streamed and not."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.engine import EngineError
from harness.scripted import Script, ScriptedEngine, Speed
from harness.types import Message, RolloutRequest, Slot
from tests.helpers.open_responses import EVENTS, misfits
from tests.helpers.serving import CHAT, RESPONSES, SMALL, in_memory, on_port, typed

GOLDEN = Path(__file__).parent.parent / "data" / "responses_stream.txt"
QUESTION = "What is six times seven?"
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>'


def saying(answer: str, thinking: str = "Let me see.") -> Callable[[RolloutRequest], Script]:
    return lambda request: Script(thinking, answer)


def ask(model: str = "scripted-mrsa", **fields: Any) -> dict[str, Any]:
    return {"model": model, "input": QUESTION, **fields}


async def respond(engine: ScriptedEngine | None = None, **fields: Any) -> dict[str, Any]:
    async with in_memory(engine) as client:
        response = await client.post(RESPONSES, json=ask(**fields))
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    assert misfits(body, "ResponseResource") == []
    return body


async def stream(engine: ScriptedEngine | None = None, **fields: Any) -> list[dict[str, Any]]:
    async with in_memory(engine) as client:
        response = await client.post(RESPONSES, json=ask(stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\ndata: [DONE]\n\n")
    found = typed(response.text)
    check_order(found)
    return found


async def refuse(engine: ScriptedEngine | None = None, **fields: Any) -> dict[str, Any]:
    async with in_memory(engine) as client:
        response = await client.post(RESPONSES, json=ask(**fields))
    error: dict[str, Any] = response.json()["error"]
    return {**error, "status": response.status_code}


def check_order(found: list[dict[str, Any]]) -> None:
    """What holds of every stream: its numbers, its schemas, and that each thing is closed before the next begins."""
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    items: list[dict[str, Any]] = []
    parts: list[str] = []
    inner = ""  # what is open inside of the item
    for event in found:
        kind = event["type"]
        if kind.startswith("mrsa:"):
            continue
        assert misfits(event, EVENTS[kind]) == [], event
        match kind.removeprefix("response."):
            case "output_item.added":
                assert event["output_index"] == len(items)
                assert not items or items[-1]["status"] != "in_progress"
                items.append(event["item"])
                parts = []
            case "output_item.done":
                assert inner == ""
                assert event["output_index"] == len(items) - 1
                assert event["item"]["id"] == items[-1]["id"]
                texts = event["item"].get("content", event["item"].get("summary", []))
                assert [part["text"] for part in texts] == parts
                items[-1] = event["item"]
            case "content_part.added" | "reasoning_summary_part.added":
                assert inner == ""
                assert event.get("content_index", event.get("summary_index")) == len(parts)
                parts.append("")
                inner = "part"
            case "output_text.delta" | "reasoning_summary_text.delta":
                assert inner == "part"
                parts[-1] += event["delta"]
            case "output_text.done" | "reasoning_summary_text.done":
                assert inner == "part"
                assert event["text"].rstrip() == parts[-1].rstrip()
                inner = "said"
            case "content_part.done" | "reasoning_summary_part.done":
                assert inner in ("said", "part")
                parts[-1] = event["part"]["text"]
                inner = ""
        if "item_id" in event:
            assert event["item_id"] == items[-1]["id"]
            assert event["output_index"] == len(items) - 1
    assert found[-1]["type"] in ("response.completed", "response.incomplete", "response.failed")
    assert found[-1]["response"]["output"] == items
    assert all(item["status"] != "in_progress" for item in items)


def text_of(body: dict[str, Any]) -> str:
    return "".join(part["text"] for item in body["output"] if item["type"] == "message" for part in item["content"])


def summaries(body: dict[str, Any]) -> list[str]:
    return [part["text"] for item in body["output"] if item["type"] == "reasoning" for part in item["summary"]]


def without_times(text: str) -> str:
    return re.sub(r"in \d+\.\d s", "in 0.0 s", text)


async def test_a_response_has_its_rounds_and_its_answer() -> None:
    body = await respond(ScriptedEngine(saying("It is \\boxed{42}.")), mrsa={**SMALL, "carry": "answer"})
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", "scripted-mrsa")
    assert body["id"].startswith("resp_")
    reasoning, message = body["output"]
    assert (reasoning["type"], message["type"]) == ("reasoning", "message")
    (part,) = summaries(body)
    rollouts, tokens = (body["mrsa"]["rounds"][0][name] for name in ("rollouts", "tokens"))
    assert part.startswith(f"**Round 0 of 1**\n\n{rollouts} rollouts ended; {tokens} tokens in 0.")
    assert part.endswith(f"Answers: 42 ({rollouts}).")
    assert message["content"] == [
        {"type": "output_text", "text": "It is \\boxed{42}.", "annotations": [], "logprobs": []}
    ]
    assert body["mrsa"]["params"]["population"] == 4


async def test_what_was_asked_for_is_echoed() -> None:
    asked = {
        "instructions": "Be brief.",
        "max_output_tokens": 50,
        "temperature": 0.5,
        "top_p": 0.9,
        "tools": [{**TOOL, "strict": True}],
        "tool_choice": "none",
        "parallel_tool_calls": False,
        "metadata": {"trace": "x"},
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "p",
        "truncation": "auto",
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "max_tool_calls": 3,
    }
    ignored = {"store": True, "include": ["reasoning.encrypted_content"], "service_tier": "auto"}
    body = await respond(**asked, **ignored)
    assert {name: body[name] for name in asked} == asked
    assert (body["store"], body["background"], body["service_tier"]) == (False, False, "default")
    assert body["mrsa"]["params"]["effort"] == "low"


async def test_which_requests_run_the_method() -> None:
    async def params(model: str, **fields: Any) -> tuple[str, int]:
        found = (await respond(model=model, **fields))["mrsa"]["params"]
        return found["effort"], found["population"]

    assert await params("scripted") == ("none", 1)
    assert await params("scripted-mrsa") == ("medium", 16)
    assert await params("scripted", reasoning={"mode": "pro"}) == ("medium", 16)
    assert await params("scripted", reasoning={"mode": "pro"}, mrsa={"population": 4}) == ("medium", 4)
    assert await params("scripted", reasoning={"mode": "pro"}, mrsa={"seed": 3}) == ("medium", 16)
    assert await params("scripted", reasoning={"mode": "pro", "effort": "low"}) == ("low", 8)
    assert await params("scripted", reasoning={"mode": "pro"}, mrsa={"effort": "low"}) == ("low", 8)
    assert await params("scripted-mrsa", reasoning={"mode": "pro"}, mrsa=False) == ("none", 1)
    assert await params("scripted", reasoning={"effort": "high"}) == ("high", 16)
    assert await params("scripted", reasoning={"mode": "standard"}) == ("none", 1)


async def test_usage_counts_every_token_of_the_run_once_as_chat_does() -> None:
    body = await respond(ScriptedEngine(saying("42", "abc")), mrsa=SMALL)
    usage = body["usage"]
    async with in_memory(ScriptedEngine(saying("42", "abc"))) as client:
        messages = [{"role": "user", "content": QUESTION}]
        chat = (await client.post(CHAT, json={"model": "scripted-mrsa", "messages": messages, "mrsa": SMALL})).json()
    assert usage == {
        "input_tokens": chat["usage"]["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": chat["usage"]["prompt_tokens_details"]["cached_tokens"]},
        "output_tokens": chat["usage"]["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": chat["usage"]["completion_tokens_details"]["reasoning_tokens"],
        },
        "total_tokens": chat["usage"]["total_tokens"],
    }
    assert (await stream(ScriptedEngine(saying("42", "abc")), mrsa=SMALL))[-1]["response"]["usage"] == usage


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("summary", [None, "concise", "auto"])
async def test_a_stream_and_a_whole_response_say_the_same(summary: str | None, candidates: int) -> None:
    fields = {
        "mrsa": {**SMALL, "carry": "answer", "final_candidates": candidates},
        "reasoning": {"summary": summary},
    }
    last = (await stream(**fields))[-1]["response"]
    body = await respond(**fields)
    for found in (last, body):
        for item in found["output"]:
            item.pop("id")
            for part in item.get("summary", ()):
                part["text"] = without_times(part["text"])
        for round in found["mrsa"]["rounds"]:
            round.pop("seconds")
        found["mrsa"].pop("run_id")
        for name in ("id", "created_at", "completed_at"):
            found.pop(name)
    assert last == body


async def test_the_golden_stream() -> None:
    """One whole stream as it stands, but for ids, times and what the prompts' wording costs."""

    def script(request: RolloutRequest) -> Script:
        place = f"{request.slot.round}.{request.slot.index}"
        error = EngineError("out of luck") if request.slot == Slot(0, 2) else None
        return Script(f"The thoughts of {place}. " * (3 + request.slot.index), f"It is \\boxed{{{place}}}.", error)

    async with in_memory(ScriptedEngine(script, chunk_tokens=24)) as client:
        mrsa = {**SMALL, "tail_tokens": 16, "set_size": 3}
        body = ask(mrsa=mrsa, stream=True, reasoning={"summary": "detailed"}, include=["mrsa.events"])
        text = (await client.post(RESPONSES, json=body)).text
    check_order(typed(text))
    text = re.sub(r'"(created|completed)_at":\d+', r'"\1_at":0', text)
    text = re.sub(r"(resp_|rs_|msg_|run_)[0-9a-f]{32}", r"\1ID", text)
    text = re.sub(r'"(seconds|prompt_tokens|input_tokens|total_tokens)":[0-9.e-]+', r'"\1":0', text)
    text = without_times(text)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("asked", "tails", "thinking", "deltas"),
    [
        ({}, False, False, False),
        ({"reasoning": {"summary": "concise"}}, False, False, True),
        ({"reasoning": {"summary": "auto"}}, False, True, True),
        ({"reasoning": {"summary": "detailed"}}, True, True, True),
        ({"reasoning": {"generate_summary": "detailed"}}, True, True, True),
        ({"mrsa": {**SMALL, "stream": "final"}}, False, True, True),
        ({"mrsa": {**SMALL, "stream": "rounds"}}, True, True, True),
        ({"mrsa": {**SMALL, "stream": "rollouts"}}, True, True, True),
        ({"mrsa": {**SMALL, "stream": "rounds"}, "reasoning": {"summary": "concise"}}, False, False, True),
    ],
)
async def test_how_much_of_the_reasoning_is_shown(
    asked: dict[str, Any], tails: bool, thinking: bool, deltas: bool
) -> None:
    def script(request: RolloutRequest) -> Script:
        return Script(f"thought of {request.slot.round}.{request.slot.index}", "42")

    fields = {"mrsa": SMALL, **asked}
    found = await stream(ScriptedEngine(script), **fields)
    for body in (found[-1]["response"], await respond(ScriptedEngine(script), **fields)):
        text = "\n".join(summaries(body))
        assert text.startswith("**Round 0 of 1**")
        assert ("thought of 0." in text) is ("[round 0, rollout" in text) is tails
        assert ("thought of 1.0" in text) is ("**Round 1, the answer**" in text) is thinking
        assert text_of(body) == "42"
    assert any("reasoning_summary_text" in event["type"] for event in found) is deltas


async def test_events_of_ours_come_where_they_are_asked_for() -> None:
    def own(found: list[dict[str, Any]]) -> list[str]:
        assert all(event["type"] == f"mrsa:{event['mrsa']['event']}" for event in found if "mrsa" in event)
        return [event["type"] for event in found if event["type"].startswith("mrsa:")]

    assert own(await stream(mrsa=SMALL)) == []
    assert own(await stream(mrsa={**SMALL, "stream": "rounds"})) == []
    names = own(await stream(mrsa=SMALL, include=["mrsa.events"]))
    assert (names[0], names[1], names[-1]) == ("mrsa:run.started", "mrsa:round.started", "mrsa:run.finished")
    assert "mrsa:rollout.delta" not in names
    found = await stream(mrsa={**SMALL, "stream": "rollouts"})
    assert "mrsa:rollout.delta" in own(found)
    assert {event["mrsa"]["round"] for event in found if event["type"] == "mrsa:rollout.delta"} == {0, 1}
    assert all(event["mrsa"]["text"] for event in found if event["type"] == "mrsa:rollout.delta")


async def test_the_answer_comes_piece_by_piece_with_one_candidate_alone() -> None:
    def engine() -> ScriptedEngine:
        return ScriptedEngine(saying("a long answer that takes several deltas"), chunk_tokens=4)

    def deltas(found: list[dict[str, Any]]) -> int:
        return sum(event["type"] == "response.output_text.delta" for event in found)

    assert deltas(await stream(engine(), mrsa=SMALL)) > 5
    assert deltas(await stream(engine(), model="scripted")) > 5
    several = await stream(engine(), mrsa={**SMALL, "final_candidates": 2})
    assert deltas(several) == 1
    assert text_of(several[-1]["response"]) == "a long answer that takes several deltas"
    assert [part.partition("\n")[0] for part in summaries(several[-1]["response"])] == [
        "**Round 0 of 1**",
        "**Round 1 of 1**",
    ]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=8, max_size=8),
    rounds=st.integers(0, 3),
    candidates=st.integers(1, 3),
    lost=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=4),
    summary=st.sampled_from([None, "auto", "detailed"]),
    options=st.sampled_from([{}, {"quorum": 2}, {"start_small": 2}, {"stop_when_agreed": {"min_votes": 2}}]),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_happens_in_a_run_the_events_keep_their_order(
    lengths: list[int],
    rounds: int,
    candidates: int,
    lost: set[tuple[int, int]],
    summary: str | None,
    options: dict[str, Any],
) -> None:
    def script(request: RolloutRequest) -> Script:
        slot = request.slot
        length = lengths[(slot.round * 4 + slot.index) % 8]
        error = EngineError("out of luck") if slot in lost else None
        return Script("x" * length, f"\\boxed{{{length % 3}}}", error, fail_after=length)

    async def ask_it() -> list[dict[str, Any]]:
        mrsa = {**SMALL, "rounds": rounds, "final_candidates": candidates, **options}
        async with in_memory(ScriptedEngine(script, chunk_tokens=7)) as client:
            body = ask(mrsa=mrsa, stream=True, reasoning={"summary": summary}, include=["mrsa.events"])
            return typed((await client.post(RESPONSES, json=body)).text)

    found = asyncio.run(ask_it())
    check_order(found)
    for part in summaries(found[-1]["response"]):
        (own,) = re.findall(r"^\*\*Round (\d+)", part) or [str(rounds)]
        assert all(int(round) <= int(own) for round in re.findall(r"\[round (\d+), rollout", part))
    if found[-1]["type"] != "response.failed":
        assert text_of(found[-1]["response"]).startswith("\\boxed")


# Input.


async def heard(**fields: Any) -> tuple[Message, ...]:
    """The messages that the engine gets."""
    asked: list[tuple[Message, ...]] = []

    def script(request: RolloutRequest) -> Script:
        asked.append(request.messages)
        return Script("hm", "42")

    await respond(ScriptedEngine(script), model="scripted", **fields)
    return asked[0]


async def test_items_become_turns() -> None:
    items = [
        {"role": "developer", "content": "Be kind."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather in Bern?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "phase": "commentary",
         "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sun"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "rain"}]},
        {"type": "function_call", "call_id": "c3", "name": "f", "arguments": "{}"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": "Why?"},
    ]  # fmt: skip
    messages = await heard(input=items, instructions="Be brief.")
    assert [(message.role, message.text) for message in messages] == [
        ("system", "Be brief."),
        ("system", "Be kind."),
        ("user", "Weather in Bern?"),
        ("assistant", "I look."),
        ("tool", "sun"),
        ("tool", "rain"),
        ("assistant", ""),
        ("assistant", "No."),
        ("user", "Why?"),
    ]
    assert [[call.id for call in message.tool_calls] for message in messages if message.role == "assistant"] == [
        ["c1", "c2"],
        ["c3"],
        [],
    ]
    assert [message.tool_call_id for message in messages if message.role == "tool"] == ["c1", "c2"]


async def test_an_answer_can_be_sent_back_as_it_came() -> None:
    first = await respond(ScriptedEngine(saying(f"I look.\n{CALL}")), tools=[TOOL], mrsa=SMALL)
    call = first["output"][-1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sun"}
    messages = await heard(input=[{"role": "user", "content": QUESTION}, *first["output"], result], tools=[TOOL])
    assert [message.role for message in messages] == ["user", "assistant", "tool"]
    assert messages[1].tool_calls[0].id == messages[2].tool_call_id


async def test_an_inline_image_becomes_a_note_and_a_warning_by_its_own_name() -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64,aGFsbG8="}
    content = [{"type": "input_text", "text": "What is it?"}, image]
    messages = await heard(input=[{"role": "user", "content": content}], instructions="Look.")
    assert messages[1].text == "What is it?\n[image/png, 5 bytes: not shown, this model reads text only]"
    body = await respond(input=[{"role": "user", "content": content}], instructions="Look.", mrsa=SMALL)
    assert body["mrsa"]["warnings"][0].startswith("input.0.content.1: the image was replaced")


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"input": [{"type": "message", "role": "user", "content": list(parts)}]}


def schema(inner: dict[str, Any]) -> dict[str, Any]:
    return {"text": {"format": {"type": "json_schema", "name": "s", "schema": inner}}}


NAMED = {"type": "function", "name": "g"}
CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "string"),
    ({"input": []}, "input", "at least 1"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input", "at least one message"),
    ({"input": [{"role": "user"}]}, "input.0.content", "required"),
    ({"input": [{"role": "boss", "content": "x"}]}, "input.0.role", "developer"),
    ({"input": [{"role": "user", "content": "x", "mood": 1}]}, "input.0.mood", "not a parameter"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "item_reference"),
    ({"input": [{"type": "web_search_call"}]}, "input.0", "web_search_call"),
    (user({"type": "input_file", "file_url": "https://example.com"}), "input.0.content.0", "text only"),
    (user({"type": "input_text", "text": 5}), "input.0.content.0.text", "string"),
    (
        {**user({"type": "input_image", "image_url": "https://example.com/a.png"}), "instructions": "x"},
        "input.0.content.0.image_url",
        "input.0.content.0: images are not read, and no URL is ever fetched",
    ),
    (user({"type": "input_image", "file_id": "f"}), "input.0.content.0.image_url", "images are not read"),
    (
        {"input": [{"type": "function_call_output", "call_id": "c",
                    "output": [{"type": "input_image", "image_url": "x"}]}]},
        "input.0.output.0.image_url",
        "images are not read",
    ),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input.0.call_id", "required"),
    ({"model": "gpt-7"}, "model", "not served"),
    ({"background": True}, "background", "stores no responses"),
    ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no responses"),
    ({"conversation": "c"}, "conversation", "not supported"),
    ({"prompt": {"id": "p"}}, "prompt", "not supported"),
    ({"include": ["message.output_text.logprobs"]}, "include", "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs", "0"),
    ({"messages": []}, "messages", "not a parameter"),
    ({"max_tokens": 5}, "max_tokens", "not a parameter"),
    ({"max_output_tokens": 0}, "max_output_tokens", "1"),
    ({"model": "scripted", "max_output_tokens": 10**9}, "max_output_tokens", "131072"),
    ({"temperature": 3}, "temperature", "2"),
    ({"metadata": {"a": 5}}, "metadata.a", "string"),
    ({"metadata": {str(number): "x" for number in range(17)}}, "metadata", "16"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a", "512"),
    ({"reasoning": {"effort": "heroic"}}, "reasoning.effort", "xhigh"),
    ({"reasoning": {"mode": "amateur"}}, "reasoning.mode", "pro"),
    ({"mrsa": {"wat": 1}}, "mrsa.wat", "not a parameter"),
    ({"mrsa": {"population": 65}}, "mrsa.population", "64"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name", "pattern"),
    ({"tools": [TOOL, TOOL]}, "tools.1.name", "twice"),
    ({"tools": [{**TOOL, "parameters": {"type": "nonsense"}}]}, "tools.0.parameters", "tools.0.parameters: type must"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tools": [TOOL], "tool_choice": NAMED}, "tool_choice.name", "no tool"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "tools": [NAMED]}}, "tool_choice.tools", "no tool"),
    (
        {"tools": [TOOL, {**NAMED, "parameters": {"type": "nonsense"}}],
         "tool_choice": {"type": "allowed_tools", "tools": [NAMED]}},
        "tools.1.parameters",
        "type must be",
    ),
    (
        {**schema({"a": json.loads('{"a":' * 300 + "1" + "}" * 300)}), "tools": [TOOL], "tool_choice": "required"},
        "text.format.schema",
        "deep",
    ),
    (schema({"$ref": "https://example.com/s.json"}), "text.format.schema", "text.format.schema: $ref"),
    ({**schema({}), "tools": [TOOL]}, "text.format", "tool_choice"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format", "json_schema"),
    ({"input": "x" * 200_000}, "input", "context"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "words"), CASES, ids=lambda value: str(value)[:60])
async def test_a_bad_field_is_named(fields: dict[str, Any], param: str, words: str) -> None:
    error = await refuse(ScriptedEngine(context_tokens=131_072), **fields)
    assert error["status"] == (404 if "gpt-7" in fields.values() else 400), error
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words.lower() in error["message"].lower()


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(
        ["", "x", "scripted", "message", "user", "input_text", "function_call", "reasoning", "json_schema"]
    ),
)
NAMES = st.sampled_from(
    "type role content text output call_id name arguments summary id status tools parameters tool_choice format schema "
    "effort mode stream mrsa population rounds image_url detail annotations async caller".split()
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12
)
FIELDS = st.sampled_from(
    "input instructions tools tool_choice text reasoning include mrsa metadata stream_options background".split()
)


@given(fields=st.dictionaries(FIELDS, VALUES, max_size=3), streamed=st.booleans())
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_body_breaks_the_server(fields: dict[str, Any], streamed: bool) -> None:
    async def ask_it() -> tuple[int, str]:
        body = {"model": "scripted", "input": QUESTION, "stream": streamed, **fields}
        async with in_memory(ScriptedEngine(mean_tokens=3)) as client:
            response = await client.post(RESPONSES, json=body)
            return response.status_code, response.text

    status, text = asyncio.run(ask_it())
    assert status in (200, 400), text
    if status == 400:
        assert json.loads(text)["error"]["param"], text
    elif streamed:
        check_order(typed(text))


# Tools and forms.


async def test_a_required_tool_is_called() -> None:
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        body = await respond(tools=[TOOL], tool_choice=choice, mrsa=SMALL)
        reasoning, call = body["output"]
        assert (reasoning["type"], call["type"], call["name"]) == ("reasoning", "function_call", "get_weather")
        assert json.loads(call["arguments"]) == {"city": "text"}
        assert body["status"] == "completed"
        found = await stream(tools=[TOOL], tool_choice=choice, mrsa=SMALL)
        kinds = [event["type"] for event in found if "function_call" in event["type"]]
        assert kinds == ["response.function_call_arguments.delta", "response.function_call_arguments.done"]
        assert found[-1]["response"]["output"][1]["arguments"] == call["arguments"]


@pytest.mark.parametrize("chunk_tokens", [1, 3, 1000])
async def test_a_free_tool_call_is_an_item_of_its_own(chunk_tokens: int) -> None:
    def engine(answer: str = f"I look it up < now.\n{CALL}\n") -> ScriptedEngine:
        return ScriptedEngine(saying(answer), chunk_tokens=chunk_tokens)

    for body in (
        await respond(engine(), tools=[TOOL], mrsa=SMALL),
        (await stream(engine(), tools=[TOOL], mrsa=SMALL))[-1]["response"],
    ):
        _, message, call = body["output"]
        assert message["content"][0]["text"].strip() == "I look it up < now."
        assert json.loads(call["arguments"]) == {"city": "Bern", "days": 2}
        assert call["call_id"].startswith("call_")
    two = (await stream(engine(f"{CALL}{CALL}"), tools=[TOOL], mrsa=SMALL))[-1]["response"]["output"]
    assert [item["type"] for item in two] == ["reasoning", "function_call", "function_call"]
    assert len({item["id"] for item in two}) == len({item["call_id"] for item in two[1:]}) + 1 == 3
    after = (await stream(engine(f"One.{CALL} Two."), tools=[TOOL], mrsa=SMALL))[-1]["response"]
    assert text_of(after) == "One. Two."
    if chunk_tokens < 10:  # it came piece by piece
        assert [item["type"] for item in after["output"]] == ["reasoning", "message", "function_call", "message"]
        assert len({item["id"] for item in after["output"]}) == 4


async def test_only_allowed_tools_can_be_called() -> None:
    other = {"type": "function", "name": "other", "parameters": {"type": "object"}}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]}
    body = await respond(ScriptedEngine(saying(CALL)), tools=[TOOL, other], tool_choice=choice, mrsa=SMALL)
    assert [item["type"] for item in body["output"]] == ["reasoning", "message"]
    assert body["tool_choice"] == choice
    assert len(body["tools"]) == 2


async def test_a_schema_binds_the_answer_and_is_echoed() -> None:
    inner = {"type": "object", "properties": {"result": {"type": "integer"}}, "required": ["result"]}
    fields = {**schema(inner), "mrsa": SMALL}
    body = await respond(**fields)
    assert json.loads(text_of(body)) == {"result": 1}
    assert body["text"]["format"]["schema"] == inner
    assert json.loads(text_of((await stream(**fields))[-1]["response"])) == {"result": 1}
    assert json.loads(text_of(await respond(text={"format": {"type": "json_object"}}, mrsa=SMALL))) == {}


# Ends.


async def test_an_answer_that_is_cut_is_incomplete_and_says_why() -> None:
    def engine() -> ScriptedEngine:
        return ScriptedEngine(saying("x" * 50, "y" * 50))

    found = await stream(engine(), max_output_tokens=10, mrsa=SMALL)
    assert found[-1]["type"] == "response.incomplete"
    for body in (found[-1]["response"], await respond(engine(), max_output_tokens=10, mrsa=SMALL)):
        assert (body["status"], body["completed_at"]) == ("incomplete", None)
        assert body["incomplete_details"] == {"reason": "max_output_tokens"}
        assert body["output"][-1]["status"] == "incomplete"
        assert text_of(body) == "x" * 10
    plain = await respond(engine(), model="scripted", max_output_tokens=40)
    assert plain["usage"]["output_tokens"] <= 40
    assert plain["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_a_deadline_cuts_an_answer_that_is_being_sent_where_it_stands() -> None:
    def script(request: RolloutRequest) -> Script:
        return Script("hm", "whole" if request.slot.round == 0 else "x" * 4000)

    engine = ScriptedEngine(script, speed=Speed(step_s=0.001), chunk_tokens=8)
    last = (await stream(engine, mrsa={**SMALL, "deadline_s": 0.3}))[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "deadline"}
    assert set(text_of(last["response"])) == {"x"}
    assert "whole" in last["response"]["mrsa"]["warnings"][-1]


async def test_a_deadline_that_ends_in_a_whole_answer_is_a_completed_response() -> None:
    def script(request: RolloutRequest) -> Script:
        return Script("hm" * (5000 if request.slot.round else 1), "42")

    body = await respond(ScriptedEngine(script, speed=Speed(step_s=0.0005)), mrsa={**SMALL, "deadline_s": 0.3})
    assert (body["status"], text_of(body), body["mrsa"]["stopped"]) == ("completed", "42", "deadline")


async def test_a_run_without_any_answer_is_an_error_and_in_a_stream_a_failed_response() -> None:
    def engine() -> ScriptedEngine:
        return ScriptedEngine(lambda request: Script("hm", "42", EngineError("out of luck")))

    error = await refuse(engine(), mrsa=SMALL)
    assert (error["status"], error["code"]) == (502, "engine_error")
    found = await stream(engine(), mrsa=SMALL)
    assert [event["type"] for event in found[-2:]] == ["error", "response.failed"]
    assert found[-2]["error"] == {name: error[name] for name in ("message", "type", "param", "code")}
    assert found[-1]["response"]["status"] == "failed"
    assert found[-1]["response"]["error"] == {"code": "engine_error", "message": error["message"]}


async def test_an_answer_that_breaks_while_it_is_sent_ends_as_an_incomplete_item_of_a_failed_response() -> None:
    def script(request: RolloutRequest) -> Script:
        error = EngineError("cut") if request.slot == Slot(1, 0) else None
        return Script("hm", "a long answer that is cut in its middle", error, fail_after=25)

    found = await stream(ScriptedEngine(script, chunk_tokens=4), mrsa=SMALL)
    assert found[-1]["type"] == "response.failed"
    message = found[-1]["response"]["output"][-1]
    assert (message["type"], message["status"]) == ("message", "incomplete")
    assert 0 < len(message["content"][0]["text"]) < 39


async def test_an_error_before_the_first_event_is_a_status_of_its_own_streamed_or_not() -> None:
    for streamed in (False, True):
        error = await refuse(mrsa={**SMALL, "final_tokens": 10**9}, stream=streamed)
        assert (error["status"], error["param"]) == (400, "mrsa.final_tokens")


async def test_a_silent_stream_says_that_it_lives() -> None:
    engine = ScriptedEngine(speed=Speed(step_s=0.001))
    async with in_memory(engine, keep_alive_s=0.05) as client:
        text = (await client.post(RESPONSES, json=ask(stream=True, mrsa=SMALL))).text
    assert text.count(": keep-alive\n\n") > 2
    assert text.startswith("event: response.created\n")


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_same_request_reads_the_same_run(streamed: bool) -> None:
    engine = ScriptedEngine(speed=Speed(step_s=0.0005))
    key = {"idempotency-key": "one"}
    async with in_memory(engine) as client:
        body = ask(mrsa=SMALL, stream=streamed)
        first = asyncio.create_task(client.post(RESPONSES, json=body, headers=key))
        await asyncio.sleep(0.1)
        second = await client.post(RESPONSES, json=body, headers=key)
        whole = await first
        asked = engine.total_requests
        await asyncio.sleep(0.05)
        third = await client.post(RESPONSES, json=body, headers=key)
        assert engine.total_requests == asked
        assert third.headers["idempotent-replayed"] == "true"
        assert (await client.post(RESPONSES, json=ask(), headers=key)).status_code == 409
        assert (await client.post(CHAT, json=body, headers=key)).status_code == 409
    if not streamed:
        assert whole.json() == second.json() == third.json()
        return
    ends = []
    for response in (whole, second, third):
        found = typed(response.text)
        check_order(found)
        ends.append(found[-1]["response"])
    assert len({end["id"] for end in ends}) == len({text_of(end) for end in ends}) == 1
    assert [end["mrsa"] for end in ends] == [ends[0]["mrsa"]] * 3


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_leaves_ends_its_run(streamed: bool) -> None:
    engine = ScriptedEngine(speed=Speed(step_s=0.05))
    async with on_port(engine) as (url, app):
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        body = json.dumps(ask(stream=streamed, mrsa={"population": 8, "rounds": 1, "final_candidates": 8})).encode()
        head = f"POST {RESPONSES} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        async with asyncio.timeout(2):
            while engine.open_requests < 7:  # noqa: ASYNC110  what is waited for has no event to set
                await asyncio.sleep(0.005)
        writer.close()
        async with asyncio.timeout(1):
            while engine.open_requests or app.state.runner._runs:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
