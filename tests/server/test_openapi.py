"""The document of what is served: whole, valid, and with a bound on everything that a client may send."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from fastapi.routing import APIRoute

from mrsa_server.api.openapi import document
from mrsa_server.app import ROUTERS
from tests.helpers.keys import client, ring
from tests.helpers.serving import CHAT, RESPONSES, SMALL, ask, in_memory

ROUTES = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
DOCUMENT = document(ROUTES)
SCHEMAS = DOCUMENT["components"]["schemas"]
# What a client may send of any shape: it goes nowhere, or is bounded as a whole by `check_schema` and by the body.
FREE = {
    "FunctionIn.parameters",
    "FunctionToolIn.parameters",
    "SchemaIn.schema",
    "SchemaFormatIn.schema",
    "OutputText.parsed",
    "CallItem.parsed_arguments",
}


def test_it_tells_of_every_route_and_of_no_other() -> None:
    told = {(method, path) for path, operations in DOCUMENT["paths"].items() for method in operations}
    assert told == {(method.lower(), route.path.replace(":path}", "}")) for route in ROUTES for method in route.methods}
    for operations in DOCUMENT["paths"].values():
        for operation in operations.values():
            assert operation["summary"]
            assert set(operation["responses"]) - {"200", "204"} or operation["operationId"] == "live"


async def test_it_is_what_the_server_gives_to_whoever_has_a_key() -> None:
    one = client("one")
    async with in_memory(keys=ring(one)) as http:
        assert (await http.get("/openapi.json")).status_code == 401
        assert (await http.get("/openapi.json", headers=one.headers)).json() == DOCUMENT


def test_its_schemas_are_schemas() -> None:
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def unbounded(name: str, schema: Any) -> Iterator[str]:
    """Places that a client may fill without end."""
    if not isinstance(schema, dict) or name in FREE:
        return
    kind, fixed = schema.get("type"), "enum" in schema or "const" in schema
    if kind == "string" and not fixed and not ({"maxLength", "pattern", "format"} & schema.keys()):
        yield f"{name}: a string without maxLength"
    if kind in ("integer", "number") and not fixed:
        for low, high in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
            if low not in schema and high not in schema:
                yield f"{name}: a number without {low}"
    if kind == "array" and "maxItems" not in schema:
        yield f"{name}: a list without maxItems"
    if kind == "object" and schema.get("additionalProperties") is not False and "maxProperties" not in schema:
        yield f"{name}: an object of any fields without maxProperties"
    for inner, one in schema.get("properties", {}).items():
        yield from unbounded(f"{name}.{inner}", one)
    for word in ("anyOf", "oneOf", "allOf"):
        for one in schema.get(word, ()):
            yield from unbounded(name, one)
    for word in ("items", "additionalProperties"):
        yield from unbounded(name, schema.get(word))


def test_every_integer_list_and_string_that_a_client_sends_is_bounded() -> None:
    """CVE-2026-34756 of vLLM was an `n` without a bound."""
    ours = {name: schema for name, schema in SCHEMAS.items() if "additionalProperties" in schema}
    assert {"ChatBody", "ResponsesBody", "BatchBody", "MrsaIn", "MessageIn"} <= set(ours)
    found = [place for name, schema in ours.items() for place in unbounded(name, schema)]
    found += [
        place
        for operations in DOCUMENT["paths"].values()
        for operation in operations.values()
        for parameter in operation["parameters"]
        if parameter["schema"].get("type") != "array"
        for place in unbounded(parameter["name"], parameter["schema"])
    ]
    assert not found


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        (CHAT, ask(mrsa=SMALL), "ChatCompletion"),
        (RESPONSES, {"model": "scripted-mrsa", "input": "x", "mrsa": SMALL}, "Response"),
        (CHAT, ask(wat=1), "Error"),
    ],
)
async def test_answers_are_as_it_says(path: str, body: dict[str, Any], name: str) -> None:
    async with in_memory() as http:
        answer = (await http.post(path, json=body)).json()
    whole = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(whole).validate(answer)
