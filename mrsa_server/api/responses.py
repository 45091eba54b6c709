"""`POST /v1/responses`, streamed and not, after Open Responses (2026-04-24) and OpenAI's Responses API.

Responses are not stored: `store` is accepted, and the response says that it was not.
"""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from harness.engine import Engine
from harness.markovian_rsa import State
from harness.run import Watch
from mrsa_server.api.chat import Route, answer
from mrsa_server.api.completion import Reply, chosen, thinking_of
from mrsa_server.api.response_events import ResponseEvents
from mrsa_server.api.responses_wire import parse_response
from mrsa_server.runs.runner import Prepared, Run
from mrsa_server.settings import Settings

router = APIRouter()


@router.post("/v1/responses")
async def create_response(request: Request) -> Response:
    """Answer an input; `reasoning`, `mrsa` or the model's name says with how much work."""
    return await answer(request, _RESPONSES)


def _read(raw: bytes, settings: Settings, name: str) -> Reply:
    asking = parse_response(raw, settings)
    return Reply(asking.chat, f"resp_{name}", int(time.time()), form=asking.form)


async def _whole(run: Run, state: State, reply: Reply, engine: Engine) -> dict[str, object]:
    thinking = await thinking_of(run, chosen(state, 1)[0], engine)
    events = ResponseEvents(run, reply, late=True)
    for _ in (*events.take(Prepared(state, Watch.NONE)), *events.finish(state, thinking)):
        pass  # the frames are of no use here, the body is what they end in
    return events.body


_RESPONSES = Route("response", _read, ResponseEvents, _whole)
