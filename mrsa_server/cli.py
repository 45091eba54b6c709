"""The command `mrsa`. A subcommand is a line in `_COMMANDS` and a module that adds its flags and runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import NamedTuple

from mrsa_server import __version__
from mrsa_server.lean import without_rich


class _Command(NamedTuple):
    """A subcommand; its module has `add_arguments(parser)` and `run(arguments) -> exit status`."""

    name: str
    summary: str
    module: str


_COMMANDS = (
    _Command("serve", "serve the OpenAI API over an engine", "mrsa_server.serve"),
    _Command("ask", "ask a question, watch the rounds, get the answer", "mrsa_server.ask"),
    _Command("batch", "answer a file of problems, over restarts and cut connections", "mrsa_server.batch"),
    _Command("plan", "forecast wall times, tokens and cost of a load on a fleet", "mrsa_server.plan"),
    _Command("runs", "list, show, follow, cancel and export stored runs", "mrsa_server.history"),
    _Command("export", "write stored runs as training data for trl", "mrsa_server.export"),
    _Command("doctor", "say what this machine can serve, what is missing and what mends it", "mrsa_server.doctor"),
    _Command("model", "check a ZAYA1 on disk, without a GPU", "mrsa_server.model"),
    _Command("keys", "make a key for a client", "mrsa_server.keys"),
    _Command("db", "make or upgrade the tables that runs are stored in", "mrsa_server.db"),
)


_PIPE = 141  # the status of what SIGPIPE ends, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="mrsa",
        description="Markovian RSA, the test-time-compute method of ZAYA1-8B, behind the OpenAI API.",
        epilog="`mrsa COMMAND --help` says more.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asked = next((word for word in words if not word.startswith("-")), None)
    for command in _COMMANDS:
        below = commands.add_parser(
            command.name, help=command.summary, description=command.summary[0].upper() + command.summary[1:] + "."
        )
        if command.name == asked:  # the others' modules stay unread: some are slow to import
            with without_rich() if command.name == "serve" else nullcontext():
                module = import_module(command.module)
            module.add_arguments(below)
            below.set_defaults(run=module.run)
    commands.add_parser("version", help="print the version").set_defaults(run=_version)
    arguments = parser.parse_args(words)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough of it, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the end
        return _PIPE
    return status


def _version(_: argparse.Namespace) -> int:
    print(__version__)
    return 0
