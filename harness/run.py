"""The one async driver: asks the algorithm what follows, awaits engines, hands out events. It decides nothing itself.

Rollout tasks put what happened to them into one inbox; the iterator alone folds it into the state. So there is a single
writer and no lock.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from harness.budget import answer_share
from harness.engine import Engine, EngineDead, EngineError, GenerationLost
from harness.events import (
    AnswersGrouped,
    DeadlineReached,
    Event,
    RolloutAborted,
    RolloutDelta,
    RolloutFailed,
    RolloutFinished,
    RolloutStarted,
    RunResumed,
    Stopped,
)
from harness.markovian_rsa import State, apply, cuts, decide, pending_vote, plan
from harness.selection import MathJudge, extract_answer, group_by_text
from harness.tails import LoopDetector, TraceBuilder, cut_tail
from harness.types import AnswerRules, Carry, Finish, Params, Rollout, RolloutRequest, Slot, Tail, TokenIds, Usage

_JUDGE_S = 10.0  # for the answers of one run, waiting included
_CHARACTERS_PER_TOKEN = 4.0  # of English, where nothing was measured
_LAST_DECODE_S = 1.0  # for what stands there when a deadline cuts a rollout
# Before a lost rollout is asked for again, each time: a router takes some seconds to find out that an engine is gone.
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_BEGUN = 3  # times that one counts which had begun to answer: a proxy that cuts what is long would cut it for ever

Inbox = Event | RolloutDelta | EngineDead


class Watch(StrEnum):
    """Which rollouts are followed delta by delta."""

    NONE = "none"
    FINAL = "final"
    ALL = "all"


class Judge(Protocol):
    """Says which answers are equal (`MathJudge`)."""

    def group(self, answers: list[str | None]) -> Future[tuple[int, ...]]:
        """A group number for each answer, -1 for none."""
        ...


async def judged(judge: Judge, answers: list[str | None]) -> tuple[int, ...]:
    """Which answers are equal: as texts, where the judge takes too long, since it has other runs' answers to judge."""
    try:
        async with asyncio.timeout(_JUDGE_S):
            return await asyncio.wrap_future(judge.group(answers))
    except TimeoutError:
        return group_by_text(answers)


@asynccontextmanager
async def open_run(
    state: State,
    engine: Engine,
    *,
    watch: Watch = Watch.FINAL,
    judge: Judge | None = None,
    elapsed_s: float = 0.0,
    lost_tokens: int | None = None,
) -> AsyncIterator[RunEvents]:
    """Run from a state to its outcome. Leaving the block aborts whatever the engine still does for it.

    Args:
        state: A fresh one of `init`, or one taken up again.
        engine: Where rollouts are generated.
        watch: Which rollouts yield `RolloutDelta`.
        judge: Who compares answers; by default a `MathJudge` of the run's own.
        elapsed_s: Seconds that count against `deadline_s` already.
        lost_tokens: For a run taken up again: what its lost generations had cost; None charges their whole grants.

    Yields:
        An iterator over the events; its `state` is folded up to the last one handed out.

    Raises:
        EngineDead: Out of the iteration. Nothing was recorded; the state can be taken up again.

    An engine is asked for a rollout only when its `RolloutStarted` has been taken and the next event is asked for:
    whoever writes events down before he comes back knows of every token that may have been generated.
    """
    if judge is None:
        with closing(MathJudge()) as own_judge:
            async with open_run(
                state, engine, watch=watch, judge=own_judge, elapsed_s=elapsed_s, lost_tokens=lost_tokens
            ) as events:
                yield events
        return
    async with asyncio.TaskGroup() as tasks:
        events = RunEvents(state, engine, watch, judge, tasks, elapsed_s, lost_tokens)
        failure: Exception | None = None
        try:
            yield events
        except Exception as error:  # raised below as it is: the task group would wrap it
            failure = error
        finally:
            events.cancel()
    if failure is not None:
        raise failure


@dataclass(slots=True)
class _Live:
    """A rollout that is being generated."""

    task: asyncio.Task[None] | None = None
    tokens: int = 0
    limit: int | None = None  # tokens to which it goes on, where it is to be cut
    begun: bool = False  # a task that is cancelled before its first step never runs
    ending: bool = False  # all its tokens are there
    cut: bool = False


class RunEvents(AsyncIterator[Event | RolloutDelta]):
    """The events of a run as they come about. Not made directly: `open_run` does."""

    def __init__(
        self,
        state: State,
        engine: Engine,
        watch: Watch,
        judge: Judge,
        tasks: asyncio.TaskGroup,
        elapsed_s: float,
        lost_tokens: int | None,
    ) -> None:
        self.state = state
        self._now = state  # ahead of `state` by what is in the outbox
        self._engine = engine
        self._watch = watch
        self._judge = judge
        self._tasks = tasks
        self._inbox: asyncio.Queue[Inbox] = asyncio.Queue()
        self._outbox: deque[tuple[Event, State]] = deque()
        self._live: dict[Slot, _Live] = {}
        self._losses: Counter[Slot] = Counter()
        self._asked: list[tuple[RolloutRequest, _Live]] = []  # their `RolloutStarted` may not have been taken yet
        self._voting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._moved = True  # since `_advance` last looked
        if state.running:
            charged = sum(state.running.values()) if lost_tokens is None else lost_tokens
            self._record(RunResumed(tuple(sorted(state.running)), charged))
        if state.params.deadline_s is not None and state.stopping is not Stopped.DEADLINE:
            left = max(0.0, state.params.deadline_s - elapsed_s)
            self._timer = asyncio.get_running_loop().call_later(left, self._inbox.put_nowait, DeadlineReached())

    @property
    def lost_tokens(self) -> int:
        """Tokens that rollouts in flight have generated so far: what an `EngineDead` throws away."""
        return sum(live.tokens for live in self._live.values())

    async def __anext__(self) -> Event | RolloutDelta:
        """The next event.

        Raises:
            StopAsyncIteration: After the outcome.
            EngineDead: The engine is gone.
        """
        while True:
            if self._outbox:
                event, self.state = self._outbox.popleft()
                return event
            self._start()  # whoever takes the events has come back, and so has kept all that he took
            if self._now.outcome is not None:
                raise StopAsyncIteration
            if self._moved:  # a delta moves nothing
                self._moved = False
                self._advance()
                continue
            item = await self._inbox.get()
            if isinstance(item, EngineDead):
                if self._now.agreed is None:
                    raise item
                self._give_up()
                continue
            if isinstance(item, RolloutDelta):
                return item
            if isinstance(item, DeadlineReached):
                if self._now.agreed is not None:  # there is an answer already
                    continue
                self._end_vote()
            self._record(item)
            self._cut()

    def rest(self) -> list[tuple[Event, State]]:
        """The further events that are there already, each with the state after it: for who keeps them together."""
        found = list(self._outbox)
        self._outbox.clear()
        if found:
            self.state = found[-1][1]
        return found

    def cancel(self) -> None:
        """Abort everything in flight."""
        if self._timer is not None:
            self._timer.cancel()
        for live in self._live.values():
            if live.task is not None:
                live.task.cancel()
        if self._voting is not None:
            self._voting.cancel()

    def _give_up(self) -> None:
        """Wait for no rollout: there is an answer, and the engine that was to cut them is gone."""
        lost = self.lost_tokens
        for live in self._live.values():
            if live.task is not None:
                live.task.cancel()
        self._live.clear()
        self._asked.clear()
        self._record(RunResumed(tuple(sorted(self._now.running)), lost))

    def _start(self) -> None:
        """Ask the engine for the rollouts whose start is known to whoever takes the events."""
        for request, live in self._asked:
            if not live.begun:  # it was not cut meanwhile
                live.task = self._tasks.create_task(self._rollout(request, live))
        self._asked.clear()

    def _end_vote(self) -> None:
        """Wait for no judge."""
        if self._voting is not None:
            self._voting.cancel()
            self._voting = None

    def _cut(self) -> None:
        """Hold rollouts in flight to what is left to them; each puts what stands there into the inbox."""
        for slot, tokens in cuts(self._now).items():
            live = self._live[slot]
            live.limit = tokens
            if live.cut or live.tokens < tokens or (live.ending and self._now.stopping is not Stopped.DEADLINE):
                continue
            live.cut = True
            if live.begun and live.task is not None:
                live.task.cancel()
            else:
                live.begun = True
                self._inbox.put_nowait(RolloutAborted(Rollout(slot, Tail((), ""), "", Finish.ABORTED, Usage(), 0.0)))

    def _record(self, event: Event) -> None:
        self._now = apply(self._now, event)
        self._moved = True
        self._outbox.append((event, self._now))
        if isinstance(event, RolloutFinished | RolloutAborted):
            self._live.pop(event.rollout.slot, None)
        elif isinstance(event, RolloutFailed):
            self._live.pop(event.slot, None)
        elif isinstance(event, RunResumed):
            for slot in event.slots:
                self._live.pop(slot, None)

    def _advance(self) -> None:
        """Everything that follows without waiting: decisions, and rollouts that can start."""
        while (event := decide(self._now)) is not None:
            self._record(event)
        for request in plan(self._now):
            self._record(RolloutStarted(request.slot, request.members, request.max_tokens))
            live = self._live[request.slot] = _Live()
            self._asked.append((request, live))
        self._cut()
        if self._now.agreed is not None:
            self._end_vote()
        if self._now.outcome is not None:
            if self._timer is not None:
                self._timer.cancel()
        elif (candidates := pending_vote(self._now)) and self._voting is None:
            self._voting = self._tasks.create_task(self._vote(candidates))
        elif not self._live and self._voting is None:
            raise RuntimeError(f"run {self._now.run_id} waits for nothing")

    async def _vote(self, candidates: tuple[Slot, ...]) -> None:
        answers = [extract_answer(self._now.rollouts[slot].answer) for slot in candidates]
        if self._now.stopping is Stopped.DEADLINE:  # the judge may take seconds, and there are none left
            groups = group_by_text(answers)
        else:
            groups = await judged(self._judge, answers)
        self._voting = None
        self._inbox.put_nowait(AnswersGrouped(candidates, groups))

    async def _rollout(self, request: RolloutRequest, live: _Live) -> None:
        """One rollout, from its first request to the event that ends it."""
        if live.begun:
            return
        live.begun = True
        clock = asyncio.get_running_loop().time
        start = clock()
        params = self._now.params
        last = request.slot.round == params.rounds
        shown = self._watch is Watch.ALL or (last and self._watch is Watch.FINAL)
        # Where a rollout may be cut, what stands there is taken: an engine is not to hold the end of it back.
        request = replace(request, watched=shown or params.may_cut)
        generation = _Generation(self._engine, request, params, self._inbox, live, shown)
        losses = self._losses[request.slot]
        try:
            if losses:
                await asyncio.sleep(_PAUSES_S[min(losses, len(_PAUSES_S)) - 1])
            finish = await generation.run(must_answer=last or params.carry is Carry.ANSWER)
            live.ending = True
            rollout = await generation.rollout(finish, clock() - start)
            self._inbox.put_nowait(RolloutFinished(rollout, generation.builder.trace()))
        except EngineError as error:
            usage, seconds = generation.usage(), clock() - start
            if isinstance(error, GenerationLost) and losses < len(_PAUSES_S):
                self._losses[request.slot] += _BEGUN if usage.completion_tokens else 1
                self._inbox.put_nowait(RunResumed((request.slot,), usage.completion_tokens))
            else:
                self._inbox.put_nowait(RolloutFailed(request.slot, str(error), usage, seconds, error.status))
        except EngineDead as error:
            self._inbox.put_nowait(error)
        except asyncio.CancelledError:
            if not live.cut:
                raise
            # Cut by the run itself: what stands there may be the best answer so far, or somebody's input.
            try:
                async with asyncio.timeout(_LAST_DECODE_S):
                    rollout = await generation.rollout(Finish.ABORTED, clock() - start)
            except (EngineError, EngineDead, TimeoutError) as error:
                reason = str(error) or "its text was not decoded in time"
                self._inbox.put_nowait(RolloutFailed(request.slot, reason, generation.usage(), clock() - start))
            else:
                read = cuts(self._now).get(request.slot) != 0
                self._inbox.put_nowait(
                    RolloutFinished(replace(rollout, cut=True), generation.builder.trace())
                    if read
                    else RolloutAborted(rollout)
                )


class _Generation:
    """The requests of one rollout: one as a rule, a second where the thinking has to be closed for an answer."""

    def __init__(
        self,
        engine: Engine,
        request: RolloutRequest,
        params: Params,
        inbox: asyncio.Queue[Inbox],
        live: _Live,
        shown: bool,
    ) -> None:
        self.builder = TraceBuilder(engine.vocabulary)
        self._engine = engine
        self._request = request
        self._params = params
        self._inbox = inbox
        self._live = live
        self._shown = shown
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._tokens = 0  # of requests that have ended, as the engine counts them
        self._ids = 0  # of these requests, in the trace
        self._loop = False
        self._cut = False

    async def run(self, must_answer: bool) -> Finish:
        """Generate until the rollout is done.

        Args:
            must_answer: Whether it has to end in an answer: the thinking is closed when its share is spent.
        """
        request, rules = self._request, self._request.answer
        close = self._engine.vocabulary.think_close
        if not close:
            return await self._ask(
                replace(request, max_tokens=min(request.max_tokens, rules.max_tokens or request.max_tokens))
            )
        if not must_answer:
            return await self._ask(replace(request, stop_ids=() if self._params.reads_answers else close))
        # Rules bind the answer alone: they can only be given to the engine once the thinking is over.
        bound = rules.max_tokens is not None or bool(rules.stop) or rules.json_schema is not None
        share = request.max_tokens - answer_share(request.max_tokens, rules.max_tokens)
        if share > 0:
            free = AnswerRules(tools=rules.tools)
            finish = await self._ask(
                replace(request, max_tokens=share, stop_ids=close if bound else (), answer=free), unthought=rules
            )
            if finish is Finish.ABORTED:
                return finish
            if self.builder.thinking:
                self.builder.close_thinking()
            elif finish is Finish.LOOP or (finish is Finish.STOP and rules.json_schema is None):
                return finish
            elif not self.builder.thought and rules.json_schema is not None:
                self._begin_anew()  # it answered freely at once, where the answer has a form
        # An engine that was cut may have gone on to the end of its share.
        left = request.max_tokens - (max(share, self.generated) if self._cut else self.generated)
        if rules.max_tokens is not None:
            left = min(left, rules.max_tokens - (len(self.builder.token_ids) - self.builder.answer_start))
        if left < 1:
            return Finish.LENGTH
        return await self._ask(replace(request, max_tokens=left, continuation=tuple(self.builder.token_ids)))

    def _to_be_dropped(self, unthought: AnswerRules | None) -> bool:
        """Whether the text is a free answer where the answer has a form: nobody is shown what will be begun anew."""
        free = unthought is not None and unthought.json_schema is not None
        return free and not self.builder.thinking and not self.builder.thought

    def _begin_anew(self) -> None:
        self.builder = TraceBuilder(self._engine.vocabulary)
        self._ids = 0

    async def _ask(self, request: RolloutRequest, unthought: AnswerRules | None = None) -> Finish:
        """One request; its tokens are joined to the trace.

        Args:
            request: What to ask for.
            unthought: Rules to hold the text to if it turns out to be an answer without thinking.
        """
        builder, detector, before = self.builder, LoopDetector(), self.generated
        # Where tokens are estimated, an estimate must not cut an answer that keeps to its bound.
        limit = request.max_tokens if self._engine.vocabulary.exact else 2 * request.max_tokens
        finish: Finish | None = None
        counted: int | None = None
        seen, longest = "", max(map(len, unthought.stop), default=0) if unthought is not None else 0
        async with aclosing(self._engine.generate(request)) as deltas:
            async for delta in deltas:
                if request.stop_ids and builder.thought and delta.token_ids:  # the engine does not know stop ids
                    self._tokens += round(len(delta.token_ids) / self._engine.vocabulary.ids_per_token)
                    self._cut, finish = True, Finish.STOP
                    break
                builder.add(delta)
                self._prompt_tokens += delta.prompt_tokens or 0
                self._cached_tokens += delta.cached_tokens or 0
                self._live.tokens = generated = self.generated
                finish, counted = delta.finish, delta.completion_tokens
                if self._shown and delta.text and not self._to_be_dropped(unthought):
                    self._inbox.put_nowait(RolloutDelta(request.slot, delta.text, not builder.thinking, generated))
                if finish is not None:
                    break
                if unthought is not None and not builder.thinking and not builder.thought:
                    seen = seen[-longest:] + delta.text if longest else ""
                    if unthought.max_tokens is not None and len(builder.token_ids) >= unthought.max_tokens:
                        finish = Finish.LENGTH
                    elif longest and any(stop in seen for stop in unthought.stop):
                        finish = Finish.STOP
                if generated - before > limit:
                    finish = Finish.LENGTH  # an engine that does not keep to `max_tokens`
                elif self._live.limit is not None and generated >= self._live.limit:
                    finish = Finish.ABORTED
                elif detector.feed(delta.text):
                    self._loop, finish = True, Finish.LOOP
                if finish is not None:
                    self._cut = True
                    break
        if finish is None:
            raise EngineError("the engine ended a generation without saying why")
        self._tokens = self.generated if counted is None else before + counted
        if self._cut and unthought is not None and unthought.max_tokens is not None and not request.watched:
            builder.bound_answer(unthought.max_tokens)  # of a delta of many tokens, some may be beyond it
        self._ids = len(builder.token_ids) - builder.inserted
        if finish is Finish.STOP and request.stop_ids and builder.thought:
            return Finish.THOUGHT
        return finish

    @property
    def generated(self) -> int:
        """Tokens that the engine has generated for this rollout."""
        ids = len(self.builder.token_ids) - self.builder.inserted - self._ids
        return self._tokens + round(ids / self._engine.vocabulary.ids_per_token)

    def usage(self) -> Usage:
        """What the rollout has cost. Of one before the last stage nothing is an answer to the question."""
        last = self._request.slot.round == self._params.rounds
        start, stop = self.builder.trace().answer if last else (0, 0)
        answer = round((stop - start) / self._engine.vocabulary.ids_per_token)
        prompt = self._prompt_tokens or self._prompt_estimate()
        return Usage(prompt, self._cached_tokens, self.generated, max(0, self.generated - answer))

    def _prompt_estimate(self) -> int:
        """Tokens of the prompt where the engine never said: a stream that is cut may not have come to its usage."""
        if not self.builder.token_ids:
            return 0
        ratio = self._engine.vocabulary.ids_per_token
        characters = sum(len(message.text) for message in self._request.messages)
        return round(characters / (ratio if ratio > 1 else _CHARACTERS_PER_TOKEN))

    async def rollout(self, finish: Finish, seconds: float) -> Rollout:
        """What is left of the rollout: its tail and its answer, decoded."""
        trace = self.builder.trace()
        last = self._request.slot.round == self._params.rounds
        tail_ids = max(1, round(self._params.tail_tokens * self._engine.vocabulary.ids_per_token))
        tail = () if last else cut_tail(trace, tail_ids, self._params.carry)  # nothing reads the last round
        answer = (await self._decode(trace.token_ids[trace.answer[0] : trace.answer[1]])).strip()
        for stop in self._request.answer.stop:
            answer = answer.partition(stop)[0]
        return Rollout(
            slot=self._request.slot,
            tail=Tail(tail, await self._decode(tail)),
            answer=answer,
            finish=finish,
            usage=self.usage(),
            seconds=seconds,
            loop=self._loop,
            cut=self._cut,
        )

    async def _decode(self, token_ids: TokenIds) -> str:
        return await self._engine.decode(token_ids) if len(token_ids) else ""
