"""Server-sent events: a response that writes frames and watches its client at the same time.

It relies on no framework for that: whoever leaves is noticed within a tick of the loop, in streams and out of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import orjson
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mrsa_server.api.errors import ApiError, to_response

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"

log = structlog.get_logger("mrsa.http")


class ClientGone(Exception):
    """The client has left: nobody reads what would follow."""


def frame(data: object) -> bytes:
    """A frame of the chat stream: `data` alone, since clients stumble over `event:` and `id:` there."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def named_frame(name: str, data: object) -> bytes:
    """A frame of the streams whose clients go by `event:`."""
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"


def error_frame(error: ApiError) -> bytes:
    """How a chat stream ends in an error."""
    return frame(error.body())


@asynccontextmanager
async def until_gone(receive: Receive) -> AsyncIterator[None]:
    """Cancel the block when the client disconnects. The request's body must have been read.

    Raises:
        ClientGone: Out of the block.
    """
    try:
        async with asyncio.timeout(None) as scope:
            watcher = asyncio.create_task(_watch(receive, scope))
            try:
                yield
            finally:
                watcher.cancel()
    except TimeoutError:
        if scope.expired():
            raise ClientGone from None
        raise


async def _watch(receive: Receive, scope: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.reschedule(asyncio.get_running_loop().time())


class EventStream(Response):
    """Frames as they come.

    An error before the first frame is an ordinary response with its own status, one after it the stream's last frame.

    Args:
        frames: Makes the frames; closing the generator ends whatever they come from.
        last: The end of a stream that breaks.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: Callable[[], AsyncGenerator[bytes, None]], last: Callable[[ApiError], bytes]) -> None:
        # `x-accel-buffering`: nginx would hold the frames back.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames
        self._last = last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end, an error, or the client's leave."""
        try:
            async with until_gone(receive), aclosing(self._frames()) as frames:
                try:
                    first = await anext(frames, b"")  # none, where what was to be read went meanwhile
                except ApiError as error:
                    await to_response(error)(scope, receive, send)
                    return
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": first, "more_body": True})
                last = b""
                try:
                    async for part in frames:
                        await send({"type": "http.response.body", "body": part, "more_body": True})
                except ApiError as error:
                    last = self._last(error)
                except Exception:
                    log.exception("stream broke")
                    last = self._last(ApiError(500, "internal_error", "The server failed."))
                await send({"type": "http.response.body", "body": last, "more_body": False})
        except ClientGone:
            pass
