"""The official Python client against a running server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.e2e

MODEL = "scripted-mrsa"
MESSAGES: Any = [{"role": "user", "content": "What is six times seven?"}]
MRSA = {"mrsa": {"population": 4, "rounds": 1, "set_size": 2, "seed": 7}}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


@pytest.fixture
async def client(scripted_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=scripted_url, api_key="none", max_retries=0) as found:
        yield found


async def test_it_lists_the_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["scripted", MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_it_completes(client: openai.AsyncOpenAI) -> None:
    done = await client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=MRSA)
    assert "boxed" in (done.choices[0].message.content or "")
    assert done.choices[0].finish_reason == "stop"
    assert done.usage
    assert done.usage.completion_tokens_details
    assert done.model_extra
    assert done.model_extra["mrsa"]["params"]["population"] == 4


async def test_it_streams_chunks(client: openai.AsyncOpenAI) -> None:
    content, reasoning, events, usage = "", "", [], None
    stream = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}, extra_body=MRSA
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        events += [(chunk.model_extra or {}).get("mrsa")]
        if chunk.choices:
            content += chunk.choices[0].delta.content or ""
            reasoning += (chunk.choices[0].delta.model_extra or {}).get("reasoning") or ""
    assert "boxed" in content
    assert reasoning.startswith("[round 0, rollout")
    assert usage
    assert next(event["event"] for event in events if event) == "run.started"


async def test_it_accumulates_with_stream(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model=MODEL, messages=MESSAGES, extra_body=MRSA) as stream:
        heard = "".join([event.delta async for event in stream if event.type == "content.delta"])
        done = await stream.get_final_completion()
    assert done.choices[0].message.content == heard
    assert "boxed" in heard


async def test_it_calls_a_tool_streamed_and_not(client: openai.AsyncOpenAI) -> None:
    done = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="required", extra_body=MRSA
    )
    assert done.choices[0].finish_reason == "tool_calls"
    assert done.choices[0].message.tool_calls
    async with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="required", extra_body=MRSA
    ) as stream:
        final = await stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or ()
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "text"}


async def test_it_raises_typed_errors(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body={"mrsa": {"population": 0}})
    assert caught.value.param == "mrsa.population"
    assert caught.value.request_id
