"""Responses that outlive their connection: in the background, retrieved, gone on with, cancelled, continued."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.engine import EngineDead
from harness.scripted import Script, ScriptedEngine, Speed
from harness.types import Message, TokenIds
from mrsa_server.runs.store import RunStore
from tests.helpers.open_responses import EVENTS, misfits
from tests.helpers.replicas import LEASE_S, check_log, log_of, only_run, replica, slow, until_ended
from tests.helpers.replicas import SIZES as SHORT
from tests.helpers.serving import CHAT, RESPONSES, in_memory, on_port, typed
from tests.helpers.serving import ask as chat

QUESTION = "What is six times seven?"
SIZES = {**SHORT, "rollout_tokens": 2000, "final_tokens": 2000}
KEY = {"idempotency-key": "one"}
LONG = "".join(f"Word {number} of a long answer. " for number in range(40)) + "\\boxed{42}"


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": "scripted-mrsa", "input": QUESTION, "background": True, "mrsa": SIZES, **fields}


def wordy(step_s: float = 0.0005) -> ScriptedEngine:
    return ScriptedEngine(
        lambda request: Script("x" * (60 + 40 * (request.slot.index % 3)), LONG), speed=Speed(step_s=step_s)
    )


async def create(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(RESPONSES, json=ask(**fields))
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    assert misfits(body, "ResponseResource") == []
    return body


async def retrieve(client: httpx.AsyncClient, response_id: str) -> dict[str, Any]:
    response = await client.get(f"{RESPONSES}/{response_id}")
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    assert misfits(body, "ResponseResource") == []
    return body


async def until(client: httpx.AsyncClient, response_id: str, *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            body = await retrieve(client, response_id)
            if body["status"] in statuses:
                return body
            await asyncio.sleep(0.02)


async def events_of(client: httpx.AsyncClient, response_id: str, after: int | None = None) -> list[dict[str, Any]]:
    query = {"stream": "true"} | ({} if after is None else {"starting_after": str(after)})
    response = await client.get(f"{RESPONSES}/{response_id}", params=query)
    assert response.status_code == 200, response.text
    assert response.text.endswith("data: [DONE]\n\n")
    return typed(response.text)


def text_of(events: list[dict[str, Any]], kind: str = "response.output_text.delta") -> str:
    return "".join(event["delta"] for event in events if event["type"] == kind)


def run_of(response: dict[str, Any]) -> str:
    return "run_" + response["id"].removeprefix("resp_")


async def test_a_response_in_the_background_is_told_at_once_and_retrieved_when_it_is_there(store_url: str) -> None:
    async with replica(slow(0.004), store_url) as client:
        first = await create(client, metadata={"case": "7"}, reasoning={"summary": "detailed"})
        assert first["status"] in ("queued", "in_progress")
        assert first["background"] is first["store"] is True
        assert first["output"] == []
        done = await until(client, first["id"], "completed")
        assert [item["type"] for item in done["output"]] == ["reasoning", "message"]
        assert "42" in done["output"][1]["content"][0]["text"]
        assert done["metadata"] == {"case": "7"}
        assert done["usage"]["output_tokens"] > 0
        assert done["completed_at"] >= done["created_at"] == first["created_at"]
        assert await retrieve(client, first["id"]) == done
        found = (await client.get(f"/v1/runs/{run_of(first)}")).json()
        assert found["background"] is True
        assert found["metadata"] == {"case": "7"}
        assert found["usage"]["completion_tokens"] == done["usage"]["output_tokens"]


async def test_any_replica_says_the_same(store_url: str) -> None:
    async with replica(slow(0.005), store_url) as client, replica(slow(), store_url) as other:
        first = await create(client)
        streamed = asyncio.create_task(events_of(other, first["id"]))
        done = await until(other, first["id"], "completed")
        assert done == await retrieve(client, first["id"])
        assert await streamed == await events_of(client, first["id"]) == await events_of(other, first["id"])


async def test_a_stream_in_the_background_is_valid_and_ends_in_what_is_retrieved(store_url: str) -> None:
    async with replica(wordy(), store_url) as client:
        response = await client.post(RESPONSES, json=ask(stream=True, reasoning={"summary": "detailed"}))
        events = typed(response.text)
        for event in events:
            assert misfits(event, EVENTS[event["type"]]) == []
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert [event["type"] for event in events[:3]] == [
            "response.created",
            "response.queued",
            "response.in_progress",
        ]
        assert text_of(events) == LONG
        assert len([event for event in events if event["type"] == "response.output_text.delta"]) > 5
        done = events[-1]["response"]
        assert done == await retrieve(client, done["id"])
        thinking = text_of(events, "response.reasoning_summary_text.delta")
        assert thinking.count("x" * 32) >= 4, "tails, and the thinking before the answer"
        assert await events_of(client, done["id"]) == events


@settings(deadline=None, max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
async def test_a_stream_cut_anywhere_and_gone_on_with_ends_in_the_same_text(store_url: str, seed: int) -> None:
    rng = random.Random(seed)
    async with replica(wordy(), store_url) as client, replica(wordy(), store_url) as other:
        first = await create(client, stream=False, reasoning={"summary": rng.choice(["auto", "detailed", None])})
        seen: list[dict[str, Any]] = []
        while not seen or seen[-1]["type"] != "response.completed":
            after = seen[-1]["sequence_number"] if seen else None
            found = await events_of(rng.choice((client, other)), first["id"], after)
            seen += found[: rng.randint(1, 9)]  # the rest was lost on the way
        whole = await events_of(client, first["id"])
    assert seen == whole
    assert text_of(seen) == LONG


async def test_a_stream_goes_on_after_its_server_has_left(store: RunStore, store_url: str) -> None:
    async with replica(wordy(0.006), store_url) as client:
        first = await create(client, reasoning={"summary": "detailed"})
        reading = asyncio.create_task(client.get(f"{RESPONSES}/{first['id']}", params={"stream": "true"}))
        await only_run(store, events=8)
        await client.app.state.runner.drain(0)  # type: ignore[attr-defined]
        cut = typed((await reading).text)
    assert cut[-1]["type"] == "error"
    assert cut[-1]["error"]["code"] == "server_shutting_down"
    seen = cut[:-1]
    assert f"starting_after={seen[-1]['sequence_number']}." in cut[-1]["error"]["message"]
    async with replica(wordy(), store_url) as client:
        seen += await events_of(client, first["id"], seen[-1]["sequence_number"])
        assert seen == await events_of(client, first["id"])
        assert text_of(seen) == LONG
    check_log(await log_of(store, run_of(first)))


async def test_a_response_goes_on_where_nobody_reads_it(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.004), store_url) as client:
        async with asyncio.timeout(10):
            reading = asyncio.create_task(client.post(RESPONSES, json=ask(stream=True)))
            run_id = await only_run(store, events=5)
            reading.cancel()
        assert (await until_ended(store, run_id)).status == "finished"


async def test_a_response_waits_for_its_engine_in_the_store(store: RunStore, store_url: str) -> None:
    engine = Asleep()
    async with in_memory(engine, up=False, database_url=store_url, lease_s=LEASE_S, engine_wait_s=0.05) as client:
        first = await create(client)
        assert first["status"] == "queued"
        reading = asyncio.create_task(events_of(client, first["id"]))
        await asyncio.sleep(0.2)
        assert (await retrieve(client, first["id"]))["status"] == "queued"
        engine.awake = True
        events = await reading
    assert [event["type"] for event in events[:2]] == ["response.created", "response.queued"]
    assert events[0]["response"]["status"] == "queued"
    assert events[-1]["type"] == "response.completed"


async def test_a_response_that_never_began_is_begun_by_another_server(store: RunStore, store_url: str) -> None:
    async with in_memory(Asleep(), up=False, database_url=store_url, lease_s=LEASE_S) as client:
        first = await create(client, temperature=0.5, instructions="Be brief.")
        await client.app.state.runner.drain(0)  # type: ignore[attr-defined]
    waiting = await store.get(run_of(first))
    assert waiting is not None
    assert (waiting.status, waiting.last, waiting.owner) == ("queued", 0, None)
    async with replica(slow(), store_url) as client:
        done = await until(client, first["id"], "completed")
    assert done["temperature"] == 0.5
    state = check_log(await log_of(store, run_of(first)))
    assert state.started.problem.messages[0].text == "Be brief."
    assert state.started.priority == waiting.priority


async def test_a_queued_request_that_its_engine_cannot_take_fails_and_says_why(store_url: str) -> None:
    engine = Asleep()
    async with in_memory(engine, up=False, database_url=store_url, lease_s=LEASE_S) as client:
        first = await create(client, mrsa={**SIZES, "budget_tokens": 7})
        engine.awake = True
        failed = await until(client, first["id"], "failed")
        assert "mrsa.budget_tokens" in failed["error"]["message"]
        events = await events_of(client, first["id"])
        assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
        assert events[-1]["response"]["error"] == failed["error"]


async def test_a_bad_request_is_told_before_any_run_where_the_engine_is_up(store: RunStore, store_url: str) -> None:
    async with replica(slow(), store_url) as client:
        response = await client.post(RESPONSES, json=ask(mrsa={**SIZES, "budget_tokens": 7}))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "mrsa.budget_tokens"
    assert await store.list_runs() == []


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_a_response_is_cancelled(store: RunStore, store_url: str, elsewhere: bool) -> None:
    async with replica(slow(0.02), store_url) as client, replica(slow(0.02), store_url) as other:
        first = await create(client)
        await only_run(store, events=4)
        reading = asyncio.create_task(events_of(client, first["id"]))
        await asyncio.sleep(0.05)
        response = await (other if elsewhere else client).post(f"{RESPONSES}/{first['id']}/cancel")
        assert response.status_code == 200
        body = response.json()
        assert body["status"] == "cancelled"
        assert misfits(body, "ResponseResource") == []
        events = await reading
        assert events[-1]["type"] == "response.incomplete"
        assert events[-1]["response"] == body == await retrieve(client, first["id"])
        again = await client.post(f"{RESPONSES}/{first['id']}/cancel")
        assert (again.status_code, again.json()) == (200, body)


async def test_what_has_ended_or_is_read_by_its_client_is_not_cancelled(store_url: str) -> None:
    async with replica(slow(), store_url) as client:
        done = await until(client, (await create(client))["id"], "completed")
        response = await client.post(f"{RESPONSES}/{done['id']}/cancel")
        assert (response.status_code, response.json()) == (200, done)
        foreground = (await client.post(RESPONSES, json=ask(background=False))).json()
        response = await client.post(f"{RESPONSES}/{foreground['id']}/cancel")
        assert response.status_code == 400
        assert "background=true" in response.json()["error"]["message"]


async def test_a_response_in_the_foreground_is_retrieved_too(store: RunStore, store_url: str) -> None:
    async with replica(slow(), store_url) as client:
        done = (await client.post(RESPONSES, json=ask(background=False, reasoning={"summary": "detailed"}))).json()
        await until_ended(store, run_of(done))
        found = await retrieve(client, done["id"])
        assert found["output"][-1] == done["output"][-1]
        assert found["usage"] == done["usage"]
        assert found["mrsa"]["params"] == done["mrsa"]["params"]
        assert text_of(await events_of(client, done["id"])) == done["output"][-1]["content"][0]["text"]
        response = await client.get(f"{RESPONSES}/{done['id']}", params={"stream": "true", "starting_after": "3"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "starting_after"


async def test_a_response_that_is_not_to_be_stored_is_nowhere(store: RunStore, store_url: str) -> None:
    async with replica(slow(), store_url) as client:
        done = (await client.post(RESPONSES, json=ask(background=False, store=False))).json()
        assert done["store"] is False
        assert (await client.get(f"{RESPONSES}/{done['id']}")).status_code == 404
        assert (await client.post(CHAT, json=chat(mrsa=SIZES, store=False))).status_code == 200
        assert await store.list_runs() == []
        response = await client.post(RESPONSES, json=ask(store=False))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "background")


async def test_a_response_is_deleted_with_its_run(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.008), store_url) as client:
        first = await create(client)
        await only_run(store, events=3)
        response = await client.delete(f"{RESPONSES}/{first['id']}")
        assert response.json() == {"id": first["id"], "object": "response", "deleted": True}
        assert (await client.get(f"{RESPONSES}/{first['id']}")).status_code == 404
        assert (await client.get(f"/v1/runs/{run_of(first)}")).status_code == 404


async def test_who_reads_a_response_that_is_deleted_is_told(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.02), store_url) as client, replica(slow(), store_url) as other:
        first = await create(client)
        await only_run(store, events=3)
        reading = [
            asyncio.create_task(one.get(f"{RESPONSES}/{first['id']}", params={"stream": "true"}))
            for one in (client, other)
        ]
        await asyncio.sleep(0.05)
        await other.delete(f"{RESPONSES}/{first['id']}")
        for response in await asyncio.gather(*reading):
            last = typed(response.text)[-1]
            assert last["type"] == "error"
            assert last["error"]["code"] == "not_found"
            assert "starting_after" not in last["error"]["message"]


async def test_a_response_goes_on_with_an_earlier_one(store: RunStore, store_url: str) -> None:
    async with replica(slow(), store_url) as client:
        first = await until(client, (await create(client, instructions="Be brief."))["id"], "completed")
        second = await until(
            client, (await create(client, input="And times two?", previous_response_id=first["id"]))["id"], "completed"
        )
        assert second["previous_response_id"] == first["id"]
        await client.delete(f"{RESPONSES}/{first['id']}")  # what goes on with it does not need it any more
        third = await create(
            client,
            input=[{"role": "user", "content": [{"type": "input_text", "text": "Sure?"}]}],
            previous_response_id=second["id"],
            background=False,
        )
        messages = check_log(await log_of(store, run_of(third))).started.problem.messages
        items = (await client.get(f"{RESPONSES}/{third['id']}/input_items", params={"order": "asc"})).json()
        newest = (await client.get(f"{RESPONSES}/{third['id']}/input_items", params={"limit": "1"})).json()
    answer = "\\boxed{42}"
    assert [(message.role, message.text) for message in messages] == [
        ("user", QUESTION),
        ("assistant", answer),
        ("user", "And times two?"),
        ("assistant", answer),
        ("user", "Sure?"),
    ]
    assert [item["content"][0]["text"] for item in items["data"]] == [message.text for message in messages]
    assert newest["data"][0]["content"][0]["text"] == "Sure?"
    assert newest["has_more"] is True


async def test_a_response_that_was_answered_is_done_before_its_end_is_on_the_disk(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replica(slow(), store_url) as client:
        kept = client.app.state.asking.store  # type: ignore[attr-defined]
        write = kept.write_many

        async def write_late(entries: Any) -> Any:
            if any(entry.status == "finished" for entry in entries):
                await asyncio.sleep(0.2)
            return await write(entries)

        monkeypatch.setattr(kept, "write_many", write_late)
        first = await create(client, background=False)
        found = await retrieve(client, first["id"])
        assert (found["status"], found["output"]) == ("completed", first["output"])
        second = await create(client, background=False)
        third = await create(client, background=False, previous_response_id=second["id"])
        assert third["status"] == "completed"


async def test_a_response_that_ends_while_it_is_cancelled_is_told_as_it_ended(
    store: RunStore, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with replica(slow(), store_url) as client:
        first = await create(client)
        kept = client.app.state.asking.store  # type: ignore[attr-defined]
        request = kept.request_cancel

        async def request_late(run_id: str) -> Any:
            await until_ended(store, run_id)
            return await request(run_id)

        monkeypatch.setattr(kept, "request_cancel", request_late)
        response = await client.post(f"{RESPONSES}/{first['id']}/cancel")
        assert response.json()["status"] == "completed"


async def test_a_response_that_is_not_there_or_not_done_cannot_be_gone_on_with(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.05), store_url) as client:
        for earlier, code in (("resp_1", "previous_response_not_found"), ("nonsense", "previous_response_not_found")):
            response = await client.post(RESPONSES, json=ask(previous_response_id=earlier))
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "previous_response_id"
            assert response.json()["error"]["code"] == code
        first = await create(client)
        response = await client.post(RESPONSES, json=ask(previous_response_id=first["id"]))
        assert "still being made" in response.json()["error"]["message"]
        await client.post(f"{RESPONSES}/{first['id']}/cancel")
        response = await client.post(RESPONSES, json=ask(previous_response_id=first["id"]))
        assert "no answer to go on with" in response.json()["error"]["message"]
        response = await client.post(RESPONSES, json=ask(previous_response_id=first["id"], input=[{"role": "user"}]))
        assert response.json()["error"]["param"] == "input.0.content", "as the client wrote it"


async def test_an_error_names_the_turn_that_the_client_wrote(store_url: str) -> None:
    async with replica(slow(), store_url) as client:
        first = await until(client, (await create(client))["id"], "completed")
        image = {"type": "input_image", "image_url": "http://example.com/x.png"}
        body = ask(previous_response_id=first["id"], input=[{"role": "user", "content": [image]}])
        response = await client.post(RESPONSES, json=body)
    assert response.json()["error"]["param"] == "input.0.content.0.image_url"


async def test_pages_of_items_end_though_a_client_gave_one_id_twice(store_url: str) -> None:
    async with replica(slow(), store_url) as client:
        turns = [{"role": "user", "content": text, "id": "twin"} for text in ("one", "two", "three")]
        first = await create(client, input=turns)
        found: list[str] = []
        query = {"limit": "1", "order": "asc"}
        while len(found) < 9:
            page = (await client.get(f"{RESPONSES}/{first['id']}/input_items", params=query)).json()
            found += [item["content"][0]["text"] for item in page["data"]]
            if not page["has_more"]:
                break
            query["after"] = page["last_id"]
    assert found == ["one", "two", "three"]


@pytest.mark.parametrize("path", ["", "/cancel", "/input_items"])
async def test_what_is_not_there_is_a_404(store_url: str, path: str) -> None:
    async with replica(slow(), store_url) as client, in_memory() as bare:
        for response_id in ("resp_1", "run_1", "resp_" + "x" * 300):
            method = "POST" if path == "/cancel" else "GET"
            response = await client.request(method, f"{RESPONSES}/{response_id}{path}")
            assert response.status_code == 404
            response = await bare.request(method, f"{RESPONSES}/{response_id}{path}")
            assert (response.status_code, response.json()["error"]["code"]) == (404, "responses_not_stored")


@pytest.mark.parametrize("query", ["starting_after=3", "stream=true&starting_after=x", "stream=yes", "stram=true"])
async def test_a_bad_parameter_is_named(store_url: str, query: str) -> None:
    async with replica(slow(), store_url) as client:
        first = await create(client)
        response = await client.get(f"{RESPONSES}/{first['id']}?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.split("&")[-1].split("=")[0]


async def test_a_deleted_response_is_not_told_again_to_its_key(store: RunStore, store_url: str) -> None:
    async with replica(slow(), store_url) as client:
        body = ask(background=False)
        first = (await client.post(RESPONSES, json=body, headers=KEY)).json()
        await until_ended(store, run_of(first))
        await client.delete(f"{RESPONSES}/{first['id']}")
        again = (await client.post(RESPONSES, json=body, headers=KEY)).json()
    assert again["status"] == "completed"
    assert again["id"] != first["id"]


# Keys of idempotency, over replicas and restarts.


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_key_stands_for_its_run_at_every_replica(
    store: RunStore, store_url: str, path: str, streamed: bool
) -> None:
    make = chat if path == CHAT else ask
    fields = {"mrsa": SIZES, "stream": streamed} | ({} if path == CHAT else {"background": False})
    engine = slow()
    async with replica(slow(0.005), store_url) as client, replica(engine, store_url) as other:
        first = asyncio.create_task(client.post(path, json=make(**fields), headers=KEY))
        run_id = await only_run(store, events=3)
        second = await other.post(path, json=make(**fields), headers=KEY)
        clash = await other.post(path, json=make(**fields, temperature=0.1), headers=KEY)
        whole = await first
    async with replica(engine, store_url) as later:
        third = await later.post(path, json=make(**fields), headers=KEY)
    assert [run.run_id for run in await store.list_runs()] == [run_id]
    assert engine.total_requests == 0
    assert (clash.status_code, clash.json()["error"]["code"]) == (409, "idempotency_key_in_use")
    for response in (whole, second, third):
        assert response.status_code == 200
        assert "42" in response.text
        assert run_id.removeprefix("run_") in response.text
        assert response.headers["content-type"] == whole.headers["content-type"]


async def test_a_key_finds_its_run_after_a_crash(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.008), store_url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=chat(mrsa=SIZES), headers=KEY))
        run_id = await only_run(store, events=9)
        await client.app.state.runner.drain(0)  # type: ignore[attr-defined]
        assert (await asking).status_code == 503
    async with replica(slow(), store_url) as client:
        response = await client.post(CHAT, json=chat(mrsa=SIZES), headers=KEY)
        assert response.json()["mrsa"]["run_id"] == run_id
        assert response.headers["idempotent-replayed"] == "true"


async def test_a_key_of_a_cancelled_run_is_free(store: RunStore, store_url: str) -> None:
    async with replica(slow(0.008), store_url) as client, replica(slow(), store_url) as other:
        asking = asyncio.create_task(client.post(CHAT, json=chat(mrsa=SIZES), headers=KEY))
        run_id = await only_run(store, events=3)
        await client.delete(f"/v1/runs/{run_id}")
        assert (await asking).status_code == 409
        await until_ended(store, run_id)
        response = await other.post(CHAT, json=chat(mrsa=SIZES), headers=KEY)
        assert response.json()["mrsa"]["run_id"] != run_id


async def test_a_key_stands_for_a_response_in_the_background(store_url: str) -> None:
    async with replica(slow(0.004), store_url) as client, replica(slow(0.004), store_url) as other:
        found = await asyncio.gather(
            *(one.post(RESPONSES, json=ask(), headers=KEY) for one in (client, other, client, other))
        )
        first = {response.json()["id"] for response in found if response.status_code == 200}
        assert len(first) == 1
        for response in found:  # one that came at the same moment is told to ask again
            assert response.status_code == 200 or response.json()["error"]["code"] == "idempotency_key_busy"
        (response_id,) = first
        await until(client, response_id, "completed")
        again = (await other.post(RESPONSES, json=ask(), headers=KEY)).json()
        assert (again["id"], again["status"]) == (response_id, "completed")
        clash = await other.post(RESPONSES, json=ask(temperature=0.1), headers=KEY)
        assert clash.status_code == 409


class Asleep(ScriptedEngine):
    """An engine that is not there before it is told to be."""

    awake = False

    def __init__(self) -> None:
        super().__init__(lambda request: Script("hm", "\\boxed{42}"))

    async def start(self) -> None:
        """As the engine's."""
        if not self.awake:
            raise EngineDead("it is asleep")
        await super().start()


# Engines that are away, clients that leave, words that nobody can store.


class Mortal(ScriptedEngine):
    """An engine that, once killed, does not even count or decode."""

    def __init__(self, thinking: str = "x" * 100, step_s: float = 0.002) -> None:
        super().__init__(lambda request: Script(thinking, LONG), speed=Speed(step_s=step_s))

    async def count(self, messages: tuple[Message, ...]) -> int:
        """As the engine's."""
        self._alive()
        return await super().count(messages)

    async def decode(self, token_ids: TokenIds) -> str:
        """As the engine's."""
        self._alive()
        return await super().decode(token_ids)

    def _alive(self) -> None:
        if self._dead:
            raise EngineDead("it was killed")


async def test_an_answer_is_there_though_its_engine_is_away(store_url: str) -> None:
    engine = Mortal()
    async with replica(engine, store_url) as client:
        done = await until(client, (await create(client, reasoning={"summary": "detailed"}))["id"], "completed")
        engine.kill()
        for _ in range(2):  # before and after anybody has noticed
            async with asyncio.timeout(3):
                found = await retrieve(client, done["id"])
            assert found["output"][-1] == done["output"][-1]
            assert found["status"] == "completed"
        assert not client.app.state.runner.host.up  # type: ignore[attr-defined]


async def test_a_stream_waits_for_the_engine_that_knows_its_words(store_url: str) -> None:
    engine = Mortal()
    async with replica(engine, store_url, engine_wait_s=5) as client:
        done = await until(client, (await create(client, reasoning={"summary": "detailed"}))["id"], "completed")
        whole = await events_of(client, done["id"])
        engine.kill()
        reading = asyncio.create_task(events_of(client, done["id"], 5))
        await asyncio.sleep(0.3)
        engine.revive()
        assert whole[:6] + await reading == whole


async def test_a_stream_whose_engine_stays_away_says_where_to_go_on(store_url: str) -> None:
    engine = Mortal()
    async with replica(engine, store_url, engine_wait_s=0.2) as client:
        done = await until(client, (await create(client, reasoning={"summary": "detailed"}))["id"], "completed")
        whole = await events_of(client, done["id"])
        engine.kill()
        response = await client.get(f"{RESPONSES}/{done['id']}", params={"stream": "true"})
        *seen, cut = typed(response.text)
        assert cut["error"]["code"] == "engine_unavailable"
        assert f"starting_after={seen[-1]['sequence_number']}." in cut["error"]["message"]
        engine.revive()
        await client.app.state.runner.host.wait_up(5)  # type: ignore[attr-defined]
        assert seen + await events_of(client, done["id"], seen[-1]["sequence_number"]) == whole


async def test_a_response_whose_engine_dies_as_it_is_asked_waits_in_the_store(store_url: str) -> None:
    engine = Mortal()
    async with replica(engine, store_url) as client:
        engine.kill()  # which nobody has noticed
        async with asyncio.timeout(3):
            first = await create(client)
        assert first["status"] == "queued"
        engine.revive()
        await until(client, first["id"], "completed")


@pytest.mark.parametrize("background", [False, True])
async def test_a_stream_lives_where_its_client_is_told_nothing(store_url: str, background: bool) -> None:
    engine = ScriptedEngine(lambda request: Script("x" * (60 * request.slot.index), LONG), speed=Speed(step_s=0.002))
    sizes = {**SIZES, "population": 24, "rounds": 0, "final_candidates": 24}
    async with on_port(engine, database_url=store_url, lease_s=5, keep_alive_s=0.2) as (url, app):
        await app.state.runner.host.wait_up(5)
        body = ask(stream=True, background=background, mrsa=sizes)
        clock = asyncio.get_running_loop().time
        async with httpx.AsyncClient(base_url=url) as client, client.stream("POST", RESPONSES, json=body) as response:
            silences, last = [], clock()
            async for _ in response.aiter_raw():
                silences.append(clock() - last)
                last = clock()
    assert len(silences) > 5
    assert max(silences) < 1


async def test_a_response_that_nobody_has_is_cancelled_without_an_engine(store: RunStore, store_url: str) -> None:
    async with in_memory(Asleep(), up=False, database_url=store_url, lease_s=LEASE_S) as client:
        first = await create(client)
        await client.app.state.runner.drain(0)  # type: ignore[attr-defined]
    async with in_memory(Asleep(), up=False, database_url=store_url, lease_s=LEASE_S) as client, asyncio.timeout(5):
        response = await client.post(f"{RESPONSES}/{first['id']}/cancel")
    assert response.json()["status"] == "cancelled"


@pytest.mark.parametrize("taken_up", [False, True])
async def test_a_deadline_holds_though_no_engine_comes_back(
    store: RunStore, store_url: str, monkeypatch: pytest.MonkeyPatch, taken_up: bool
) -> None:
    engine = Mortal()
    async with replica(Mortal("x" * 1000), store_url) as client:
        first = await create(client, mrsa={**SIZES, "deadline_s": 2.5})
        await only_run(store, events=4)
        await client.app.state.runner.drain(0)  # type: ignore[attr-defined]
    server = in_memory(engine if taken_up else Asleep(), up=taken_up, database_url=store_url, lease_s=LEASE_S)
    async with server as client:
        host, kept = client.app.state.runner.host, client.app.state.asking.store  # type: ignore[attr-defined]
        read = kept.events

        async def read_and_lose(*args: Any) -> Any:  # the first to read is who takes the run up
            engine.kill()
            host.lost("it was killed")
            return await read(*args)

        if taken_up:
            monkeypatch.setattr(kept, "events", read_and_lose)
        await until_ended(store, run_of(first), 10)
        body = await retrieve(client, first["id"])
    assert body["status"] == "failed"
    assert "mrsa.deadline_s=2.5" in body["error"]["message"]


async def test_a_run_whose_client_left_while_it_was_stored_is_not_taken_up(
    store: RunStore, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with on_port(slow(), database_url=store_url, lease_s=LEASE_S) as (url, app):
        await app.state.runner.host.wait_up(5)
        kept = app.state.asking.store
        make, late = kept.create, asyncio.Event()

        async def create_late(*args: Any) -> Any:
            await late.wait()
            return await make(*args)

        async def create_whole(*args: Any, wanted: Any) -> Any:  # what is begun is not cut, nor asked any more
            return await asyncio.shield(asyncio.create_task(create_late(*args)))

        monkeypatch.setattr(kept, "create", create_whole)
        async with httpx.AsyncClient(base_url=url) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(RESPONSES, json=ask(background=False), timeout=0.3)
            await asyncio.sleep(0.1)
            late.set()
            await asyncio.sleep(3 * LEASE_S)
    assert await store.list_runs() == []


async def test_a_key_whose_run_was_left_elsewhere_is_to_be_asked_again(store: RunStore, store_url: str) -> None:
    body = ask(background=False)
    async with (
        on_port(slow(0.02), database_url=store_url, lease_s=LEASE_S) as (url, app),
        replica(slow(), store_url) as other,
        httpx.AsyncClient(base_url=url) as client,
    ):
        await app.state.runner.host.wait_up(5)
        first = asyncio.create_task(client.post(RESPONSES, json=body, headers=KEY, timeout=1))
        await only_run(store, events=3)
        again = asyncio.create_task(other.post(RESPONSES, json=body, headers=KEY))
        with pytest.raises(httpx.ReadTimeout):
            await first
        busy = await again
        assert (busy.status_code, busy.json()["error"]["code"]) == (409, "idempotency_key_busy")
        assert "x-should-retry" not in busy.headers
        assert (await other.post(RESPONSES, json=body, headers=KEY)).status_code == 200


@pytest.mark.parametrize("where", ["prompt_cache_options", "parsed"])
async def test_a_body_too_deep_to_be_told_again_is_refused(store_url: str, where: str) -> None:
    options: dict[str, Any] = {"prompt_cache_options": {"a": "DEEP"}}
    text = {"type": "output_text", "text": "x", "parsed": "DEEP"}
    parsed: dict[str, Any] = {"input": [{"role": "assistant", "content": [text]}, {"role": "user", "content": "x"}]}
    body = json.dumps(ask(**{"prompt_cache_options": options, "parsed": parsed}[where]))
    body = body.replace('"DEEP"', "[" * 400 + "]" * 400)
    async with replica(slow(), store_url) as client:
        response = await client.post(RESPONSES, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "254" in response.json()["error"]["message"]


async def test_a_model_that_cannot_be_printed_is_none_before_names_are_known(store_url: str) -> None:
    engine = Asleep()
    engine.model = ""
    async with in_memory(engine, up=False, database_url=store_url, lease_s=LEASE_S) as client, asyncio.timeout(3):
        response = await client.post(RESPONSES, json=ask(model="a\0b-mrsa"))
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_conversation_is_as_large_as_a_body_at_most(tmp_path: Path) -> None:
    image = "data:image/png;base64," + "A" * 3_000  # no token: a note stands for it
    turn = {"role": "user", "content": [{"type": "input_image", "image_url": image, "detail": "auto"}]}
    async with in_memory(state_dir=tmp_path, max_body_bytes=8_000) as client:
        found = await until(client, (await create(client, input=[turn]))["id"], "completed")
        again = await create(client, input=[turn], previous_response_id=found["id"])
        found = await until(client, again["id"], "completed")
        response = await client.post(RESPONSES, json=ask(input=[turn], previous_response_id=found["id"]))
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert (error["param"], error["code"]) == ("previous_response_id", "request_too_large")
        assert "8000" in error["message"]
