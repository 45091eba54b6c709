"""`mrsa db upgrade` and `mrsa db current`: the tables that runs are stored in, and whether they are up to date.

A SQLite file is upgraded by the server itself. Before a new version of a fleet starts, its Postgres is upgraded once.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from pydantic import ValidationError

from mrsa_server import migrations
from mrsa_server.runs.database import Database
from mrsa_server.runs.store_errors import StoreError, StoreUnavailable
from mrsa_server.settings import Settings

_FAILED = 3
_BEHIND = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do, and the one setting of it that is no secret."""
    parser.epilog = "The database is that of MRSA_DATABASE_URL, or the SQLite file in --state-dir or the usual folder."
    parser.add_argument(
        "action",
        choices=("upgrade", "current"),
        help="`upgrade` makes the tables or brings them up to date; `current` says at which schema they are, and exits "
        f"with {_BEHIND} if that is not this version's",
    )
    parser.add_argument(
        "--state-dir", metavar="DIR", default=argparse.SUPPRESS, help="as of `mrsa serve` [MRSA_STATE_DIR]"
    )


def run(arguments: argparse.Namespace) -> int:
    """Do it; the exit status."""
    try:
        flags = {"state_dir": arguments.state_dir} if "state_dir" in arguments else {}
        url = Settings(**flags).store_url
        if url is None:
            return _fail("which database? Set MRSA_DATABASE_URL, or give --state-dir")
        database = Database(url.get_secret_value())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        return _fail(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    except (ValueError, StoreError) as error:
        return _fail(str(error))
    try:
        return asyncio.run(_act(database, arguments.action))
    except StoreUnavailable as error:  # it names the place
        return _fail(str(error))
    except StoreError as error:
        return _fail(f"{database.name}: {error}")


def _fail(reason: str) -> int:
    print(f"mrsa db: {reason}", file=sys.stderr)
    return _FAILED


async def _act(database: Database, action: str) -> int:
    try:
        if action == "upgrade":
            await database.upgrade()
        current = await database.current()
    finally:
        await database.aclose()
    head = migrations.HEAD
    print(f"{database.name}: {current or 'no tables'}" + ("" if current == head else f", this version needs {head}"))
    return 0 if current == head else _BEHIND
