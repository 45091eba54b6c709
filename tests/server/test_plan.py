"""`mrsa plan`: what it says of a load, and of what it cannot take."""

from __future__ import annotations

import json
import time

import pytest

from mrsa_server.cli import main


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["plan", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def number(found: object, *path: str) -> float:
    for key in path:
        assert isinstance(found, dict)
        found = found[key]
    assert isinstance(found, int | float)
    return found


def test_a_plan_says_walls_tokens_cost_and_what_laziness_saves(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--gpus", "2xh100", "--effort", "high", "--users", "4", "--price", "2")
    assert found["gpus"] == 2
    assert number(found, "params", "rollout_tokens") == 40_960
    seen = found["forecast"]
    assert number(seen, "wall_s", "p50") < number(seen, "wall_s", "p95") <= number(seen, "wall_s", "p99")
    assert number(seen, "cost_per_run") == pytest.approx(number(seen, "gpu_s_per_run") / 3600 * 2)
    assert 300_000 < number(seen, "generated_tokens") < 400_000
    assert number(found, "compared", "users") == 2
    assert number(found, "compared", "lazy", "generated_tokens") < 0.5 * number(
        found, "compared", "barrier", "generated_tokens"
    )
    assert number(found, "alone", "wall_s", "p50") < number(seen, "wall_s", "p50")


def test_the_same_seed_gives_the_same_plan(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = (planned(capsys, "--effort", "low", "--seed", seed) for seed in ("5", "5", "6"))
    for found in (first, second, third):
        found.pop("seconds")
    assert first == second != third


def test_a_plan_finds_how_many_users_a_fleet_holds(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpus", "4xh200", "--effort", "low", "--target-s", "400")
    users = int(number(planned(capsys, *words), "users_held"))
    assert users % 4 == 0
    inside, outside = (
        number(planned(capsys, *words[:4], "--users", str(count)), "forecast", "wall_s", "p95")
        for count in (users, 2 * users)
    )
    assert inside <= 1.05 * 400  # one engine was searched, four were simulated here
    assert outside > 400


def test_what_is_said_of_users_agrees_with_the_forecast_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpus", "4xh200", "--effort", "low", "--target-s", "400")
    searched = int(number(planned(capsys, *words), "users_held"))
    for users in range(searched - 4, searched + 13, 2):
        found = planned(capsys, *words, "--users", str(users))
        kept = number(found, "forecast", "wall_s", "p95") <= 400
        assert kept == (number(found, "users_held") >= users)


def test_a_plan_of_runs_that_come_by_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    calm = planned(capsys, "--effort", "low", "--runs-per-hour", "20")
    assert not calm["forecast"]["growing"]  # type: ignore[index]
    assert planned(capsys, "--effort", "low", "--runs-per-hour", "5000")["forecast"]["growing"]  # type: ignore[index]


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "cpu", "--effort", "low", "--users", "2", "--target-s", "600"]) == 0
    said = capsys.readouterr().out
    for words in (
        "divided by",
        "wall, p95",
        "US$ a run, at 0.1 an hour",
        "Round by round behind a barrier",
        "can be held if 95 %",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--gpus", "3xtpu"), "argument --gpus: '3xtpu' is no [COUNTx]KIND; kinds are h200"),
        (("--gpus", "0xh200"), "argument --gpus: must be between 1 and 10000 GPUs, not 0"),
        (("--population", "0"), "argument --population: must be between 1 and 256, not 0"),
        (("--length-median", "nan"), "argument --length-median: must be between"),
        (("--users", "900000"), "--users: at most 104,166 such runs at once can be simulated on this fleet"),
        (("--users", "1", "--runs-per-hour", "2"), "--users and --runs-per-hour: give one of them"),
        (("--final-candidates", "40"), "--final-candidates: must be at most population (16), not 40"),
        (("--question-tokens", "131050"), "--question-tokens: the model's context is 131072 tokens"),
        (("--rollout-tokens", "200000"), "--rollout-tokens: the model's context is 131072 tokens"),
    ],
)
def test_what_cannot_be_planned_is_named(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["plan", *words])
    except SystemExit as error:
        status = int(error.code or 0)
    assert status == 2
    assert said in capsys.readouterr().err


def test_1_000_concurrent_runs_are_planned_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    planned(capsys, "--gpus", "8xh200", "--effort", "high", "--users", "1000")
    assert time.process_time() - began < 20
