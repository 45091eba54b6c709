"""`mrsa keys new`: a key for a client. Its line goes to the server, its secret to the client and nowhere else."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from mrsa_server.keyring import BadKeys, Limits, Scope, new_key, read_keys

_FAILED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the key is for."""
    parser.usage = "mrsa keys new ID [flags]"
    parser.epilog = (
        "Prints the line for --keys-file (or MRSA_KEYS) and, below it, the secret, which is shown once and stored "
        "nowhere. With --file the line is added to that file and the secret alone is printed. To exchange a secret, "
        "add a second key of the same id and take the first line away once nobody uses it."
    )
    parser.add_argument("action", choices=("new",), help="make a key")
    parser.add_argument("id", metavar="ID", help="its name in logs and metrics, and the owner of its runs")
    parser.add_argument(
        "--scopes",
        default=str(Scope.INFERENCE),
        help=f"what it may do, some of {', '.join(Scope)} with commas between them (default: {Scope.INFERENCE})",
    )
    parser.add_argument("--runs-per-minute", type=int, metavar="RUNS", help="runs that it may begin in a minute")
    parser.add_argument(
        "--tokens-per-minute",
        type=int,
        metavar="TOKENS",
        help="tokens in a minute; a run that may need more is let in when a minute's worth is there, and paid off",
    )
    parser.add_argument("--concurrent-runs", type=int, metavar="RUNS", help="runs that it may have at once")
    parser.add_argument("--file", type=Path, help="add the line to this file, for the owner alone where it is new")


def run(arguments: argparse.Namespace) -> int:
    """Make it; the exit status."""
    limits = Limits(arguments.runs_per_minute, arguments.tokens_per_minute, arguments.concurrent_runs)
    try:
        key, secret = new_key(arguments.id, map(Scope, arguments.scopes.split(",")), limits)
        read_keys(key.line)
        if arguments.file is None:
            print(key.line)
        else:
            _add(arguments.file, key.line)
    except (BadKeys, ValueError, OSError) as error:
        print(f"mrsa keys: {str(error).removeprefix('line 1: ')}", file=sys.stderr)
        return _FAILED
    print(secret)
    return 0


def _add(path: Path, line: str) -> None:
    """Add a line to a file of keys, which is good before and after.

    Raises:
        BadKeys: It is not.
        OSError: It cannot be written.
    """
    before = path.read_text() if path.exists() else ""
    text = f"{before}\n" if before and not before.endswith("\n") else before
    read_keys(f"{text}{line}\n")
    # In one step, since a server may read it at any moment.
    made = path.with_name(f".{path.name}.{os.getpid()}")
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    try:
        with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(f"{text}{line}\n")
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
