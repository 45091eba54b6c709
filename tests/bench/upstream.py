"""The server over a fake upstream, beside a bare client: `python -m tests.bench.upstream`.

Each user asks one question with N=16, T=1: 32 upstream calls with F=16, 5 with F=1, in two stages. The bare client
sends the same calls in the same two stages and does nothing else. Upstream, server and client are processes apart.
Further flags are the server's: by default it stores its runs in a file, here in a folder that is gone afterwards, and
with `--state-dir none` in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import aiohttp
import orjson
import psutil
import uvloop

from tests.helpers.fake_upstream import MODEL
from tests.helpers.ports import free_port

POPULATION = 16
QUESTION = [{"role": "user", "content": "What is asked? " * 20}]
Ask = Callable[[], Coroutine[Any, Any, None]]


class Figures(NamedTuple):
    """Seconds, upstream calls, seconds of the server's CPU."""

    wall_s: float
    calls: int
    cpu_s: float


@contextmanager
def process(*words: str, **environment: str) -> Iterator[psutil.Process]:
    """Python in a process of its own, ended with the block."""
    surroundings = os.environ | environment
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, env=surroundings) as child:
        try:
            yield psutil.Process(child.pid)
        finally:
            child.terminate()


def cpu_s(server: psutil.Process | None) -> float:
    if server is None:
        return 0.0
    times = server.cpu_times()
    return float(times.user + times.system)


def peak_mb(server: psutil.Process) -> float:
    """The largest resident size so far."""
    with open(f"/proc/{server.pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


async def ready(session: aiohttp.ClientSession, url: str, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while True:
            try:
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.1)


async def calls(session: aiohttp.ClientSession, upstream: str) -> int:
    async with session.get(f"{upstream}/stats") as answer:
        count: int = orjson.loads(await answer.read())["calls"]
        return count


async def measure(
    session: aiohttp.ClientSession, upstream: str, server: psutil.Process | None, users: int, ask: Ask
) -> Figures:
    before, cpu, start = await calls(session, upstream), cpu_s(server), time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(users):
            tasks.create_task(ask())
    wall = time.perf_counter() - start
    return Figures(wall, await calls(session, upstream) - before, cpu_s(server) - cpu)


def through_server(session: aiohttp.ClientSession, url: str, final_candidates: int, stream: bool) -> Ask:
    mrsa = {"population": POPULATION, "rounds": 1, "final_candidates": final_candidates, "set_size": 4}
    mrsa |= {"rollout_tokens": 512, "tail_tokens": 256, "final_tokens": 512}
    body = orjson.dumps({"model": f"{MODEL}-mrsa", "messages": QUESTION, "mrsa": mrsa, "stream": stream})

    async def ask() -> None:
        headers = {"content-type": "application/json"}
        async with session.post(f"{url}/v1/chat/completions", data=body, headers=headers) as answer:
            said = await answer.read()
            if answer.status != 200 or (stream and not said.endswith(b"data: [DONE]\n\n")):
                raise RuntimeError(f"HTTP {answer.status}: {said[-300:].decode()}")

    return ask


def direct(session: aiohttp.ClientSession, url: str, stages: tuple[int, int]) -> Ask:
    body = orjson.dumps({"model": MODEL, "messages": QUESTION, "max_tokens": 512, "stream": True})

    async def call() -> None:
        headers = {"content-type": "application/json"}
        async with session.post(f"{url}/v1/chat/completions", data=body, headers=headers) as answer:
            await answer.read()

    async def ask() -> None:
        for count in stages:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(count):
                    tasks.create_task(call())

    return ask


async def run(options: argparse.Namespace, upstream: str, url: str, server: psutil.Process) -> None:
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await ready(session, f"{upstream}/health")
        await ready(session, f"{url}/health/ready")
        await through_server(session, url, 1, False)()  # What is imported and cached at first use is no cost of a call.
        print(f"{'':>22}  {'wall s':>7}  {'calls':>6}  {'CPU ms/call':>11}  {'peak RSS MB':>11}")
        for users in (1, options.users):
            for final in (POPULATION, 1):
                stages = (POPULATION, POPULATION) if final == POPULATION else (4, 1)
                name = f"{users} x F={final}"
                bare = await measure(session, upstream, None, users, direct(session, upstream, stages))
                print(f"{name + ' bare':>22}  {bare.wall_s:7.2f}  {bare.calls:6}")
                for stream in (False, True):
                    ask = through_server(session, url, final, stream)
                    ours = await measure(session, upstream, server, users, ask)
                    print(
                        f"{name + (' streamed' if stream else ' server'):>22}  {ours.wall_s:7.2f}  {ours.calls:6}  "
                        f"{1e3 * ours.cpu_s / ours.calls:11.2f}  {peak_mb(server):11.0f}"
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=50, help="users at once")
    parser.add_argument("--delay", type=float, default=1.0, help="seconds a call")
    parser.add_argument("--tokens", type=int, default=16, help="tokens a call")
    parser.add_argument("--level", type=int, default=3, choices=(1, 2, 3), help="how the upstream speaks")
    options, flags = parser.parse_known_args()
    ports = free_port(), free_port()
    upstream, url = (f"http://127.0.0.1:{port}" for port in ports)
    fake = ["-m", "tests.helpers.fake_upstream", "--port", str(ports[0]), "--delay", str(options.delay)]
    fake += ["--tokens", str(options.tokens), "--level", str(options.level)]
    serve = ["-c", "from mrsa_server.cli import main; main()", "serve", "--engine", "openai", "--log-level", "warning"]
    serve += ["--engine-url", f"{upstream}/v1", "--port", str(ports[1])]
    with tempfile.TemporaryDirectory() as state:
        with process(*fake), process(*serve, *flags, XDG_STATE_HOME=state) as server:
            uvloop.run(run(options, upstream, url, server))


if __name__ == "__main__":
    main()
