"""Who may use which route: nobody without a key but probes, and nobody what its key is not for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import ValidationError

from mrsa_server.api.auth import rule_of
from mrsa_server.app import ROUTERS, create_app
from mrsa_server.keyring import Scope
from mrsa_server.settings import Settings
from tests.helpers.keys import client, ring
from tests.helpers.serving import CHAT, RESPONSES, SMALL, ask, in_memory

PROBES = {"/health/live", "/health/ready"}
ALICE, ROOT = client("alice"), client("root", Scope.ADMIN)


def routes() -> Iterator[tuple[str, str, object]]:
    """Method, a path, and the endpoint of every route."""
    for router in ROUTERS:
        for route in router.routes:
            assert isinstance(route, APIRoute), f"{route} has no dependencies, so that nobody would be asked for a key"
            for method in sorted(route.methods):
                yield method, route.path.replace(":path}", "}").replace("{", "x").replace("}", ""), route.endpoint


ROUTES = list(routes())


@pytest.mark.parametrize(("method", "path", "endpoint"), ROUTES, ids=lambda value: str(value)[:60])
async def test_no_route_but_probes_answers_without_a_key(method: str, path: str, endpoint: object) -> None:
    bad: list[dict[str, str]] = [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer x"},
        {"authorization": f"Basic {ALICE.secret}"},
        {"authorization": ALICE.secret},
        {"authorization": f"Bearer {ALICE.line}"},
        {"authorization": f"Bearer {ALICE.line.split(':')[1]}"},
        {"authorization": f"Bearer {ALICE.secret}{ALICE.secret}"},
        {"authorization": "Bearer ' OR 1=1 --"},
        {"authorization": "Bearer " + "x" * 10_000},
        {"x-api-key": ALICE.secret},
        {"host": "127.0.0.1", "x-forwarded-for": "127.0.0.1"},
        {"host": "x/health/live?"},
    ]
    async with in_memory(keys=ring(ALICE)) as http:
        for headers in bad:
            response = await http.request(method, path, headers=headers)
            if path in PROBES:
                assert response.status_code == 200
                continue
            assert response.status_code == 401, (headers, response.text)
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert ALICE.secret not in response.text
        twice = [("authorization", f"Bearer {ALICE.secret}"), ("authorization", "Bearer x")]
        assert (await http.request(method, path, headers=twice)).status_code in ((200,) if path in PROBES else (401,))


def test_every_route_says_who_may_use_it() -> None:
    assert len(ROUTES) > 15
    without = [path for _, path, endpoint in ROUTES if rule_of(endpoint) is None]
    assert not without
    assert {path for _, path, endpoint in ROUTES if (rule := rule_of(endpoint)) and rule.public} == PROBES


def test_there_are_no_routes_but_those_that_are_walked() -> None:
    app = create_app(Settings(engine="scripted", state_dir="none"))
    served = []
    for route in app.router.routes:  # since 0.141 or so FastAPI keeps a router that is included as one of them
        included = getattr(route, "original_router", None)
        served += [route] if included is None else included.routes
    assert {getattr(route, "endpoint", route) for route in served} == {endpoint for _, _, endpoint in ROUTES}
    assert app.openapi_url is None or app.docs_url is None


async def test_a_route_that_says_not_who_may_use_it_refuses_everybody() -> None:
    forgotten = APIRouter()

    @forgotten.get("/forgotten")
    async def endpoint() -> dict[str, str]:
        return {"secret": "x"}

    for keys in ({}, {"keys": ring(ROOT)}):
        async with in_memory(**keys) as http:
            http.app.include_router(forgotten)  # type: ignore[attr-defined]
            response = await http.get("/forgotten", headers=ROOT.headers)
            assert response.status_code == 403
            assert "secret" not in response.text


REACH: dict[Scope, set[str]] = {
    Scope.INFERENCE: {CHAT, RESPONSES},
    Scope.RUNS_READ: {"/v1/runs", "/v1/export"},
    Scope.RUNS_WRITE: set(),
    Scope.METRICS: {"/metrics"},
    Scope.ADMIN: {CHAT, RESPONSES, "/v1/runs", "/v1/export", "/metrics"},
}


@pytest.mark.parametrize("scope", Scope)
async def test_a_key_reaches_what_its_scopes_say(scope: Scope) -> None:
    one = client("one", scope)
    async with in_memory(keys=ring(one)) as http:
        for method, path in (
            ("POST", CHAT),
            ("POST", RESPONSES),
            ("GET", "/v1/runs"),
            ("GET", "/v1/export"),
            ("GET", "/metrics"),
        ):
            response = await http.request(method, path, headers=one.headers)
            assert (response.status_code != 403) == (path in REACH[scope]), (path, response.text)
            if response.status_code == 403:
                assert response.json()["error"]["code"] == "insufficient_scope"
        assert (await http.get("/v1/models", headers=one.headers)).status_code == 200
        writes = (await http.delete("/v1/runs/run_x", headers=one.headers)).status_code
        assert (writes != 403) == (scope in (Scope.RUNS_WRITE, Scope.ADMIN))


async def test_a_key_that_is_refused_costs_no_work_and_is_counted() -> None:
    async with in_memory(keys=ring(ROOT)) as http:
        await http.post(CHAT, json=ask(), headers={"authorization": "Bearer x"})
        text = (await http.get("/metrics", headers=ROOT.headers)).text
        assert 'mrsa_admission_rejections_total{reason="unauthorized"} 1.0' in text
        assert "mrsa_runs_total{" not in text


async def test_anybody_reads_metrics_where_that_is_said() -> None:
    async with in_memory(keys=ring(ALICE), metrics_open=True) as http:
        assert (await http.get("/metrics")).status_code == 200
        assert (await http.get("/v1/models")).status_code == 401


async def test_without_keys_anybody_may_ask_whatever_he_sends_as_one() -> None:
    async with in_memory() as http:
        for headers in ({}, {"authorization": "Bearer none"}, {"authorization": "x"}):
            assert (await http.post(CHAT, json=ask(mrsa=SMALL), headers=headers)).status_code == 200


async def test_a_good_key_asks_by_the_header_of_the_official_clients() -> None:
    async with in_memory(keys=ring(ALICE, ROOT)) as http:
        for scheme in ("Bearer", "bearer"):
            headers = {"authorization": f"{scheme} {ALICE.secret}"}
            assert (await http.post(CHAT, json=ask(mrsa=SMALL), headers=headers)).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "server.example", "localhost.example"])
def test_a_server_that_others_reach_needs_keys_or_a_word(host: str) -> None:
    with pytest.raises(ValidationError, match="can be reached by others"):
        Settings(engine="scripted", host=host)
    assert Settings(engine="scripted", host=host, open=True).host == host
    assert Settings(engine="scripted", host=host, keys=ring(ALICE)).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_a_server_that_nobody_else_reaches_needs_none(host: str) -> None:
    assert Settings(engine="scripted", host=host).host == host


def test_the_command_refuses_to_listen_to_all_without_keys() -> None:
    words = [sys.executable, "-m", "mrsa_server", "serve", "--engine", "scripted", "--host", "0.0.0.0"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "--keys-file" in done.stderr
    done = subprocess.run([*words, "--keys-file", "/nowhere"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 3
    assert "/nowhere" in done.stderr
    assert "Traceback" not in done.stderr


async def test_no_answer_lets_pages_of_other_sites_read_it() -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    async with in_memory() as http:
        for response in (
            await http.options(CHAT, headers=headers),
            await http.post(CHAT, json=ask(mrsa=SMALL), headers=headers),
            await http.get("/v1/models", headers=headers),
        ):
            assert not [name for name in response.headers if name.startswith("access-control")]
        # What a page may send without asking first is no JSON by its type, and starts nothing.
        plain = await http.post(CHAT, content=b"{}", headers={"content-type": "text/plain", **headers})
        assert plain.status_code == 400


@pytest.mark.parametrize(
    "path",
    "/invocations /pause /resume /update_weights /sleep /wake_up /collective_rpc /tokenize /load_lora_adapter "
    "/v1/load_lora_adapter /reset_prefix_cache /server_info /docs /redoc".split(),
)
async def test_nothing_of_the_engine_is_reached_through_the_server(path: str) -> None:
    async with in_memory(keys=ring(ROOT)) as http:
        for method in ("GET", "POST"):
            assert (await http.request(method, path, headers=ROOT.headers, json={})).status_code == 404
