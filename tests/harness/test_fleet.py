"""Forecasts of a load on a fleet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.fleet import Fleet, Load, Work, forecast, users_held
from harness.simulate import Order
from harness.types import InvalidParams, Params
from mrsa_server.machines import MACHINES

HIGH = Work(Params(population=16, rounds=2, rollout_tokens=40_960))
H200 = MACHINES["h200"].engine


def test_a_lone_user_has_the_engine_to_himself() -> None:
    seen = forecast(HIGH, Fleet(H200), Load(1), runs=20)
    assert len(seen.walls_s) == 20
    assert seen.engine_s == pytest.approx(sum(seen.walls_s) / 20)
    assert seen.tokens_per_s == pytest.approx(seen.tokens / seen.engine_s)
    assert 14 < seen.rollouts < 18
    assert seen.preemptions == 0
    assert not seen.growing


def test_the_headline_setting_generates_what_its_authors_report() -> None:
    behind = forecast(replace(HIGH, median_tokens=20_100), Fleet(H200), Load(1), Order.BARRIER, runs=60)
    assert behind.tokens == pytest.approx(740_000, rel=0.03)
    medium = Work(replace(HIGH.params, rollout_tokens=16_384), median_tokens=15_900)
    assert forecast(medium, Fleet(H200), Load(1), Order.BARRIER, runs=60).tokens == pytest.approx(440_000, rel=0.03)


def test_laziness_is_worth_most_of_its_tokens_where_the_fleet_is_busy() -> None:
    ours, theirs = (forecast(HIGH, Fleet(H200), Load(10), order, runs=60) for order in Order)
    assert ours.tokens / theirs.tokens < 0.5
    assert ours.engine_s / theirs.engine_s < 0.6


def test_twice_the_engines_hold_twice_the_users() -> None:
    target_s = 1800.0
    held = users_held(HIGH, Fleet(H200), Load(1), target_s)
    assert users_held(HIGH, Fleet(H200, 2), Load(1), target_s) == 2 * held
    assert forecast(HIGH, Fleet(H200), Load(held)).wall_s(0.95) <= target_s
    assert forecast(HIGH, Fleet(H200), Load(round(1.2 * held))).wall_s(0.95) > target_s
    assert users_held(HIGH, Fleet(H200), Load(1), 60.0) == 0


def test_runs_that_come_too_fast_are_said_to_pile_up() -> None:
    fleet = Fleet(H200, 2)
    assert not forecast(HIGH, fleet, Load(runs_per_hour=30), runs=150).growing
    assert forecast(HIGH, fleet, Load(runs_per_hour=300), runs=150).growing


def test_some_engines_stand_for_a_large_fleet() -> None:
    small = forecast(HIGH, Fleet(H200, 2), Load(20), runs=200)
    large = forecast(HIGH, Fleet(H200, 2_000), Load(20_000), runs=200, most_rollouts=5_000)
    assert 2 < large.engines < 20
    assert large.wall_s(0.5) == pytest.approx(small.wall_s(0.5), rel=0.1)


def test_a_rollout_that_no_cache_holds_is_refused() -> None:
    with pytest.raises(InvalidParams, match=r"takes .* tokens of KV cache, which holds 40000"):
        forecast(HIGH, Fleet(replace(H200, kv_tokens=40_000)), Load(1))


def test_runs_that_come_by_themselves_wait_as_long_on_eight_engines_as_on_one() -> None:
    low = Work(Params(population=8, rounds=2, rollout_tokens=8192))
    one = forecast(low, Fleet(H200), Load(runs_per_hour=120))
    eight = forecast(low, Fleet(H200, 8), Load(runs_per_hour=960))
    assert len(eight.walls_s) == 8 * len(one.walls_s)
    assert eight.wall_s(0.5) == pytest.approx(one.wall_s(0.5), rel=0.15)
    assert not eight.growing


def test_users_who_think_do_not_come_all_at_once() -> None:
    """40 users who take ten times as long to think as to wait are some four at once, at any time."""
    seen = forecast(HIGH, Fleet(H200), Load(1), runs=20)
    wall = seen.wall_s(0.5)
    few = forecast(HIGH, Fleet(H200), Load(4), runs=200)
    many = forecast(HIGH, Fleet(H200), Load(40, think_s=10 * few.wall_s(0.5)), runs=200)
    assert wall < many.wall_s(0.5) < 1.3 * few.wall_s(0.5)
    assert many.batch == pytest.approx(few.batch, rel=0.3)
