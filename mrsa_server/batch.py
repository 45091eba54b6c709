"""`mrsa batch`: a file of problems in, a file of results out, through the batches of a running server.

The batch is the server's: this command may be stopped, cut off or killed at any point, and the same command goes on
from there. What it needs for that stands beside the output, in `OUTPUT.batch`, until the output is written.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mrsa_server.api.batches_wire import BatchBody
from mrsa_server.api.errors import BadRequest
from mrsa_server.api.wire import ChatBody, MrsaIn, read
from mrsa_server.client import base_url, connect, message_of
from mrsa_server.problems import CHAT, BadProblems, Problems, Wanted, write_batch
from mrsa_server.settings import Effort

_POLL_S = 1.0
_GIVE_UP_S = 900.0  # without a word from the server; the batch goes on there
_LONGEST_PAUSE_S = 10.0
_KEEP_S = 30 * 86_400  # that the server keeps the results
_AGAIN = frozenset({408, 429, 502, 503, 504})  # what a server says that is about to come back
# How a field of the API is written here.
_FLAGS = {
    "mrsa": "--mrsa",
    "max_completion_tokens": "--max-tokens",
    "temperature": "--temperature",
    "completion_window": "--window",
}
_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
_MOST_ERRORS = 10  # that are told
_REASON = 300  # characters of one
_FEW = 8  # lines, or fields, that are named
_NOBODY: dict[str, object] = {"code": "no_result", "message": "The batch ended without a word about this line."}


class Failed(Exception):
    """There are no results; the message is for a person."""


class Reason(NamedTuple):
    """Why a line has no answer: an error's code and message."""

    code: str
    message: str


class Results(NamedTuple):
    """What was written: how many lines, and where in the problems those stand that have no answer."""

    lines: int
    failures: Mapping[Reason, Sequence[int]]

    @property
    def failed(self) -> int:
        """How many lines have no answer."""
        return sum(map(len, self.failures.values()))

    def told(self) -> Iterator[str]:
        """Why lines have no answer, the most frequent reasons first."""
        found = sorted(self.failures.items(), key=lambda one: -len(one[1]))
        for reason, places in found[:_MOST_ERRORS]:
            lines = f"line {places[0]}" if len(places) == 1 else f"{len(places):,} lines ({_few(places)})"
            yield f"{lines}: {reason.code}: {reason.message}"
        if more := found[_MOST_ERRORS:]:
            yield f"and {sum(len(places) for _, places in more):,} lines for {len(more):,} other reasons"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `mrsa batch`."""
    parser.description = (
        "Send a file of problems to a running server as one batch, follow it, and write the results in the same order. "
        'A line is {"problem": "..."} (or prompt, question, input) or {"messages": [...]}, each with an id if it has '
        "one and with fields of a chat such as mrsa, model or temperature, which go before the flags; or a line of a "
        "batch as OpenAI has it. The batch goes on at the server when this command is stopped; the same command comes "
        "back to it."
    )
    parser.epilog = "Exit status: 0 if every line has an answer, 1 if not, 130 when interrupted."
    parser.add_argument("problems", type=Path, help="the problems, JSON lines")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the results go")
    parser.add_argument(
        "--url",
        default=os.environ.get("MRSA_URL"),
        help="the server (default: http://127.0.0.1:8000) [MRSA_URL]; its key goes into MRSA_API_KEY",
    )
    parser.add_argument("--model", help="model to ask (default: the server's first that runs the method)")
    parser.add_argument("--effort", choices=[effort.value for effort in Effort], help="preset of the method")
    parser.add_argument(
        "--mrsa",
        type=_pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the method, such as population=8; may be given again for others",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, help="how freely tokens are drawn (default: the server's)")
    parser.add_argument(
        "--window", default="24h", metavar="TIME", help="give up what has not ended after it, such as 24h or 7d"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    parser.add_argument(
        "--cancel", action="store_true", help="end the batch that goes on; without the flag, its results are fetched"
    )


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, orjson.loads(value)
    except orjson.JSONDecodeError:
        return name, value


def _check_flags(given: argparse.Namespace) -> None:
    """Refuse what the server would, in its words, before anything is sent.

    Raises:
        Failed: Names the flag.
    """
    asked: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "?"}], "mrsa": dict(given.mrsa)}
    asked |= {"max_completion_tokens": given.max_tokens, "temperature": given.temperature}
    batch = {"input_file_id": "f", "endpoint": CHAT, "completion_window": given.window}
    try:
        read(ChatBody, asked)
        read(BatchBody, batch)
    except BadRequest as error:
        path = (error.param or "").split(".")
        flag = _FLAGS[path[0]]
        if error.code == "unknown_parameter":
            raise Failed(f"{flag} {path[-1]}: is none of {', '.join(MrsaIn.model_fields)}") from None
        raise Failed(" ".join((flag, *path[1:])) + error.message.removeprefix(error.param or "")) from None


def run(arguments: argparse.Namespace) -> int:
    """Do it; 0 if every line has an answer, 1 if not, 130 when interrupted."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    url = base_url(arguments.url)
    try:
        with connect(url, httpx.Timeout(30, read=120, write=120)) as client:
            command = _Command(client, arguments, console)
            return command.cancel() if arguments.cancel else command.run()
    except (Failed, BadProblems) as failure:
        reason = str(failure)
    except httpx.HTTPError as error:
        reason = f"no server answers at {url}: {error}"
    except OSError as error:
        reason = str(error)
    except KeyboardInterrupt:
        if _note_path(arguments.output).exists():
            console.print(
                "\nStopped. What was begun goes on at the server: the same command comes back to it, and with --cancel "
                "it ends.",
                markup=False,
            )
        return 130
    print(f"mrsa batch: {reason}", file=sys.stderr)
    return 1


@dataclass(frozen=True, slots=True)
class _Note:
    """What the next command needs in order to go on.

    Attributes:
        digest: Of all that is sent: a command with other problems or flags begins another batch.
        key: Of idempotency: a batch that was asked for is not begun twice.
        file_id: Of the problems at the server, once they are there.
        batch_id: Once it has begun.
    """

    digest: str
    key: str
    file_id: str | None = None
    batch_id: str | None = None


def _note_path(output: Path) -> Path:
    return output.with_name(output.name + ".batch")


def _read_note(path: Path) -> _Note | None:
    try:
        return _Note(**orjson.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (orjson.JSONDecodeError, TypeError):
        raise Failed(f"{path} is none of this command's: remove it, or choose another output") from None


class _Command:
    def __init__(self, client: httpx.Client, arguments: argparse.Namespace, console: Console) -> None:
        self._client = client
        self._arguments = arguments
        self._console = console
        self._output: Path = arguments.output
        self._note_path = _note_path(arguments.output)
        self._note = _Note("", "")
        self._heard = False  # from the server
        self._waiting = False  # for it to come back

    def run(self) -> int:
        """From wherever it stands to the results."""
        if self._output.exists() and self._arguments.problems.exists():
            if self._output.samefile(self._arguments.problems):
                raise Failed(f"{self._output} holds the problems: results go into a file of their own")
        if self._output.exists() and not self._arguments.force:
            raise Failed(f"{self._output} is there already: --force overwrites it")
        if not self._output.parent.is_dir():
            raise Failed(f"{self._output.parent} is no folder")
        _check_flags(self._arguments)
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mrsa-batch-") as folder:
            upload = Path(folder) / "batch.jsonl"
            problems = self._prepare(upload)
            if problems.unused:
                self._console.print(
                    f"Not sent, for they are no part of a request: {_few(problems.unused)}.", markup=False
                )
            batch = self._follow(self._begin(upload, problems), len(problems.ids))
            if batch["status"] == "failed":
                self._note_path.unlink()
                raise Failed(_refusal(batch))
            found = [self._download(batch[name], Path(folder) / name) for name in ("output_file_id", "error_file_id")]
            results = _write(self._output, problems.ids, found)
        self._note_path.unlink()
        for line in results.told():
            self._console.print(line, markup=False)
        self._console.print(_summary(batch, results, self._output, time.monotonic() - began), markup=False)
        return 1 if results.failed else 0

    def cancel(self) -> int:
        """End the batch that goes on."""
        note = _read_note(self._note_path)
        if note is None or note.batch_id is None:
            raise Failed(f"nothing goes on for {self._output}: there is no {self._note_path}")
        batch = _good(self._client.post(f"/v1/batches/{note.batch_id}/cancel")).json()
        self._console.print(
            f"{note.batch_id} is {batch['status']}: the same command without --cancel writes what it has."
        )
        return 0

    def _prepare(self, upload: Path) -> Problems:
        """Write what is to be sent."""
        given = self._arguments
        mrsa = dict(given.mrsa) | ({"effort": given.effort} if given.effort else {})
        wanted = Wanted(given.model or self._first_model(), mrsa, given.max_tokens, given.temperature)
        with upload.open("wb") as file:
            return write_batch(given.problems, wanted, file)

    def _first_model(self) -> str:
        models = [str(model["id"]) for model in self._ask(lambda: self._client.get("/v1/models")).json()["data"]]
        name = next((model for model in models if model.endswith("-mrsa")), None)
        if name is None:
            raise Failed(f"the server has no model that runs the method, only {', '.join(models) or 'none'}")
        return name

    def _begin(self, upload: Path, problems: Problems) -> str:
        """The batch of these problems, which may have begun long ago."""
        with upload.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        note = _read_note(self._note_path)
        if note is None:
            note = self._noted(_Note(digest, uuid.uuid4().hex))
        elif note.digest != digest:
            raise Failed(
                f"{self._note_path} tells of a batch with other problems or flags: give the same again to go on with "
                "it, or remove the file, or choose another output"
            )
        elif note.batch_id is not None:
            self._console.print(f"Going on with {note.batch_id}.")
            self._note = note
            return note.batch_id
        if note.file_id is None:
            note = self._noted(replace(note, file_id=self._upload(upload)))
        body = {
            "input_file_id": note.file_id,
            "endpoint": problems.endpoint,
            "completion_window": self._arguments.window,
            "output_expires_after": {"anchor": "created_at", "seconds": _KEEP_S},
            "metadata": {"source": self._arguments.problems.name[:512]},
        }
        headers = {"idempotency-key": note.key}
        batch = self._ask(lambda: self._client.post("/v1/batches", json=body, headers=headers)).json()
        self._noted(replace(note, batch_id=batch["id"]))
        self._console.print(f"{batch['id']}: {len(problems.ids):,} lines.")
        return str(batch["id"])

    def _upload(self, path: Path) -> str:
        def post() -> httpx.Response:
            with path.open("rb") as file:
                return self._client.post("/v1/files", files={"file": ("batch.jsonl", file)}, data={"purpose": "batch"})

        return str(self._ask(post).json()["id"])

    def _noted(self, note: _Note) -> _Note:
        _replace(self._note_path, lambda file: file.write(orjson.dumps(asdict(note))))
        self._note = note
        return note

    def _follow(self, batch_id: str, lines: int) -> dict[str, Any]:
        """Show how far a batch is until it has ended."""
        board = _Board(self._console, lines)
        with board:
            while True:
                batch: dict[str, Any] = self._ask(
                    lambda: self._client.get(f"/v1/batches/{batch_id}"), board.away
                ).json()
                board.show(batch)
                if batch["status"] in _ENDED:
                    return batch
                time.sleep(_POLL_S)

    def _download(self, file_id: str | None, path: Path) -> Path | None:
        if file_id is None:
            return None

        def get() -> httpx.Response:
            with self._client.stream("GET", f"/v1/files/{file_id}/content") as response, path.open("wb") as file:
                if response.status_code != 200:
                    response.read()
                    return response
                for part in response.iter_bytes():
                    file.write(part)
            return response

        self._ask(get)
        return path

    def _ask(
        self, ask: Callable[[], httpx.Response], away: Callable[[str], None] = lambda reason: None
    ) -> httpx.Response:
        """Ask until the server answers; one that has never done so is asked once.

        Raises:
            Failed: It refuses, or does not come back.
            httpx.TransportError: Nobody is there.
        """
        until, pause = time.monotonic() + _GIVE_UP_S, _POLL_S
        while True:
            try:
                response = ask()
            except httpx.TransportError as error:
                if not self._heard:
                    raise
                reason = str(error) or type(error).__name__
            else:
                self._heard = True
                if self._waiting and response.status_code not in _AGAIN:
                    self._waiting = False
                    self._console.print("The server is back.")
                if response.status_code == 404 and self._note.batch_id is not None:
                    raise Failed(f"{message_of(response)} To begin anew, remove {self._note_path}.")
                if response.status_code not in _AGAIN:
                    return _good(response)
                reason = message_of(response)
            if time.monotonic() > until:
                raise Failed(f"the server does not come back ({reason}): the same command goes on when it does")
            if not self._waiting:
                self._waiting = True
                self._console.print(f"Waiting for the server: {reason}", markup=False)
            away(reason)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _good(response: httpx.Response) -> httpx.Response:
    if response.status_code != 200:
        raise Failed(message_of(response))
    return response


class _Board:
    """How far a batch is: a bar in a terminal, and elsewhere a line at each tenth."""

    def __init__(self, console: Console, lines: int) -> None:
        self._console = console
        self._lines = lines
        self._told = -1
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("waiting", total=lines, detail="")

    def __enter__(self) -> _Board:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, batch: dict[str, Any]) -> None:
        counts, status = batch["request_counts"], batch["status"].replace("_", " ")
        done, failed = counts["completed"] + counts["failed"], counts["failed"]
        running = batch.get("mrsa", {}).get("running", 0)
        detail = ", ".join([f"{failed:,} failed"] * bool(failed) + [f"{running:,} running"] * bool(running))
        self._progress.update(self._task, completed=done, description=status, detail=detail)
        tenth = 10 * done // max(1, self._lines)
        if not self._console.is_terminal and tenth > self._told and done:
            self._told = tenth
            self._console.print(f"{done:,} of {self._lines:,} lines have ended, {failed:,} without an answer.")

    def away(self, reason: str) -> None:
        self._progress.update(self._task, description="waiting for the server", detail=reason[:60])


def _write(output: Path, ids: Mapping[str, int], found: Sequence[Path | None]) -> Results:
    """Write a line for each problem, in their order, all or nothing."""
    failures: dict[Reason, list[int]] = {}

    def write(file: Any) -> None:
        with contextlib.ExitStack() as stack:
            heads = [_Head(stack.enter_context(path.open("rb"))) for path in found if path is not None]
            for custom_id, place in ids.items():
                head = next((one for one in heads if one.custom_id == custom_id), None)
                if head is None:
                    nothing = {"id": None, "custom_id": custom_id, "response": None, "error": _NOBODY}
                    file.write(orjson.dumps(nothing, option=orjson.OPT_APPEND_NEWLINE))
                    failures.setdefault(_reason(_NOBODY), []).append(place)
                    continue
                file.write(head.data)
                if head.reason is not None:
                    failures.setdefault(head.reason, []).append(place)
                head.next()

    _replace(output, write)
    return Results(len(ids), failures)


def _reason(error: Mapping[str, object]) -> Reason:
    return Reason(str(error.get("code") or "error"), " ".join(str(error.get("message", "")).split())[:_REASON])


def _few(things: Sequence[object]) -> str:
    return ", ".join(map(str, things[:_FEW])) + (", ..." if len(things) > _FEW else "")


class _Head:
    """The first line of results that is not written yet; the files have the order of the problems."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self.next()

    def next(self) -> None:
        self.data = next(self._lines, b"")
        line = orjson.loads(self.data) if self.data else {}
        self.custom_id: str | None = line.get("custom_id")
        self.reason: Reason | None = None  # for having no answer
        if line and line["error"] is not None:
            self.reason = _reason(line["error"])
        elif line and line["response"]["status_code"] != 200:
            self.reason = _reason(line["response"]["body"]["error"])


def _replace(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file as a whole: another process sees the old one, or none, until it is there."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # as any file that is made, and not the writer's secret
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _refusal(batch: dict[str, Any]) -> str:
    errors = (batch["errors"] or {"data": []})["data"]
    told = [f"line {error['line']}: {error['message']}" if error["line"] else error["message"] for error in errors]
    more = [f"and {len(told) - _MOST_ERRORS} more"] if len(told) > _MOST_ERRORS else []
    return "the server refuses the batch:\n" + "\n".join(told[:_MOST_ERRORS] + more)


def _summary(batch: dict[str, Any], results: Results, output: Path, seconds: float) -> str:
    usage = batch["usage"] or {"output_tokens": 0, "input_tokens": 0}
    ended = "" if batch["status"] == "completed" else f" The batch was {batch['status']}."
    return (
        f"{results.lines:,} lines: {results.lines - results.failed:,} answered, {results.failed:,} without an answer; "
        f"{usage['output_tokens']:,} tokens generated and {usage['input_tokens']:,} read, {seconds:,.0f} s.{ended} "
        f"Results: {output}"
    )
