"""The schemas of Open Responses, as `llm-comply` ships them: an outside word on what a response and its events are."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator

_COMPONENTS = json.loads((files("llm_comply") / "specs" / "openresponses.json").read_text())["components"]
# By the event types in the schemas themselves.
EVENTS: dict[str, str] = {
    schema["properties"]["type"]["enum"][0]: name
    for name, schema in _COMPONENTS["schemas"].items()
    if name.endswith("StreamingEvent")
}


@cache
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator({"$ref": f"#/components/schemas/{schema}", "components": _COMPONENTS})


def misfits(value: dict[str, Any], schema: str) -> list[str]:
    """What of a value does not fit a schema. That of `text.format` forbids every schema, and is not asked about it."""
    response = value.get("response", value)
    if response.get("object") == "response" and response["text"]["format"]["type"] == "json_schema":
        response = {**response, "text": {"format": {"type": "text"}}}
        value = {**value, "response": response} if "response" in value else response
    return [f"{error.json_path}: {error.message}" for error in _validator(schema).iter_errors(value)]
