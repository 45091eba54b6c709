"""How often streams are read where many are open: a server that sends every token by itself would cost a read each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import aiohttp


class Pace:
    """Reads of some streams, all together, bounded: what comes meanwhile waits in the sockets' buffers.

    All streams that rest are woken by one timer, so that one turn of the loop reads many. A stream that brings
    something half as often never rests, nor does its first read wait.

    Args:
        reads_per_s: Of all streams together; few streams rest for no time that anybody sees.
        longest_s: Longest rest, however many there are. What is there when a stream is closed is lost.
    """

    def __init__(self, reads_per_s: float, longest_s: float) -> None:
        self._reads_per_s = reads_per_s
        self._longest_s = longest_s
        self._streams = 0
        self._resting: list[asyncio.Transport] = []

    async def read(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """The body as it comes, everything that is there at once.

        Raises:
            aiohttp.ClientError, OSError: The connection broke, or was silent for too long.
        """
        clock = asyncio.get_running_loop().time
        content, before = response.content, 0.0
        self._streams += 1
        try:
            while data := await content.readany():
                now = clock()
                if now - before < 2 * self.wait_s:  # one that has rested comes a little later than that
                    self._rest(response.connection)
                before = now
                yield data
        finally:
            self._streams -= 1

    @property
    def wait_s(self) -> float:
        """The shortest time between two reads of a stream."""
        return min(self._streams / self._reads_per_s, self._longest_s)

    def _rest(self, connection: aiohttp.connector.Connection | None) -> None:
        transport = None if connection is None else connection.transport
        if transport is None:  # the body has ended
            return
        transport.pause_reading()
        if not self._resting:
            asyncio.get_running_loop().call_later(self.wait_s, self._wake)
        self._resting.append(transport)

    def _wake(self) -> None:
        resting, self._resting = self._resting, []
        for transport in resting:
            if not transport.is_closing():
                transport.resume_reading()
