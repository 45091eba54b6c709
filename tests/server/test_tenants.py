"""What keys may use: runs and tokens a minute, runs at once; and what all runs may cost together."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engine import Delta
from harness.markovian_rsa import State, init
from harness.prompts import load_templates
from harness.scripted import Script, ScriptedEngine, Speed, run_virtual
from harness.types import Params, RolloutRequest
from mrsa_server import keyring
from mrsa_server.api.errors import OverBudget, RateLimited
from mrsa_server.keyring import KeyRing, Scope, read_keys
from mrsa_server.metrics import Metrics
from mrsa_server.runs.tenants import Tenants, worst_tokens
from tests.helpers.keys import Client, client, ring
from tests.helpers.runs import PROBLEM, TextJudge, World, go, params_of_runs
from tests.helpers.serving import CHAT, SMALL, ask, in_memory, on_port

TEMPLATES = load_templates()
PLAIN = Params(population=1, rounds=0, final_tokens=100)


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def spent(found: Tenants) -> list[str]:
    """Of two keys those of which no line of a batch begins."""
    assert found.held is not None
    return list(found.held(["a", "b"]))


def tenants(*clients: Client, most: int | None = None) -> tuple[Tenants, Clock]:
    clock = Clock()
    keys = KeyRing(None, read_keys("\n".join(one.line for one in clients)))
    return Tenants(keys, Metrics(), most, clock), clock


def test_runs_a_minute_come_back_one_by_one() -> None:
    found, clock = tenants(client("a", runs_per_minute=6), client("b", runs_per_minute=1))
    for _ in range(6):
        found.leave(found.enter("a"), None)
    with pytest.raises(RateLimited) as error:
        found.enter("a")
    assert dict(error.value.headers)["retry-after"] == "10"
    assert found.headers("a")["x-ratelimit-remaining-requests"] == "0"
    found.enter("b")
    clock.now += 9.9
    with pytest.raises(RateLimited) as error:
        found.enter("a")
    assert dict(error.value.headers)["retry-after"] == "1"
    clock.now += 0.11
    found.enter("a")
    clock.now += 3600
    assert found.headers("a")["x-ratelimit-remaining-requests"] == "6", "a minute is the most that is saved up"


def test_runs_at_once_are_those_that_have_not_ended() -> None:
    found, _ = tenants(client("a", concurrent_runs=2))
    first, _ = found.enter("a"), found.enter("a")
    with pytest.raises(RateLimited, match="2 runs"):
        found.enter("a")
    found.leave(first, None)
    found.enter("a")


def test_a_run_is_let_in_for_what_it_may_cost_and_gives_back_what_it_did_not_use() -> None:
    found, clock = tenants(client("a", tokens_per_minute=1_000))
    ticket = found.enter("a")
    found.admit(ticket, PLAIN, 50)
    assert found.headers("a")["x-ratelimit-remaining-tokens"] == "850"
    found.leave(ticket, init("run", PROBLEM, PLAIN, TEMPLATES))
    assert found.headers("a")["x-ratelimit-remaining-tokens"] == "1000"
    large = Params(population=1, rounds=0, final_tokens=3_000)
    ticket = found.enter("a")
    found.admit(ticket, large, 0)  # more than a minute's worth, and a minute's worth is there
    with pytest.raises(RateLimited) as error:
        found.admit(found.enter("a"), PLAIN, 0)
    assert dict(error.value.headers)["retry-after"] == "120", "the SDKs wait no longer"
    clock.now += 125
    with pytest.raises(RateLimited) as error:
        found.admit(found.enter("a"), PLAIN, 0)
    assert dict(error.value.headers)["retry-after"] == "1"
    clock.now += 1.1
    found.admit(found.enter("a"), PLAIN, 0)


async def test_a_run_that_ends_while_its_key_is_away_gives_its_tokens_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "_LOOK_S", 0.01)
    file, a, b = tmp_path / "keys", client("a", tokens_per_minute=1_000), client("b")
    file.write_text(f"{a.line}\n{b.line}\n")
    ring, clock = KeyRing(file), Clock()
    found, keeping = Tenants(ring, Metrics(), None, clock), asyncio.create_task(ring.keep())
    ticket = found.enter("a")
    found.admit(ticket, Params(population=1, rounds=0, final_tokens=90_000), 0)
    for text, ids in ((f"{b.line}\n", ("b",)), (f"{a.line}\n{b.line}\n", ("a", "b"))):
        file.write_text(text)
        async with asyncio.timeout(5):
            while ring.ids != ids:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.01)
        if ids == ("b",):
            found.leave(ticket, init("run", PROBLEM, PLAIN, TEMPLATES))
    keeping.cancel()
    assert found.headers("a")["x-ratelimit-remaining-tokens"] == "1000"


def test_a_run_that_is_refused_for_its_tokens_is_none_of_the_minute_s_runs() -> None:
    found, _ = tenants(client("a", tokens_per_minute=100, runs_per_minute=2))
    found.admit(found.enter("a"), PLAIN, 0)
    for _ in range(5):
        ticket = found.enter("a")
        with pytest.raises(RateLimited):
            found.admit(ticket, PLAIN, 0)
        found.leave(ticket, None)
    assert found.headers("a")["x-ratelimit-remaining-requests"] == "1"


def test_what_all_runs_may_cost_together_is_bounded_and_a_run_alone_is_let_in() -> None:
    found, _ = tenants(client("a"), client("b"), most=250)
    one, other, third = found.enter("a"), found.enter("b"), found.enter("b")
    found.admit(one, Params(population=1, rounds=0, final_tokens=9_999), 0)
    with pytest.raises(OverBudget) as error:
        found.admit(other, PLAIN, 0)
    assert (error.value.status, error.value.code) == (503, "server_overloaded")
    assert dict(error.value.headers)["retry-after"] == "5"
    assert dict(error.value.headers)["x-ratelimit-remaining-tokens"] == "0"
    found.leave(one, None)
    found.admit(other, PLAIN, 0)
    found.admit(third, PLAIN, 0)
    assert found.committed == 200
    for ticket in (other, third):
        found.leave(ticket, None)
    assert found.committed == 0


def test_runs_of_batches_and_those_that_go_on_are_never_refused() -> None:
    found, _ = tenants(client("a", concurrent_runs=1, tokens_per_minute=10, runs_per_minute=1), most=1)
    state = init("run", PROBLEM, PLAIN, TEMPLATES)
    adopted = [found.adopt("a", batch=batch) for batch in (True, False, False)]
    for ticket in adopted:
        found.resume(ticket, state)
    with pytest.raises(RateLimited):
        found.enter("a")
    for ticket in adopted:
        found.leave(ticket, state)
    assert found.committed == 0
    found.admit(found.enter("a"), PLAIN, 0, promised=True)


def test_lines_of_batches_have_as_many_tokens_for_themselves_and_wait_for_more() -> None:
    found, clock = tenants(client("a", tokens_per_minute=600, concurrent_runs=1, runs_per_minute=1), client("b"))
    state = init("run", PROBLEM, PLAIN, TEMPLATES)  # 100 tokens at most
    lines = []
    while not spent(found):
        lines.append(found.adopt("a", batch=True))
        found.resume(lines[-1], state)
        other = found.adopt("b", batch=True)
        found.resume(other, state)
    assert len(lines) == 6
    assert spent(found) == ["a"]
    assert found.headers("a")["x-ratelimit-remaining-tokens"] == "600", "who waits for an answer is not held up"
    found.admit(found.enter("a"), PLAIN, 0)
    found.leave(lines[0], state)  # which used none
    assert spent(found) == []
    found.resume(found.adopt("a", batch=True), state)
    assert spent(found) == ["a"]
    clock.now += 1
    assert spent(found) == []


def test_no_line_of_a_batch_begins_before_it_is_known_what_the_last_ones_may_cost() -> None:
    found, _ = tenants(client("a", tokens_per_minute=600), client("b"))
    state = init("run", PROBLEM, PLAIN, TEMPLATES)  # 100 tokens at most
    for leave in (False, True):
        lines = [found.adopt("a", batch=True) for _ in range(2)]
        found.adopt("b", batch=True)
        for line in lines:
            assert spent(found) == ["a"]
            if leave:
                found.leave(line, None)
            else:
                found.resume(line, state)
        assert spent(found) == []


async def test_a_batch_of_a_key_that_is_spent_waits_and_those_of_others_do_not(tmp_path: Path) -> None:
    poor, rich = client("poor", tokens_per_minute=1), client("rich")
    async with in_memory(keys=ring(poor, rich), state_dir=tmp_path) as http:

        async def batch(who: Client) -> str:
            lines = [{"custom_id": str(n), "method": "POST", "url": CHAT, "body": ask(mrsa=SMALL)} for n in range(70)]
            text = "\n".join(json.dumps(line) for line in lines)
            form = {"files": {"file": ("b.jsonl", text)}, "data": {"purpose": "batch"}}
            file = (await http.post("/v1/files", headers=who.headers, **form)).json()["id"]  # type: ignore[arg-type]
            body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
            return str((await http.post("/v1/batches", json=body, headers=who.headers)).json()["id"])

        async def look(name: str, who: Client) -> dict[str, Any]:
            return dict((await http.get(f"/v1/batches/{name}", headers=who.headers)).json())

        async def until(name: str, who: Client, reached: Callable[[dict[str, Any]], bool]) -> None:
            async with asyncio.timeout(20):
                while not reached(await look(name, who)):  # noqa: ASYNC110 (nobody tells)
                    await asyncio.sleep(0.05)

        first = await batch(poor)
        taken_at_once = 64
        await until(first, poor, lambda found: found["request_counts"]["completed"] == taken_at_once)
        second = await batch(rich)
        await until(second, rich, lambda found: found["status"] == "completed")
        assert (await look(first, poor))["request_counts"]["completed"] == taken_at_once
        await http.post(f"/v1/batches/{first}/cancel", headers=poor.headers)
        await until(first, poor, lambda found: found["status"] == "cancelled")


async def test_lines_of_a_key_that_was_taken_away_begin_no_more_and_can_be_cancelled(tmp_path: Path) -> None:
    gone, root = client("gone", tokens_per_minute=1), client("root", Scope.ADMIN)
    lines = [{"custom_id": str(n), "method": "POST", "url": CHAT, "body": ask(mrsa=SMALL)} for n in range(70)]
    form = {"files": {"file": ("b.jsonl", "\n".join(map(json.dumps, lines)))}, "data": {"purpose": "batch"}}

    async def until(http: httpx.AsyncClient, path: str, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(20):
            while not reached(found := (await http.get(path, headers=root.headers)).json()):  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.05)
        return dict(found)

    async with in_memory(keys=ring(gone, root), state_dir=tmp_path) as http:
        file = (await http.post("/v1/files", headers=gone.headers, **form)).json()["id"]  # type: ignore[arg-type]
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        batch = f"/v1/batches/{(await http.post('/v1/batches', json=body, headers=gone.headers)).json()['id']}"
        await until(http, batch, lambda found: found["request_counts"]["completed"] == 64)  # taken at once
    async with in_memory(keys=ring(root), state_dir=tmp_path) as http:
        await asyncio.sleep(2.5)  # two looks
        assert (await until(http, batch, lambda _: True))["request_counts"]["completed"] == 64
        await http.post(f"{batch}/cancel", headers=root.headers)
        await until(http, batch, lambda found: found["status"] == "cancelled")


@given(params=params_of_runs, key=st.integers(0, 10**6))
def test_no_run_costs_more_than_it_was_let_in_for(params: Params, key: int) -> None:
    async def run() -> State:
        return (await go(init("run", PROBLEM, params, TEMPLATES), World(key), judge=TextJudge()))[0]

    assert run_virtual(run()).usage.completion_tokens <= worst_tokens(params, 0)


class Noting(ScriptedEngine):
    """Remembers the salts that it was asked with."""

    def __init__(self) -> None:
        super().__init__()
        self.salts: list[str | None] = []

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        self.salts.append(request.cache_salt)
        async for delta in super().generate(request):
            yield delta


async def test_the_prompts_of_a_key_have_a_salt_of_their_own_before_and_after_a_restart(tmp_path: Path) -> None:
    a, b = client("a"), client("b")
    seen: dict[str, set[str | None]] = {}
    for keys, callers in ((ring(a, b), (a, b)), (ring(b, a), (a, b))):
        engine = Noting()
        async with in_memory(engine, keys=keys, state_dir=tmp_path) as http:
            for who in callers:
                engine.salts.clear()
                assert (await status(http, who)).status_code == 200
                assert len(engine.salts) > 1
                seen.setdefault(who.secret, set()).update(engine.salts)
    assert [len(salts) for salts in seen.values()] == [1, 1]
    assert len(set.union(*seen.values())) == 2
    engine = Noting()
    async with in_memory(engine) as http:
        await http.post(CHAT, json=ask(mrsa=SMALL))
        assert set(engine.salts) == {None}
        refused = await http.post(CHAT, json=ask(cache_salt="x"))
        assert refused.status_code == 400, "it is nobody's to choose"


async def status(http: httpx.AsyncClient, who: Client, **fields: Any) -> httpx.Response:
    return await http.post(CHAT, json=ask(mrsa=SMALL, **fields), headers=who.headers)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_key_s_limit_is_a_429_that_says_when_to_come_back(stream: bool) -> None:
    a, b, root = client("a", runs_per_minute=2), client("b"), client("root", Scope.ADMIN)
    async with in_memory(keys=ring(a, b, root)) as http:
        good = [await status(http, a, stream=stream) for _ in range(2)]
        assert [one.status_code for one in good] == [200, 200]
        assert [one.headers["x-ratelimit-remaining-requests"] for one in good] == ["1", "0"]
        refused = await status(http, a, stream=stream)
        assert refused.status_code == 429
        error = refused.json()["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert refused.headers["x-ratelimit-limit-requests"] == "2"
        assert "x-should-retry" not in refused.headers
        assert (await status(http, b, stream=stream)).status_code == 200
        text = (await http.get("/metrics", headers=root.headers)).text
    assert 'mrsa_key_rejections_total{key="a",reason="key_runs"} 1.0' in text
    assert 'mrsa_admission_rejections_total{reason="key_runs"} 1.0' in text
    assert 'mrsa_key_runs_total{key="b",status="finished"} 1.0' in text
    assert a.secret not in text


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_that_are_not_there_refuse_a_run_before_its_first_rollout(stream: bool) -> None:
    a = client("a", tokens_per_minute=100_000)
    engine = ScriptedEngine(speed=Speed(step_s=0.01))
    async with in_memory(engine, keys=ring(a)) as http:
        first = asyncio.create_task(status(http, a, stream=True, reasoning_effort="high"))
        while not engine.open_requests:  # noqa: ASYNC110  what is waited for has no event to set
            await asyncio.sleep(0.01)
        asked = engine.total_requests
        refused = await status(http, a, stream=stream, reasoning_effort="high")
        assert refused.status_code == 429, refused.text
        assert 60 < int(refused.headers["retry-after"]) <= 120
        assert refused.headers["x-ratelimit-limit-tokens"] == "100000"
        assert engine.total_requests == asked
        first.cancel()


@pytest.mark.parametrize("fields", [{"model": "scripted"}, {"mrsa": SMALL}], ids=["chat", "mrsa"])
async def test_who_leaves_before_the_last_word_pays_for_all_that_was_written(fields: dict[str, Any]) -> None:
    a, text = client("a", tokens_per_minute=6_000), " ".join(f"w{number}" for number in range(3_000))
    engine = ScriptedEngine(lambda _: Script("hm", text), chunk_tokens=100, speed=Speed(step_s=0.0001))
    body = ask(**{"stream": True, "max_tokens": 100_000, **fields})
    async with on_port(engine, keys=ring(a)) as (url, app):
        said, tenants = 0, app.state.runner.tenants
        async with (
            httpx.AsyncClient(base_url=url) as http,
            http.stream("POST", CHAT, json=body, headers=a.headers) as got,
        ):
            async for line in got.aiter_lines():
                said += len(re.findall(r"\bw\d", line))
                if said > 2_000:
                    break
        async with asyncio.timeout(5):
            while tenants.committed:  # noqa: ASYNC110  what is waited for has no event to set
                await asyncio.sleep(0.01)
        left = int(tenants.headers("a")["x-ratelimit-remaining-tokens"])
        counted = re.search(r'mrsa_key_tokens_total\{key="a"\} (\S+)', app.state.metrics.text().decode())
    assert left < 6_000 - said + 500, "a few come back meanwhile"
    assert counted is not None
    assert float(counted[1]) > said


async def test_runs_at_once_of_a_key_are_bounded_and_others_go_on() -> None:
    a, b = client("a", concurrent_runs=1), client("b")
    engine = ScriptedEngine(speed=Speed(step_s=0.002))
    async with in_memory(engine, keys=ring(a, b)) as http:
        found = await asyncio.gather(*(status(http, who) for who in (a, a, a, b, b)))
        assert [one.status_code for one in found] == [200, 429, 429, 200, 200]
        assert (await status(http, a)).status_code == 200, "one that has ended has its place no more"


async def test_the_whole_is_a_503_with_the_same_headers() -> None:
    a = client("a", runs_per_minute=2)
    engine = ScriptedEngine(speed=Speed(step_s=0.002))
    for settings in ({"max_runs": 1, "max_queued": 0}, {"max_committed_tokens": 1}):
        async with in_memory(engine, keys=ring(a), **settings) as http:
            found = await asyncio.gather(*(status(http, a) for _ in range(2)))
            assert sorted(one.status_code for one in found) == [200, 503]
            refused = max(found, key=lambda one: one.status_code)
            assert refused.json()["error"]["code"] == "server_overloaded"
            assert refused.headers["retry-after"] == "5"
            assert refused.headers["x-ratelimit-limit-requests"]
            left = http.app.state.runner.tenants.headers("a")["x-ratelimit-remaining-requests"]  # type: ignore[attr-defined]
            assert left == "1", "what the server had no place for is not charged"


async def test_a_key_without_limits_has_no_such_headers() -> None:
    async with in_memory() as http:
        response = await http.post(CHAT, json=ask(mrsa=SMALL))
        assert not [name for name in response.headers if name.startswith("x-ratelimit")]


async def test_a_run_that_is_read_again_is_charged_once(tmp_path: Path) -> None:
    a = client("a", runs_per_minute=1)
    headers = {**a.headers, "idempotency-key": "k"}
    async with in_memory(keys=ring(a), state_dir=tmp_path) as http:
        for _ in range(3):
            assert (await http.post(CHAT, json=ask(mrsa=SMALL), headers=headers)).status_code == 200
        assert (await status(http, a)).status_code == 429
