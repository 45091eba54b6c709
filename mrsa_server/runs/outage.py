"""Tells the log that something is away: once when it begins, now and then while it lasts, and once when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

_AGAIN_S = 60.0
# Before it is told to be over: while a file is locked or its disk is full it can be read all the same, and who writes
# may wait for ten seconds before he finds out.
_QUIET_S = 15.0


class Outage:
    """One thing that may be away, however many miss it at once and try again.

    Until somebody has got through, nothing is told: whoever tries first says himself that nothing is there.

    Args:
        what: Its name, with which the lines begin.
        logger: In whose name they are.
        clock: Seconds.
    """

    def __init__(self, what: str, logger: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._log = structlog.get_logger(logger)
        self._clock = clock
        self._known = False
        self._began: float | None = None
        self._told = 0.0
        self._back: float | None = None  # since when nobody has missed it

    def missed(self, reason: str) -> None:
        """Somebody met nothing there."""
        now, self._back = self._clock(), None
        if not self._known:
            return
        if self._began is None:
            self._began = self._told = now
            self._log.warning(f"{self._what} is away", reason=reason)
        elif now - self._told >= _AGAIN_S:
            self._told = now
            self._log.warning(f"{self._what} is still away", reason=reason, seconds=round(now - self._began, 1))

    def met(self) -> None:
        """Somebody got through."""
        self._known = True
        if self._began is None:
            return
        now = self._clock()
        if self._back is None:
            self._back = now
        if now - self._back >= _QUIET_S:
            self._log.warning(f"{self._what} is back", seconds=round(self._back - self._began, 1))
            self._began = self._back = None
