"""The official Python client's Responses API against a running server."""

from __future__ import annotations

import asyncio
import json
import random
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


async def test_it_makes_a_response_in_the_background_and_retrieves_it(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model=MODEL, input=QUESTION, background=True, extra_body=MRSA)
    assert first.status in ("queued", "in_progress")
    async with asyncio.timeout(20):
        while True:
            done = await client.responses.retrieve(first.id)
            if done.status not in ("queued", "in_progress"):
                break
            await asyncio.sleep(0.05)
    assert done.status == "completed"
    assert "boxed" in done.output_text
    items = [item async for item in client.responses.input_items.list(first.id)]
    assert items[0].content[0].text == QUESTION  # type: ignore[union-attr]
    second = await client.responses.create(
        model=MODEL, input="Sure?", previous_response_id=first.id, background=False, extra_body=MRSA
    )
    assert second.previous_response_id == first.id
    assert len([item async for item in client.responses.input_items.list(second.id, limit=2)]) == 3
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(first.id)


async def test_it_goes_on_with_a_stream_that_was_cut(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(
        model=MODEL,
        input=QUESTION,
        background=True,
        stream=True,
        reasoning={"summary": "detailed"},
        extra_body=MRSA,
    )
    seen: list[Any] = []
    async for event in stream:
        seen.append(event)
        if len(seen) == 5:
            break
    await stream.close()
    response_id = seen[0].response.id
    cut = random.Random(4)
    while seen[-1].type != "response.completed":
        after = seen[-1].sequence_number
        async with await client.responses.retrieve(response_id, stream=True, starting_after=after) as rest:
            async for event in rest:
                seen.append(event)
                if cut.random() < 0.2:
                    break
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    done = await client.responses.retrieve(response_id)
    assert done.output_text == text == seen[-1].response.output_text
    assert "boxed" in text


async def test_its_stream_of_a_response_that_is_there_accumulates(client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model=MODEL, input=QUESTION, background=True, extra_body=MRSA)
    async with client.responses.stream(response_id=first.id) as stream:
        numbers = [event.sequence_number async for event in stream]
        whole = await stream.get_final_response()
    async with client.responses.stream(response_id=first.id, starting_after=3) as stream:
        rest = [event.sequence_number async for event in stream]
        again = await stream.get_final_response()
    assert numbers[4:] == rest
    assert whole.output_text == again.output_text
    assert "boxed" in whole.output_text


async def test_it_cancels(client: openai.AsyncOpenAI) -> None:
    sizes = {"population": 8, "rounds": 8, "set_size": 2, "tail_tokens": 8, "seed": 7}
    first = await client.responses.create(
        model=MODEL, input=QUESTION, background=True, extra_body={"mrsa": sizes}, reasoning={"effort": "max"}
    )
    assert (await client.responses.cancel(first.id)).status == "cancelled"
    assert (await client.responses.retrieve(first.id)).status == "cancelled"


async def test_it_raises_typed_errors(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.responses.create(model="other", input=QUESTION)
    fields: Any
    for fields, param in (
        ({"background": True, "store": False}, "background"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model=MODEL, input=QUESTION, **fields)
        assert caught.value.param == param
