"""`mrsa runs`: the runs that a server has stored, listed, shown, followed, cancelled and exported.

What was asked for goes to standard output and everything else to standard error, so that it can be piped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mrsa_server.client import base_url, connect, lines, message_of, visible

_TRIES = 30  # to come back to a stream that was cut
_PAUSE_S = 1.0
_WIDE = 200  # characters of a line that no terminal shows
_ROOMY = 110  # characters of a terminal that shows all of a list
_LEAST_ANSWER = 12  # of all answers of a round, in a terminal however narrow
_ANSWER = 72  # characters of one in a table
_MOST_MARKS = 32  # in one line of a narrow terminal
_MARKS = {"finished": "●", "lost": "✗", "skipped": "=", "running": "◐", "waiting": "○"}


class Refused(Exception):
    """The server cannot do it; the message is for a person."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `mrsa runs`."""
    parser.description = (
        "The runs that a server has stored: in a file of its own, or where --state-dir or MRSA_DATABASE_URL said."
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = _action(actions, "list", "the newest runs", _list)
    listing.add_argument("--status", help="only these, such as queued,running or finished")
    listing.add_argument("--model", help="only of this model")
    listing.add_argument("--batch", metavar="BATCH", help="only those of this batch")
    listing.add_argument("--limit", type=_count, default=20, metavar="N", help="most runs (default: 20)")
    for name, summary, act in (
        ("show", "one run: rounds, rollouts, answers, usage", _show),
        ("watch", "follow a run's events until it ends, over cut connections", _watch),
        ("cancel", "end a run, wherever it is", _cancel),
        ("export", "a run's log as JSON lines", _export),
    ):
        below = _action(actions, name, summary, act)
        below.add_argument("run_id", metavar="RUN", help="its id, or that of its response or completion")
        if name == "export":
            below.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (default: standard output)")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def _action(
    actions: Any, name: str, summary: str, act: Callable[[httpx.Client, argparse.Namespace], int]
) -> argparse.ArgumentParser:
    below: argparse.ArgumentParser = actions.add_parser(name, help=summary, description=summary.capitalize() + ".")
    below.add_argument(
        "--url",
        default=os.environ.get("MRSA_URL"),
        help="the server (default: http://127.0.0.1:8000) [MRSA_URL]; its key goes into MRSA_API_KEY",
    )
    if name in ("list", "show"):
        below.add_argument("--json", action="store_true", help="print what the server says")
    below.set_defaults(act=act)
    return below


def run(arguments: argparse.Namespace) -> int:
    """Do it; 0 where it was done, 1 where the server refuses or the run has no answer, 130 when interrupted."""
    url = base_url(arguments.url)
    try:
        with connect(url, httpx.Timeout(30, read=60)) as client:
            status: int = arguments.act(client, arguments)
            return status
    except Refused as refusal:
        reason = str(refusal)
    except httpx.HTTPError as error:
        reason = f"no server answers at {url}: {error}"
    except BrokenPipeError:
        raise  # `cli` knows what to do
    except OSError as error:
        reason = str(error)
    except KeyboardInterrupt:
        return 130
    print(f"mrsa runs: {reason}", file=sys.stderr)
    return 1


def _get(client: httpx.Client, path: str, **query: object) -> httpx.Response:
    response = client.get(path, params={name: str(value) for name, value in query.items() if value is not None})
    if response.status_code != 200:
        raise Refused(message_of(response))
    return response


def _list(client: httpx.Client, arguments: argparse.Namespace) -> int:
    found: list[dict[str, Any]] = []
    after: str | None = None
    while len(found) < arguments.limit:
        limit = min(100, arguments.limit - len(found))
        query = {"status": arguments.status, "model": arguments.model, "batch": arguments.batch}
        page = _get(client, "/v1/runs", **query, limit=limit, after=after).json()
        found += page["data"]
        if not page["has_more"]:
            break
        after = page["last_id"]
    if arguments.json:
        sys.stdout.buffer.write(orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n")
        return 0
    console = _console()
    # The id is whole, since it is what the other actions want; so is all that stands beside it.
    names = ("id", "status", *(("model", "effort") if console.width >= _ROOMY else ()))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("run", *names[1:], "created"):
        table.add_column(name, no_wrap=True)
    table.add_column("seconds", justify="right")
    for one in found:
        created = datetime.fromtimestamp(one["created_at"]).strftime("%Y-%m-%d %H:%M:%S")
        told = [Text(visible(str(one[name] or ""))) for name in names]
        table.add_row(*told, created, f"{one['seconds']:,.1f}")
    console.print(table if found else "No runs.")
    return 0


def _console() -> Console:
    """Standard output: a terminal with its width, or a pipe, for which no line is broken or cut short."""
    return Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _WIDE)


def _show(client: httpx.Client, arguments: argparse.Namespace) -> int:
    one = _get(client, f"/v1/runs/{arguments.run_id}").json()
    if arguments.json:
        sys.stdout.buffer.write(orjson.dumps(one, option=orjson.OPT_INDENT_2) + b"\n")
        return 0
    console = _console()
    console.print(Text(f"{one['id']}: {one['status']}, {one['model']}, {one['seconds']:,.1f} s", style="bold"))
    if one["error"] is not None:
        console.print(Text(visible(one["error"]["message"]), style="red"))
    if "rounds" in one:
        console.print(_rounds(one["rounds"], console.width))
        usage = one["usage"]
        console.print(
            f"{usage['completion_tokens']:,} tokens generated and {usage['prompt_tokens']:,} read"
            + (f", up to {one['lost_tokens']:,} lost with their engine or server" if one["lost_tokens"] else "")
        )
    for answer in one.get("answers", ())[:1]:
        console.print()
        console.print(Text(visible(answer["content"])))
    return 0


def _rounds(rounds: Sequence[dict[str, Any]], width: int) -> Table:
    """A line for each round, within a terminal's width: answers are cut short before marks are."""
    marks = ["".join(_MARKS[rollout["status"]] for rollout in row["rollouts"]) for row in rounds]
    tokens = [f"{row['usage']['completion_tokens']:,}" for row in rounds]
    widths = [len("round"), min(_MOST_MARKS, max(map(len, [*marks, "rollouts"]))), max(map(len, [*tokens, "tokens"]))]
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name, most in zip(("round", "rollouts", "tokens"), widths, strict=True):
        table.add_column(name, width=most, overflow="fold", justify="right" if name == "tokens" else "left")
    left = width - sum(widths) - 4 * (len(widths) + 1)
    table.add_column("answers", no_wrap=True, overflow="ellipsis", max_width=max(_LEAST_ANSWER, left))
    for row, marked, told in zip(rounds, marks, tokens, strict=True):
        answers = dict.fromkeys(rollout["answer"] for rollout in row["rollouts"] if rollout.get("answer"))
        short = Text(visible(" | ".join(" ".join(answer.split())[:_ANSWER] for answer in list(answers)[:3])))
        table.add_row(str(row["round"]), marked, told, short)
    return table


def _watch(client: httpx.Client, arguments: argparse.Namespace) -> int:
    last = ""
    for event in _events(client, arguments.run_id):
        last = event["kind"]
        print(visible(_line(event)), flush=True)
    if last != "run_finished":
        one = _get(client, f"/v1/runs/{arguments.run_id}").json()
        if one["error"] is not None:
            print(f"mrsa runs: {visible(one['error']['message'])}", file=sys.stderr)
        return 0 if one["status"] in ("finished", "stopped") else 1
    return 0


def _events(client: httpx.Client, run_id: str) -> Iterator[dict[str, Any]]:
    """Every event once, in order, however often the connection is cut."""
    after, tries = 0, 0
    while True:
        try:
            with client.stream("GET", f"/v1/runs/{run_id}/events", params={"after": after}) as response:
                if response.status_code == 204:
                    return
                if response.status_code not in (200, 503):
                    response.read()
                    raise Refused(message_of(response))
                for line in lines(response):
                    if line.startswith(b"data: ") and "number" in (event := orjson.loads(line[6:])):
                        after, tries = event["number"], 0
                        yield event
        except httpx.TransportError:
            if not after and not tries:
                raise
        tries += 1
        if tries > _TRIES:
            raise Refused("the server does not come back")
        if tries > 1:  # a stream that ends is asked once more, for a 204
            time.sleep(_PAUSE_S)


def _line(event: dict[str, Any]) -> str:
    at, kind, fields = datetime.fromtimestamp(event["at"]).strftime("%H:%M:%S"), event["kind"], event["event"]
    said = kind.replace("_", " ")
    rollout = fields.get("rollout")
    if rollout is not None:
        slot, usage = rollout["slot"], rollout["usage"]
        answer = " ".join(rollout["answer"].split())[:_ANSWER]
        said += f": round {slot['round']}, rollout {slot['index']}, {usage['completion_tokens']:,} tokens, "
        said += rollout["finish"] + (f": {answer}" if answer else "")
    elif "slot" in fields:
        said += f": round {fields['slot']['round']}, rollout {fields['slot']['index']}"
        said += f": {fields['error']}" if "error" in fields else ""
    elif "slots" in fields:
        said += f": {len(fields['slots'])} rollouts"
    elif "reason" in fields:
        said += f": {fields['reason']}"
    return f"{at} {said}"


def _cancel(client: httpx.Client, arguments: argparse.Namespace) -> int:
    response = client.delete(f"/v1/runs/{arguments.run_id}")
    if response.status_code != 200:
        raise Refused(message_of(response))
    one = response.json()
    if one["cancel_requested"]:
        print(f"{one['id']} is being ended")
    else:
        print(f"{one['id']} had ended before: {one['status']}")
    return 0


def _export(client: httpx.Client, arguments: argparse.Namespace) -> int:
    log = _get(client, f"/v1/runs/{arguments.run_id}/export").content
    if arguments.output is None:
        sys.stdout.buffer.write(log)
    else:
        arguments.output.write_bytes(log)
    return 0
