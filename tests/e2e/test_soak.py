"""Half a minute of the soak: what is broken, left open or kept of every client shows within it."""

from __future__ import annotations

import pytest

from tests.bench.soak import Options, run, tell

pytestmark = pytest.mark.e2e


def test_nothing_is_broken_or_left_after_half_a_minute_of_faults_and_bad_clients() -> None:
    """Memory for caches that fill up is let pass; 20 KB of each client would not."""
    options = Options(minutes=0.4, per_s=20, share=0.1, restart_s=8, sample_s=1, most_mb=12)
    found = run(options)
    tell(options, found)
    assert found.broken == []
    assert sum(met.total() for met in found.met.values()) > 100
