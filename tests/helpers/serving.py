"""The server in the test's own process: in memory, or behind uvicorn on a loopback port where connections matter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import orjson
import uvicorn
from fastapi import FastAPI

from harness.scripted import ScriptedEngine
from mrsa_server.app import create_app
from mrsa_server.engines.build import ServedEngine
from mrsa_server.serve import protocol
from mrsa_server.settings import Settings
from mrsa_server.tracing import Tracing

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
QUESTION = [{"role": "user", "content": "What is six times seven?"}]
SMALL = {"population": 4, "rounds": 1, "set_size": 2, "tail_tokens": 32, "seed": 7}


def ask(model: str = "scripted-mrsa", **fields: Any) -> dict[str, Any]:
    """A body."""
    return {"model": model, "messages": QUESTION, **fields}


def settings_of(settings: dict[str, Any]) -> Settings:
    """Those of a scripted engine without a store, unless they name one."""
    return Settings(**{"engine": "scripted", "state_dir": "none"} | settings)


def scripted_app(engine: ServedEngine | None, settings: dict[str, Any], tracing: Tracing | None = None) -> FastAPI:
    """The application over a scripted engine; without a store, unless the settings name one."""
    return create_app(settings_of(settings), engine or ScriptedEngine(), tracing)


@asynccontextmanager
async def in_memory(
    engine: ServedEngine | None = None, *, up: bool = True, tracing: Tracing | None = None, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """The application without a socket; a response comes when it is whole. With `up` the engine is waited for."""
    app = scripted_app(engine, settings, tracing)
    async with app.router.lifespan_context(app):
        if up:
            await app.state.runner.host.wait_up(5)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            client.app = app  # type: ignore[attr-defined]
            yield client


@asynccontextmanager
async def on_port(
    engine: ServedEngine | None = None, *, at: int = 0, **settings: Any
) -> AsyncIterator[tuple[str, FastAPI]]:
    """The server behind uvicorn, on a free port or `at` one; its URL and the application."""
    app = scripted_app(engine, settings)
    config = uvicorn.Config(
        app,
        port=at,
        http=protocol(settings_of(settings)),
        ws="none",
        lifespan="on",
        log_config=None,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.005)
        if task.done():
            task.result()
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", app
    finally:
        server.should_exit = True
        await task


def chunks(text: str) -> list[dict[str, Any]]:
    """The chunks of a whole stream, `[DONE]` left out."""
    return [orjson.loads(line) for line in frames(text) if line != "[DONE]"]


def frames(text: str) -> Iterator[str]:
    """The data of each frame; comments are left out, anything else is a mistake."""
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            assert block.startswith("data: "), block
            yield block.removeprefix("data: ")


def joined(found: list[dict[str, Any]], field: str = "content", index: int = 0) -> str:
    """The text of one field over all chunks of a choice."""
    return "".join(
        choice["delta"].get(field) or ""
        for chunk in found
        for choice in chunk.get("choices", ())
        if choice["index"] == index
    )


def events(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What stands under `mrsa`."""
    return [chunk["mrsa"] for chunk in found if "mrsa" in chunk]


def typed(text: str) -> list[dict[str, Any]]:
    """The events of a whole stream of `/v1/responses`, `[DONE]` left out; any other frame is a mistake."""
    found = []
    for block in text.split("\n\n"):
        if block and not block.startswith(":") and block != "data: [DONE]":
            name, data = block.split("\n")
            found.append(orjson.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}", block
    return found
