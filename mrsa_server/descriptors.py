"""File descriptors: how many this process may open, and who may have them."""

from __future__ import annotations

import resource
from typing import NamedTuple

import structlog

# For what is neither a client's connection nor a generation: the event loop, logs, the judge's pipes, names.
_RESERVE = 64
# Connections to a remote engine for what is no generation: it is asked for ids, for texts, and whether it is well.
SHORT_CALLS = 256
_BACKLOG = 2048  # as uvicorn's
# Where there is no limit.
_MANY = 1 << 20

log = structlog.get_logger("mrsa.server")


class Places(NamedTuple):
    """How many may be open at once.

    Attributes:
        connections: Of clients that are served.
        calls: Generations in the engine.
        backlog: Of clients that wait to be accepted, and are accepted all at one time: each costs a descriptor until
            it has been told that there is no place.
    """

    connections: int
    calls: int
    backlog: int


def raise_limit() -> int:
    """Raise the soft limit to the hard one, and say what is in force: 1,024 is what shells give by custom."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError) as error:  # the kernel's own limit may lie below an infinite one
            log.warning("file descriptors cannot be raised", limit=soft, hard=hard, reason=str(error))
    limit = current_limit()
    log.info("file descriptors", limit=limit, before=soft)
    return limit


def current_limit() -> int:
    """Descriptors that this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MANY if soft == resource.RLIM_INFINITY else soft


def share_out(limit: int, calls: int, *, remote: bool) -> Places:
    """How many places there are, so that neither side takes the last descriptor.

    Args:
        limit: All descriptors.
        calls: Generations that are wanted at once.
        remote: Whether each of them takes a connection of its own, and its prompt another for a moment.
    """
    backlog = min(_BACKLOG, limit // 8)
    free = max(4, limit - _RESERVE - 2 * backlog)  # one lot is being told while the next one comes
    if not remote:
        return Places(free, calls, backlog)
    calls = min(calls, free // 2)
    return Places(free - calls - min(SHORT_CALLS, calls // 4), calls, backlog)
