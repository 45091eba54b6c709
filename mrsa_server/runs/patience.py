"""How long the store is waited for: without end for what was begun, and for seconds by who has begun nothing yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from mrsa_server.runs.store_errors import StoreUnavailable

# A client waits for no more than an answer then, and tries again by itself; a database that is restarted, or fails over
# to its replica, often takes less.
NEW_S = 5.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
T = TypeVar("T")


@asynccontextmanager
async def promptly() -> AsyncIterator[Callable[[], bool]]:
    """Give the store `NEW_S` for all that is asked of it in the block, on behalf of a request that begins something.

    Yields:
        Tells whether the request still waits: a transaction goes on to its end by itself, and is not to begin then
        what nobody knows of.

    Raises:
        StoreUnavailable: It did not answer in that time.
    """
    waits = True
    try:
        async with asyncio.timeout(NEW_S) as until:
            yield lambda: waits
    except TimeoutError:
        if not until.expired():
            raise
        raise StoreUnavailable(f"no answer within {NEW_S:g} s") from None
    finally:
        waits = False


async def patiently(write: Callable[[], Awaitable[T]]) -> T:
    """Repeat a write until the store takes it. That the store is away is told by the store (`Outage`)."""
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return await write()
        except StoreUnavailable:
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
