"""What prompts of one run share in vLLM's prefix cache: `python -m tests.bench.prefix` (with vLLM's CPU build).

First without an engine: of the places of all sets that a run needs, how many repeat the prefix of another set, by the
order in which a set's members stand in its prompt. Then on the embedded model: N rollouts of one prompt against N
prompts, and the aggregation prompts of real runs in each order. Every generation there is one token long, so what is
measured is prefill.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from statistics import mean
from typing import NamedTuple

import psutil

from harness.lineage import draw_sets, needed, seed_of
from harness.markovian_rsa import State, init
from harness.prompts import aggregation_messages, load_templates
from harness.run import Watch, open_run
from harness.types import Message, Params, Problem, RolloutRequest, Selection, Slot
from mrsa_server.engines.embedded import EmbeddedEngine

Sets = Sequence[Sequence[int]]
Order = Callable[[Sets, random.Random], list[tuple[int, ...]]]

ROWS = ((16, 4, 1, 16), (16, 4, 2, 16), (16, 4, 2, 1), (32, 4, 8, 32), (32, 4, 8, 1))
BLOCKS = (16, 32, 128)  # vLLM's on GPUs, the embedded engine's, vLLM's on CPUs
QUESTION_WORDS = 1_460  # some 1,500 tokens
TEMPLATES = load_templates()
_WORDS = (
    "river stone market ladder winter copper garden engine harbour letter bridge orchard signal valley basket"
    " candle mirror hammer forest island pepper silver thunder window anchor barrel circle desert feather glacier"
)


def drawn(sets: Sets, stream: random.Random) -> list[tuple[int, ...]]:
    """As they are drawn: each set in a random order of its own."""
    return [tuple(stream.sample(list(members), len(members))) for members in sets]


def ascending(sets: Sets, stream: random.Random) -> list[tuple[int, ...]]:
    """By index."""
    return [tuple(sorted(members)) for members in sets]


def frequency(sets: Sets, stream: random.Random) -> list[tuple[int, ...]]:
    """What most sets of the round hold stands first: one order for all sets, as in an FP-tree."""
    held = Counter(member for members in sets for member in members)
    return [tuple(sorted(members, key=lambda member: (-held[member], member))) for members in sets]


def greedy(sets: Sets, stream: random.Random) -> list[tuple[int, ...]]:
    """What most sets hold goes first in all that hold it; then the same among these, and among the others."""
    ordered: list[tuple[int, ...]] = [()] * len(sets)
    groups: list[tuple[tuple[int, ...], dict[int, frozenset[int]]]] = [
        ((), {place: frozenset(members) for place, members in enumerate(sets)})
    ]
    while groups:
        prefix, left = groups.pop()
        if len(set(left.values())) == 1:
            for place, members in left.items():
                ordered[place] = (*prefix, *sorted(members))
            continue
        held = Counter(member for members in left.values() for member in members)
        first = min(held, key=lambda member: (-held[member], member))
        with_it = {place: members - {first} for place, members in left.items() if first in members}
        groups.append(((*prefix, first), with_it))
        if len(with_it) < len(left):
            groups.append((prefix, {place: members for place, members in left.items() if place not in with_it}))
    return ordered


ORDERS: dict[str, Order] = {"drawn": drawn, "ascending": ascending, "frequency": frequency, "greedy": greedy}


def rounds_of(seed: int, population: int, set_size: int, rounds: int, finals: int) -> list[list[tuple[int, ...]]]:
    """The sets that a run needs, by round from 1."""
    sets = [draw_sets(seed_of(seed, "sets", round), population, set_size, population) for round in range(1, rounds + 1)]
    slots = sorted(needed(sets, (Slot(rounds, index) for index in range(finals))))
    return [
        [tuple(sets[round - 1][slot.index]) for slot in slots if slot.round == round] for round in range(1, rounds + 1)
    ]


def shared_places(rounds: Iterable[Sets], order: Order, stream: random.Random) -> float:
    """Share of all places whose member, with all before it, stands at the same place in an earlier set of its round."""
    places = distinct = 0
    for sets in rounds:
        prompts = order(sets, stream)
        places += sum(map(len, prompts))
        distinct += len({prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)})
    return 1 - distinct / places


def print_places(seeds: int) -> None:
    print(f"Candidates' places that repeat a prefix of their round, means of {seeds} seeds.\n")
    print(f"| N, C, T, F | {' | '.join(ORDERS)} |\n|---|{'---|' * len(ORDERS)}")
    for row in ROWS:
        graphs = [rounds_of(seed, *row) for seed in range(seeds)]
        shares = [
            mean(shared_places(graph, order, random.Random(seed)) for seed, graph in enumerate(graphs))
            for order in ORDERS.values()
        ]
        print(f"| {', '.join(map(str, row))} | {' | '.join(f'{share:.3f}' for share in shares)} |", flush=True)


def computed_tokens(prompts: Iterable[Sequence[int]], block_tokens: int) -> int:
    """Prompt tokens that an engine computes which shares every whole block: each distinct prefix of blocks once.

    What follows the last whole block is every prompt's own, and its last token is never taken from a cache.
    """
    blocks: set[tuple[int, ...]] = set()
    computed = 0
    for prompt in prompts:
        whole = len(prompt) // block_tokens
        prefixes = [tuple(prompt[: end * block_tokens]) for end in range(1, whole + 1)]
        known = sum(prefix in blocks for prefix in prefixes)
        blocks.update(prefixes)
        computed += len(prompt) - min(known * block_tokens, (len(prompt) - 1) // block_tokens * block_tokens)
    return computed


class Prefill(NamedTuple):
    """Some prompts that were computed together. Times are from the first one's start."""

    prompt_tokens: int
    cached_tokens: int
    counted: tuple[int, int]  # vLLM's own counters of the same: tokens asked for in the cache, tokens found
    mean_s: float  # to a first token
    last_s: float  # to the last one's first token
    cpu_s: float


@dataclass
class Bench:
    """The embedded engine with vLLM's counters on."""

    engine: EmbeddedEngine

    async def prefill(self, prompts: Sequence[tuple[Message, ...]], leaders: int = 0) -> Prefill:
        """Compute prompts on a cold cache, all at once.

        Args:
            prompts: The prompts.
            leaders: Hold all but so many back until these have their first token; 0 holds none.
        """
        assert self.engine._llm is not None
        await self.engine._llm.reset_prefix_cache()
        counted, cpu, start = _counted(), _cpu_s(), time.perf_counter()
        tokens: list[tuple[int, int]] = []
        seconds: list[float] = []

        async def one(place: int) -> None:
            request = RolloutRequest("bench", Slot(0, place), prompts[place], max_tokens=1)
            async with aclosing(self.engine.generate(request)) as deltas:
                async for delta in deltas:
                    if delta.prompt_tokens is not None:
                        seconds.append(time.perf_counter() - start)
                        tokens.append((delta.prompt_tokens, delta.cached_tokens or 0))

        for batch in (range(leaders), range(leaders, len(prompts))):
            async with asyncio.TaskGroup() as tasks:
                for place in batch:
                    tasks.create_task(one(place))
        now = _counted()
        return Prefill(
            sum(prompt for prompt, _ in tokens),
            sum(cached for _, cached in tokens),
            (now[0] - counted[0], now[1] - counted[1]),
            mean(seconds),
            max(seconds),
            _cpu_s() - cpu,
        )

    async def run(self, params: Params) -> State:
        """A run to its end, on a cold cache."""
        assert self.engine._llm is not None
        await self.engine._llm.reset_prefix_cache()
        problem = Problem((Message("user", ("Write a long essay on the history of one trade, with its dates.",)),))
        async with open_run(init("bench", problem, params, TEMPLATES), self.engine, watch=Watch.NONE) as events:
            async for _ in events:
                pass
            return events.state

    async def ids(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        """A prompt as the engine computes it."""
        return await self.engine._prompts.render(messages)


@asynccontextmanager
async def bench(options: argparse.Namespace) -> AsyncIterator[Bench]:
    engine = EmbeddedEngine()
    engine._args |= {
        "disable_log_stats": False,
        "kv_cache_memory_bytes": 1 << 31,  # 46,000 tokens: what is not found was not shared, rather than evicted
        "max_num_batched_tokens": options.step_tokens,
        "block_size": options.block_tokens,
        "long_prefill_token_threshold": options.chunk_tokens,
    }
    await engine.start()
    try:
        yield Bench(engine)
    finally:
        await engine.aclose()


def _counted() -> tuple[int, int]:
    from prometheus_client import REGISTRY

    values = {
        sample.name: int(sample.value)
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name in ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
    }
    return values.get("vllm:prefix_cache_queries_total", 0), values.get("vllm:prefix_cache_hits_total", 0)


def _cpu_s() -> float:
    """Of this process and the engine's."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def question(seed: int) -> tuple[Message, ...]:
    stream = random.Random(seed)
    return (Message("user", (" ".join(stream.choice(_WORDS.split()) for _ in range(QUESTION_WORDS)),)),)


async def print_round_0(bench: Bench, population: int) -> None:
    same, other = [question(0)] * population, [question(seed) for seed in range(1, population + 1)]
    await bench.prefill([question(population + 1)])  # what is set up at first use is no cost of a prompt
    rows = {
        "one prompt": await bench.prefill(same[:1]),
        f"{population} of one prompt, at once": await bench.prefill(same),
        f"{population} of one prompt, one first": await bench.prefill(same, leaders=1),
        f"{population} prompts, at once": await bench.prefill(other),
    }
    print("\n| round 0 | prompt tokens | computed | vLLM's counters | first token, mean s | last s | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(
            f"| {name} | {row.prompt_tokens:,} | {row.prompt_tokens - row.cached_tokens:,} "
            f"| {row.counted[0]:,} - {row.counted[1]:,} | {row.mean_s:.2f} | {row.last_s:.2f} | {row.cpu_s:.2f} |",
            flush=True,
        )


async def print_orders(bench: Bench, seeds: int, params: Params) -> None:
    """Real tails of real runs; their prompts computed anew in every order, round by round as they were."""
    rows: dict[str, list[Prefill]] = {name: [] for name in ORDERS}
    blocks: dict[str, list[list[int]]] = {name: [] for name in ORDERS}
    live: list[float] = []
    tails: list[int] = []
    for seed in range(seeds):
        state = await bench.run(replace(params, seed=seed))
        usages = [rollout.usage for slot, rollout in state.rollouts.items() if slot.round]
        live.append(sum(usage.cached_tokens for usage in usages) / sum(usage.prompt_tokens for usage in usages))
        tails += [len(rollout.tail.token_ids) for rollout in state.rollouts.values() if rollout.tail]
        for name, order in ORDERS.items():
            prompts = prompts_of(state, order)
            rows[name].append(await bench.prefill(prompts))
            ids = [await bench.ids(prompt) for prompt in prompts]
            blocks[name].append([sum(map(len, ids)), *(computed_tokens(ids, block) for block in BLOCKS)])
    print(
        f"\nAggregation prompts of {seeds} runs, N={params.population} C={params.set_size} T={params.rounds} "
        f"F={params.final_candidates}, tails of {mean(tails):.0f} tokens. As the runs "
        f"themselves went, the cache held {mean(live):.3f} of their tokens.\n"
    )
    print(
        "| order | prompt tokens | found in the cache | vLLM's counters | last first token, s | CPU s "
        f"| {' | '.join(f'by blocks of {block}' for block in BLOCKS)} |"
    )
    print(f"|---|---|---|---|---|---|{'---|' * len(BLOCKS)}")
    for name, runs in rows.items():
        total = sum(run.prompt_tokens for run in runs)
        counted = sum(run.counted[1] for run in runs) / sum(run.counted[0] for run in runs)
        columns = [sum(column) for column in zip(*blocks[name], strict=True)]
        print(
            f"| {name} | {total:,} | {sum(run.cached_tokens for run in runs) / total:.3f} | {counted:.3f} "
            f"| {mean(run.last_s for run in runs):.2f} | {mean(run.cpu_s for run in runs):.2f} "
            f"| {' | '.join(f'{1 - computed / columns[0]:.3f}' for computed in columns[1:])} |",
            flush=True,
        )


def prompts_of(state: State, order: Order) -> list[tuple[Message, ...]]:
    """The aggregation prompts of a run that has ended, with the members in another order."""
    prompts: list[tuple[Message, ...]] = []
    for round in range(1, state.params.rounds + 1):
        slots = sorted(slot for slot in state.needed if slot.round == round)
        for members in order([state.sets[round - 1][slot.index] for slot in slots], random.Random(round)):
            tails = [state.rollouts[Slot(round - 1, member)].tail for member in members]
            prompts.append(aggregation_messages(TEMPLATES, state.problem, tails, state.params.seed, round))
    return prompts


async def measure(options: argparse.Namespace) -> None:
    params = Params(
        population=16,
        set_size=4,
        rounds=1,
        rollout_tokens=208,
        tail_tokens=200,
        final_tokens=1,
        final_candidates=16,
        selection=Selection.FIRST,
    )
    async with bench(options) as engine:
        print(
            f"\nSteps of {options.step_tokens} tokens, blocks of {options.block_tokens}, "
            f"long_prefill_token_threshold {options.chunk_tokens}."
        )
        await print_round_0(engine, params.population)
        if options.runs:
            await print_orders(engine, options.runs, params)
            await print_orders(engine, options.runs, replace(params, rounds=2, final_candidates=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=200, help="draws averaged without an engine; 0 for none")
    parser.add_argument("--runs", type=int, default=2, help="runs measured in each of two shapes; 0 for none")
    parser.add_argument("--step-tokens", type=int, default=512, help="vLLM's max_num_batched_tokens")
    parser.add_argument("--block-tokens", type=int, default=32, help="vLLM's block_size")
    parser.add_argument("--chunk-tokens", type=int, default=0, help="vLLM's long_prefill_token_threshold")
    options = parser.parse_args()
    if options.seeds:
        print_places(options.seeds)
    asyncio.run(measure(options))


if __name__ == "__main__":
    main()
