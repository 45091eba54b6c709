"""Keeps the engine: starts it in the background, knows whether it is up, and waits for it where it is not."""

from __future__ import annotations

import asyncio
from enum import StrEnum
from math import inf

import structlog

from harness.engine import EngineDead
from mrsa_server.api.errors import EngineUnavailable
from mrsa_server.engines import CannotServe
from mrsa_server.engines.build import ServedEngine, memory_tokens

_POLL_S = 0.25
_TELL_S = 60.0
_SLOWEST_POLL_S = 2.0

log = structlog.get_logger("mrsa.engine")


class Health(StrEnum):
    """What the engine is doing."""

    STARTING = "starting"
    UP = "up"
    LOST = "lost"  # it was up; asked again and again until it answers
    FAILED = "failed"  # it cannot start; another try would end the same


class EngineHost:
    """One engine and its health. `run` is its life; whoever calls it owns it.

    Args:
        engine: Not yet started.
        sleeps: Whether it is scaled to zero at rest, and comes back when something waits for it.
    """

    def __init__(self, engine: ServedEngine, *, sleeps: bool = False) -> None:
        self.engine = engine
        self._sleeps = sleeps
        self.health = Health.STARTING
        self.reason = "it is starting"
        self.memory_tokens: int | None = None  # of the engine, once it is up and where it can tell
        self._up = asyncio.Event()
        self._lost = asyncio.Event()

    async def run(self) -> None:
        """Start the engine and watch over it until cancelled, then close it; returns early where it cannot start."""
        try:
            await self._start()
            while self.health is not Health.FAILED:
                self._lost.clear()
                await self._lost.wait()
                await self._recover()
        finally:
            self._up.clear()
            await self.engine.aclose()

    async def _start(self) -> None:
        pause, told = _POLL_S, -inf
        clock = asyncio.get_running_loop().time
        while True:
            try:
                await self.engine.start()
            except EngineDead as error:  # not there yet: a remote engine may still be loading, or sleep all night
                self.reason = str(error)
                if clock() - told >= _TELL_S:
                    told = clock()
                    log.warning("engine not there yet", reason=self.reason)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _SLOWEST_POLL_S)
            except Exception as error:
                plain = isinstance(error, CannotServe)
                self.health = Health.FAILED
                self.reason = str(error) if plain else f"{type(error).__name__}: {error}"
                self._up.set()  # nobody waits for what never comes
                # Something that is not installed needs no trace of where it was missed.
                traced = not (plain or isinstance(error, ImportError))
                log.error("engine cannot start", reason=self.reason, exc_info=traced)
                return
            else:
                self._rise()
                return

    async def _recover(self) -> None:
        """Wait for an engine that lives elsewhere; one that lived in this process is loaded anew."""
        pause = _POLL_S
        while not await self._answers():
            if self.engine.in_process:
                await self.engine.aclose()
                await self._start()
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _SLOWEST_POLL_S)
        self._rise()

    async def _answers(self) -> bool:
        try:
            return await self.engine.healthy()
        except Exception as error:
            self.reason = f"{type(error).__name__}: {error}"
            return False

    def _rise(self) -> None:
        self.health, self.reason = Health.UP, ""
        self.memory_tokens = memory_tokens(self.engine)
        self._up.set()
        log.info("engine up", model=self.engine.model, memory_tokens=self.memory_tokens)

    def lost(self, reason: str) -> None:
        """Say that a generation met a dead engine."""
        if self.health is Health.UP:
            log.warning("engine lost", reason=reason)
            self.health, self.reason = Health.LOST, reason
            self._up.clear()
            self._lost.set()

    @property
    def up(self) -> bool:
        """Whether it is up, as far as anyone has noticed."""
        return self.health is Health.UP

    async def wait_up(self, timeout_s: float | None) -> None:
        """Return when the engine is up; without a time, however long that takes.

        Raises:
            EngineUnavailable: It is not up after `timeout_s`, or never will be.
        """
        if self.up:
            return
        if self.health is Health.FAILED:  # nobody waits for what never comes
            raise EngineUnavailable(self.reason)
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            raise EngineUnavailable(self.reason) from None
        if not self.up:
            raise EngineUnavailable(self.reason)

    async def check(self) -> bool:
        """Whether requests may come: the engine is up, asking it, or only asleep. None would come to wake it else."""
        if self.up and not await self._answers():
            self.lost("it does not answer")
        return self.up or (self._sleeps and self.health is not Health.FAILED)
