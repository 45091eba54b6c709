"""How long the store is waited for: without end for what was begun, and for seconds by who has begun nothing yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from mrsa_server.runs.store_errors import StoreUnavailable
from mrsa_server.runs.transactions import Transacting

# A client waits for no more than an answer then, and tries again by itself; a database that is restarted, or fails over
# to its replica, often takes less.
NEW_S = 5.0
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
T = TypeVar("T")


@asynccontextmanager
async def promptly(store: Transacting) -> AsyncIterator[Callable[[], bool]]:
    """Give a store `NEW_S` for all that is asked of it in the block, on behalf of a request that begins something.

    A store that takes what others write is not away: among many who come at once each waits for his turn.

    Yields:
        Tells whether the request still waits: a transaction goes on to its end by itself, and is not to begin then
        what nobody knows of.

    Raises:
        StoreUnavailable: It did not answer in that time.
    """
    clock, later = asyncio.get_running_loop().time, asyncio.get_running_loop().call_later
    begun, waits = clock(), True
    timer: asyncio.TimerHandle

    def look() -> None:
        nonlocal timer
        left = max(begun, store.transactions.written_at) + NEW_S - clock()
        if left > 0:
            timer = later(left, look)
        else:
            until.reschedule(clock())

    timer = later(NEW_S, look)
    try:
        async with asyncio.timeout(None) as until:
            yield lambda: waits
    except TimeoutError:
        if not until.expired():
            raise
        raise StoreUnavailable(f"no answer within {NEW_S:g} s") from None
    finally:
        waits = False
        timer.cancel()


async def patiently(write: Callable[[], Awaitable[T]]) -> T:
    """Repeat a write until the store takes it. That the store is away is told by the store (`Outage`)."""
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return await write()
        except StoreUnavailable:
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
