"""How the soak tells a leak from noise."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.soak import Sample, climb, errors
from tests.bench.soak_clients import Broken, Told, refused

MB = 1 << 20


def samples(mb: Callable[[float], float], seconds: int = 1800) -> list[Sample]:
    return [Sample(at, 0, int(mb(at / 3600) * MB), 0, 0, 0, 0, 0, 0, 0.0) for at in range(0, seconds, 5)]


@pytest.mark.parametrize("mb_an_hour", [0.0, 60.0])
def test_a_leak_is_told_from_noise(mb_an_hour: float) -> None:
    noise = random.Random(1)
    found = climb(samples(lambda hours: 100 + mb_an_hour * hours + noise.gauss(0, 1)))
    assert found is not None
    assert abs(found.mb_an_hour - mb_an_hour) < 3 * found.error
    assert found.error < 10


def test_memory_that_fills_up_at_first_climbs_no_more_at_the_end() -> None:
    found = climb(samples(lambda hours: 100 + min(30, 600 * hours)))
    assert found is not None
    assert found.mb_an_hour == 0
    assert climb(samples(lambda _: 100, seconds=60)) is None


def test_what_is_no_warning_in_the_log_is_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"level": "warning"}\n{"level": "error", "event": "run broke"}\nTraceback\n')
    assert [line[:30] for line in errors(log)] == ['the log: {"level": "error", "e', "the log: Traceback"]


@pytest.mark.parametrize(
    ("status", "raw"),
    [
        (500, b'{"error": {"message": "m", "type": "t", "param": null, "code": "internal_error"}}'),
        (503, b"no workers"),
        (502, b'{"error": {"code": "engine_error"}}'),
        # One that does not say when to come back.
        (503, b'{"error": {"message": "m", "type": "t", "param": null, "code": "server_overloaded"}}'),
    ],
)
def test_an_error_that_the_api_does_not_have_breaks_a_rule(status: int, raw: bytes) -> None:
    with pytest.raises(Broken):
        refused(Told(status, {}, raw))
