"""`Idempotency-Key`: the same request reads the same run."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from harness.engine import EngineError
from harness.scripted import Script, ScriptedEngine, Speed
from harness.types import RolloutRequest
from tests.helpers.serving import CHAT, SMALL, ask, chunks, events, frames, in_memory, joined, on_port

KEY = {"idempotency-key": "one"}


def slow() -> ScriptedEngine:
    return ScriptedEngine(lambda request: Script("hm" * 20, f"answer {request.slot}"), speed=Speed(step_s=0.002))


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_same_request_reads_the_same_run_in_flight_and_after_it(streamed: bool) -> None:
    engine = slow()
    async with in_memory(engine) as client:
        body = ask(mrsa=SMALL, stream=streamed)
        first = asyncio.create_task(client.post(CHAT, json=body, headers=KEY))
        await asyncio.sleep(0.1)
        second = await client.post(CHAT, json=body, headers=KEY)
        whole = await first
        asked = engine.total_requests
        await asyncio.sleep(0.05)
        third = await client.post(CHAT, json=body, headers=KEY)
        assert engine.total_requests == asked
    assert third.headers["idempotent-replayed"] == "true"
    assert third.headers["content-type"] == whole.headers["content-type"]
    if not streamed:
        assert whole.json() == second.json() == third.json()
        return
    found = [chunks(response.text) for response in (whole, second, third)]
    assert len({joined(one) for one in found}) == 1
    assert len({one[0]["id"] for one in found}) == 1
    for one, response in zip(found, (whole, second, third), strict=True):
        assert list(frames(response.text))[-1] == "[DONE]"
        assert events(one)[0]["event"] == "run.started"
        assert events(one)[-1] == events(found[0])[-1]


async def test_a_late_reader_gets_the_whole_answer_at_the_end() -> None:
    engine = ScriptedEngine(lambda request: Script("hm", "x" * 400), speed=Speed(step_s=0.001), chunk_tokens=4)
    async with in_memory(engine) as client:
        body = ask("scripted", stream=True)
        first = asyncio.create_task(client.post(CHAT, json=body, headers=KEY))
        await asyncio.sleep(0.2)  # in the middle of its answer
        late = chunks((await client.post(CHAT, json=body, headers=KEY)).text)
        early = chunks((await first).text)
    assert joined(late) == joined(early) == "x" * 400
    assert sum("content" in chunk["choices"][0]["delta"] for chunk in early) > 20
    assert sum(bool(chunk["choices"][0]["delta"].get("content")) for chunk in late) == 1


async def test_the_same_key_with_another_body_is_a_409() -> None:
    async with in_memory(slow()) as client:
        first = asyncio.create_task(client.post(CHAT, json=ask(mrsa=SMALL), headers=KEY))
        await asyncio.sleep(0.05)
        for _ in range(2):  # in flight, and ended
            response = await client.post(CHAT, json=ask(mrsa=SMALL, seed=1), headers=KEY)
            assert (response.status_code, response.json()["error"]["code"]) == (409, "idempotency_key_in_use")
            assert response.headers["x-should-retry"] == "false"
            await first
            await asyncio.sleep(0.05)


async def test_another_key_or_none_is_another_run() -> None:
    engine = ScriptedEngine()
    async with in_memory(engine) as client:
        for headers in ({}, {}, KEY, {"idempotency-key": "two"}):
            await client.post(CHAT, json=ask("scripted"), headers=headers)
        assert engine.total_requests == 4


@pytest.mark.parametrize(("key", "status"), [("", 400), ("x" * 255, 200), ("x" * 256, 400)])
async def test_keys_are_bounded(key: str, status: int) -> None:
    async with in_memory() as client:
        response = await client.post(CHAT, json=ask("scripted"), headers={"idempotency-key": key})
    assert response.status_code == status


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_run_ends_when_its_last_reader_has_left_and_frees_its_key(streamed: bool) -> None:
    engine = ScriptedEngine(speed=Speed(step_s=0.02))
    async with on_port(engine) as (url, app), httpx.AsyncClient(base_url=url) as client:
        body = ask(mrsa=SMALL, stream=streamed)
        tasks = []
        for _ in range(2):
            tasks.append(asyncio.create_task(client.post(CHAT, json=body, headers=KEY)))
            await asyncio.sleep(0.1)
        tasks[0].cancel()
        await asyncio.sleep(0.2)
        assert engine.open_requests == 2
        tasks[1].cancel()
        await asyncio.sleep(0.3)
        assert engine.open_requests == 0
        asked = engine.total_requests
        third = asyncio.create_task(client.post(CHAT, json=body, headers=KEY))
        await asyncio.sleep(0.2)
        assert engine.total_requests == asked + 2
        third.cancel()
        await asyncio.sleep(0.2)
        assert not app.state.asking.keys._entries


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_error_that_cost_tokens_is_answered_again_and_any_other_tried_again(streamed: bool) -> None:
    def script(request: RolloutRequest) -> Script:
        return Script("hm", "42", EngineError("out of luck"))

    engine = ScriptedEngine(script)
    async with in_memory(engine) as client:
        body = ask("scripted", stream=streamed)
        first = await client.post(CHAT, json=body, headers=KEY)
        await asyncio.sleep(0.02)
        second = await client.post(CHAT, json=body, headers=KEY)
        assert engine.total_requests == 1
        assert second.status_code == 502
        assert second.json()["error"] == (chunks(first.text)[-1] if streamed else first.json())["error"]

        asked = 1
        refused: dict[str, Any] = {**body, "messages": [{"role": "user", "content": "x"}], "max_tokens": 10**9}
        for _ in range(2):
            response = await client.post(CHAT, json=refused, headers={"idempotency-key": "two"})
            assert response.status_code == 400
        assert engine.total_requests == asked


async def test_ended_runs_are_kept_for_some_time_and_in_some_number() -> None:
    engine = ScriptedEngine()
    async with in_memory(engine, max_idempotency_keys=2, idempotency_keep_s=0.3) as client:
        keys = client.app.state.asking.keys  # type: ignore[attr-defined]
        for number in range(4):
            await client.post(CHAT, json=ask("scripted"), headers={"idempotency-key": str(number)})
            await asyncio.sleep(0.01)
        assert set(keys._entries) == {"2", "3"}
        await asyncio.sleep(0.4)
        assert not keys._entries
        assert not keys._ended
