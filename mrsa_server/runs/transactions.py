"""Transactions go on to their end, whoever waits for them, and are counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

from mrsa_server.runs.outage import Outage
from mrsa_server.runs.store_errors import StoreUnavailable

Operation = Literal["write", "read", "renew", "claim", "prune", "other"]
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Observer(Protocol):
    """Is told what a store does."""

    def store_call(self, operation: Operation, seconds: float) -> None:
        """A call has ended, well or not; the wait for a connection is in it."""
        ...

    def takeovers(self, runs: int) -> None:
        """Runs of a lost owner were taken."""
        ...

    def fenced(self, writes: int) -> None:
        """Writes were refused, since others have their runs."""
        ...


class Transactions:
    """Those that are under way; none is begun any more once it is `closed`. An observer is told of each.

    The log is told here, and nowhere else, that the database is away and that it is back.

    Attributes:
        closed: Whether none is begun any more.
        written_at: When one that writes last got through, on the loop's clock.
    """

    def __init__(self) -> None:
        self.closed = False
        self.observer: Observer | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self.written_at = float("-inf")
        self._outage = Outage("store", "mrsa.store")

    async def run(self, operation: Operation, transaction: Coroutine[Any, Any, _T]) -> _T:
        """Begin one and wait for it.

        Raises:
            StoreUnavailable: The store was closed.
        """
        if self.closed:
            transaction.close()
            raise StoreUnavailable("it was closed")
        began = time.perf_counter()

        def ended(task: asyncio.Task[_T]) -> None:
            self._running.discard(task)
            if not task.cancelled():
                away = task.exception()
                if isinstance(away, StoreUnavailable):
                    self._outage.missed(str(away))
                else:
                    self._outage.met()
                    if operation == "write":  # others write where there is something to write
                        self.written_at = asyncio.get_running_loop().time()
            if self.observer is not None:
                self.observer.store_call(operation, time.perf_counter() - began)

        task = asyncio.create_task(transaction)
        self._running.add(task)
        task.add_done_callback(ended)
        return await asyncio.shield(task)

    async def settle(self) -> None:
        """Return when none is under way."""
        if self._running:
            await asyncio.wait(self._running)


class Transacting(Protocol):
    """What has methods that are transactions."""

    transactions: Transactions


_S = TypeVar("_S", bound=Transacting)
_Method = Callable[Concatenate[_S, _P], Coroutine[Any, Any, _T]]


def whole(operation: Operation) -> Callable[[_Method[_S, _P, _T]], _Method[_S, _P, _T]]:
    """Let a transaction go on to its end when the one who waits for it is cancelled.

    A driver that is cancelled may give up its connection as it is: with SQLite, in the middle of a transaction, whose
    lock kept every writer out until the garbage was collected.

    Args:
        operation: What its seconds are counted for.
    """

    def decorate(method: _Method[_S, _P, _T]) -> _Method[_S, _P, _T]:
        @wraps(method)
        async def run(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
            return await self.transactions.run(operation, method(self, *args, **kwargs))

        return run

    return decorate
