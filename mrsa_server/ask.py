"""`mrsa ask`: one question to a running server, or to the embedded engine started for it; rounds live in the terminal.

The answer goes to standard output and everything else to standard error, so that it can be piped.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mrsa_server.client import base_url, connect, lines, message_of, visible
from mrsa_server.settings import Effort

_START_S = 600.0  # a first start converts the model
_CACHE = "MRSA_CACHE_DIR"
_NUMBERS = (
    "population",
    "rounds",
    "set_size",
    "rollout_tokens",
    "tail_tokens",
    "final_tokens",
    "final_candidates",
    "budget_tokens",
    "seed",
    "quorum",
    "start_small",
)


class AskFailed(Exception):
    """The question got no answer; the message is for a person."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `mrsa ask`."""
    parser.description = (
        "Ask one question, watch the rounds, get the answer and what it cost. Without a server at --url, the embedded "
        "engine is started for this question (a small model on this CPU; `mrsa serve` keeps one up)."
    )
    parser.add_argument("question", help="the question; - reads it from standard input")
    parser.add_argument(
        "--url",
        default=os.environ.get("MRSA_URL"),
        help="a running server (default: http://127.0.0.1:8000, or else start one) [MRSA_URL]; its key goes into "
        "MRSA_API_KEY",
    )
    parser.add_argument("--start", action="store_true", help="start the embedded engine even where a server runs")
    parser.add_argument("--model", help="model to ask (default: the server's first that runs the method)")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--effort", choices=[effort.value for effort in Effort], help="preset of the parameters below")
    method = parser.add_argument_group("method (each overrides the preset)")
    for name in _NUMBERS:
        method.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    method.add_argument("--deadline-s", type=_finite, metavar="SECONDS", help="end with the best answer so far")
    method.add_argument(
        "--stop-when-agreed",
        type=_agreement,
        metavar="SHARE[,VOTES]",
        help="end the run once so many answers of a round agree, such as 0.75,3",
    )
    method.add_argument("--skip-agreed-sets", action="store_true", default=None, help="never read answers that agree")
    method.add_argument("--temperature", type=_finite, help="how freely tokens are drawn (default: the server's)")
    parser.add_argument("--quiet", action="store_true", help="print the answer alone")


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
    if not math.isfinite(value):  # JSON has no other numbers
        raise argparse.ArgumentTypeError(f"must be a finite number, not {text!r}")
    return value


def _agreement(text: str) -> dict[str, float]:
    share, _, votes = text.partition(",")
    try:
        return {"share": _finite(share)} | ({"min_votes": int(votes)} if votes else {})
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a share, or a share and votes such as 0.75,3") from None


def run(arguments: argparse.Namespace) -> int:
    """Ask; 0 after an answer, 1 without, 130 when interrupted."""
    question = sys.stdin.read() if arguments.question == "-" else arguments.question
    console = Console(stderr=True, quiet=arguments.quiet)
    try:
        with _server(arguments, console) as (url, started):
            effort = arguments.effort or (Effort.LOW.value if started else None)
            _ask(url, question, effort, arguments, console)
            if started:
                console.print(
                    "The embedded model has 135 million parameters: it shows that the machine runs, no more.",
                    soft_wrap=True,
                )
    except AskFailed as failure:
        Console(stderr=True).print(Text(f"mrsa ask: {failure}", style="red"), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped; the server has dropped the run.")
        return 130
    return 0


@contextlib.contextmanager
def _server(arguments: argparse.Namespace, console: Console) -> Iterator[tuple[str, bool]]:
    """The server to ask, and whether it was started for this question."""
    url = base_url(arguments.url)
    if not arguments.start:
        if _lives(url):
            yield url, False
            return
        if arguments.url is not None:
            raise AskFailed(f"no server answers at {url}")
        console.print(f"No server at {url}.")
    console.print("Starting the embedded engine for this question (`mrsa serve` keeps one up).")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mrsa_server", "serve", "--engine", "embedded", "--port", str(port)]
    command += ["--state-dir", "none"]  # nobody comes back to this server, and it is to go on with no other's runs
    # What the environment says of servers is about another one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MRSA_") or name == _CACHE}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", process, console)
        process.stdout.close()
        yield f"http://127.0.0.1:{port}", True
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _lives(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/live", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], console: Console) -> None:
    assert process.stdout is not None
    log = b""
    give_up = time.monotonic() + _START_S
    with console.status("The model loads (under a minute; the first time it is unpacked too).") as status:
        while time.monotonic() < give_up:
            log += process.stdout.read() or b""
            lines = log.decode("utf-8", "replace").strip().splitlines()
            if process.poll() is not None:
                raise AskFailed("the embedded engine did not start:\n" + "\n".join(lines[-15:]))
            if lines:
                status.update(f"The model loads: {escape(lines[-1][:100])}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health/ready", timeout=5).status_code == 200:
                    return
            time.sleep(0.3)
    raise AskFailed(f"the embedded engine was not ready within {_START_S:.0f} s")


def _ask(url: str, question: str, effort: str | None, arguments: argparse.Namespace, console: Console) -> None:
    mrsa: dict[str, object] = {
        name: getattr(arguments, name)
        for name in (*_NUMBERS, "deadline_s", "stop_when_agreed", "skip_agreed_sets")
        if getattr(arguments, name) is not None
    }
    if effort is not None:
        mrsa["effort"] = effort
    messages = [{"role": "user", "content": question}]
    if arguments.system:
        messages.insert(0, {"role": "system", "content": arguments.system})
    timeout = httpx.Timeout(30, read=60)  # keep-alives come more often
    with connect(url, timeout) as client:
        body = {
            "model": arguments.model or _first_model(client),
            "messages": messages,
            "mrsa": mrsa,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if arguments.temperature is not None:
            body["temperature"] = arguments.temperature
        board = Board()
        live = Live(console=console, get_renderable=board.render, refresh_per_second=8, transient=False)
        with live if console.is_terminal and not arguments.quiet else contextlib.nullcontext():
            for chunk in _chunks(client, body):
                line = board.take(chunk)
                if line is not None and not console.is_terminal:
                    console.print(visible(line), highlight=False, markup=False, soft_wrap=True)
            board.done = True
    print(visible(board.answer) if sys.stdout.isatty() else board.answer)
    console.print(board.cost(), highlight=False, soft_wrap=True)


def _first_model(client: httpx.Client) -> str:
    try:
        response = client.get("/v1/models")
        if response.status_code != 200:
            raise AskFailed(message_of(response))
        models = [str(model["id"]) for model in response.json()["data"]]
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise AskFailed(f"the server does not list its models: {error}") from error
    name = next((model for model in models if model.endswith("-mrsa")), None)
    if name is None:
        raise AskFailed(f"the server has no model that runs the method, only {', '.join(models) or 'none'}")
    return name


def _chunks(client: httpx.Client, body: dict[str, object]) -> Iterator[dict[str, Any]]:
    """The frames of a stream, errors raised."""
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise AskFailed(message_of(response))
            for line in lines(response):
                if line == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    chunk = orjson.loads(line[6:])
                    if "error" in chunk:
                        raise AskFailed(chunk["error"]["message"])
                    yield chunk
    except httpx.HTTPError as error:
        raise AskFailed(f"the connection was lost: {error}") from error
    raise AskFailed("the stream ended before the answer did")


@dataclass
class _Round:
    """What is known of a round: its rollouts that were started, a mark for each that ended."""

    rollouts: int = 0
    marks: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float | None = None


class Board:
    """The state of a run as its stream tells it, and its pictures."""

    def __init__(self) -> None:
        self.answer = ""
        self.done = False
        self._rounds: dict[int, _Round] = {}
        self._params: dict[str, Any] = {}
        self._report: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._start = time.monotonic()

    def take(self, chunk: dict[str, Any]) -> str | None:
        """Fold one chunk in; a line for those who have no terminal, where one is due."""
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices", ()):
            if choice["index"] == 0:
                self.answer += choice["delta"].get("content") or ""
                for call in choice["delta"].get("tool_calls") or ():
                    self.answer += f"{call['function']['name']}({call['function']['arguments']})\n"
        event: dict[str, Any] = chunk.get("mrsa") or {}
        match event.get("event"):
            case "run.started":
                self._params = event["params"]
                return self._headline()
            case "round.started":
                self._round(event).rollouts = event["rollouts"]
            case "rollout.finished":
                row = self._round(event)
                row.marks.append("●" if event["finish"] in ("stop", "thought") else "◐")
                row.tokens += event["tokens"]
                row.answers += [event["answer"]] if event.get("answer") else []
                answer = f": {event['answer']}" if event.get("answer") else ""
                return (
                    f"round {event['round']}, rollout {event['index']}: {event['tokens']:,} tokens, "
                    f"{event['seconds']:.1f} s, {event['finish']}{answer}"
                )
            case "rollout.failed":
                self._round(event).marks.append("✗")
                return f"round {event['round']}, rollout {event['index']} failed: {event['error']}"
            case "round.finished":
                self._round(event).seconds = event["seconds"]
            case "set.skipped":
                self._round(event).marks.append("=")
                return f"round {event['round']}, rollout {event['index']}: its set agrees, it is not generated"
            case "quorum.reached":
                return (
                    f"round {event['round']}: a quorum has ended, {event['stragglers']} others go on to a tail at most"
                )
            case "population.topped_up":
                return f"the first rollouts do not agree, {event['rollouts']} more start"
            case "answers.agreed":
                return f"round {event['round']}: {event['votes']} of {event['ended']} agree, the run ends"
            case "run.finished":
                self._report = event
        return None

    def _round(self, event: dict[str, Any]) -> _Round:
        return self._rounds.setdefault(event["round"], _Round())

    def _headline(self) -> str:
        known = self._params
        parts = [f"{name} {known[name]:,}" for name in _NUMBERS[:7] if isinstance(known.get(name), int)]
        return "Markovian RSA: " + ", ".join(parts).replace("_", " ")

    def render(self) -> Group:
        """The picture of a terminal: a row for each round, a mark for each rollout."""
        table = Table(box=None, padding=(0, 2), show_header=bool(self._rounds), header_style="dim")
        for name in ("round", "rollouts", "tokens", "seconds", "answers"):
            table.add_column(name, justify="right" if name in ("tokens", "seconds") else "left")
        for number, row in sorted(self._rounds.items()):
            open_marks = "○" * max(0, row.rollouts - len(row.marks))
            last = number == self._params.get("rounds")
            seen = dict.fromkeys(row.answers[-3:])
            table.add_row(
                f"{number}{' (final)' if last else ''}",
                Text("".join(row.marks)) + Text(open_marks, style="dim"),
                f"{row.tokens:,}",
                "" if row.seconds is None else f"{row.seconds:.1f}",
                escape(visible(", ".join(answer[:24] for answer in seen))),
            )
        parts: list[Any] = [Text(self._headline() if self._params else "Asking…", style="bold"), table]
        if not self.done:
            parts.append(Spinner("dots", f"{time.monotonic() - self._start:.0f} s"))
            if self.answer:
                parts.append(Text(visible(self.answer[-600:]), style="cyan"))
        return Group(*parts)

    def cost(self) -> str:
        """What the answer cost, in a line."""
        generated = self._usage.get("completion_tokens", 0)
        read = self._usage.get("prompt_tokens", 0)
        rollouts = sum(int(row["rollouts"]) for row in self._report.get("rounds", ()))
        saved = self._report.get("saved", {})
        line = (
            f"{generated:,} tokens generated and {read:,} read in {rollouts} rollout{'s' * (rollouts != 1)}, "
            f"{time.monotonic() - self._start:.1f} s"
        )
        if saved.get("rollouts"):
            line += f"; {saved['rollouts']} rollouts were never started, as nothing reads them"
        for option in ("stop_when_agreed", "start_small", "skip_agreed_sets"):
            if saved.get(option, {}).get("rollouts"):
                line += f"; {option} saved {saved[option]['rollouts']} rollouts"
        if saved.get("quorum", {}).get("cut"):
            line += f"; quorum cut {saved['quorum']['cut']} rollouts"
        if self._report.get("stopped") in ("deadline", "budget"):
            line += f"; stopped by its {self._report['stopped']}"
        if self._report.get("tails") == "approximate":
            line += "; tails are approximate: the engine gives no token ids"
        return line + "."
