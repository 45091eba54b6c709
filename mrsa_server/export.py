"""`mrsa export`: stored runs as training data for trl, one JSON line a row.

Rows go to standard output or to a file, and what was left out and why to standard error. A file is there when it is
whole, and not before.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson

from mrsa_server.client import base_url, connect, message_of

_SUMMARY = b'{"object":"export.summary"'  # how the last line begins, and no row
_READ_S = 600.0  # a server may pass over many runs before it finds a row
_RUNS = {
    "going_on": "still going on",
    "no_log": "that ended before the first token",
    "other_version": "written by another version",
    "other_prompts": "asked with other prompts than this server's",
    "no_round": "without a rollout in these rounds",
    "no_traces": "without traces, or without them any more",
    "no_answer": "without an answer that others can be compared with",
}
_ROLLOUTS = {
    "cut": "cut before their end (--only all takes them)",
    "other_answer": "with another answer than the run's",
    "no_trace": "without a trace",
    "other_words": "whose ids this server's engine reads as other words than were stored",
    "not_unicode": "with half a character in their text",
}


class Refused(Exception):
    """The server cannot do it, or did not to the end; the message is for a person."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `mrsa export`."""
    parser.description = (
        "Write the prompts that the server sent in its stored runs, as it sent them, in the chat JSONL of trl: for "
        "SFTTrainer with what the model wrote (sft), for GRPOTrainer and RLOOTrainer with the answer that the run "
        "chose, as a pseudo-label (rl, one row for each distinct prompt of a run). The newest runs come first."
    )
    parser.add_argument("--format", required=True, choices=("sft", "rl"), help="for which kind of training")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (default: standard output)")
    parser.add_argument(
        "--url",
        default=os.environ.get("MRSA_URL"),
        help="the server (default: http://127.0.0.1:8000) [MRSA_URL]; its key goes into MRSA_API_KEY",
    )
    which = parser.add_argument_group("which runs")
    which.add_argument(
        "--run",
        action="append",
        dest="named",
        metavar="RUN",
        help="only this run, by its id or by that of its response or completion; may be repeated",
    )
    which.add_argument("--status", help="only these (default: finished,stopped)")
    which.add_argument("--model", help="only of this model, as the requests name it")
    which.add_argument("--since", metavar="TIME", help="only from then on: Unix seconds, or a date such as 2026-07-01")
    which.add_argument("--until", metavar="TIME", help="only before then")
    rows = parser.add_argument_group("which rows")
    rows.add_argument(
        "--rounds",
        choices=("aggregation", "final", "all"),
        help="of which rounds (default: aggregation, all but the first)",
    )
    rows.add_argument(
        "--only",
        choices=("whole", "agreeing", "all"),
        help="sft: rollouts that the model ended itself (default), of these those with their run's answer, or all",
    )
    rows.add_argument(
        "--thinking",
        choices=("inline", "field", "none"),
        help="sft: in <think> marks in the content (default), in reasoning_content, or left out",
    )
    rows.add_argument("--limit", type=int, metavar="N", help="most rows")


def run(arguments: argparse.Namespace) -> int:
    """Do it; 0 where all was written, 1 where the server refuses or the stream was cut, 130 when interrupted."""
    url = base_url(arguments.url)
    try:
        with connect(url, httpx.Timeout(30, read=_READ_S)) as client:
            _tell(_export(client, arguments))
            return 0
    except Refused as refusal:
        reason = str(refusal)
    except httpx.ConnectError as error:
        reason = f"no server answers at {url}: {error}"
    except httpx.HTTPError as error:
        reason = f"the export was cut: {error}"
    except BrokenPipeError:
        raise  # `cli` knows what to do
    except OSError as error:
        reason = str(error)
    except KeyboardInterrupt:
        return 130
    print(f"mrsa export: {reason}", file=sys.stderr)
    return 1


def _export(client: httpx.Client, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the rows; what the server says of them."""
    query: dict[str, Any] = {"format": arguments.format, "summary": "true"}
    for name in ("run", "status", "model", "since", "until", "rounds", "only", "thinking", "limit"):
        value = getattr(arguments, "named" if name == "run" else name)  # `run` is the command itself
        if value is not None:
            query[name] = value
    with client.stream("GET", "/v1/export", params=query) as response:
        if response.status_code != 200:
            response.read()
            raise Refused(message_of(response))
        with _output(arguments.output) as write:
            last = b""
            for part in response.iter_bytes():  # not by lines: a text may hold what Python takes for the end of one
                last += part
                begin = last.rfind(b"\n", 0, -1) + 1
                if begin:
                    write(last[:begin])
                    last = last[begin:]
            if not (last.startswith(_SUMMARY) and last.endswith(b"\n")):
                raise Refused("the export was cut: its end is missing")
    summary: dict[str, Any] = orjson.loads(last)
    return summary


@contextmanager
def _output(path: Path | None) -> Iterator[Callable[[bytes], object]]:
    """Where rows are written to; a file takes its name when it is whole."""
    if path is None:
        yield sys.stdout.buffer.write
        sys.stdout.buffer.flush()
        return
    path = path.resolve()
    if path.exists() and not path.is_file():  # a pipe, or a terminal
        with path.open("wb") as file:
            yield file.write
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as file:
            yield file.write
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _tell(summary: dict[str, Any]) -> None:
    lines = [f"{_count(summary['rows'], 'row')} of {_count(summary['runs'], 'run')}"]
    for what, words in (("run", _RUNS), ("rollout", _ROLLOUTS)):
        for reason, count in summary[f"skipped_{what}s"].items():
            lines.append(f"left out: {_count(count, what)} {words.get(reason, reason)}")
    print("\n".join(lines), file=sys.stderr)


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")
