"""The engine's host: what it tells while an engine is away."""

from __future__ import annotations

import asyncio

from structlog.testing import capture_logs

from harness.engine import EngineDead
from harness.scripted import ScriptedEngine, run_virtual
from mrsa_server.runs.host import EngineHost


def test_an_engine_that_sleeps_all_night_is_told_of_once_a_minute() -> None:
    class Asleep(ScriptedEngine):
        async def start(self) -> None:
            raise EngineDead("nobody is there")

    async def night() -> None:
        host = asyncio.create_task(EngineHost(Asleep()).run())
        await asyncio.sleep(600)
        host.cancel()

    with capture_logs() as lines:
        run_virtual(night())
    assert 10 <= sum(line["event"] == "engine not there yet" for line in lines) <= 11
