"""Idempotency keys: a request that comes again reads the run that it started, in flight and for a while after its end.

What is kept of an ended run is the response alone. A run that was given up, or failed in a way that a retry may mend,
leaves its key free.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from mrsa_server.api.completion import Reply
from mrsa_server.api.errors import ApiError, BadRequest, KeyInUse, TakenOver
from mrsa_server.runs.runner import Run

_MAX_KEY = 255  # characters, as at Stripe, where the header comes from

log = structlog.get_logger("mrsa.http")


class Asked(NamedTuple):
    """A request that was let in: its run, and how it is answered."""

    run: Run
    reply: Reply


class Kept(NamedTuple):
    """The whole response of a run that has ended."""

    body: bytes
    streamed: bool


@dataclass(eq=False, slots=True)
class _Entry:
    digest: bytes
    run_id: str
    held: Asked | Kept | ApiError


class Keys:
    """The keys of one server; `aclose` forgets them.

    Args:
        keep_s: Seconds for which an ended run answers.
        most: Ended runs that are kept; beyond it the oldest goes.
    """

    def __init__(self, keep_s: float, most: int) -> None:
        self._keep_s = keep_s
        self._most = most
        self._entries: dict[str, _Entry] = {}
        self._ended: dict[str, asyncio.TimerHandle] = {}  # the oldest first
        self._tasks: set[asyncio.Task[None]] = set()

    def __contains__(self, key: str) -> bool:
        """Whether `find` would look at a body."""
        entry = self._entries.get(key)
        return entry is not None and not (isinstance(entry.held, Asked) and entry.held.run.cancelled)

    def find(self, key: str | None, body: bytes) -> Asked | Kept | None:
        """What the key stands for; None for nothing yet.

        Raises:
            KeyInUse: It stands for another body.
            ApiError: What its run ended with.
        """
        if key is None or key not in self:
            return None
        entry = self._entries[key]
        if entry.digest != digest_of(body):
            raise KeyInUse
        if isinstance(entry.held, ApiError):
            raise entry.held.copy()
        return entry.held

    def put(self, key: str, body: bytes, asked: Asked, render: Callable[[], Awaitable[bytes]]) -> None:
        """Let a key stand for a run.

        Args:
            key: One for which `find` knew nothing.
            body: Of the request.
            asked: What it started.
            render: Makes the response, once the run has ended with an answer.
        """
        self._forget(key)
        entry = self._entries[key] = _Entry(digest_of(body), asked.run.id, asked)
        task = asyncio.create_task(self._keep(key, entry, asked, render), name=f"key of run {asked.run.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def forget(self, run_id: str) -> None:
        """Let go of the key of a run that was deleted."""
        for key in [key for key, entry in self._entries.items() if entry.run_id == run_id]:
            self._forget(key)

    async def aclose(self) -> None:
        """Forget everything."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for key in list(self._entries):
            self._forget(key)

    async def _keep(self, key: str, entry: _Entry, asked: Asked, render: Callable[[], Awaitable[bytes]]) -> None:
        """Put the response in the run's place when it has ended; or let go of the key."""
        run = asked.run
        await run.ended()
        held: Kept | ApiError | None = None
        if run.error is not None:
            # The store knows what became of a run that another server has.
            held = run.error.copy() if run.error.final and not isinstance(run.error, TakenOver) else None
        elif not run.cancelled:
            try:
                held = Kept(await render(), bool(asked.reply.chat.body.stream))
            except Exception:
                log.exception("response broke", run_id=run.id)
        if self._entries.get(key) is not entry:
            return
        if held is None:
            self._forget(key)
            return
        entry.held = held
        self._ended[key] = asyncio.get_running_loop().call_later(self._keep_s, self._forget, key)
        while len(self._ended) > self._most:
            self._forget(next(iter(self._ended)))

    def _forget(self, key: str) -> None:
        self._entries.pop(key, None)
        timer = self._ended.pop(key, None)
        if timer is not None:
            timer.cancel()


def read_key(given: str | None) -> str | None:
    """The key of a request, if it has one.

    Raises:
        BadRequest: It is empty or too long.
    """
    if given is not None and not 1 <= len(given) <= _MAX_KEY:
        raise BadRequest(
            f"Idempotency-Key: must be 1 to {_MAX_KEY} characters, not {len(given)}", code="invalid_idempotency_key"
        )
    return given


def digest_of(body: bytes) -> bytes:
    """Tells whether a request with the same key is the same request."""
    return hashlib.sha256(body).digest()
