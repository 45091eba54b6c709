"""The official Python client's Responses API against a running server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.e2e

MODEL = "scripted-mrsa"
QUESTION = "What is six times seven?"
MRSA = {"mrsa": {"population": 4, "rounds": 1, "set_size": 2, "seed": 7}}
TOOLS: Any = [
    {
        "type": "function",
        "name": "get_weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
]


class Result(BaseModel):
    result: int


@pytest.fixture
async def client(scripted_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=scripted_url, api_key="none", max_retries=0) as found:
        yield found


async def test_it_responds(client: openai.AsyncOpenAI) -> None:
    done = await client.responses.create(
        model=MODEL, input=QUESTION, instructions="Be brief.", metadata={"a": "b"}, extra_body=MRSA
    )
    assert "boxed" in done.output_text
    assert done.status == "completed"
    assert done.metadata == {"a": "b"}
    assert done.output[0].type == "reasoning"
    assert done.output[0].summary[0].text.startswith("**Round 0 of 1**")
    assert done.usage
    assert done.usage.output_tokens_details.reasoning_tokens > 0
    assert done.model_extra
    assert done.model_extra["mrsa"]["params"]["population"] == 4


async def test_it_streams_events_of_ours_too(client: openai.AsyncOpenAI) -> None:
    include: Any = ["mrsa.events"]
    stream = await client.responses.create(
        model=MODEL, input=QUESTION, stream=True, include=include, reasoning={"summary": "auto"}, extra_body=MRSA
    )
    types, text, thought = [], "", ""
    async for event in stream:
        types.append(str(event.type))
        if event.type == "response.output_text.delta":
            text += event.delta
        if event.type == "response.reasoning_summary_text.delta":
            thought += event.delta
    assert "boxed" in text
    assert thought.startswith("**Round 0 of 1**")
    assert "mrsa:rollout.finished" in types
    assert types[-1] == "response.completed"


@pytest.mark.parametrize("summary", [None, "concise", "auto", "detailed"])
async def test_it_accumulates_with_stream(client: openai.AsyncOpenAI, summary: Any) -> None:
    async with client.responses.stream(
        model=MODEL, input=QUESTION, reasoning={"summary": summary}, extra_body=MRSA
    ) as stream:
        heard = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        done = await stream.get_final_response()
    assert done.output_text == heard
    assert "boxed" in heard


async def test_it_calls_a_tool_streamed_and_not_and_sends_back_what_it_returned(client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": MODEL, "tools": TOOLS, "extra_body": MRSA}
    done = await client.responses.create(input=QUESTION, tool_choice="required", **asked)
    call = done.output[-1]
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "text"}
    async with client.responses.stream(input=QUESTION, tool_choice="required", **asked) as stream:
        kinds = [event.type async for event in stream]
        streamed = (await stream.get_final_response()).output[-1]
    assert "response.function_call_arguments.delta" in kinds
    assert streamed.type == "function_call"
    assert streamed.parsed_arguments == {"city": "text"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    for output in (done.output, [item.model_dump() for item in done.output], [done.output[0], streamed]):
        items = [{"role": "user", "content": QUESTION}, *output, result]
        assert "boxed" in (await client.responses.create(input=items, **asked)).output_text


async def test_it_parses_an_answer_and_sends_it_back(client: openai.AsyncOpenAI) -> None:
    done = await client.responses.parse(model=MODEL, input=QUESTION, text_format=Result, extra_body=MRSA)
    assert done.output_parsed == Result(result=1)
    async with client.responses.stream(model=MODEL, input=QUESTION, text_format=Result, extra_body=MRSA) as stream:
        assert (await stream.get_final_response()).output_parsed == Result(result=1)
    items: Any = [{"role": "user", "content": QUESTION}, *done.output, {"role": "user", "content": "Sure?"}]
    assert (await client.responses.create(model=MODEL, input=items, extra_body=MRSA)).status == "completed"


async def test_it_raises_what_breaks_in_a_stream(client: openai.AsyncOpenAI) -> None:
    body = {"mrsa": {**MRSA["mrsa"], "deadline_s": 0.03}}
    with pytest.raises(openai.APIError) as caught:
        async with client.responses.stream(model=MODEL, input=QUESTION, extra_body=body) as stream:
            await stream.get_final_response()
    assert caught.value.code == "deadline_exceeded"


async def test_it_raises_typed_errors(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="other", input=QUESTION)
    for field in ({"background": True}, {"previous_response_id": "resp_1"}):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model=MODEL, input=QUESTION, **field)  # type: ignore[call-overload]
        assert caught.value.param == next(iter(field))
