"""Thousands of runs on a fleet of modelled engines, in seconds: what a run takes, what it costs, what a fleet holds.

The same graphs, priorities and engine as a real run on the scripted engine's virtual clock, without text, tokens and
tasks: a test holds the two equal. Nothing here awaits or reads a clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf
from typing import NamedTuple, cast

from harness.budget import answer_share
from harness.lineage import descendants, draw_sets, needed, seed_of
from harness.markovian_rsa import PRIORITIES
from harness.speed import Batch, EngineModel, Stream
from harness.types import Params, Slot


class Order(StrEnum):
    """How a run is evaluated: as we do, or round by round behind a barrier with every rollout."""

    LAZY = "lazy"
    BARRIER = "barrier"


@dataclass(frozen=True, slots=True)
class Wording:
    """Lengths of what stands in the prompts beside tails, in tokens.

    Attributes:
        question: The conversation with its template, the prompt of round 0.
        opening: What an aggregation prompt has before its first candidate, the question left out.
        between: Between two candidates.
        closing: After the last.
    """

    question: int = 512
    opening: int = 160
    between: int = 48
    closing: int = 64

    def __post_init__(self) -> None:
        for name, low in (("question", 1), ("opening", 0), ("between", 0), ("closing", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: must be at least {low}, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Graph:
    """The rollouts of a run and who reads whom, by place: `round * N + index`.

    Attributes:
        params: Of the run; its seed drew the sets.
        ready: Places that wait for nothing, in the order in which they are asked for.
        readers: By place, who reads it.
        inputs: By place, whom it reads, ascending.
        rank: By place, how many of the run's rollouts wait for it: its priority within the run.
        finals: Places that the answer is taken from.
        count: Rollouts that are generated.
    """

    params: Params
    ready: tuple[int, ...]
    readers: tuple[tuple[int, ...], ...]
    inputs: tuple[tuple[int, ...], ...]
    rank: tuple[int, ...]
    finals: frozenset[int]
    count: int


def draw(params: Params, order: Order) -> Graph:
    """The graph of a run: what something reads, or everything behind a barrier.

    Behind the barrier nothing is ranked, and `readers` and `inputs` still say who reads whom.
    """
    width, rounds = params.population, params.rounds
    sets = tuple(
        draw_sets(seed_of(params.seed, "sets", round), width, params.set_size, width) for round in range(1, rounds + 1)
    )
    finals = [Slot(rounds, index) for index in range(params.final_candidates)]
    slots = needed(sets, finals)
    if order is Order.BARRIER:
        slots = frozenset(Slot(round, index) for round in range(rounds + 1) for index in range(params.count(round)))
    readers: dict[Slot, tuple[Slot, ...]] = {}
    inputs: list[tuple[int, ...]] = [()] * (width * (rounds + 1))
    for slot in sorted(slots):
        if slot.round:
            members = sets[slot.round - 1][slot.index]
            inputs[slot.round * width + slot.index] = tuple((slot.round - 1) * width + member for member in members)
            for member in members:
                source = Slot(slot.round - 1, member)
                readers[source] = (*readers.get(source, ()), slot)
    below = dict.fromkeys(slots, 0) if order is Order.BARRIER else descendants(readers, slots)
    rank = [0] * len(inputs)
    for slot, waiting in below.items():
        rank[slot.round * width + slot.index] = min(waiting, PRIORITIES - 1)
    ready = sorted((slot for slot in slots if slot.round == 0), key=lambda slot: (-below[slot], slot))
    return Graph(
        params=params,
        ready=tuple(slot.index for slot in ready),
        readers=tuple(
            tuple(reader.round * width + reader.index for reader in readers.get(Slot(*divmod(place, width)), ()))
            for place in range(len(inputs))
        ),
        inputs=tuple(inputs),
        rank=tuple(rank),
        finals=frozenset(slot.round * width + slot.index for slot in finals),
        count=len(slots),
    )


class Run:
    """One run of the simulation, and in the end what it took.

    Attributes:
        number: Its place in the order of starts; older runs go first.
        engine: Index of its engine.
        started_s: When it was asked for.
        ended_s: When its last candidate ended; below 0 before.
        tokens: Generated.
        prompt_tokens: Of all its requests.
        cached_tokens: Of these, found in the prefix cache.
        rollouts: Started.
    """

    __slots__ = (
        "_behind",
        "_generated",
        "_graph",
        "_left",
        "_lengths",
        "_missing",
        "cached_tokens",
        "ended_s",
        "engine",
        "number",
        "prompt_tokens",
        "rollouts",
        "started_s",
        "tokens",
    )

    def __init__(self, number: int, engine: int, started_s: float, graph: Graph, lengths: Sequence[int]) -> None:
        self.number = number
        self.engine = engine
        self.started_s = started_s
        self.ended_s = -1.0
        self.tokens = self.prompt_tokens = self.cached_tokens = self.rollouts = 0
        self._graph = graph
        self._lengths = lengths
        self._missing = [len(inputs) for inputs in graph.inputs]
        self._left = len(graph.finals)
        self._behind = 0  # of the round that runs, how many have ended: for the barrier
        self._generated: dict[int, int] = {}  # by place, thinking that a reader may see

    @property
    def wall_s(self) -> float:
        """From its start to its end."""
        return self.ended_s - self.started_s


class _Owner(NamedTuple):
    """Whose a request is; `second` tokens follow in another one, with a `</think>` of ours where none was `closed`."""

    run: Run
    place: int
    second: int
    closed: bool


class Simulation:
    """Runs on a fleet of equal engines; a run stays on one, the least loaded when it starts.

    Args:
        model: Of each engine.
        engines: How many.
        graphs: Of the runs; run i takes the i-th, around and around.
        order: As the graphs were drawn for.
        lengths: Tokens of thinking, markers left out, by a run's number and then by place.
        wording: Lengths of the prompts.
        answer_tokens: Tokens of an answer, its end included.
    """

    def __init__(
        self,
        model: EngineModel,
        engines: int,
        graphs: Sequence[Graph],
        order: Order,
        lengths: Callable[[int], Sequence[int]],
        wording: Wording,
        answer_tokens: int,
    ) -> None:
        self.engines = [Batch(model) for _ in range(engines)]
        self.now = 0.0
        self._graphs = graphs
        self._barrier = order is Order.BARRIER
        self._length = lengths
        self._wording = wording
        self._answer = answer_tokens
        self._load = [0] * engines  # runs that have not ended
        self._started = 0
        self._count = 0
        self._events: list[tuple[float, int, int]] = []  # when, order, engine; or -1, a start
        self._due = [-1.0] * engines  # when each engine is looked at next, so that older entries are known as such

    def start_at(self, at: float) -> None:
        """Have a run start."""
        self._count += 1
        heapq.heappush(self._events, (at, self._count, -1))

    def step(self) -> list[Run]:
        """Let the next thing happen.

        Returns:
            The runs that have ended by it; mostly none.

        Raises:
            IndexError: Nothing is left to happen.
        """
        while True:
            at, _, engine = heapq.heappop(self._events)
            if engine < 0:
                self.now = at
                self._start(at)
                return []
            if at == self._due[engine]:
                break
        self._due[engine] = -1.0
        self.now = at
        ended = [run for stream in self.engines[engine].due(at) if (run := self._reached(at, stream)) is not None]
        self._touch(engine)
        return ended

    def _touch(self, engine: int) -> None:
        """Look at an engine again when its next event is due."""
        at = self.engines[engine].next_at()
        if at != self._due[engine] and at != inf:
            self._due[engine] = at
            self._count += 1
            heapq.heappush(self._events, (at, self._count, engine))

    def _start(self, at: float) -> None:
        engine = self._load.index(min(self._load))
        self._load[engine] += 1
        number = self._started
        self._started += 1
        run = Run(number, engine, at, self._graphs[number % len(self._graphs)], self._length(number))
        for place in run._graph.ready:
            self._ask(at, run, place)
        self._touch(engine)

    def _ask(self, at: float, run: Run, place: int) -> None:
        """A rollout's request, with all that it will generate."""
        graph, words, number = run._graph, self._wording, run.number
        params = graph.params
        length = run._lengths[place] + 2  # both markers
        inputs = graph.inputs[place]
        prefixes: list[tuple[object, int]]
        if inputs:
            generated, tail = run._generated, params.tail_tokens
            name: tuple[int, ...] = (number, place // params.population)
            tokens = words.question + words.opening
            prefixes = [(name, tokens)]
            last = inputs[-1]
            for source in inputs:
                name = (*name, source)
                tokens += min(tail, generated[source]) + (words.between if source != last else words.closing)
                prefixes.append((name, tokens))
        else:
            tokens = words.question
            prefixes = [((number,), tokens)]
        second = 0
        if place in graph.finals:
            limit = params.final_tokens
            share = limit - answer_share(limit, None)
            whole = length + self._answer
            now = min(whole, share) if share > 0 else min(whole, limit)
            if share > 0 and whole > share:
                second = min(limit - share, self._answer if length > share else whole - share)
        else:
            now = min(length, params.rollout_tokens)
            run._generated[place] = min(length - 2, params.rollout_tokens - 1)
        run.rollouts += 1
        self._send(at, run, Stream(tokens, now, prefixes), _Owner(run, place, second, length <= now))

    def _send(self, at: float, run: Run, stream: Stream, owner: _Owner) -> None:
        stream.priority = run.number * PRIORITIES - run._graph.rank[owner.place]
        stream.owner = owner
        run.prompt_tokens += stream.prompt_tokens
        self.engines[run.engine].enter(at, stream)

    def _reached(self, at: float, stream: Stream) -> Run | None:
        """A request has ended; the run that has ended by it."""
        run, place, second, closed = cast(_Owner, stream.owner)
        run.tokens += stream.tokens
        run.cached_tokens += stream.cached_tokens
        graph = run._graph
        if second:
            tokens = stream.prompt_tokens + stream.tokens + (not closed)
            prefixes = [*stream.prefixes[:-1], (stream.prefixes[-1][0], tokens)]
            self._send(at, run, Stream(tokens, second, prefixes), _Owner(run, place, 0, True))
            return None
        if place in graph.finals:
            run._left -= 1
            if run._left:
                return None
            run.ended_s = at
            self._load[run.engine] -= 1
            return run
        if self._barrier:
            run._behind += 1
            if run._behind == graph.params.population:
                run._behind = 0
                first = (place // graph.params.population + 1) * graph.params.population
                for reader in range(first, first + graph.params.count(first // graph.params.population)):
                    self._ask(at, run, reader)
            return None
        ready = []
        for reader in graph.readers[place]:
            run._missing[reader] -= 1
            if not run._missing[reader]:
                ready.append(reader)
        if len(ready) > 1:
            ready.sort(key=lambda reader: (-graph.rank[reader], reader))
        for reader in ready:
            self._ask(at, run, reader)
        return None


def draw_many(params: Params, order: Order, count: int) -> tuple[Graph, ...]:
    """Graphs of runs with seeds of their own, from the stream of `params.seed`."""
    return tuple(draw(replace(params, seed=seed_of(params.seed, "run", number)), order) for number in range(count))
