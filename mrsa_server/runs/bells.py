"""Wakes those who wait for a run to go on. A bell may ring for nothing: the table is the truth."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from mrsa_server.runs.store_errors import StoreError


class Progress(NamedTuple):
    """How far a run has come: the number of its last event, and whether it has ended."""

    last: int
    ended: bool


class Bells:
    """The bells of those who wait, in this process.

    What other processes write is seen by `look`, every `poll_s` and for all who wait at once, while anyone does.

    Args:
        look: How far each of these runs has come; one that is gone is left out.
    """

    def __init__(self, look: Callable[[Collection[str]], Awaitable[Mapping[str, Progress]]], poll_s: float) -> None:
        self.poll_s = poll_s
        self._look = look
        self._hung: dict[str, dict[asyncio.Future[None], int]] = {}
        self._poller: asyncio.Task[None] | None = None

    @contextmanager
    def hung(self, run_id: str, after: int) -> Iterator[asyncio.Future[None]]:
        """A bell that rings once the run may have gone beyond `after` or ended."""
        bell = asyncio.get_running_loop().create_future()
        self._hung.setdefault(run_id, {})[bell] = after
        if self._poller is None:
            self._poller = asyncio.create_task(self._poll(), name="store poll")
        try:
            yield bell
        finally:
            bells = self._hung[run_id]
            del bells[bell]
            if not bells:
                del self._hung[run_id]

    def ring(self, run_id: str) -> None:
        """Wake those who wait for a run."""
        for bell in self._hung.get(run_id, ()):
            if not bell.done():
                bell.set_result(None)

    def ring_all(self) -> None:
        """Wake everyone."""
        for run_id in self._hung:
            self.ring(run_id)

    async def aclose(self) -> None:
        """Look no further, and wake everyone."""
        self.ring_all()
        poller, self._poller = self._poller, None
        if poller is not None:
            poller.cancel()
            await asyncio.wait((poller,))

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self.poll_s)
            if not self._hung:
                self._poller = None
                return
            try:
                found = await self._look(tuple(self._hung))
            except StoreError:  # each of them will meet it, and tell its reader
                self.ring_all()
                continue
            for run_id, bells in self._hung.items():
                progress = found.get(run_id)
                if progress is None or progress.ended or progress.last > min(bells.values()):
                    self.ring(run_id)
