"""`stop_when_agreed`, `skip_agreed_sets`, `quorum`, `start_small` as a client meets them."""

from __future__ import annotations

from typing import Any

import pytest

from harness.scripted import Script, ScriptedEngine, Speed
from harness.types import RolloutRequest
from mrsa_server.ask import Board
from tests.helpers.serving import CHAT, ask, chunks, events, in_memory, joined

SIZES = {"population": 8, "rounds": 2, "set_size": 3, "rollout_tokens": 400, "tail_tokens": 40, "final_tokens": 400}
OFF = {"stop_when_agreed": None, "skip_agreed_sets": False, "quorum": None, "start_small": None}


def agreeing(request: RolloutRequest) -> Script:
    """All say 42, but the last rollouts of a round think longer."""
    return Script("x" * (300 if request.slot.index > 5 else 60), "It is \\boxed{42}")


def quarrelling(request: RolloutRequest) -> Script:
    return Script("x" * 60, f"\\boxed{{{request.slot.round}{request.slot.index}}}")


async def both(script: Any, **mrsa: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same request whole and streamed."""
    engine = ScriptedEngine(script, speed=Speed(step_s=1e-4), chunk_tokens=10)
    body = ask(mrsa={**SIZES, "seed": 3, **mrsa})
    async with in_memory(engine) as client:
        whole = await client.post(CHAT, json=body)
        streamed = await client.post(CHAT, json={**body, "stream": True})
        assert whole.status_code == 200, whole.text
        return whole.json(), chunks(streamed.text)


async def test_a_run_that_agrees_ends_early_and_reports_what_that_saved() -> None:
    whole, stream = await both(agreeing, stop_when_agreed={"share": 0.6, "min_votes": 3})
    report = whole["mrsa"]
    assert report["stopped"] == "agreed"
    assert whole["choices"][0]["message"]["content"] == joined(stream) == "It is \\boxed{42}"
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert report["saved"]["stop_when_agreed"]["rollouts"] > 0
    assert report["saved"]["stop_when_agreed"]["tokens_estimate"] > 0
    assert report["answers"][0]["round"] == 0
    assert report["answers"][0]["votes"] >= 3
    (agreed,) = (event for event in events(stream) if event["event"] == "answers.agreed")
    assert agreed["votes"] >= 3
    assert events(stream)[-1]["event"] == "run.finished"
    assert events(stream)[-1]["stopped"] == "agreed"
    assert report["params"]["stop_when_agreed"] == {"share": 0.6, "min_votes": 3}


@pytest.mark.parametrize(
    ("asked", "found"), [(True, {"share": 0.75, "min_votes": 3}), (False, None), ({}, {"share": 0.75, "min_votes": 3})]
)
async def test_true_asks_for_the_usual_agreement(asked: object, found: object) -> None:
    whole, _ = await both(agreeing, stop_when_agreed=asked)
    assert whole["mrsa"]["params"]["stop_when_agreed"] == found


async def test_fewer_answers_than_n_are_foretold() -> None:
    async with in_memory(ScriptedEngine(agreeing)) as client:
        body = ask(mrsa={**SIZES, "rounds": 0, "stop_when_agreed": True, "quorum": 2}, n=8)
        found = (await client.post(CHAT, json=body)).json()
        assert found["mrsa"]["warnings"] == [
            "stop_when_agreed may end the run with fewer answers than n=8",
            "quorum may end the run with fewer answers than n=8",
        ]
        exact = (await client.post(CHAT, json=ask(mrsa={**SIZES, "rounds": 0}, n=8))).json()
        assert len(exact["choices"]) == 8
        assert exact["mrsa"]["warnings"] == []


async def test_sets_that_agree_are_taken_over() -> None:
    whole, stream = await both(agreeing, skip_agreed_sets=True)
    report = whole["mrsa"]
    assert report["stopped"] is None
    assert whole["choices"][0]["message"]["content"] == joined(stream) == "It is \\boxed{42}"
    skipped = [event for event in events(stream) if event["event"] == "set.skipped"]
    assert report["saved"]["skip_agreed_sets"]["rollouts"] == len(skipped) > 0
    assert sum(row["agreed"] for row in report["rounds"]) == len(skipped)
    assert [row["rollouts"] for row in report["rounds"]][1:] == [0, 0]


async def test_a_quorum_cuts_stragglers_and_says_how_many() -> None:
    whole, stream = await both(agreeing, quorum=4, rounds=1, final_candidates=8)
    report = whole["mrsa"]
    assert report["saved"]["quorum"]["cut"] > 0
    assert report["saved"]["quorum"]["tokens_at_most"] > 0
    reached = [event for event in events(stream) if event["event"] == "quorum.reached"]
    assert {event["round"] for event in reached} == {0, 1}
    assert any(event.get("finish") == "aborted" for event in events(stream))


async def test_a_small_start_is_topped_up_only_where_it_disagrees() -> None:
    easy, _ = await both(agreeing, start_small=3)
    assert easy["mrsa"]["stopped"] == "agreed"
    assert sum(row["rollouts"] for row in easy["mrsa"]["rounds"]) == 3
    assert easy["mrsa"]["saved"]["start_small"]["rollouts"] > 0
    hard, stream = await both(quarrelling, start_small=3)
    assert hard["mrsa"]["stopped"] is None
    assert hard["mrsa"]["saved"]["start_small"]["rollouts"] == 0
    assert [event["rollouts"] for event in events(stream) if event["event"] == "population.topped_up"] == [
        hard["mrsa"]["rounds"][0]["rollouts"] - 3
    ]


async def test_all_are_off_unless_asked_for() -> None:
    whole, _ = await both(agreeing)
    assert OFF.items() <= whole["mrsa"]["params"].items()
    assert whole["mrsa"]["saved"].keys() == {"rollouts", "tokens_estimate"}


async def test_parameters_in_force_can_be_sent_back() -> None:
    first, _ = await both(agreeing, stop_when_agreed={"min_votes": 3}, skip_agreed_sets=True, quorum=6, start_small=4)
    again, _ = await both(agreeing, **first["mrsa"]["params"])
    assert again["mrsa"]["params"] == first["mrsa"]["params"]
    assert again["choices"][0]["message"]["content"] == first["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mrsa": {**SIZES, "quorum": 9}}, "mrsa.quorum"),
        ({"mrsa": {**SIZES, "quorum": 0}}, "mrsa.quorum"),
        ({"mrsa": {**SIZES, "start_small": 1}}, "mrsa.start_small"),
        ({"mrsa": {**SIZES, "start_small": True}}, "mrsa.start_small"),
        ({"mrsa": {**SIZES, "stop_when_agreed": 0.75}}, "mrsa.stop_when_agreed"),
        ({"mrsa": {**SIZES, "stop_when_agreed": "yes"}}, "mrsa.stop_when_agreed"),
        ({"mrsa": {**SIZES, "stop_when_agreed": {"share": 1.5}}}, "mrsa.stop_when_agreed.share"),
        ({"mrsa": {**SIZES, "stop_when_agreed": {"share": 0}}}, "mrsa.stop_when_agreed.share"),
        ({"mrsa": {**SIZES, "stop_when_agreed": {"min_votes": 1}}}, "mrsa.stop_when_agreed.min_votes"),
        ({"mrsa": {**SIZES, "stop_when_agreed": {"min_votes": 9}}}, "mrsa.stop_when_agreed.min_votes"),
        ({"mrsa": {**SIZES, "stop_when_agreed": {"vote": 3}}}, "mrsa.stop_when_agreed.vote"),
        ({"mrsa": {**SIZES, "skip_agreed_sets": 1}}, "mrsa.skip_agreed_sets"),
        ({"mrsa": {**SIZES, "skip_agreed_sets": True, "set_size": 1}}, "mrsa.skip_agreed_sets"),
        ({"mrsa": {**SIZES, "stop_when_agreed": {}}, "stop": ["END"]}, "mrsa.stop_when_agreed"),
        ({"mrsa": {**SIZES, "start_small": 2}, "max_completion_tokens": 50}, "mrsa.start_small"),
    ],
)
async def test_what_cannot_be_is_a_400_that_names_it(fields: dict[str, Any], param: str) -> None:
    async with in_memory(ScriptedEngine(agreeing)) as client:
        response = await client.post(CHAT, json=ask(**fields))
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param
        assert "AgreementIn" not in error["message"]


async def test_the_terminal_tells_what_was_decided() -> None:
    _, stream = await both(agreeing, skip_agreed_sets=True, quorum=4)
    board = Board()
    lines = [line for chunk in stream if (line := board.take(chunk)) is not None]
    assert any("its set agrees" in line for line in lines)
    assert "skip_agreed_sets saved" in board.cost()


@pytest.mark.parametrize("seed", range(6))
async def test_nothing_of_a_round_is_told_after_its_end(seed: int) -> None:
    def say(request: RolloutRequest) -> Script:
        place, length = tuple(request.slot), 300 if request.slot == (0, 5) else 20
        return Script(f"{seed}{place}" * length, f"\\boxed{{{2 if request.slot == (0, 0) else 1}}}")

    _, stream = await both(say, rounds=1, set_size=2, final_candidates=6, skip_agreed_sets=True, seed=seed)
    over: set[int] = set()
    for event in events(stream):
        if event["event"] in ("set.skipped", "rollout.finished", "rollout.failed"):
            assert event["round"] not in over
        elif event["event"] == "round.finished":
            over.add(event["round"])
    assert over == {0, 1}
