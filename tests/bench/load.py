"""Many runs at once, over HTTP: `python -m tests.bench.load [--runs 1000] [--population 16]`.

`mrsa serve --engine scripted`, with its default settings, meets all runs at one moment, half of them streamed.
Each streamed run has a twin with the same seed that is not: both must end, and say and cost the same. Server and client
are processes apart.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
import orjson
import psutil
import uvloop

from tests.helpers.processes import serving
from tests.helpers.serving import CHAT, chunks, events, joined

_SENDING_S = 2.0  # in which all requests are written
_GAUGES = ("mrsa_runs_running", "mrsa_runs_queued", "mrsa_rollouts_waiting", "mrsa_inflight_tokens")


class Said(NamedTuple):
    """What a run came to: its name, its answer, OpenAI's `usage`, and the report under `mrsa`."""

    run_id: str
    content: str
    usage: dict[str, Any]
    report: dict[str, Any]


@dataclass
class Watched:
    """What the server took while the runs were in flight, at most."""

    rss: int = 0
    descriptors: int = 0
    gauges: dict[str, float] = field(default_factory=dict)


def body(seed: int, stream: bool, population: int) -> bytes:
    sizes = {"population": population, "rounds": 2, "rollout_tokens": 512, "tail_tokens": 128, "final_tokens": 512}
    question = [{"role": "user", "content": f"What follows from the {seed}th case? " * 8}]
    asked = {"model": "scripted-mrsa", "messages": question, "seed": seed, "stream": stream, "mrsa": sizes}
    return orjson.dumps(asked | ({"stream_options": {"include_usage": True}} if stream else {}))


def read(raw: bytes, stream: bool) -> Said:
    """The answer of one run.

    Raises:
        AssertionError: It is not whole, or its sums do not add up.
    """
    if stream:
        assert raw.endswith(b"data: [DONE]\n\n"), raw[-300:]
        found = chunks(raw.decode())
        report = events(found)[-1]
        assert report["event"] == "run.finished", report
        said = Said(report["run_id"], joined(found), found[-1]["usage"], report)
    else:
        whole = orjson.loads(raw)
        said = Said(whole["mrsa"]["run_id"], whole["choices"][0]["message"]["content"], whole["usage"], whole["mrsa"])
    assert said.content, "no answer"
    for kind in ("prompt_tokens", "completion_tokens"):
        assert said.usage[kind] == sum(part[kind] for part in said.report["usage"]) > 0, kind
    assert said.usage["total_tokens"] == said.usage["prompt_tokens"] + said.usage["completion_tokens"]
    for part in said.report["rounds"]:
        assert part["rollouts"] == part["finished"], part
    return said


def generated(said: Said) -> list[tuple[int, int]]:
    """Tokens read and generated, by round; what a cache held depends on who was first."""
    return [(part["prompt_tokens"], part["completion_tokens"]) for part in said.report["usage"]]


def peak_rss(pid: int) -> int:
    """The largest resident size of a process so far, in bytes."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


@contextmanager
def stopped(server: psutil.Process) -> Iterator[None]:
    """A process that stands still: what it is sent meanwhile it meets all at once."""
    server.suspend()
    try:
        yield
    finally:
        server.resume()


async def gauges(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    async with session.get(f"{url}/metrics") as answer:
        text = await answer.text()
    found = {name: float(re.search(rf"^{name} (\S+)$", text, re.M)[1]) for name in _GAUGES}  # type: ignore[index]
    ended = re.search(r'^mrsa_runs_total\{status="finished"\} (\S+)$', text, re.M)
    return found | {"finished": float(ended[1]) if ended else 0.0}


async def watch(session: aiohttp.ClientSession, url: str, server: psutil.Process, most: Watched) -> None:
    """Look again and again, until cancelled."""
    while True:
        most.descriptors = max(most.descriptors, server.num_fds())
        for name, value in (await gauges(session, url)).items():
            most.gauges[name] = max(most.gauges.get(name, 0.0), value)
        await asyncio.sleep(0.1)


async def load(url: str, pid: int, runs: int, population: int) -> None:
    """Send all, check all, print what it took.

    Raises:
        AssertionError: A run is lost or its answer is wrong.
    """
    server, most = psutil.Process(pid), Watched()
    timeout = aiohttp.ClientTimeout(total=None)
    headers = {"content-type": "application/json"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def ask(number: int) -> tuple[int, bool, Said]:
            stream = number % 2 == 0
            data = body(number // 2, stream, population)
            async with session.post(url + CHAT, data=data, headers=headers) as answer:
                raw = await answer.read()
                assert answer.status == 200, (answer.status, raw[:300])
            return number // 2, stream, read(raw, stream)

        async def knock() -> None:
            async with session.get(f"{url}/health/live") as answer:
                assert answer.status == 200

        warm = await ask(-2)  # what is loaded at the first request is no run's
        async with asyncio.TaskGroup() as tasks:  # connections, so that nothing is left but the requests
            for _ in range(runs):
                tasks.create_task(knock())
        before, cpu = server.memory_info().rss, sum(server.cpu_times()[:2])
        watcher = asyncio.create_task(watch(session, url, server, most))
        async with asyncio.TaskGroup() as tasks:
            with stopped(server):
                asked = [tasks.create_task(ask(number)) for number in range(runs)]
                await asyncio.sleep(_SENDING_S)
            start = time.perf_counter()
        wall, cpu = time.perf_counter() - start, sum(server.cpu_times()[:2]) - cpu
        watcher.cancel()
        said = [task.result() for task in asked]
        last = await gauges(session, url)
    assert len({one.run_id for _, _, one in (*said, warm)}) == runs + 1
    twins = {(seed, stream): one for seed, stream, one in said}
    for (seed, stream), one in twins.items():
        other = twins.get((seed, not stream), one)
        assert (one.content, generated(one)) == (other.content, generated(other)), f"the runs with seed {seed} differ"
    assert last == dict.fromkeys(_GAUGES, 0.0) | {"finished": runs + 1}, last
    peak = peak_rss(pid)
    rollouts = sum(part["rollouts"] for _, _, one in said for part in one.report["rounds"])
    tokens = sum(one.usage["completion_tokens"] for _, _, one in said)
    print(f"{runs} runs of N={population}, {rollouts} rollouts, {tokens} tokens: all ended, twins agree, nothing lost")
    print(f"wall {wall:.1f} s, CPU {cpu:.1f} s: {1e3 * cpu / runs:.1f} ms a run, {1e3 * cpu / rollouts:.2f} a rollout")
    print(f"peak RSS {peak / 2**20:.0f} MB, {before / 2**20:.0f} before: {(peak - before) / 1024 / runs:.0f} KB a run")
    print(
        f"seen at most: {most.descriptors} descriptors, {most.gauges['mrsa_runs_running']:.0f} runs in flight, "
        f"{most.gauges['mrsa_runs_queued']:.0f} queued, {most.gauges['mrsa_rollouts_waiting']:.0f} rollouts waiting, "
        f"{most.gauges['mrsa_inflight_tokens']:,.0f} tokens in flight"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--population", type=int, default=16)
    options, flags = parser.parse_known_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:  # a connection for each run
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with serving("--engine", "scripted", *flags) as (server, url):
        uvloop.run(load(url, server.pid, options.runs, options.population))


if __name__ == "__main__":
    main()
