"""Imports for a server, without what libraries load for terminals."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_rich() -> Iterator[None]:
    """Let what is imported in the block think that rich is not installed, unless it is in use already.

    structlog and httpx load it where they find it: 3 MB for tracebacks and a command line that a server never shows.
    """
    if "rich" in sys.modules:
        yield
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # Python's own way to say that there is none
    try:
        yield
    finally:
        del sys.modules["rich"]
