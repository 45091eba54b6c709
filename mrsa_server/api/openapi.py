"""`/openapi.json`: what is served, told from the models that bodies are read with and the rules of the routes.

FastAPI's own would say nothing of bodies, which the routes read themselves. A test holds this against the routes, and
schemathesis against the server.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import orjson
from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from mrsa_server import __version__
from mrsa_server.api import batches, chat, export, files, health, models, responses, runs
from mrsa_server.api.auth import any_key, rule_of
from mrsa_server.api.batches_wire import LONGEST_S, SHORTEST_S, BatchBody
from mrsa_server.api.query import MOST_CHARACTERS
from mrsa_server.api.responses_wire import ResponsesBody
from mrsa_server.api.training import Form, Only, Rounds, Thinking
from mrsa_server.api.wire import ChatBody, Wire
from mrsa_server.api.zyphra import FIELDS_OF_PROXY
from mrsa_server.runs.record import BatchStatus, FilePurpose, RunKind, StoredStatus

router = APIRouter()

Json = dict[str, Any]

_BODIES: tuple[type[Wire], ...] = (ChatBody, ResponsesBody, BatchBody)
_REFERENCE = "#/components/schemas/{model}"
_JSON, _LINES, _EVENTS, _TEXT = "application/json", "application/jsonl", "text/event-stream", "text/plain"
_ERRORS: Mapping[int, str] = {
    400: "The request cannot be honoured; `param` names the field and `message` the limit.",
    401: "No key, or one that is not known.",
    403: "The key lacks the scope.",
    404: "There is none that this key sees, or the server stores nothing.",
    408: "The body came too slowly.",
    409: "The idempotency key stands for another request, or what was asked for has ended already.",
    413: "The body is too large.",
    429: "The key has used what it may: `retry-after` and `x-ratelimit-*` say when there is more.",
    500: "The server failed.",
    502: "The run has no answer.",
    503: "The server, its engine or its store cannot answer now; `retry-after` says when to ask again.",
    504: "The run's own deadline came before any answer.",
}


def _string(**more: object) -> Json:
    return {"type": "string", **more}


def _integer(low: int, high: int | None = None) -> Json:
    return {"type": "integer", "minimum": low, **({} if high is None else {"maximum": high})}


def _enum(*values: str) -> Json:
    return {"type": "string", "enum": list(values)}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(required: Mapping[str, Json], **more: Json) -> Json:
    return {"type": "object", "required": list(required), "properties": {**required, **more}}


def _array(items: Json) -> Json:
    return {"type": "array", "items": items}


def _of(name: str) -> Json:
    return {"$ref": _REFERENCE.format(model=name)}


def _page(name: str) -> Json:
    ends = {"first_id": _or_null(_string()), "last_id": _or_null(_string())}
    return _object({"object": {"const": "list"}, "data": _array(_of(name)), **ends, "has_more": {"type": "boolean"}})


def _deleted(kind: str) -> Json:
    return _object({"id": _string(), "object": {"const": kind}, "deleted": {"const": True}})


_ANY: Json = {}
_STAMP = {"type": "number"}
_CHAT_USAGE = _object(
    {"prompt_tokens": _integer(0), "completion_tokens": _integer(0), "total_tokens": _integer(0)},
    completion_tokens_details=_object({"reasoning_tokens": _integer(0)}),
)
_MRSA = {"type": "object", "description": "The run: its parameters in force, rounds, answers and votes; see README.md."}
_ANSWERED: Mapping[str, Json] = {
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _string(),
                    "type": _enum("invalid_request_error", "rate_limit_error", "server_error"),
                    "param": _or_null(_string()),
                    "code": _or_null(_string()),
                }
            )
        }
    ),
    "ChatCompletion": _object(
        {
            "id": _string(),
            "object": {"const": "chat.completion"},
            "created": _integer(0),
            "model": _string(),
            "choices": _array(
                _object(
                    {
                        "index": _integer(0),
                        "message": _object({"role": {"const": "assistant"}, "content": _or_null(_string())}),
                        "finish_reason": _enum("stop", "length", "tool_calls"),
                    }
                )
            ),
            "usage": _CHAT_USAGE,
            "mrsa": _MRSA,
        }
    ),
    "Response": _object(
        {
            "id": _string(),
            "object": {"const": "response"},
            "created_at": _integer(0),
            "status": _enum("queued", "in_progress", "completed", "incomplete", "failed", "cancelled"),
            "model": _string(),
            "output": _array({"type": "object"}),
            "error": _or_null({"type": "object"}),
        }
    ),
    "Model": _object(
        {"id": _string(), "object": {"const": "model"}, "created": _integer(0), "owned_by": _string()},
    ),
    "ModelList": _object({"object": {"const": "list"}, "data": _array(_of("Model"))}),
    "Run": _object(
        {
            "id": _string(),
            "object": {"const": "run"},
            "kind": _enum(*get_args(RunKind)),
            "status": _enum(*get_args(StoredStatus)),
            "model": _string(),
            "created_at": _STAMP,
            "ended_at": _or_null(_STAMP),
            "events": _integer(0),
            "metadata": {"type": "object"},
            "key_id": _or_null(_string()),
        }
    ),
    "RunPage": _page("Run"),
    "Trace": _object({"object": {"const": "run.trace"}, "token_ids": _array(_integer(0)), "run_id": _string()}),
    "File": _object(
        {
            "id": _string(),
            "object": {"const": "file"},
            "bytes": _integer(0),
            "created_at": _integer(0),
            "expires_at": _or_null(_integer(0)),
            "filename": _string(),
            "purpose": _enum(*get_args(FilePurpose)),
        }
    ),
    "FilePage": _page("File"),
    "Batch": _object(
        {
            "id": _string(),
            "object": {"const": "batch"},
            "endpoint": _string(),
            "input_file_id": _string(),
            "completion_window": _string(),
            "status": _enum(*get_args(BatchStatus)),
            "created_at": _integer(0),
            "request_counts": _object({"total": _integer(0), "completed": _integer(0), "failed": _integer(0)}),
        }
    ),
    "BatchPage": _page("Batch"),
    "Items": _page("Item"),
    "Item": {"type": "object", "required": ["id", "type"]},
    "Well": _object({"status": {"const": "ok"}}),
}


@dataclass(frozen=True, slots=True)
class _Told:
    """What an operation takes and gives, beside what its rule says.

    Attributes:
        answers: By type, what a 200 holds.
        errors: With which other statuses it may answer; what needs a key has 401 and 403 too.
        query: Its parameters, by name.
        body: What its body is.
        form: Whether that is a form.
        headers: Headers that it reads.
        empty: Another status of success, without a body.
    """

    answers: Mapping[str, Json | None]
    errors: tuple[int, ...] = ()
    query: Mapping[str, Json] | None = None
    body: Json | None = None
    form: bool = False
    headers: Mapping[str, Json] | None = None
    empty: int | None = None


_STORED = (400, 404, 500, 503)
_ASKED = (400, 404, 408, 409, 413, 429, 500, 502, 503, 504)
_KEY = {"Idempotency-Key": _string(minLength=1, maxLength=255)}
_NAME = _string(minLength=1, maxLength=128)
_FREE = _string(maxLength=MOST_CHARACTERS)
_ORDER = _enum("asc", "desc")
_SWITCH = _enum("true", "false")
_WHEN = _string(description="Unix seconds or ISO 8601", maxLength=64)
_FORM = _object(
    {"file": _string(format="binary"), "purpose": {"const": "batch"}},
    **{"expires_after[anchor]": {"const": "created_at"}, "expires_after[seconds]": _integer(SHORTEST_S, LONGEST_S)},
)

_TOLD: Mapping[object, _Told] = {
    chat.chat_completions: _Told(
        {_JSON: _of("ChatCompletion"), _EVENTS: None}, _ASKED, body=_of("ChatBody"), headers=_KEY
    ),
    responses.create_response: _Told(
        {_JSON: _of("Response"), _EVENTS: None}, _ASKED, body=_of("ResponsesBody"), headers=_KEY
    ),
    responses.compact_response: _Told({}, (404, 500)),
    responses.get_response: _Told(
        {_JSON: _of("Response"), _EVENTS: None},
        _STORED,
        {
            "stream": _SWITCH,
            "starting_after": _integer(0, 2**31 - 1),
            "include": _FREE,
            "include[]": _FREE,
            "include_obfuscation": _FREE,
        },
    ),
    responses.cancel_response: _Told({_JSON: _of("Response")}, _STORED),
    responses.delete_response: _Told({_JSON: _deleted("response")}, _STORED),
    responses.list_input_items: _Told(
        {_JSON: _of("Items")},
        _STORED,
        {
            "after": _NAME,
            "limit": _integer(1, 100),
            "order": _ORDER,
            "include": _FREE,
            "include[]": _FREE,
        },
    ),
    runs.list_runs: _Told(
        {_JSON: _of("RunPage")},
        _STORED,
        {
            "limit": _integer(1, 100),
            "after": _NAME,
            "status": _string(pattern="^[a-z,]{1,128}$"),
            "model": _FREE,
            "kind": _enum(*get_args(RunKind)),
            "batch": _FREE,
        },
    ),
    runs.get_run: _Told({_JSON: _of("Run")}, _STORED),
    runs.cancel_run: _Told({_JSON: _of("Run")}, _STORED),
    runs.run_events: _Told(
        {_EVENTS: None},
        _STORED,
        {"after": _integer(0, 2**31 - 1)},
        headers={"Last-Event-ID": _integer(0, 2**31 - 1)},
        empty=204,
    ),
    runs.export_run: _Told({_LINES: _string()}, _STORED),
    runs.run_trace: _Told({_JSON: _of("Trace")}, (*_STORED, 502)),
    export.export: _Told(
        {_LINES: _string()},
        _STORED,
        {
            "format": _enum(*Form),
            "run": _array(_NAME),
            "rounds": _enum(*Rounds),
            "only": _enum(*Only),
            "thinking": _enum(*Thinking),
            "limit": _integer(1, 10**9),
            "summary": _SWITCH,
            "status": _string(pattern="^[a-z,]{1,128}$"),
            "model": _FREE,
            "since": _WHEN,
            "until": _WHEN,
        },
    ),
    files.upload_file: _Told({_JSON: _of("File")}, (400, 404, 408, 413, 500, 503), body=_FORM, form=True),
    files.list_files: _Told(
        {_JSON: _of("FilePage")},
        _STORED,
        {"purpose": _FREE, "limit": _integer(1, 10_000), "order": _ORDER, "after": _NAME},
    ),
    files.get_file: _Told({_JSON: _of("File")}, _STORED),
    files.file_content: _Told({"application/octet-stream": _string(format="binary")}, _STORED),
    files.delete_file: _Told({_JSON: _deleted("file")}, _STORED),
    batches.create_batch: _Told(
        {_JSON: _of("Batch")}, (400, 404, 408, 409, 413, 500, 503), body=_of("BatchBody"), headers=_KEY
    ),
    batches.list_batches: _Told({_JSON: _of("BatchPage")}, _STORED, {"after": _NAME, "limit": _integer(1, 100)}),
    batches.get_batch: _Told({_JSON: _of("Batch")}, _STORED),
    batches.cancel_batch: _Told({_JSON: _of("Batch")}, (*_STORED, 409)),
    models.list_models: _Told({_JSON: _of("ModelList")}, (500, 503)),
    models.get_model: _Told({_JSON: _of("Model")}, (404, 500, 503)),
    health.live: _Told({_JSON: _of("Well")}, (500,)),
    health.ready: _Told({_JSON: _of("Well")}, (500, 503)),
    health.metrics: _Told({_TEXT: _string()}, (500,)),
}
_PLACES = {"round": _integer(0, 10_000), "index": _integer(0, 1_000_000)}
_NEEDED = {"format"}  # of the query


@router.get("/openapi.json")
@any_key
async def openapi() -> Response:
    """This document."""
    return Response(_document(), media_type=_JSON)


@cache
def _document() -> bytes:
    modules = (chat, responses, runs, export, files, batches, models, health)
    served = [route for module in modules for route in module.router.routes] + list(router.routes)
    return orjson.dumps(document(route for route in served if isinstance(route, APIRoute)))


def document(routes: Iterable[APIRoute]) -> Json:
    """The document of some routes.

    Raises:
        KeyError: Nothing is told of one of them.
    """
    told = {**_TOLD, openapi: _Told({_JSON: {"type": "object"}}, (500,))}
    paths: Json = {}
    for route in routes:
        path = route.path.replace(":path}", "}")
        for method in sorted(route.methods or ()):
            paths.setdefault(path, {})[method.lower()] = _operation(route, path, told[route.endpoint])
    _, found = models_json_schema([(model, "validation") for model in _BODIES], ref_template=_REFERENCE)
    schemas: Json = found["$defs"] | dict(_ANSWERED)
    # What Zyphra's example proxy takes is taken here too.
    schemas["ChatBody"]["properties"] |= {name: _ANY for name in FIELDS_OF_PROXY}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mrsa-server",
            "version": __version__,
            "description": "Markovian RSA behind the OpenAI API. Strings, lists and numbers beyond these bounds are a "
            "400, as is every field that is not here.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(route: APIRoute, path: str, told: _Told) -> Json:
    rule = rule_of(route.endpoint)
    keyed = rule is not None and not rule.public
    errors = {*told.errors, *((401, 403) if keyed else ())}
    given: Json = {str(status): _error(status) for status in sorted(errors)}
    if told.answers:
        # Of streams nothing is told: what a schema of one means, tools do not agree on.
        content = {kind: {} if schema is None else {"schema": schema} for kind, schema in told.answers.items()}
        given = {"200": {"description": "Done.", "content": content}, **given}
    if told.empty is not None:
        given[str(told.empty)] = {"description": "There is nothing more."}
    operation: Json = {
        "operationId": route.endpoint.__name__,
        "summary": (inspect.getdoc(route.endpoint) or "").partition("\n")[0],
        "parameters": list(_parameters(path, told)),
        "responses": given,
        # Where the server has no keys none is needed.
        "security": [{"key": []}] if keyed else [],
    }
    if rule is not None and rule.scope is not None:
        operation["x-scope"] = str(rule.scope)
    if told.body is not None:
        kind = "multipart/form-data" if told.form else _JSON
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": told.body}}}
    return operation


def _parameters(path: str, told: _Told) -> Iterable[Json]:
    for name in re.findall(r"\{(\w+)\}", path):
        yield {"name": name, "in": "path", "required": True, "schema": _PLACES.get(name, _NAME)}
    for name, schema in (told.query or {}).items():
        yield {"name": name, "in": "query", "required": name in _NEEDED, "schema": schema}
    for name, schema in (told.headers or {}).items():
        yield {"name": name, "in": "header", "required": False, "schema": schema}


def _error(status: int) -> Json:
    return {"description": _ERRORS[status], "content": {_JSON: {"schema": _of("Error")}}}
