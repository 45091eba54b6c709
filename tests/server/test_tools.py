"""Tool calls in answers, and schemas that become grammars."""

from __future__ import annotations

import json
import time

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.scripted import instance_of
from mrsa_server.api.errors import BadRequest
from mrsa_server.api.schemas import check_schema
from mrsa_server.api.tools import Call, CallReader, Tool, call_schema, read_forced, read_free

WEATHER = Tool(
    "get_weather",
    "The weather.",
    {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]},
)
TREE = Tool(
    "grow",
    None,
    {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}},
)
HERMES = '<tool_call>{"name": "get_weather", "arguments": {"city": "Bern"}}</tool_call>'
ZAYA = (
    "<zyphra_tool_call>\n<function=get_weather>\n<parameter=city>\n5\n</parameter>\n<parameter=days>\n5\n</parameter>\n"
    "</function>\n</zyphra_tool_call>"
)


def test_a_call_is_read_in_hermes_and_in_zaya_notation() -> None:
    assert read_free(f"Let me look. {HERMES}", (WEATHER,)).calls == (("get_weather", '{"city":"Bern"}'),)
    (call,) = read_free(ZAYA, (WEATHER,)).calls
    assert json.loads(call.arguments) == {"city": "5", "days": 5}  # each by its type in the schema


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "\nline\n\n", "line\n"),  # one line break on either side is the notation's
        ({"type": "string"}, "\n\n  x\n", "\n  x"),
        ({"type": "string"}, "tight", "tight"),
        ({"type": "string"}, "\nnull\n", "null"),
        ({"type": ["string", "null"]}, "\n5\n", "5"),
        ({"type": ["string", "null"]}, "\nnull\n", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "\n[1]\n", "[1]"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "\nNone\n", None),
        ({"type": "boolean"}, "\nTrue\n", True),
        ({"type": "boolean"}, "\nfalse\n", False),
        ({"type": "array"}, '\n["a", {"b": 1.5}]\n', ["a", {"b": 1.5}]),
        ({"type": "integer"}, "\nmany\n", "many"),
        ({}, "\nTrue\n", "True"),
        ({}, "\n5\n", 5),
        ({"type": 5, "anyOf": 5}, "\n5\n", 5),
    ],
    ids=str,
)
def test_a_parameter_has_the_type_of_its_schema(schema: dict[str, object], text: str, value: object) -> None:
    tool = Tool("f", None, {"type": "object", "properties": {"x": schema}})
    body = f"<zyphra_tool_call>\n<function=f>\n<parameter=x>{text}</parameter>\n</function>\n</zyphra_tool_call>"
    (call,) = read_free(body, (tool,)).calls
    assert json.loads(call.arguments) == {"x": value}


@pytest.mark.parametrize(
    "text",
    [
        "no call at all, though 3 < 4 <tool",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        "<tool_call>not json</tool_call>",
        "<zyphra_tool_call><function=unknown></function></zyphra_tool_call>",
        '<tool_call>{"name": "get_weather", "arguments": {"city": ',
        "</tool_call><tool_call>",
    ],
)
def test_what_is_no_call_of_a_known_tool_stays_text(text: str) -> None:
    assert read_free(text, (WEATHER,)) == (text, ())


def test_a_call_whose_closing_mark_is_missing_counts_where_it_is_whole() -> None:
    assert len(read_free(HERMES.removesuffix("</tool_call>"), (WEATHER,)).calls) == 1


PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [HERMES, ZAYA, "<tool_call>", "</tool_call>", "<", "<zyphra_tool_call>", "<tool_call", " ", "\n"]
        ),
        st.text(max_size=5),
    ),
    max_size=6,
).map("".join)


@given(text=PIECES, data=st.data())
def test_an_answer_in_pieces_reads_like_the_whole(text: str, data: st.DataObject) -> None:
    whole = CallReader((WEATHER,))
    first, last = whole.feed(text), whole.close()
    pieces = CallReader((WEATHER,))
    said, at = "", 0
    calls: list[Call] = []
    while at < len(text):
        size = data.draw(st.integers(1, 9))
        part = pieces.feed(text[at : at + size])
        said, calls, at = said + part.text, [*calls, *part.calls], at + size
    end = pieces.close()
    assert said + end.text == first.text + last.text
    assert (*calls, *end.calls) == first.calls + last.calls


@given(st.text(max_size=30))
def test_no_more_is_held_back_than_could_be_a_call(text: str) -> None:
    said = CallReader((WEATHER,)).feed(text).text
    held = text[len(said) :]
    assert said + held == text
    assert not held or "<zyphra_tool_call>".startswith(held) or "<tool_call>".startswith(held)


@pytest.mark.parametrize("several", [False, True])
def test_a_forced_call_fits_its_schema_and_is_read_back(several: bool) -> None:
    schema = json.loads(call_schema((WEATHER, TREE), several))
    value = instance_of(schema)
    jsonschema.validate(value, schema)
    assert read_forced(json.dumps(value), (WEATHER, TREE)).calls == (("get_weather", '{"city":"text"}'),)


def test_the_references_of_a_tools_schema_still_point_into_it() -> None:
    schema = json.loads(call_schema((WEATHER, TREE), False))
    jsonschema.validate({"name": "grow", "arguments": {"next": {"next": {}}}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "grow", "arguments": {"next": {"next": 5}}}, schema)


def test_a_forced_call_that_was_cut_is_text() -> None:
    assert read_forced('{"name": "get_weather", "argum', (WEATHER,)).calls == ()


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "http://169.254.169.254/latest"},
        {"properties": {"a": {"items": [{"$ref": "other.json"}]}}},
        {"patternProperties": {"(a{99}){99}": {}}},
        {"pattern": "(x{1,40}){40}"},
        {"pattern": r"(a)\1"},
        {"minLength": 10**6},
    ],
)
def test_a_hostile_schema_is_refused(schema: dict[str, object]) -> None:
    with pytest.raises(BadRequest) as caught:
        check_schema(schema, "where")
    assert caught.value.param == "where"


def test_a_block_that_never_closes_takes_time_in_its_length_alone() -> None:
    reader = CallReader((WEATHER,))
    start = time.perf_counter()
    said = reader.feed("<tool_call>").text
    for _ in range(250_000):
        said += reader.feed("abcd").text
    assert said == ""
    assert reader.close().text == "<tool_call>" + "abcd" * 250_000
    assert time.perf_counter() - start < 2  # 7 minutes, when each piece was joined to all before it


def test_many_small_blocks_take_time_in_their_length_alone() -> None:
    text = "<tool_call></tool_call>" * 45_000
    start = time.perf_counter()
    assert read_free(text, (WEATHER,)) == (text, ())
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": []},
        {"anyOf": {}},
        {"required": "a"},
        {"required": [1]},
        {"minimum": "0"},
        {"minLength": -1},
        {"multipleOf": 0},
        {"additionalProperties": "no"},
        {"enum": "a"},
        {"items": []},
        {"type": []},
        {"pattern": 5},
        {"pattern": "["},
        {"pattern": "a{5,2}"},
        {"$ref": 5},
        {"$ref": "#nope"},
        {"$ref": "#/properties"},
        {"$dynamicRef": "#/$defs/a"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"not": {"if": {"contains": {"type": "nonsense"}}}},
        {"patternProperties": {"(": {}}},
    ],
    ids=str,
)
def test_what_is_no_schema_is_refused(schema: dict[str, object]) -> None:
    with pytest.raises(BadRequest):
        check_schema(schema, "where")


WORDS = st.sampled_from(
    "type properties items anyOf required minimum minLength enum pattern $defs additionalProperties a string object "
    "array integer".split()
)
SCHEMAS = st.recursive(
    st.one_of(st.booleans(), st.integers(-2, 2), WORDS, st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=8,
)


@given(st.dictionaries(WORDS, SCHEMAS, max_size=4))
@example({"items": [False], "$defs": {}})
def test_whatever_is_accepted_is_a_schema_to_others_too(schema: dict[str, object]) -> None:
    try:
        check_schema(schema, "where")
    except BadRequest:
        return
    try:
        jsonschema.Draft7Validator.check_schema(schema)
    except jsonschema.SchemaError:  # `$defs` is checked by the newer draft alone, `items` as a list by the older
        jsonschema.Draft202012Validator.check_schema(schema)


def test_patterns_that_take_long_to_compile_are_not_compiled_here() -> None:
    schema = {"anyOf": [{"pattern": f"[{number}]" + "[a-\U0001ffff]" * 40} for number in range(150)]}
    start = time.perf_counter()
    check_schema(schema, "where")
    assert time.perf_counter() - start < 2  # 9 seconds, with Python's own compiler
