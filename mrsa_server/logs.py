"""Log lines: structlog and the standard library through one formatter. Prompts and answers are never in them."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger


def _without_colors(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    event.pop("color_message", None)  # uvicorn says everything twice
    return event


def _visible(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """A terminal does what it reads, and anybody may write a path; our own words and tracebacks stay as they are."""
    for name, value in event.items():
        if isinstance(value, str) and name not in ("event", "exception", "stack") and not value.isprintable():
            event[name] = ascii(value)[1:-1]
    return event


def configure(level: str, form: Literal["auto", "json", "text"], further: Sequence[Processor] = ()) -> None:
    """Set up logging for this process, to stderr; called once, by the command line.

    Args:
        level: Least severity.
        form: Of the lines; `auto` is text in a terminal.
        further: What each line is to go through beside the usual.
    """
    colors = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        *further,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    last: list[Processor] = (
        # Not rich's tracebacks: they print every local variable, prompts among them, and take a second to do so.
        [_visible, structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]
        if text
        else [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _without_colors, *last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
    for name in ("httpx", "httpcore", "alembic"):  # a line for each call or plugin says nothing that ours do not
        logging.getLogger(name).setLevel(logging.WARNING)
