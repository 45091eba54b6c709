"""ZAYA1's tool calls in a plain `vllm serve`, by the parser that our plugin brings."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine.test_zaya_tokens import tokenizer

pytestmark = pytest.mark.engine

SCHEMA = {
    "type": "object",
    "properties": {"place": {"type": "string"}, "days": {"type": "integer"}, "where": {"type": "object"}},
}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]
CALL = (
    "<zyphra_tool_call>\n<function=look>\n<parameter=place>\nGenève\n\nand 007\n</parameter>\n"
    '<parameter=days>\n7\n</parameter>\n<parameter=where>\n{"a": [1, true]}\n</parameter>\n</function>\n'
    "</zyphra_tool_call>"
)
ARGUMENTS = {"place": "Genève\n\nand 007", "days": 7, "where": {"a": [1, True]}}
SAID = f"<think>hm < a\n</think>\n\nSo: {CALL}\n{CALL}"


@pytest.fixture(scope="module", params=["gemma", "gpt2"])
def words(request: pytest.FixtureRequest) -> Any:
    return tokenizer(request.param)


def start(words: Any) -> tuple[Any, Any]:
    """The parser of one request as vLLM makes it, and the request."""
    with warnings.catch_warnings(action="ignore"):
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.parser.parser_manager import ParserManager
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        kind = ParserManager.get_parser("zaya_xml", "qwen3", enable_auto_tools=True)
        asked = {"model": "zaya", "messages": [{"role": "user", "content": "?"}], "tools": TOOLS, "tool_choice": "auto"}
        request = ChatCompletionRequest.model_validate(asked)
        assert kind is not None
        parser = kind(words, request.tools)
        return parser, parser.adjust_request(request)


def test_plain_vllm_reads_reasoning_and_calls(words: Any) -> None:
    parser, request = start(words)
    assert not request.skip_special_tokens
    reasoning, content, calls = parser.parse(SAID, request, enable_auto_tools=True)
    assert (reasoning.strip(), content.strip()) == ("hm < a", "So:")
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("look", ARGUMENTS)] * 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_it_streams_arguments_however_its_tokens_come(words: Any, data: st.DataObject) -> None:
    parser, request = start(words)
    ids = words.encode(SAID, add_special_tokens=False)
    cuts = data.draw(
        st.sets(st.integers(1, len(ids) - 1), max_size=12) | st.just(set(range(1, len(ids)))), label="cuts"
    )
    bounds = [0, *sorted(cuts), len(ids)]
    read, reasoning, content = 0, "", ""
    calls: dict[int, list[str]] = {}
    pieces = 0
    for begin, end in pairwise(bounds):
        text = words.decode(ids[:end])
        if end < len(ids):
            text = text.rstrip("\ufffd")  # vLLM hands out whole characters
        delta = parser.parse_delta(text[read:], ids[begin:end], request, [], finished=end == len(ids))
        read = len(text)
        if delta is None:
            continue
        reasoning, content = reasoning + (delta.reasoning or ""), content + (delta.content or "")
        for call in delta.tool_calls:
            name, arguments = calls.setdefault(call.index, ["", ""])
            calls[call.index] = [name + (call.function.name or ""), arguments + (call.function.arguments or "")]
            pieces += bool(call.function.arguments)
    assert (reasoning.strip(), content.strip()) == ("hm < a", "So:")
    assert [(name, json.loads(arguments)) for name, arguments in calls.values()] == [("look", ARGUMENTS)] * 2
    assert pieces > 4 or len(cuts) < len(ids) - 1
