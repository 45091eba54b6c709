"""What a key has made is there for that key and for `admin`, and for no other key: not even that it exists."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from mrsa_server.api.auth import rule_of
from mrsa_server.app import ROUTERS
from mrsa_server.keyring import Scope
from tests.helpers.keys import client, ring
from tests.helpers.serving import CHAT, RESPONSES, SMALL, ask, in_memory

ALICE, BOB, ROOT = client("alice"), client("bob"), client("root", Scope.ADMIN)
LINE = {"custom_id": "1", "method": "POST", "url": CHAT, "body": ask(mrsa=SMALL)}


async def ended(http: httpx.AsyncClient, path: str) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            found: dict[str, Any] = (await http.get(path, headers=ALICE.headers)).json()
            if found["status"] not in ("queued", "running", "validating", "in_progress", "finalizing"):
                return found
            await asyncio.sleep(0.05)


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with in_memory(keys=ring(ALICE, BOB, ROOT), state_dir=tmp_path) as found:
        yield found


async def upload(http: httpx.AsyncClient, lines: list[dict[str, Any]], who: dict[str, str]) -> str:
    text = b"".join(orjson.dumps(line) + b"\n" for line in lines)
    sent = {"files": {"file": ("in.jsonl", text)}, "data": {"purpose": "batch"}}
    response = await http.post("/v1/files", headers=who, **sent)  # type: ignore[arg-type]
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


async def make(http: httpx.AsyncClient) -> dict[str, str]:
    """One of everything, Alice's; the names by the parameters of routes."""
    chat = (await http.post(CHAT, json=ask(mrsa=SMALL), headers=ALICE.headers)).json()
    body = {"model": "scripted-mrsa", "input": "6*7?", "mrsa": SMALL}
    response = (await http.post(RESPONSES, json=body, headers=ALICE.headers)).json()
    file_id = await upload(http, [LINE], ALICE.headers)
    batch = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    batch_id = (await http.post("/v1/batches", json=batch, headers=ALICE.headers)).json()["id"]
    done = await ended(http, f"/v1/batches/{batch_id}")
    assert done["status"] == "completed", done
    return {
        "run_id": chat["mrsa"]["run_id"],
        "response_id": response["id"],
        "file_id": file_id,
        "batch_id": batch_id,
        "output_file_id": done["output_file_id"],
        "model": "scripted",
        "round": "0",
        "index": "0",
    }


async def test_what_one_key_has_made_is_not_there_for_another(http: httpx.AsyncClient) -> None:
    names = await make(http)
    await ended(http, f"/v1/runs/{names['run_id']}")
    walked = 0
    for router in ROUTERS:
        for route in router.routes:
            path, endpoint = getattr(route, "path", ""), getattr(route, "endpoint", None)
            rule = rule_of(endpoint)
            if "{" not in path or rule is None or rule.scope is None:
                continue
            assert set(re.findall(r"\{(\w+)", path)) <= set(names), f"whose is what {path} names?"
            for method in getattr(route, "methods", ()):
                for theirs in ("file_id", "output_file_id") if "{file_id}" in path else ("file_id",):
                    where = path.format(**{**names, "file_id": names[theirs]})
                    response = await http.request(method, where, headers=BOB.headers)
                    nothing = await http.request(method, where.replace("_", "_x"), headers=BOB.headers)
                    assert response.status_code == 404, (method, where, response.text)
                    assert nothing.status_code == 404
                    assert response.json()["error"]["code"] == nothing.json()["error"]["code"]
                    walked += 1
    assert walked >= 16
    for path in ("/v1/runs", "/v1/batches", "/v1/files", "/v1/runs?batch=" + names["batch_id"]):
        assert (await http.get(path, headers=BOB.headers)).json()["data"] == []
        mine = (await http.get(path, headers=ALICE.headers)).json()["data"]
        assert mine
        assert len((await http.get(path, headers=ROOT.headers)).json()["data"]) == len(mine)
    assert (await http.get("/v1/export?format=rl", headers=BOB.headers)).text == ""
    assert (await http.get("/v1/export?format=rl", headers=ALICE.headers)).text
    for path in (f"/v1/runs?after={names['run_id']}", f"/v1/files?after={names['file_id']}"):
        assert (await http.get(path, headers=BOB.headers)).status_code == 400
        assert (await http.get(path, headers=ROOT.headers)).status_code == 200
    named = f"/v1/export?format=rl&run={names['run_id']}"
    assert (await http.get(named, headers=BOB.headers)).status_code == 400
    assert (await http.get(named, headers=ROOT.headers)).status_code == 200
    assert (await http.get(f"/v1/runs/{names['run_id']}", headers=ROOT.headers)).json()["key_id"] == "alice"
    for name in ("run_id", "response_id", "file_id", "batch_id"):
        path = {"run_id": "runs", "response_id": "responses", "file_id": "files", "batch_id": "batches"}[name]
        for who in (ALICE, ROOT):
            assert (await http.get(f"/v1/{path}/{names[name]}", headers=who.headers)).status_code == 200


async def test_nobody_goes_on_with_another_s_response(http: httpx.AsyncClient) -> None:
    names = await make(http)
    body = {"model": "scripted", "input": "And?", "previous_response_id": names["response_id"], "mrsa": SMALL}
    refused = await http.post(RESPONSES, json=body, headers=BOB.headers)
    unknown = await http.post(RESPONSES, json=body | {"previous_response_id": "resp_0"}, headers=BOB.headers)
    assert refused.status_code == unknown.status_code == 400
    assert refused.json()["error"]["code"] == unknown.json()["error"]["code"] == "previous_response_not_found"
    assert (await http.post(RESPONSES, json=body, headers=ALICE.headers)).status_code == 200

    line = {"custom_id": "1", "method": "POST", "url": RESPONSES, "body": body}
    for who, told in ((BOB, "error_file_id"), (ALICE, "output_file_id")):
        file_id = await upload(http, [line], who.headers)
        batch = {"input_file_id": file_id, "endpoint": RESPONSES, "completion_window": "24h"}
        batch_id = (await http.post("/v1/batches", json=batch, headers=who.headers)).json()["id"]
        async with asyncio.timeout(20):
            found: dict[str, Any] = {"status": ""}
            while found["status"] != "completed":
                await asyncio.sleep(0.05)
                found = (await http.get(f"/v1/batches/{batch_id}", headers=who.headers)).json()
        assert found[told], found


async def test_nobody_makes_a_batch_of_another_s_file(http: httpx.AsyncClient) -> None:
    batch = {
        "input_file_id": await upload(http, [LINE], ALICE.headers),
        "endpoint": CHAT,
        "completion_window": "24h",
    }
    assert (await http.post("/v1/batches", json=batch, headers=BOB.headers)).status_code == 400
    assert (await http.post("/v1/batches", json=batch, headers=ALICE.headers)).status_code == 200


@pytest.mark.parametrize("stored", [True, False])
async def test_the_same_idempotency_key_of_two_keys_stands_for_two_runs(tmp_path: Path, stored: bool) -> None:
    async with in_memory(keys=ring(ALICE, BOB), state_dir=tmp_path if stored else "none") as http:
        found = []
        for who, number in ((ALICE, 7), (BOB, 7), (ALICE, 7), (BOB, 8)):
            headers = {**who.headers, "idempotency-key": "same"}
            response = await http.post(CHAT, json=ask(mrsa=SMALL | {"seed": number}), headers=headers)
            found.append((response.status_code, response.json().get("mrsa", {}).get("run_id")))
        assert found[0] == found[2] != found[1]
        assert [status for status, _ in found] == [200, 200, 200, 409]
        control = await http.post(CHAT, json=ask(), headers={**BOB.headers, "idempotency-key": "bob\x1fsame"})
        assert control.status_code == 400


async def test_what_was_made_without_keys_is_for_admin_alone(tmp_path: Path) -> None:
    async with in_memory(state_dir=tmp_path) as http:
        run_id = (await http.post(CHAT, json=ask(mrsa=SMALL))).json()["mrsa"]["run_id"]
        assert (await http.get(f"/v1/runs/{run_id}")).json()["key_id"] is None
    async with in_memory(keys=ring(ALICE, ROOT), state_dir=tmp_path) as http:
        assert (await http.get(f"/v1/runs/{run_id}", headers=ALICE.headers)).status_code == 404
        assert (await http.get(f"/v1/runs/{run_id}", headers=ROOT.headers)).status_code == 200
