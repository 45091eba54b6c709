"""A model that could think and answers at once: rules hold though its tokens come many at a time."""

from __future__ import annotations

import pytest

from harness.engine import Vocabulary
from harness.events import RolloutFinished
from harness.markovian_rsa import init
from harness.prompts import Templates
from harness.run import Watch, open_run
from harness.scripted import THINK_CLOSE, THINK_OPEN, Script, ScriptedEngine
from harness.types import AnswerRules, Finish, Message, Params, Problem, Rollout

ALONE = Params(population=1, rounds=0)


async def rollout(answer: str, rules: AnswerRules, chunk_tokens: int, templates: Templates) -> Rollout:
    """Of a plain rollout that nobody watches."""
    engine = ScriptedEngine(lambda _: Script("", answer), chunk_tokens=chunk_tokens, thinking=False)
    engine.vocabulary = Vocabulary((THINK_OPEN,), (THINK_CLOSE,))
    problem = Problem((Message("user", ("why",)),), rules)
    async with open_run(init("run", problem, ALONE, templates), engine, watch=Watch.NONE) as events:
        found = [event.rollout async for event in events if isinstance(event, RolloutFinished)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 128])
async def test_an_answer_keeps_to_its_bound_in_tokens(templates: Templates, chunk_tokens: int) -> None:
    made = await rollout("0123456789" * 30, AnswerRules(max_tokens=20), chunk_tokens, templates)
    assert made.finish is Finish.LENGTH
    assert made.answer == "0123456789" * 2
    assert made.usage.completion_tokens >= 20


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 4, 5, 7, 128])
async def test_a_stop_string_is_found_across_deltas(templates: Templates, chunk_tokens: int) -> None:
    made = await rollout(
        "some text STOP more of it " * 9, AnswerRules(stop=("STOP", "nowhere")), chunk_tokens, templates
    )
    assert (made.answer.strip(), made.finish) == ("some text", Finish.STOP)
    assert made.usage.completion_tokens < 15 + chunk_tokens + 1
