"""A server under faults and bad clients for long: `python -m tests.bench.soak [--minutes 30] [--postgres]`.

`mrsa serve --engine openai`, with keys, quotas and a store, before a fake upstream that fails in every way that it
knows and is killed and started again now and then. Clients of many kinds (`soak_clients`) come at random, good, bad and
gone. It prints what was seen over time and what each kind of client met, and exits with 1 where a rule of the API was
broken, an error was logged, anything is left once the last client has gone, or memory climbs. Everything is drawn from
`--seed`; what follows when is the machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import le
from pathlib import Path
from typing import NamedTuple

import aiohttp
import orjson
import psutil
from prometheus_client.parser import text_string_to_metric_families

from mrsa_server.keyring import Scope
from tests.bench.soak_clients import (
    ANSWERS,
    KEEP_ALIVE_S,
    KINDS,
    LATE_S,
    MOST_BODY_BYTES,
    Broken,
    Kind,
    World,
    unread,
)
from tests.helpers.keys import client
from tests.helpers.ports import free_port
from tests.helpers.postgres import WANTED, running
from tests.helpers.replicas import upgrade

FAULTS = ("400", "429", "500", "503", "hang", "stall", "reset", "abort", "drip", "truncate", "garbage", "error")
_HANG_S = 120.0  # for one client, whatever it asks
_IDLE_S = 60.0  # until nothing is left of what clients began
_AT_REST = ("mrsa_runs_running", "mrsa_runs_queued", "mrsa_rollouts_waiting", "mrsa_inflight_tokens")
_LATE = {"threads": min(32, (os.cpu_count() or 1) + 4), "processes": 2}  # asyncio's pool; the judge and its tracker
_MB = 1 << 20


@dataclass(frozen=True)
class Options:
    """What is asked of a soak.

    Attributes:
        minutes: For which clients come.
        per_s: Clients a second.
        share: Of generations that have a fault.
        restart_s: Between two deaths of the upstream.
        sample_s: Between two looks at the server.
        most_mb_an_hour: By which memory may climb in the last third, where there were enough looks to tell.
        most_mb: By which it may have grown from rest to rest; caches of prompts and of SQLite fill up meanwhile.
    """

    minutes: float = 30.0
    per_s: float = 15.0
    share: float = 0.05
    restart_s: float = 180.0
    sample_s: float = 5.0
    most_mb_an_hour: float = 12.0
    most_mb: float = 48.0
    seed: int = 1
    level: int = 1
    postgres: bool = False
    python: tuple[str, ...] = ("-m", "mrsa_server")


class Sample(NamedTuple):
    """The server at one moment: seconds since the start, bytes, counts, seconds of CPU."""

    at_s: float
    rss: int
    uss: int
    descriptors: int
    threads: int
    processes: int
    tasks: int
    runs: int
    store: int
    cpu_s: float

    @property
    def left(self) -> tuple[int, int]:
        """What must be as at the start once all is over."""
        return self.descriptors, self.tasks


@dataclass
class Found:
    """What a soak has found; `broken` is empty where all is well."""

    samples: list[Sample] = field(default_factory=list)
    met: dict[str, Counter[str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    start: Sample | None = None
    end: Sample | None = None
    plain_s: list[tuple[float, float]] = field(default_factory=list)
    silent_s: float = 0.0
    climb: Climb | None = None


class Climb(NamedTuple):
    """How memory grows, in MB an hour, and how sure that is: one standard error."""

    mb_an_hour: float
    error: float


class Upstream:
    """The fake upstream in a process that can be killed and comes back on its port."""

    def __init__(self, options: Options) -> None:
        self.port = free_port()
        self._options = options
        self._starts = 0
        self.start()

    def start(self, *, faults: bool = True) -> None:
        share = self._options.share if faults else 0.0
        words = ["--port", str(self.port), "--level", str(self._options.level), "--answers", *ANSWERS]
        words += ["--tokens", "200", "--think", "content", "--piece", "16", "--writes", "6", "--delay", "0.15"]
        words += ["--faults", ",".join(FAULTS), "--fault-share", str(share), "--tokens-fault-share", str(share / 20)]
        words += ["--seed", str(self._options.seed + self._starts)]
        self._starts += 1
        command = [sys.executable, "-m", "tests.helpers.fake_upstream", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Server:
    """`mrsa serve` and how it is seen from outside."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, store: Path, log: Path, metrics_key: str) -> None:
        self.url = url
        self.log = log
        self._process = psutil.Process(process.pid)
        self._store = store
        self._began = time.monotonic()
        # A connection for each look: one that is kept would count as the server's.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True), headers={"authorization": f"Bearer {metrics_key}"}
        )

    async def aclose(self) -> None:
        await self._session.close()

    async def metrics(self) -> dict[str, float]:
        """Those without labels, and the tokens that runs in flight may cost."""
        async with self._session.get(f"{self.url}/metrics") as answer:
            families = text_string_to_metric_families(await answer.text())
        samples = [sample for family in families for sample in family.samples]
        found = {sample.name: sample.value for sample in samples if not sample.labels}
        committed = [one.value for one in samples if one.labels == {"state": "committed"}]
        return found | {"committed": committed[0]}

    async def look(self) -> Sample:
        metrics = await self.metrics()
        memory, children = self._process.memory_full_info(), self._process.children(recursive=True)
        times = self._process.cpu_times()
        return Sample(
            at_s=time.monotonic() - self._began,
            rss=memory.rss,
            uss=memory.uss,
            descriptors=self._process.num_fds(),
            threads=self._process.num_threads(),
            processes=len(children),
            tasks=int(metrics["mrsa_tasks"]),
            runs=int(metrics["mrsa_runs_running"] + metrics["mrsa_runs_queued"]),
            store=sum(file.stat().st_size for file in self._store.glob("*") if file.is_file()),
            cpu_s=times.user + times.system,
        )

    def kill_judge(self) -> None:
        """Its worker; not the tracker that Python puts beside it."""
        for child in self._process.children():
            if not any("resource_tracker" in word for word in child.cmdline()):
                child.kill()

    async def at_rest(self) -> str:
        """What still goes on; nothing for rest."""
        metrics = await self.metrics()
        return ", ".join(f"{name} {metrics[name]:g}" for name in (*_AT_REST, "committed") if metrics[name])

    def open_descriptors(self) -> Counter[str]:
        """What the descriptors are, so that one that is left can be named."""
        places = Path(f"/proc/{self._process.pid}/fd")
        found: Counter[str] = Counter()
        for place in places.iterdir():
            try:
                found[os.readlink(place).partition(":")[0]] += 1
            except FileNotFoundError:
                continue
        return found


@contextmanager
def stored(options: Options, folder: Path) -> Iterator[dict[str, str]]:
    """The environment that names a store."""
    if not options.postgres:
        yield {"MRSA_STATE_DIR": str(folder / "state")}
        return
    with running() as postgres:
        if postgres is None:
            raise SystemExit(WANTED)
        url = postgres.url(postgres.make())
        asyncio.run(upgrade(url))
        yield {"MRSA_DATABASE_URL": url}


KEYS = {
    "alice": client("alice"),
    "bob": client("bob"),
    "carol": client("carol", runs_per_minute=20, concurrent_runs=2),
    "dave": client("dave", tokens_per_minute=30_000),
    "reader": client("reader", Scope.RUNS_READ),
    "metrics": client("metrics", Scope.METRICS),
}


@contextmanager
def serving(options: Options, upstream: Upstream) -> Iterator[tuple[subprocess.Popen[bytes], str, Path, Path, Path]]:
    """The server as a process: its URL, its state, its log and its keys."""
    port = free_port()
    words = [sys.executable, *options.python, "serve", "--engine", "openai", "--port", str(port), "--log-format"]
    words += ["json", "--log-level", "warning", "--engine-url", f"http://127.0.0.1:{upstream.port}/v1"]
    words += ["--engine-timeout-s", "4", "--engine-wait-s", "8", "--keep-alive-s", str(KEEP_ALIVE_S)]
    words += ["--header-timeout-s", str(LATE_S), "--body-timeout-s", str(LATE_S)]
    words += ["--max-body-bytes", str(MOST_BODY_BYTES), "--max-runs", "32", "--max-queued", "16"]
    # So short that both ends of what is kept are seen within a soak.
    words += ["--idempotency-keep-s", "60", "--max-idempotency-keys", "64"]
    words += ["--keep-runs-days", str(120 / 86_400), "--keep-traces-days", str(60 / 86_400)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mrsa-soak-")))
        keys, log, state = folder / "keys", folder / "log", folder / "state"
        write_keys(keys)
        surroundings = os.environ | stack.enter_context(stored(options, folder))
        surroundings |= {"PYTHONWARNINGS": "default::ResourceWarning"}
        said = stack.enter_context(log.open("wb"))
        command = [*words, "--keys-file", str(keys)]
        with subprocess.Popen(command, env=surroundings, stdout=said, stderr=said) as process:
            try:
                yield process, f"http://127.0.0.1:{port}", state, log, keys
            finally:
                process.terminate()


async def until(what: str, seconds: float, condition: object) -> None:
    """Wait until a condition holds.

    Raises:
        Broken: It did not in time.
    """
    deadline = time.monotonic() + seconds
    while not await condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise Broken(f"{what} within {seconds:g} s")
        await asyncio.sleep(0.5)


@asynccontextmanager
async def visiting(server: Server, draws: random.Random) -> AsyncIterator[World]:
    """Clients, with connections that are closed with the block."""
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        yield World(server.url, session, KEYS, draws)


async def visit(world: World, kind: Kind, found: Found) -> None:
    """One client, from its coming to its going."""
    name = kind.__name__
    met = found.met.setdefault(name, Counter())
    try:
        async with asyncio.timeout(_HANG_S):
            met[await kind(world)] += 1
    except Broken as error:
        met["broken"] += 1
        found.broken.append(f"{name}: {error}")
    except TimeoutError:
        met["hung"] += 1
        found.broken.append(f"{name}: no end within {_HANG_S:g} s")
    except Exception as error:
        met["broken"] += 1
        found.broken.append(f"{name}: {type(error).__name__}: {error}")


async def rest(server: Server, like: Sample | None) -> Sample:
    """Wait until the server does nothing, and has let go of all that it had for clients.

    Args:
        server: Which.
        like: How it stood before; None for whenever it does not change any more.

    Raises:
        Broken: It does something for ever.
    """
    deadline, last, quiet = time.monotonic() + _IDLE_S, await server.look(), 0
    while True:
        await asyncio.sleep(1)
        now, busy = await server.look(), await server.at_rest()
        quiet = quiet + 1 if not busy and now.left == last.left else 0
        last = now
        if quiet >= 8 if like is None else (not busy and all(map(le, now.left, like.left))):
            return now
        if time.monotonic() > deadline:
            if busy:
                raise Broken(f"it does not come to rest: {busy}")
            return now


async def coming(world: World, options: Options, found: Found) -> None:
    """Clients come at random until the time is over, and go when they have what they wanted."""
    kinds, weights = list(KINDS), list(KINDS.values())
    until_s = time.monotonic() + 60 * options.minutes
    async with asyncio.TaskGroup() as clients:
        while time.monotonic() < until_s:
            await asyncio.sleep(world.draws.expovariate(options.per_s))
            (kind,) = world.draws.choices(kinds, weights)
            clients.create_task(visit(world, kind, found))


async def looking(server: Server, options: Options, found: Found) -> None:
    """Look at the server again and again, until cancelled."""
    while True:
        found.samples.append(await server.look())
        await asyncio.sleep(options.sample_s)


async def dying(upstream: Upstream, server: Server, options: Options, draws: random.Random) -> None:
    """Kill the upstream now and then, and start it again; and who judges answers for the server. Until cancelled."""
    while True:
        await asyncio.sleep(options.restart_s * (0.5 + draws.random()))
        server.kill_judge()
        await asyncio.to_thread(upstream.kill)
        await asyncio.sleep(4 * draws.random())
        upstream.start()


async def rekeying(keys: Path, draws: random.Random) -> None:
    """Write the file of keys anew, a further key in it now and then, until cancelled."""
    while True:
        await asyncio.sleep(20 * draws.random())
        write_keys(keys, client("guest").line if draws.random() < 0.5 else "")


def write_keys(file: Path, more: str = "") -> None:
    """Those of all clients and one more, at once: the server may read it at any moment."""
    new = file.with_suffix(".new")
    new.write_text("\n".join([*(key.line for key in KEYS.values()), more]))
    new.replace(file)


async def soak(
    options: Options, process: subprocess.Popen[bytes], url: str, state: Path, log: Path, keys: Path, upstream: Upstream
) -> Found:
    """Let clients come, and say what was found."""
    found, draws = Found(), random.Random(options.seed)
    server = Server(process, url, state, log, KEYS["metrics"].secret)
    try:
        async with visiting(server, draws) as world:
            await until("the server is not ready", 90, partial(_ready, world))
            # What is loaded and opened at first use is no client's: connections of the store, the judge's process.
            for _ in range(3):
                async with asyncio.TaskGroup() as clients:
                    for kind in KINDS:
                        if kind is not unread:
                            clients.create_task(visit(world, kind, Found()))
        found.start = await rest(server, None)
        async with visiting(server, draws) as world:
            beside = [asyncio.create_task(looking(server, options, found))]
            beside += [asyncio.create_task(dying(upstream, server, options, random.Random(options.seed)))]
            beside += [asyncio.create_task(rekeying(keys, random.Random(options.seed)))]
            await coming(world, options, found)
            for task in beside:
                task.cancel()
            for outcome in await asyncio.gather(*beside, return_exceptions=True):
                if not isinstance(outcome, asyncio.CancelledError):
                    found.broken.append(f"the soak itself broke: {outcome!r}")
            found.plain_s, found.silent_s = world.plain_s, world.silent_s
        try:
            found.end = await rest(server, found.start)
        except Broken as error:
            found.broken.append(str(error))
            found.end = await server.look()
        found.broken += leftovers(found, server, options)
    finally:
        await server.aclose()
    found.broken += errors(log)
    found.climb = climb(found.samples)
    if found.climb is not None and found.climb.mb_an_hour - 2 * found.climb.error > options.most_mb_an_hour:
        found.broken.append(f"memory climbs by {found.climb.mb_an_hour:.1f} MB/h in the last third")
    return found


async def _ready(world: World) -> bool:
    try:
        return (await world.call("GET", "/health/ready", headers={})).status == 200
    except aiohttp.ClientError:
        return False


def leftovers(found: Found, server: Server, options: Options) -> list[str]:
    """What is there after the end that was not there before the start; pools of threads and the judge may come late."""
    assert found.start is not None
    assert found.end is not None
    said = []
    for name in ("descriptors", "tasks", "threads", "processes"):
        before, after = getattr(found.start, name), getattr(found.end, name)
        if after > before + _LATE.get(name, 0):
            more = f": {dict(server.open_descriptors())}" if name == "descriptors" else ""
            said.append(f"{after} {name} are left, {before} at the start{more}")
    grown = (found.end.uss - found.start.uss) / _MB
    if grown > options.most_mb:
        said.append(f"memory has grown by {grown:.1f} MB")
    return said


def errors(log: Path) -> list[str]:
    """What the server wrote that is no warning of its own."""
    said = []
    for line in log.read_text(errors="replace").splitlines():
        try:
            level = orjson.loads(line)["level"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            level = "none"
        if level not in ("debug", "info", "warning"):
            said.append(f"the log: {line[:300]} ... {line[-1_500:]}" if len(line) > 2_000 else f"the log: {line}")
    return said


def climb(samples: Sequence[Sample], blocks: int = 10) -> Climb | None:
    """How private memory grows over the last third, by a line through the medians of equal parts; None for too few."""
    last = samples[-(len(samples) // 3) :]
    if len(last) < 3 * blocks:
        return None
    parts = [last[len(last) * at // blocks : len(last) * (at + 1) // blocks] for at in range(blocks)]
    hours = [statistics.fmean(one.at_s for one in part) / 3600 for part in parts]
    mb = [statistics.median(one.uss for one in part) / _MB for part in parts]
    slope, base = statistics.linear_regression(hours, mb)
    off = sum((y - base - slope * x) ** 2 for x, y in zip(hours, mb, strict=True)) / (blocks - 2)
    mean = statistics.fmean(hours)
    return Climb(slope, (off / sum((x - mean) ** 2 for x in hours)) ** 0.5)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def tell(options: Options, found: Found) -> None:
    """Print it: over time, by client, what was left, what was broken."""
    samples = found.samples
    began = samples[0].at_s if samples else 0.0
    rows = 6
    columns = "minutes,RSS MB,private MB,descriptors,tasks,threads,runs,store MB,CPU,plain p50 / p95 s".split(",")
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    length = 60 * options.minutes / rows
    clock0 = min((at for at, _ in found.plain_s), default=0.0)
    for row in range(rows):
        part = [one for one in samples if row <= (one.at_s - began) / length < row + 1]
        if len(part) < 2:
            continue
        plain = [took for at, took in found.plain_s if row <= (at - clock0) / length < row + 1]
        cpu = (part[-1].cpu_s - part[0].cpu_s) / (part[-1].at_s - part[0].at_s)

        def middle(name: str, part: list[Sample] = part) -> float:
            return statistics.median(getattr(one, name) for one in part)

        print(
            f"| {row * length / 60:.1f} to {(row + 1) * length / 60:.1f} | {middle('rss') / _MB:.1f} | "
            f"{middle('uss') / _MB:.1f} | {middle('descriptors'):.0f} | {middle('tasks'):.0f} | "
            f"{middle('threads'):.0f} | {middle('runs'):.0f} | {middle('store') / _MB:.1f} | {cpu:.0%} | "
            f"{quantile(plain, 0.5):.2f} / {quantile(plain, 0.95):.2f} |"
        )
    for name, one in (("start", found.start), ("end", found.end)):
        if one is not None:
            print(
                f"at rest, {name}: {one.descriptors} descriptors, {one.tasks} tasks, {one.threads} threads, "
                f"{one.processes} further processes, {one.rss / _MB:.1f} MB resident, {one.uss / _MB:.1f} private"
            )
    if found.climb is not None:
        print(f"last third: {found.climb.mb_an_hour:+.1f} MB/h, standard error {found.climb.error:.1f}")
    print(f"longest silence of a stream: {found.silent_s:.1f} s\n")
    for name, met in sorted(found.met.items()):
        print(f"{name:>20}  {met.total():6}  " + ", ".join(f"{count} x {what}" for what, count in met.most_common()))
    print(f"\n{sum(met.total() for met in found.met.values())} clients, {len(found.broken)} rules broken")
    for line, count in Counter(found.broken).most_common(40):
        print(f"- {count} x {line}")


def run(options: Options) -> Found:
    """Start everything, soak, end everything."""
    upstream = Upstream(options)
    try:
        with serving(options, upstream) as started:
            return asyncio.run(soak(options, *started, upstream))
    finally:
        upstream.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Options()
    parser.add_argument("--minutes", type=float, default=usual.minutes)
    parser.add_argument("--per-s", type=float, default=usual.per_s, help="clients a second")
    parser.add_argument("--share", type=float, default=usual.share, help="of generations that have a fault")
    parser.add_argument("--restart-s", type=float, default=usual.restart_s, help="between two deaths of the upstream")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--level", type=int, default=usual.level, choices=(1, 2, 3), help="how the upstream speaks")
    parser.add_argument("--postgres", action="store_true", help="store in a Postgres that is started for it")
    options = Options(**vars(parser.parse_args()))
    found = run(options)
    tell(options, found)
    return 1 if found.broken else 0


if __name__ == "__main__":
    sys.exit(main())
