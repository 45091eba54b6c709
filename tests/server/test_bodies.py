"""Bodies that cannot be honoured: always a 400 in OpenAI's shape that names the field, never a 5xx."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.serving import CHAT, SMALL, ask, in_memory

JSON = {"content-type": "application/json"}


def user(content: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def schema(inner: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": inner}}}


def tool(parameters: dict[str, Any], name: str = "f") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def nested(levels: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": nested(levels - 1)}} if levels else {}


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hi"}, "messages", "list"),
    ({"messages": user(5)}, "messages.0.content", "string"),
    ({"messages": user(None)}, "messages.0.content", "required"),
    ({"messages": user([])}, "messages.0.content", "at least 1"),
    ({"messages": user([{"type": "text", "text": 1}])}, "messages.0.content.0.text", "string"),
    ({"messages": user([{"type": "input_audio"}])}, "messages.0.content.0", "text only"),
    ({"messages": user([{"type": "file", "file": {"file_id": "x"}}])}, "messages.0.content.0", "text only"),
    (
        {"messages": user([{"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}])},
        "messages.0.content.0.image_url",
        "no URL is ever fetched",
    ),
    ({"messages": user([{"type": "text"}])}, "messages.0.content.0.text", "required"),
    ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role", "developer"),
    ({"messages": [{"content": "x"}]}, "messages.0.role", "required"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages.0.mood", "not a parameter"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "required"),
    ({"model": 5}, "model", "string"),
    ({"model": "gpt-7"}, "model", "not served"),
    ({"temperature": 3}, "temperature", "2"),
    ({"temperature": "1"}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 0}, "n", "1"),
    ({"n": 10**6}, "n", "64"),
    ({"n": 2**70}, "n", "integer"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "1"),
    ({"model": "scripted", "max_tokens": 10**9}, "max_tokens", "131072"),
    ({"seed": 1.5}, "seed", "integer"),
    ({"stop": [""]}, "stop", "empty"),
    ({"stop": ["x"] * 17}, "stop", "16"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"logprobs": True}, "logprobs", "False"),
    ({"logprobs": 0}, "logprobs", "False"),
    ({"top_logprobs": False}, "top_logprobs", "integer"),
    ({"top_logprobs": 1}, "top_logprobs", "0"),
    ({"functions": []}, "functions", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities.1", "text"),
    ({"logit_bias": {"5": 100}}, "logit_bias", "0 items"),
    ({"wat": 1}, "wat", "not a parameter"),
    ({"reasoning_effort": "heroic"}, "reasoning_effort", "xhigh"),
    ({"mrsa": {"wat": 1}}, "mrsa.wat", "not a parameter"),
    ({"mrsa": "yes"}, "mrsa", ""),
    ({"mrsa": {"population": 65}}, "mrsa.population", "64"),
    ({"mrsa": {"population": 0}}, "mrsa.population", "1"),
    ({"mrsa": {"rounds": 33}}, "mrsa.rounds", "32"),
    ({"mrsa": {"rounds": -1}}, "mrsa.rounds", "0"),
    ({"mrsa": {"population": 4, "final_candidates": 5}}, "mrsa.final_candidates", "4"),
    ({"mrsa": {"deadline_s": 0}}, "mrsa.deadline_s", "0"),
    ({"mrsa": {"budget_tokens": 10}}, "mrsa.budget_tokens", "smallest budget"),
    ({"mrsa": {"tail_tokens": 10**6}}, "mrsa.tail_tokens", "32768"),
    ({"mrsa": {"stream": "all"}}, "mrsa.stream", "rollouts"),
    ({"mrsa": {"carry": "soul"}}, "mrsa.carry", "hybrid"),
    ({"rsa_t": "many"}, "rsa_t", "integer"),
    ({"rsa_n": 100}, "rsa_n", "rsa_n: must be at most 64"),
    ({"rsa_n": 4, "rsa_final_n": 5}, "rsa_final_n", "4"),
    ({"rsa_n": 4, "mrsa": False}, "rsa_n", "mrsa is false"),
    ({"rsa_n": 4, "mrsa": "yes"}, "mrsa", "object"),
    ({"rsa_t": 0, "mrsa": {"effort": "high"}}, "rsa_t", "mrsa.effort"),
    ({"rsa_tail_window": False, "mrsa": {"tail_tokens": 9}}, "rsa_tail_window", "whole"),
    ({"mrsa": {"rollout_tokens": 1}}, "mrsa.rollout_tokens", "at least 2"),
    ({"short_resp_len": 1}, "short_resp_len", "at least 2"),
    ({"rsa_summarize": True}, "rsa_summarize", "not supported"),
    ({"rsa_n": 4, "mrsa": {"population": 4}}, "rsa_n", "give one"),
    ({"tools": [{"type": "custom"}]}, "tools.0.type", "function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
    ({"tools": [FUNCTION, FUNCTION]}, "tools.1.function.name", "twice"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    (
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice.function.name",
        "no tool",
    ),
    ({"tools": [FUNCTION], **schema({})}, "response_format", "tool_choice"),
    (schema({"$ref": "https://example.com/s.json"}), "response_format.json_schema.schema", "$ref"),
    (schema({"$ref": "file:///etc/passwd"}), "response_format.json_schema.schema", "$ref"),
    (schema(nested(40)), "response_format.json_schema.schema", "deep"),
    (schema({"enum": ["x" * 70_000]}), "response_format.json_schema.schema", "65536"),
    (schema({"type": "string", "pattern": "a" * 300}), "response_format.json_schema.schema", "256"),
    (schema({"type": "string", "pattern": "(a{900}){900}"}), "response_format.json_schema.schema", "1024"),
    (schema({"type": "string", "pattern": "(?=a)b"}), "response_format.json_schema.schema", "look around"),
    (schema({"type": "array", "maxItems": 10**9}), "response_format.json_schema.schema", "maxItems"),
    (schema({"type": "nonsense"}), "response_format.json_schema.schema", "type must be"),
    (schema({"type": 5}), "response_format.json_schema.schema", "type must be"),
    (schema({"properties": [1]}), "response_format.json_schema.schema", "properties must be"),
    (schema({"items": 3}), "response_format.json_schema.schema", "items must be"),
    (schema({"properties": {"a": {"type": "strin"}}}), "response_format.json_schema.schema", "type must be"),
    (schema({"$ref": "#/nope"}), "response_format.json_schema.schema", "points to no schema"),
    (schema({"$ref": "#"}), "response_format.json_schema.schema", "back to itself"),
    (schema({"$ref": "#/x", "x": {"type": "nonsense"}}), "response_format.json_schema.schema", "type must be"),
    (schema({"pattern": "(a"}), "response_format.json_schema.schema", "cannot be compiled"),
    ({"tools": [tool({"type": "nonsense"})]}, "tools.0.function.parameters", "type must be"),
    (
        {"tools": [tool({"enum": ["x" * 60_000]}, f"f{number}") for number in range(3)], "tool_choice": "required"},
        "tools",
        "131072",
    ),
    ({"tools": [tool({"enum": ["x" * 60_000]}, f"f{number}") for number in range(9)]}, "tools", "524288"),
]


@pytest.mark.parametrize(("fields", "param", "words"), CASES, ids=lambda value: str(value)[:60])
async def test_a_bad_field_is_named(fields: dict[str, Any], param: str, words: str) -> None:
    async with in_memory() as client:
        response = await client.post(CHAT, json=ask(**fields))
    error = response.json()["error"]
    assert response.status_code == (404 if "gpt-7" in fields.values() else 400), error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"].lower().find(words.lower()) >= 0, error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "verbosity": "low"},
        {"prompt_cache_key": "k", "safety_identifier": "s", "parallel_tool_calls": True, "logit_bias": {}},
        {"logprobs": False, "top_logprobs": 0, "audio": None, "modalities": ["text"], "functions": None},
        {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": -1, "frequency_penalty": 1},
        {"stream_options": None, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}},
        {"stop": "END", "max_tokens": 500, "seed": -5, "reasoning": {"effort": "low", "summary": "auto"}},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}, *user("y")]},
        {
            "messages": [
                *user("x"),
                {
                    "role": "assistant",
                    "content": None,
                    "refusal": None,
                    "annotations": [],
                    "reasoning": "hm",
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "5"},
            ]
        },
        schema({"type": "object", "properties": {"x": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "string"}}}),
        schema({"type": "string", "pattern": r"^\d{4}-\d{2}$"}),
        schema({"properties": {"pattern": {"enum": [{"type": "x"}], "default": {"maxLength": 10**9}}}}),
        schema({"type": "string", "pattern": r"^\p{Lu}[\w\/]+$"}),
        schema({"definitions": {"a/b": {"type": ["string", "null"]}}, "items": {"$ref": "#/definitions/a~1b"}}),
        schema({"properties": {"child": {"$ref": "#"}}}),
        {"rsa_debug": True, "rsa_n": None},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_what_openai_knows_and_does_no_harm_is_accepted(fields: dict[str, Any]) -> None:
    async with in_memory() as client:
        response = await client.post(CHAT, json=ask(mrsa=SMALL, **fields))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"model": "\\ud800"}',
        b'{"temperature": 1e999}',
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"mrsa":' + b"[" * 900 + b"]" * 900 + b"}",
        orjson.dumps(ask(metadata={"x": [[]]}, tools=[{"type": "function", "function": {"name": "f"}}])).replace(
            b"[[]]", b"[" * 900 + b"]" * 900
        ),
    ],
    ids=[str(number) for number in range(13)],
)
async def test_a_body_that_is_no_proper_json_is_a_400(body: bytes) -> None:
    async with in_memory() as client:
        response = await client.post(CHAT, content=body, headers=JSON)
    assert response.status_code in (200, 400) if b"metadata" in body else response.status_code == 400, response.text
    if response.status_code == 400:
        assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=latin-1"},
        {**JSON, "content-encoding": "gzip"},
    ],
    ids=str,
)
async def test_a_body_of_another_kind_is_a_400(headers: dict[str, str]) -> None:
    async with in_memory() as client:
        response = await client.post(CHAT, content=orjson.dumps(ask()), headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("invalid_content_type", "invalid_content_encoding")


async def test_unknown_paths_and_methods_answer_in_the_same_shape() -> None:
    async with in_memory() as client:
        for response, status in (
            (await client.get("/nowhere"), 404),
            (await client.get(CHAT), 405),
            (await client.get("/v1/models/gpt-7"), 404),
        ):
            assert response.status_code == status
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_trailing_slash_is_no_redirect_to_wherever_the_client_says() -> None:
    async with in_memory() as client:
        response = await client.post(CHAT + "/", json=ask(), headers={"host": "evil.example"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("length", ["x", "-1", "+5", "1_0", "\u0663", "9" * 5000])
async def test_a_length_that_is_no_number_is_a_400(length: str) -> None:
    async with in_memory() as client:
        headers = {**JSON, "content-length": length.encode()}
        response = await client.post(CHAT, content=orjson.dumps(ask()), headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_content_length"


async def test_a_field_that_only_says_how_to_report_starts_nothing() -> None:
    async with in_memory() as client:
        body = (await client.post(CHAT, json=ask("scripted", rsa_debug=True))).json()
    assert body["mrsa"]["params"]["population"] == 1


async def test_what_breaks_inside_is_a_500_that_tells_nothing() -> None:
    async with in_memory() as client:
        del client.app.state.asking  # type: ignore[attr-defined]
        response = await client.post(CHAT, json=ask())
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "The server failed."
    assert response.headers["x-request-id"]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[asyncio.Runner, httpx.AsyncClient]]:
    """One server for all examples."""
    with asyncio.Runner() as runner:
        context = in_memory()
        client = runner.run(context.__aenter__())
        yield runner, client
        runner.run(context.__aexit__(None, None, None))


def leaves() -> st.SearchStrategy[Any]:
    text = st.sampled_from(["", "x", "scripted", "scripted-mrsa", "user", "tool", "text", "function", "\0", "é" * 50])
    numbers = st.one_of(st.integers(-3, 70), st.integers(), st.floats(allow_nan=False, allow_infinity=False))
    return st.one_of(st.none(), st.booleans(), numbers, text, st.text(max_size=8))


NAMES = st.sampled_from(
    "model messages role content type text image_url url tools function name parameters tool_choice response_format "
    "json_schema schema mrsa population rounds set_size final_candidates deadline_s budget_tokens seed n stop stream "
    "stream_options include_usage temperature reasoning_effort rsa_t rsa_n tool_calls id arguments wat $ref "
    "pattern".split()
)
VALUES = st.recursive(
    leaves(),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=5)),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(NAMES, VALUES, max_size=5), whole=st.booleans())
def test_no_body_whatever_makes_the_server_fail(
    server: tuple[asyncio.Runner, httpx.AsyncClient], fields: dict[str, Any], whole: bool
) -> None:
    runner, client = server
    body = fields if whole else {**ask(mrsa={"population": 2, "rounds": 1}), **fields}
    try:
        content = orjson.dumps(body)
    except (TypeError, orjson.JSONEncodeError):  # an integer beyond 64 bits: Python's own writer knows it
        import json

        content = json.dumps(body).encode()
    response = runner.run(client.post(CHAT, content=content, headers=JSON))
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_metadata_is_bounded_since_a_page_of_runs_shows_that_of_a_hundred() -> None:
    async with in_memory() as client:
        fits = {"a" * 64: "x" * 9_000, "b": [None, {"c": 1}]}
        assert (await client.post(CHAT, json=ask(mrsa=SMALL, metadata=fits))).status_code == 200
        response = await client.post(CHAT, json=ask(mrsa=SMALL, metadata={"a": "x" * 5_000, "b": "x" * 5_000}))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "metadata"
    assert "9216" in response.json()["error"]["message"]
