"""What a token costs the server, in CPU: `python -m tests.bench.tokens [--streams 64] [--tokens 3072]`.

The whole way counts: `mrsa serve` in a process of its own, asked over HTTP by clients in this one. What is measured is
the CPU time of the server's process alone, which the engine's process has no part in: in process (`--engine vllm` on
vLLM's CPU build, with a tiny model of random weights), and over HTTP (`--engine openai` before a fake upstream in a
third process, one that keeps to `stream_interval` and one that sends every token by itself).

    watched      one plain rollout a stream, shown as it is written: one connection each
    16 a stream  runs of 16 rollouts that are all shown (`mrsa.stream: rollouts`)
    unwatched    runs of 16 rollouts of which nobody sees more than the end
    vLLM alone   vLLM's own front end in a bare process: what is left where the server costs nothing
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil

from tests.bench.upstream import cpu_s, process, ready
from tests.helpers.ports import free_port
from tests.helpers.tiny_model import CONTEXT_TOKENS, write_tiny_model

POPULATION = 16
_ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "kv_cache_memory_bytes": 1 << 29,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 512,
    "block_size": 32,
}
# Of torch, so that what computes does not spin on the core of what is measured.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens":(\d+)')


class Case(NamedTuple):
    """How the server is asked, for `streams` rollouts at once."""

    name: str
    mrsa: dict[str, Any] | None
    rollouts: int  # a stream

    def body(self, model: str, tokens: int) -> dict[str, Any]:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Say whatever comes to mind."}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.mrsa is None:
            return body | {"max_completion_tokens": tokens}
        return body | {
            "model": f"{model}-mrsa",
            "mrsa": {**self.mrsa, "final_tokens": tokens, "rollout_tokens": tokens},
        }


_RUN = {"population": POPULATION, "rounds": 0, "final_candidates": POPULATION, "selection": "first"}
CASES = (
    Case("watched", None, 1),
    Case("16 a stream", {**_RUN, "stream": "rollouts"}, POPULATION),
    Case("unwatched", {**_RUN, "stream": "final"}, POPULATION),
)


class Figures(NamedTuple):
    """Of one case: tokens, seconds of the wall, seconds of the server's CPU, reads of the clients."""

    tokens: int
    wall_s: float
    cpu_s: float
    reads: int

    def line(self, name: str) -> str:
        cost_us = 1e6 * self.cpu_s / self.tokens
        return (
            f"{name:<34} {self.tokens / self.wall_s:9,.0f} {cost_us:10.2f} {1e6 / cost_us:11,.0f} "
            f"{self.cpu_s / self.wall_s:8.0%} {self.reads / self.wall_s:9,.0f}"
        )


HEAD = f"{'':<34} {'tok/s':>9} {'CPU us/tok':>10} {'a core, t/s':>11} {'of core':>8} {'reads/s':>9}"


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[int, int]:
    """Read a stream to its end; its tokens, and how many reads it took."""
    reads, last = 0, b""
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        async for data in answer.content.iter_any():
            reads += 1
            last = (last + data)[-4096:]
        if answer.status != 200 or not last.endswith(b"data: [DONE]\n\n"):
            raise RuntimeError(f"HTTP {answer.status}: {last[-500:].decode()}")
    return int(_COMPLETION_TOKENS.findall(last)[-1]), reads


async def measure(
    session: aiohttp.ClientSession, url: str, server: psutil.Process, model: str, case: Case, streams: int, tokens: int
) -> Figures:
    """Ask for `streams` rollouts at once and wait for all of them."""
    before, start = cpu_s(server), time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        asked = [
            tasks.create_task(ask(session, url, case.body(model, tokens))) for _ in range(streams // case.rollouts)
        ]
    wall, cpu = time.perf_counter() - start, cpu_s(server) - before
    answers = [one.result() for one in asked]
    return Figures(sum(count for count, _ in answers), wall, cpu, sum(reads for _, reads in answers))


async def table(
    title: str,
    url: str,
    server: psutil.Process,
    model: str,
    options: argparse.Namespace,
    cases: tuple[Case, ...] = CASES,
) -> None:
    """A row for each case."""
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await ready(session, f"{url}/health/ready", 120)
        for case in cases:  # what is imported and cached at first use is no cost of a token
            await measure(session, url, server, model, case, case.rollouts, 64)
        for case in cases:
            found = await measure(session, url, server, model, case, options.streams, options.tokens)
            print(found.line(f"{title}, {case.name}"), flush=True)


@contextmanager
def serving(*flags: str) -> Iterator[tuple[psutil.Process, str]]:
    """`mrsa serve`, not ready yet, and its URL."""
    port = free_port()
    words = ("-c", "from mrsa_server.cli import main; main()", "serve", "--log-level", "error", "--port", str(port))
    with process(*words, *flags) as server:
        yield server, f"http://127.0.0.1:{port}"


def in_process(folder: Path, options: argparse.Namespace) -> None:
    """The engine behind `--engine vllm`, after vLLM's front end without a server."""
    for name, watched in (("watched", 1), ("unwatched", 0)):
        words = ["-m", "tests.bench.tokens", "--alone", str(folder), "--streams", str(options.streams)]
        words += ["--tokens", str(options.tokens), "--watched", str(watched)]
        said = subprocess.run([sys.executable, *words], check=True, capture_output=True, text=True).stdout
        print(Figures(*json.loads(said.splitlines()[-1])).line(f"vLLM alone, {name}"), flush=True)
    flags = ["--engine", "vllm", "--model", str(folder), "--served-model", "tiny", "--engine-args", json.dumps(_ENGINE)]
    with serving(*flags) as (server, url):
        asyncio.run(table("in process", url, server, "tiny", options))


async def alone(options: argparse.Namespace) -> None:
    """Print the figures of vLLM's front end: the requests that the engine would send, their outputs dropped."""
    from harness.types import Message, RolloutRequest, Slot
    from mrsa_server.engines.vllm import VllmEngine

    engine = VllmEngine(options.alone, max_model_len=CONTEXT_TOKENS, extra=_ENGINE)
    await engine.start()
    llm, messages = engine._running(), (Message("user", ("Say whatever comes to mind.",)),)

    async def one(index: int, tokens: int) -> int:
        request = RolloutRequest("bench", Slot(0, index), messages, tokens, watched=bool(options.watched))
        prompt = await engine._prompts.render(messages)
        reads = 0
        outputs = llm.generate(
            {"type": "token", "prompt_token_ids": list(prompt)},
            engine._vllm.sampling_params(request),
            f"{index}-{tokens}",
        )
        async for _ in outputs:
            reads += 1
        return reads

    await one(-1, 64)
    cpu, start = time.process_time(), time.perf_counter()
    reads = await asyncio.gather(*(one(index, options.tokens) for index in range(options.streams)))
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(json.dumps(Figures(options.streams * options.tokens, wall, cpu, sum(reads))), flush=True)
    await engine.aclose()


def over_http(options: argparse.Namespace) -> None:
    """The engine behind `--engine openai`, in token ids and as a plain chat."""
    for name, flags in (
        ("stream_interval", ("--level", "1", "--interval")),
        ("event a token", ("--level", "1")),
        ("plain chat", ("--level", "3")),
    ):
        port = free_port()
        upstream = f"http://127.0.0.1:{port}"
        tokens = options.tokens if name == "plain chat" else options.tokens // 4 + 2
        fake = ["-m", "tests.helpers.fake_upstream", "--port", str(port), "--tokens", str(tokens), "--varied"]
        fake += ["--piece", "1" if "1" in flags else "4", "--writes", "0", *flags]
        fake += ["--delay", str(options.streams * options.tokens / options.rate)]
        with process(*fake), serving("--engine", "openai", "--engine-url", upstream) as (server, url):
            asyncio.run(table(name, url, server, "fake", options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64, help="rollouts at once, a multiple of 16")
    parser.add_argument("--tokens", type=int, default=3072, help="tokens of a rollout")
    parser.add_argument("--rate", type=float, default=20_000, help="tokens a second that the fake upstream sends")
    parser.add_argument("--only", choices=("process", "http"), help="one half of the table")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--watched", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.update(_ENVIRONMENT)
    if options.alone:
        asyncio.run(alone(options))
        return
    print(HEAD)
    if options.only != "http":
        if importlib.util.find_spec("vllm") is None:
            print("in process: vLLM is not installed here")
        else:
            with tempfile.TemporaryDirectory() as folder:
                write_tiny_model(Path(folder))
                in_process(Path(folder), options)
    if options.only != "process":
        over_http(options)


if __name__ == "__main__":
    main()
