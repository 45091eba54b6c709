"""Forgets what has been kept long enough, now and then, for as long as the server lives."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from mrsa_server.runs.store_errors import StoreUnavailable

if TYPE_CHECKING:  # a server without a store loads no database
    from mrsa_server.runs.store import RunStore

_SOONER = 10  # after the start, and after a try that failed

log = structlog.get_logger("mrsa.store")


@dataclass(frozen=True, slots=True)
class Keep:
    """For how many seconds after a run's end its parts are kept; None for ever."""

    runs_s: float | None
    traces_s: float | None
    keys_s: float | None


async def forget(store: RunStore, keep: Keep, every_s: float = 600.0) -> None:
    """Prune a store until cancelled; at random times, so that replicas do not all do it at once."""
    pause = every_s / _SOONER
    while True:
        await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        pause = every_s
        try:
            pruned = await store.prune(
                runs_older_than_s=keep.runs_s, traces_older_than_s=keep.traces_s, keys_older_than_s=keep.keys_s
            )
        except StoreUnavailable as error:
            pause = every_s / _SOONER
            log.warning("nothing is forgotten", reason=str(error))
        except Exception:  # one that breaks every time must not fill the log, nor end what else it does
            log.exception("nothing is forgotten")
        else:
            if any(pruned):
                log.info("forgotten", **pruned._asdict())
