"""Whether the store answers, for those who ask often: probes of Kubernetes and Prometheus."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mrsa_server.runs.store_errors import StoreUnavailable

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.store import RunStore

_FRESH_S = 1.0


class Pulse:
    """Asks a store whether it answers: one question at a time, however many want to know, and not every time.

    Args:
        store: Which.
        wait_s: Seconds in which it has to answer.

    Attributes:
        reason: Why it is taken to be away; None where it answered when it was last asked.
    """

    def __init__(self, store: RunStore, wait_s: float = 2.0) -> None:
        self.reason: str | None = None
        self._store = store
        self._wait_s = wait_s
        self._asked_at = float("-inf")
        self._question: asyncio.Task[None] | None = None

    async def check(self) -> str | None:
        """The reason as it is now, within `wait_s`."""
        clock = asyncio.get_running_loop().time
        if self._question is None:
            if clock() - self._asked_at < _FRESH_S:
                return self.reason
            self._asked_at = clock()
            self._question = asyncio.create_task(self._ask(), name="store pulse")
        left = self._asked_at + self._wait_s - clock()
        if left > 0:
            await asyncio.wait((self._question,), timeout=left)
        if self._question is not None:
            self.reason = f"no answer within {self._wait_s:g} s"
        return self.reason

    async def _ask(self) -> None:
        try:
            await self._store.ping()
            self.reason = None
        except StoreUnavailable as error:
            self.reason = error.reason
        finally:
            self._question = None

    async def aclose(self) -> None:
        """Ask no more."""
        if self._question is not None:
            self._question.cancel()
            await asyncio.wait((self._question,))
