"""`/v1/runs`: what is stored of runs, read by clients; on both stores."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from harness.scripted import ScriptedEngine
from tests.helpers.replicas import LEASE_S, SIZES, log_of, only_run, replica, slow, until_ended
from tests.helpers.serving import CHAT, RESPONSES, SMALL, ask, in_memory


async def answered(client: httpx.AsyncClient, **mrsa: Any) -> dict[str, Any]:
    response = await client.post(CHAT, json=ask(mrsa={**SIZES, **mrsa}))
    assert response.status_code == 200
    found = response.json()
    assert isinstance(found, dict)
    return found


def frames(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    found = []
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            number, kind, data = (line.partition(": ")[2] for line in block.split("\n"))
            found.append((int(number), kind, orjson.loads(data)))
    return found


async def test_a_run_is_shown_whole(store: Any, store_url: str) -> None:
    async with replica(ScriptedEngine(), store_url) as client:
        answer = await answered(client, final_candidates=2, seed=5)
        run_id = answer["mrsa"]["run_id"]
        await until_ended(store, run_id)
        run = (await client.get(f"/v1/runs/{run_id}")).json()
    assert run["id"] == run_id
    assert run["status"] == "finished"
    assert run["model"] == "scripted-mrsa"
    assert run["params"] == answer["mrsa"]["params"]
    assert run["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]
    assert run["answers"][0]["content"] == answer["choices"][0]["message"]["content"]
    assert [(one["round"], one["index"], one["votes"]) for one in run["answers"]] == [
        (one["round"], one["index"], one["votes"]) for one in answer["mrsa"]["answers"]
    ]
    for row, told in zip(run["rounds"], answer["mrsa"]["rounds"], strict=True):
        assert len(row["rollouts"]) == told["rollouts"]
        assert row["skipped"] == told["skipped"]
        for rollout in row["rollouts"]:
            assert rollout["status"] == "finished"
            assert len(rollout["reads"]) == (SIZES["set_size"] if row["round"] else 0)
            assert rollout["tail"] or row["round"] == SIZES["rounds"]
    assert run["error"] is None


async def test_a_run_is_found_by_the_id_of_what_its_client_got(store: Any, store_url: str) -> None:
    async with replica(ScriptedEngine(), store_url) as client:
        chat = await answered(client)
        body = {"model": "scripted-mrsa", "input": "?", "mrsa": SIZES}
        response = (await client.post(RESPONSES, json=body)).json()
        for got, other in ((chat["id"], "resp_"), (response["id"], "chatcmpl-")):
            name = got.partition("_")[2] or got.removeprefix("chatcmpl-")
            run_id = f"run_{name}"
            await until_ended(store, run_id)
            for path in ("", "/events", "/export", f"/traces/{SIZES['rounds']}/0"):
                by_run = (await client.get(f"/v1/runs/{run_id}{path}")).content
                by_view = await client.get(f"/v1/runs/{got}{path}")
                assert (by_view.status_code, by_view.content) == (200, by_run)
            assert (await client.delete(f"/v1/runs/{got}")).json()["id"] == run_id
            query = {"format": "rl", "rounds": "all"}
            rows = [(await client.get("/v1/export", params={**query, "run": one})).content for one in (run_id, got)]
            assert rows[0] == rows[1] != b""
            twice = await client.get("/v1/export", params={**query, "run": [run_id, got]})
            assert twice.content == rows[0]
            assert (await client.get(f"/v1/runs/{other}{name}")).status_code == 404, "it was not answered so"
        page = (await client.get("/v1/runs", params={"after": response["id"]})).json()
        assert [run["id"] for run in page["data"]] == [chat["mrsa"]["run_id"]]


async def test_pages_of_runs_are_the_newest_first_and_filtered(store: Any, store_url: str) -> None:
    async with replica(ScriptedEngine(), store_url) as client:
        ids = [(await answered(client, seed=number))["mrsa"]["run_id"] for number in range(5)][::-1]
        await until_ended(store, ids[0])
        first = (await client.get("/v1/runs", params={"limit": 2})).json()
        assert [run["id"] for run in first["data"]] == ids[:2]
        assert first["has_more"]
        second = (await client.get("/v1/runs", params={"limit": 3, "after": first["last_id"]})).json()
        assert [run["id"] for run in second["data"]] == ids[2:]
        assert not second["has_more"]
        for query, count in (
            ({"status": "finished,stopped"}, 5),
            ({"status": "failed"}, 0),
            ({"model": "other"}, 0),
            ({"kind": "response"}, 0),
            ({"kind": "chat.completion", "model": "scripted-mrsa"}, 5),
        ):
            assert len((await client.get("/v1/runs", params=query)).json()["data"]) == count


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "101"}, "limit"),
        ({"limit": "٣"}, "limit"),
        ({"after": "run_none"}, "after"),
        ({"after": "a\u0000b"}, "after"),
        ({"status": "done"}, "status"),
        ({"kind": "x"}, "kind"),
        ({"model": "a\u0000"}, "model"),
        ({"page": "1"}, "page"),
    ],
)
async def test_a_bad_query_is_named(query: dict[str, str], param: str, store_url: str, store: Any) -> None:
    async with replica(ScriptedEngine(), store_url) as client:
        response = await client.get("/v1/runs", params=query)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param


async def test_the_events_of_a_run_can_be_read_again_from_anywhere(store: Any, store_url: str) -> None:
    async with replica(ScriptedEngine(), store_url) as client:
        run_id = (await answered(client))["mrsa"]["run_id"]
        last = (await until_ended(store, run_id)).last
        whole = await client.get(f"/v1/runs/{run_id}/events")
        assert whole.headers["content-type"].startswith("text/event-stream")
        found = frames(whole.text)
        assert [number for number, _, _ in found] == list(range(1, last + 1))
        assert found[0][1] == "run_started"
        assert found[-1][1] == "run_finished"
        rest = frames((await client.get(f"/v1/runs/{run_id}/events", headers={"last-event-id": "3"})).text)
        assert rest == found[3:]
        assert frames((await client.get(f"/v1/runs/{run_id}/events", params={"after": last - 1})).text) == found[-1:]
        over = await client.get(f"/v1/runs/{run_id}/events", headers={"last-event-id": str(last)})
        assert over.status_code == 204, "an EventSource asks no more"
        export = (await client.get(f"/v1/runs/{run_id}/export")).text.splitlines()
        assert [orjson.loads(line) for line in export] == [data for _, _, data in found]
        assert len(await log_of(store, run_id)) == last


async def test_a_run_is_followed_from_another_replica_until_its_end(store: Any, store_url: str) -> None:
    async with replica(slow(), store_url) as owner, replica(ScriptedEngine(), store_url) as other:
        asking = asyncio.create_task(answered(owner))
        run_id = await only_run(store)
        async with asyncio.timeout(20):
            followed = frames((await other.get(f"/v1/runs/{run_id}/events")).text)
        answer = await asking
        assert followed[-1][1] == "run_finished"
        assert [number for number, _, _ in followed] == list(range(1, len(followed) + 1))
        assert followed[-1][2]["event"]["candidates"][0] == {
            "round": answer["mrsa"]["answers"][0]["round"],
            "index": answer["mrsa"]["answers"][0]["index"],
        }


async def test_a_run_is_cancelled_by_its_id_here_and_elsewhere(store: Any, store_url: str) -> None:
    for there in (False, True):
        async with replica(slow(0.05), store_url) as owner, replica(ScriptedEngine(), store_url) as other:
            asking = asyncio.create_task(owner.post(CHAT, json=ask(mrsa=SIZES)))
            run_id = await only_run(store)
            said = await (other if there else owner).delete(f"/v1/runs/{run_id}")
            assert said.json()["cancel_requested"]
            async with asyncio.timeout(LEASE_S + 2):
                response = await asking
            assert response.status_code == 409
            assert response.json()["error"]["code"] == "run_cancelled"
            assert (await until_ended(store, run_id)).status == "cancelled"
            again = (await owner.delete(f"/v1/runs/{run_id}")).json()
            assert again["status"] == "cancelled"
            assert (await owner.get(f"/v1/runs/{run_id}")).json()["error"]["code"] == "run_cancelled"


async def test_a_trace_is_told_as_ids_and_as_text(store: Any, store_url: str) -> None:
    async with replica(ScriptedEngine(), store_url) as client:
        answer = await answered(client)
        run_id, last = answer["mrsa"]["run_id"], SIZES["rounds"]
        trace = (await client.get(f"/v1/runs/{run_id}/traces/{last}/0")).json()
        assert trace["answer"].strip() == answer["choices"][0]["message"]["content"]
        assert trace["reasoning"]
        start, stop = trace["answer_span"]
        assert 0 < start < stop <= len(trace["token_ids"])
        for path in (f"{run_id}/traces/9/9", f"{run_id}/traces/0/77", "run_none/traces/0/0", "run_none", "a%00b"):
            missing = await client.get(f"/v1/runs/{path}")
            assert missing.status_code == 404
            assert missing.json()["error"]["code"] == "not_found"
        assert (await client.get(f"/v1/runs/{run_id}/traces/x/0")).json()["error"]["param"] == "round"


async def test_without_a_store_there_is_nothing_to_read_and_that_is_said() -> None:
    async with in_memory(ScriptedEngine()) as client:
        for method, path in (("GET", ""), ("GET", "/r"), ("DELETE", "/r"), ("GET", "/r/events"), ("GET", "/r/export")):
            response = await client.request(method, f"/v1/runs{path}")
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "runs_not_stored"
            assert "--state-dir" in response.json()["error"]["message"]


async def test_a_browser_that_comes_back_goes_on_where_it_was_and_not_where_its_address_says(tmp_path: Path) -> None:
    async with in_memory(state_dir=tmp_path) as http:
        run_id = (await http.post(CHAT, json=ask(mrsa=SMALL))).json()["mrsa"]["run_id"]
        for after, seen, first in (("1", "3", 4), ("3", "1", 4), ("0", "", None), ("0", "x", None)):
            path = f"/v1/runs/{run_id}/events?after={after}"
            response = await http.get(path, headers={"last-event-id": seen})
            if first is None:
                assert response.status_code == 400
                continue
            assert response.text.startswith(f"id: {first}\n")
