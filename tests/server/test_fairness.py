"""A mixed load of short and long runs: nobody starves. `tests.bench.fairness` prints the same at length."""

from __future__ import annotations

import pytest

from harness.scripted import run_virtual
from mrsa_server.runs.admission import Admission
from tests.bench.fairness import MIX, STRICT_AGE, Job, Order, RoundRobin, draw_jobs, quantile, simulate

KINDS = [kind for kind, _ in MIX]


@pytest.fixture(scope="module")
def jobs() -> list[Job]:
    return draw_jobs(80, 0.25, seed=1)


def latencies(jobs: list[Job], order: Order) -> dict[str, list[float]]:
    found = run_virtual(simulate(jobs, order))
    assert found.keys() == set(jobs), "all have ended"
    return {kind: [seconds for job, seconds in found.items() if job.kind == kind] for kind in KINDS}


def test_short_runs_are_not_shut_out_by_long_ones_and_long_ones_still_end(jobs: list[Job]) -> None:
    ours, strict = latencies(jobs, Admission), latencies(jobs, STRICT_AGE)
    assert all(len(seconds) > 1 for seconds in ours.values()), "the mix has all kinds"
    assert quantile(ours["low"], 0.99) < 0.6 * quantile(strict["low"], 0.99)
    for kind in KINDS[1:]:
        assert max(ours[kind]) < 2.5 * max(strict[kind])


def test_the_order_that_ours_is_compared_with_runs_too(jobs: list[Job]) -> None:
    latencies(jobs[:20], RoundRobin)
