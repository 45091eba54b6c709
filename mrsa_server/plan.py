"""`mrsa plan`: what a load takes on a fleet, before there is one. A forecast by simulation, no engine is started."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import NamedTuple, TypeVar

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.fleet import HELD_SHARE, Fleet, Forecast, Load, Work, forecast, users_held
from harness.simulate import Order, Wording
from harness.types import InvalidParams, Sampling
from mrsa_server.api.effort import Wishes, decide_params
from mrsa_server.api.errors import BadRequest
from mrsa_server.machines import MACHINES, Machine
from mrsa_server.settings import Effort, Settings

_METHOD = (  # a parameter, the least and the most of it that can be planned, its meaning
    ("population", 1, 256, "N, rollouts in each round but the last"),
    ("rounds", 0, 64, "T, aggregation rounds"),
    ("set_size", 1, 256, "C, tails in one aggregation prompt"),
    ("rollout_tokens", 1, 1_000_000, "beta, most tokens of a rollout before the last stage"),
    ("tail_tokens", 1, 1_000_000, "tau, tokens that a rollout passes on"),
    ("final_tokens", 1, 1_000_000, "most tokens of a rollout of the last stage"),
    ("final_candidates", 1, 256, "F, rollouts of the last round"),
)
_MOST_ROLLOUTS = 5_000_000  # of one engine's users at once: some minutes to simulate
_SIDE_BY_SIDE = 100  # users of one engine that the two orders are compared under: more of them only wait longer
_FLEET = re.compile(r"(?:(\d+)\s*[x*]\s*)?([a-z0-9-]+)", re.IGNORECASE)
_MOST_ENGINES = 10_000
_MOST_USERS = 1_000_000
N = TypeVar("N", int, float)


class Request(NamedTuple):
    """What was asked for, checked."""

    machine: Machine
    fleet: Fleet
    work: Work
    load: Load
    price: float  # US dollars a GPU-hour
    target_s: float | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What was found.

    Attributes:
        seen: The load on the fleet.
        alone: One run at a time on one engine.
        ours: The load that both orders are compared under, on one engine: `users_compared`
        theirs: and the same behind a barrier, every rollout of every round.
        users_compared: Users of that engine.
        users_held: Whose runs keep within the target; None where none was asked for.
        seconds: That the forecast took.
    """

    seen: Forecast
    alone: Forecast
    ours: Forecast
    theirs: Forecast
    users_compared: int
    users_held: int | None
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `mrsa plan`."""
    parser.description = (
        "Forecast what a load takes on a fleet of GPUs that serve ZAYA1-8B: wall times, tokens, cost, and how many "
        "users the fleet holds. A simulation of every rollout on a model of the engine; the model comes from data "
        "sheets (see mrsa_server/machines.py) and may be off by a half either way."
    )
    parser.add_argument(
        "--gpus", type=_fleet, default=_fleet("h200"), metavar="[COUNTx]KIND",
        help=f"the fleet, such as 8xh200; kinds: {', '.join(MACHINES)} (default: h200)",
    )  # fmt: skip
    load = parser.add_argument_group("load")
    load.add_argument(
        "--users", type=_number(int, 1, _MOST_USERS), metavar="N", help="who each have one run at a time (default: 1)"
    )
    load.add_argument("--think-s", type=_number(float, 0, 10_000_000), default=0.0, metavar="SECONDS",
                      help="mean time from the end of a user's run to the next, exponential (default: 0)")  # fmt: skip
    load.add_argument("--runs-per-hour", type=_number(float, 0.001, 10_000_000), metavar="RATE",
                      help="runs that come at random, instead of --users")  # fmt: skip
    load.add_argument("--question-tokens", type=_number(int, 1, 1_000_000), default=512, metavar="N",
                      help="of the conversation (default: 512)")  # fmt: skip
    method = parser.add_argument_group("method")
    method.add_argument(
        "--effort", choices=[effort.value for effort in Effort], default=Effort.MEDIUM.value,
        help="the preset that the others override (default: medium)",
    )  # fmt: skip
    for name, low, high, meaning in _METHOD:
        method.add_argument(f"--{name.replace('_', '-')}", type=_number(int, low, high), metavar="N", help=meaning)
    method.add_argument("--seed", type=_number(int, 0, 1 << 62), default=0, metavar="N",
                        help="of sets, lengths and arrivals (default: 0)")  # fmt: skip
    model = parser.add_argument_group("lengths and prices")
    model.add_argument(
        "--length-median", type=_number(float, 1, 10_000_000), default=19_000.0,
        metavar="TOKENS",
        help="of a rollout's thinking if nothing cut it; lognormal (default: 19000. 20,100 gives the 740,000 tokens "
        "that the authors report for N=16, T=2, beta=40K, and 15,900 the 440,000 for 16K)",
    )  # fmt: skip
    model.add_argument("--length-sigma", type=_number(float, 0, 5), default=0.7, metavar="SIGMA",
                       help="of its logarithm (default: 0.7)")  # fmt: skip
    model.add_argument("--answer-tokens", type=_number(int, 1, 100_000), default=500, metavar="N",
                       help="after the thinking of the last stage (default: 500)")  # fmt: skip
    model.add_argument("--price", type=_number(float, 0, 1_000_000), metavar="USD",
                       help="of a GPU for an hour (default: what clouds asked for in 2025)")  # fmt: skip
    parser.add_argument("--target-s", type=_number(float, 0.001, 10_000_000), metavar="SECONDS",
                        help="look for the most users of whose runs 95 %% end within this time")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Plan; 0 with a plan, 2 where something contradicts itself."""
    try:
        request = read(arguments)
        found = plan(request)
    except (InvalidParams, BadRequest, ValueError) as error:
        print(f"mrsa plan: error: {_flags(str(error))}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(as_json(request, found), indent=2))
    else:
        show(request, found, Console(soft_wrap=True))
    return 0


def read(arguments: argparse.Namespace) -> Request:
    """Arguments -> what to plan.

    Raises:
        InvalidParams, BadRequest, ValueError: Naming what is wrong, as the API does.
    """
    machine, engines = arguments.gpus
    if arguments.users is not None and arguments.runs_per_hour is not None:
        raise ValueError("--users and --runs-per-hour: give one of them")
    wishes = Wishes(Effort(arguments.effort), **{name: getattr(arguments, name) for name, *_ in _METHOD})
    # The server's limits are its operator's to set: here they are those of the method.
    settings = Settings.model_construct(max_population=1 << 20, max_rounds=1 << 20, max_rollout_tokens=1 << 20)
    decided = decide_params(
        wishes, settings, Sampling(), arguments.seed, machine.context_tokens, arguments.question_tokens
    )
    work = Work(
        decided.params,
        replace(Wording(), question=arguments.question_tokens),
        arguments.length_median,
        arguments.length_sigma,
        arguments.answer_tokens,
    )
    most = engines * _MOST_ROLLOUTS // (decided.params.population * (decided.params.rounds + 1))
    if (arguments.users or 1) > most:
        raise ValueError(f"--users: at most {most:,} such runs at once can be simulated on this fleet")
    rate = arguments.runs_per_hour
    users = 0 if rate is not None else arguments.users or 1
    price = machine.price if arguments.price is None else arguments.price
    return Request(
        machine,
        Fleet(machine.engine, engines),
        work,
        Load(users, arguments.think_s, rate or 0.0),
        price,
        arguments.target_s,
        decided.warnings,
    )


def plan(request: Request) -> Plan:
    """Simulate the load, one run alone, both orders side by side, and look for the users that the target allows."""
    began = time.perf_counter()
    work, fleet, load, target_s = request.work, request.fleet, request.load, request.target_s
    one = replace(fleet, engines=1)
    seen = forecast(work, fleet, load)
    alone = forecast(work, one, Load(1))
    if load.users:
        users = max(1, min(_SIDE_BY_SIDE, round(load.users / fleet.engines)))
    else:
        users = max(1, min(_SIDE_BY_SIDE, round(load.runs_per_hour / fleet.engines * alone.wall_s(0.5) / 3600)))
    same = Load(users, load.think_s)
    ours = alone if users == 1 and not load.think_s else forecast(work, one, same)
    held = None if target_s is None else users_held(work, fleet, load, target_s)
    if held is not None and load.users:  # both are samples, and what is printed side by side has to agree
        kept = target_s is not None and seen.wall_s(HELD_SHARE) <= target_s
        held = max(held, load.users) if kept else min(held, load.users - 1)
    return Plan(
        seen=seen,
        alone=alone,
        ours=ours,
        theirs=forecast(work, one, same, Order.BARRIER),
        users_compared=users,
        users_held=held,
        seconds=time.perf_counter() - began,
    )


def as_json(request: Request, found: Plan) -> dict[str, object]:
    """The plan for machines: seconds, tokens, US dollars."""
    return {
        "gpu": request.machine.label,
        "gpus": request.fleet.engines,
        "engine": {name: None if value == inf else value for name, value in asdict(request.fleet.model).items()},
        "params": {name: getattr(request.work.params, name) for name, *_ in _METHOD},
        "lengths": {
            "median_tokens": request.work.median_tokens,
            "sigma": request.work.sigma,
            "answer_tokens": request.work.answer_tokens,
        },
        "load": asdict(request.load),
        "price_per_gpu_hour": request.price,
        "forecast": _numbers(found.seen, request.price),
        "alone": _numbers(found.alone, request.price),
        "compared": {
            "users": found.users_compared,
            "lazy": _numbers(found.ours, request.price),
            "barrier": _numbers(found.theirs, request.price),
        },
        "target_s": request.target_s,
        "users_held": found.users_held,
        "warnings": list(request.warnings),
        "seconds": round(found.seconds, 3),
    }


def _numbers(seen: Forecast, price: float) -> dict[str, object]:
    return {
        "wall_s": {f"p{share:g}": seen.wall_s(share / 100) for share in (50, 95, 99)},
        "runs_measured": len(seen.walls_s),
        "gpus_simulated": seen.engines,
        "generated_tokens": seen.tokens,
        "prompt_tokens": seen.prompt_tokens,
        "cached_tokens": seen.cached_tokens,
        "rollouts": seen.rollouts,
        "tokens_per_s_per_gpu": seen.tokens_per_s,
        "streams_per_gpu": seen.batch,
        "gpu_s_per_run": seen.engine_s,
        "cost_per_run": seen.engine_s / 3600 * price,
        "preemptions_per_run": seen.preemptions,
        "growing": seen.growing,
    }


def show(request: Request, found: Plan, console: Console) -> None:
    """The plan for people."""
    params, fleet, load, seen = request.work.params, request.fleet, request.load, found.seen
    asked = f"{load.users:,} user{'s' * (load.users != 1)}" if load.users else f"{load.runs_per_hour:,g} runs an hour"
    console.print(
        f"{fleet.engines} x {request.machine.label}, {asked}; N={params.population} C={params.set_size} "
        f"T={params.rounds} beta={params.rollout_tokens:,} tau={params.tail_tokens:,} F={params.final_candidates}",
        highlight=False,
        style="bold",
    )
    for warning in request.warnings:
        console.print(f"! {escape(warning)}", highlight=False)
    if seen.growing:
        console.print("! Runs come faster than they end: waits grow without end, the walls here are only the first.")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("this load", justify="right")
    table.add_column("a run alone", justify="right")
    rows: tuple[tuple[str, Callable[[Forecast], str]], ...] = (
        ("wall, p50", lambda one: _time(one.wall_s(0.5))),
        ("wall, p95", lambda one: _time(one.wall_s(0.95))),
        ("wall, p99", lambda one: _time(one.wall_s(0.99))),
        ("tokens generated a run", lambda one: f"{one.tokens:,.0f}"),
        ("prompt tokens a run", lambda one: f"{one.prompt_tokens:,.0f}"),
        ("  found in the prefix cache", lambda one: f"{one.cached_tokens:,.0f}"),
        ("rollouts a run", lambda one: f"{one.rollouts:.1f}"),
        ("tokens/s a GPU", lambda one: f"{one.tokens_per_s:,.0f}"),
        ("streams at once a GPU", lambda one: f"{one.batch:.0f}"),
        ("preempted rollouts a run", lambda one: f"{one.preemptions:.1f}"),
        ("GPU-seconds a run", lambda one: f"{one.engine_s:,.0f}"),
        (f"US$ a run, at {request.price:g} an hour", lambda one: f"{one.engine_s / 3600 * request.price:.3f}"),
        ("runs an hour", lambda one: _rate(3600 / one.engine_s * (fleet.engines if one is seen else 1))),
    )
    for name, of in rows:
        table.add_row(name, of(seen), of(found.alone))
    console.print(table)
    ours, theirs = found.ours, found.theirs
    if params.rounds:
        users = f"{found.users_compared} user{'s' * (found.users_compared != 1)} a GPU"
        console.print(
            f"Round by round behind a barrier, with {users}: {theirs.tokens / ours.tokens:.2f} times the tokens, "
            f"{theirs.wall_s(0.5) / ours.wall_s(0.5):.2f} times the wall time, "
            f"{theirs.engine_s / ours.engine_s:.2f} times the GPU-seconds.",
            highlight=False,
        )
    if found.users_held is not None:
        held = f"{found.users_held:,} users" if found.users_held else "no user"
        console.print(
            f"{held[0].upper()}{held[1:]} can be held if {HELD_SHARE * 100:.0f} % of the runs are to end within "
            f"{_time(request.target_s or 0)}.",
            highlight=False,
            style="bold",
        )
    part = f"; {seen.engines} of {fleet.engines} GPUs stand for all" if seen.engines < fleet.engines else ""
    console.print(
        f"{len(seen.walls_s):,} runs measured{part}; simulated in {found.seconds:.1f} s.",
        highlight=False,
        style="dim",
    )


def _rate(runs: float) -> str:
    return f"{runs:,.0f}" if runs >= 10 else f"{runs:.2g}"


def _time(seconds: float) -> str:
    """Seconds as people read them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _fleet(text: str) -> tuple[Machine, int]:
    """`8xh200` -> the GPU and how many."""
    match = _FLEET.fullmatch(text.strip())
    kind = match[2].lower() if match else ""
    if match is None or kind not in MACHINES:
        raise argparse.ArgumentTypeError(f"{text!r} is no [COUNTx]KIND; kinds are {', '.join(MACHINES)}")
    count = int(match[1]) if match[1] else 1
    if not 1 <= count <= _MOST_ENGINES:
        raise argparse.ArgumentTypeError(f"must be between 1 and {_MOST_ENGINES} GPUs, not {count}")
    return MACHINES[kind], count


def _number(kind: Callable[[str], N], low: float, high: float) -> Callable[[str], N]:
    def parse(text: str) -> N:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be between {low:,} and {high:,}, not {text}")
        return value

    return parse


def _flags(message: str) -> str:
    """The API's names of fields as those of our flags."""
    name, colon, rest = message.partition(": ")
    names = {"messages": "question_tokens", "median_tokens": "length_median", "sigma": "length_sigma"}
    field = name.removeprefix("mrsa.")
    field = names.get(field, field)
    return f"--{field.replace('_', '-')}{colon}{rest}" if re.fullmatch(r"[a-z_]+", field) and colon else message
