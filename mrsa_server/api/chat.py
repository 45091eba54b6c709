"""`POST /v1/chat/completions`, streamed and not."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from mrsa_server.api.answering import answer
from mrsa_server.api.asking import Route
from mrsa_server.api.auth import needs
from mrsa_server.api.chunks import ChatChunks
from mrsa_server.api.completion import Reply, completion
from mrsa_server.api.wire import COMPLETION, parse_chat
from mrsa_server.keyring import Scope
from mrsa_server.settings import Settings

router = APIRouter()


@router.post("/v1/chat/completions")
@needs(Scope.INFERENCE)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation; `mrsa` in the body, or the model's name, says with how much work."""
    return await answer(request, ROUTE)


def _read(raw: bytes, settings: Settings, name: str, created: int) -> Reply:
    return Reply(parse_chat(raw, settings), f"{COMPLETION}{name}", created)


ROUTE = Route("chat.completion", _read, ChatChunks, completion)
