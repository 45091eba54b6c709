"""A process that writes runs until it is killed: `python -m tests.helpers.writer URL`.

Every run has the same events, so that whoever reads a log knows what has to follow. It goes on with what others left.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import uuid

from harness.events import Event
from harness.markovian_rsa import init
from harness.prompts import load_templates
from harness.scripted import run_virtual
from harness.types import Params, Selection
from mrsa_server.runs.store import NewRun, RunStore
from tests.helpers.runs import PROBLEM, World, go

LEASE_S = 0.1
_PARAMS = Params(
    population=6, set_size=2, rounds=2, rollout_tokens=80, tail_tokens=40, final_tokens=4000, selection=Selection.FIRST
)


def whole_log() -> list[Event]:
    """All events of each run."""
    start = init("run", PROBLEM, _PARAMS, load_templates())
    return [start.started, *run_virtual(go(start, World(3, failing=10)))[1]]


async def write(url: str, log: list[Event]) -> None:
    """Write for ever, one event at a time."""
    store = RunStore(url, owner=f"writer {os.getpid()}", lease_s=LEASE_S)
    await store.open()
    print("writing", flush=True)
    while True:
        claims = await store.claim_lost(1, ["m"])
        if claims:
            (claim,) = claims
        else:
            record = NewRun(uuid.uuid4().hex, "chat.completion", b"{}", "m", created_at=time.time())
            claim = await store.create(record, log[:1])
        for number in range(claim.last, len(log)):
            assert await store.append(claim, log[number : number + 1], after=number) == number + 1
        await store.finish(claim, "finished")


if __name__ == "__main__":
    asyncio.run(write(sys.argv[1], whole_log()))
