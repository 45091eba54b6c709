"""What the clients of a soak do, each kind a function that returns what it came to, and raises where a rule is broken.

The rules are the API's: an answer is the whole answer, an error has OpenAI's shape and one of the codes that its status
can have, a stream ends in `[DONE]` or in an error, is never silent for long, and one in the background can be gone on
with anywhere without a gap.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import aiohttp
import orjson

from tests.helpers.keys import Client
from tests.helpers.serving import CHAT, QUESTION, RESPONSES, ask, joined

# What the upstream answers in turn: to tell that they are equal takes the judge's processes.
ANSWERS = ("The answer is \\boxed{42}.", "The answer is \\boxed{\\frac{84}{2}}.", "The answer is \\boxed{43}.")
PLAIN, METHOD = "fake", "fake-mrsa"
MOST_BODY_BYTES = 300_000
LATE_S = 3.0  # for headers and bodies to arrive
KEEP_ALIVE_S = 2.0
_SILENT_S = KEEP_ALIVE_S + 8.0  # the machine may be busy
_SIZES = {"population": 4, "rounds": 1, "set_size": 2, "tail_tokens": 64, "rollout_tokens": 2048, "final_tokens": 2048}
_ENDED = {"completed", "incomplete", "failed", "cancelled"}
# What a good request may be refused with, by status.
_CODES = {
    400: {"engine_refused"},
    429: {"rate_limit_exceeded"},
    502: {"engine_error"},
    503: {"server_overloaded", "engine_unavailable"},
    504: {"deadline_exceeded"},
}
_CANCELLED = {"run_cancelled", "idempotency_key_busy"}


class Broken(AssertionError):
    """The server broke a rule."""


class Told(NamedTuple):
    """A response that is whole."""

    status: int
    headers: Any
    raw: bytes

    @property
    def body(self) -> Any:
        return orjson.loads(self.raw)


@dataclass
class World:
    """What all clients share.

    Attributes:
        url: Of the server.
        session: Where connections are kept.
        keys: Clients' keys by name.
        draws: Decides everything.
        plain_s: When each plain request began and how long its answer took, in seconds.
        silent_s: The longest time for which a stream said nothing.
    """

    url: str
    session: aiohttp.ClientSession
    keys: dict[str, Client]
    draws: random.Random
    plain_s: list[tuple[float, float]] = field(default_factory=list)
    silent_s: float = 0.0

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def headers(self, key: str | None = None) -> dict[str, str]:
        """Of a client, one of those without limits where none is named."""
        return self.keys[key or self.draws.choice(("alice", "bob"))].headers

    def method(self, **fields: Any) -> dict[str, Any]:
        """A body that asks for a run of the method, no two alike."""
        sizes = _SIZES | {"rounds": self.draws.choice((1, 1, 2)), "seed": self.draws.getrandbits(40)}
        sizes["final_candidates"] = self.draws.choice((1, 1, 1, 3))  # of several the judge chooses, in processes
        return ask(METHOD, mrsa=sizes | fields.pop("mrsa", {}), **fields)

    async def call(self, verb: str, path: str, **what: Any) -> Told:
        what.setdefault("headers", self.headers())
        async with self.session.request(verb, self.url + path, **what) as answer:
            return Told(answer.status, answer.headers, await answer.read())

    async def frames(self, answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The blocks of a stream as they come, comments left out."""
        rest, since = b"", time.monotonic()
        async for part in answer.content.iter_any():
            silent, since = time.monotonic() - since, time.monotonic()
            self.silent_s = max(self.silent_s, silent)
            if silent > _SILENT_S:
                raise Broken(f"a stream was silent for {silent:.1f} s")
            *blocks, rest = (rest + part).split(b"\n\n")
            for block in blocks:
                if block and not block.startswith(b":"):
                    yield block
        if rest:
            raise Broken(f"a stream ended within a frame: {rest[-200:]!r}")


def refused(told: Told, *also: str) -> str:
    """What a good request was refused with.

    Raises:
        Broken: It may not be.
    """
    try:
        error = told.body["error"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise Broken(f"HTTP {told.status} without an error: {told.raw[:300]!r}") from None
    if set(error) != {"message", "type", "param", "code"}:
        raise Broken(f"HTTP {told.status} in another shape: {told.raw[:300]!r}")
    if error["code"] not in _CODES.get(told.status, set()) | set(also):
        raise Broken(f"HTTP {told.status}: {told.raw[:400]!r}")
    if told.status in (429, 503) and "retry-after" not in told.headers and "x-should-retry" not in told.headers:
        raise Broken(f"HTTP {told.status} does not say when to come back: {told.raw[:300]!r}")
    return f"{told.status} {error['code']}"


def expect(told: Told, *statuses: int) -> str:
    """What a bad request was answered with: one of these statuses, in the shape of errors."""
    if told.status not in statuses:
        raise Broken(f"HTTP {told.status}, not {statuses}: {told.raw[:300]!r}")
    if told.status >= 400 and set(told.body["error"]) != {"message", "type", "param", "code"}:
        raise Broken(f"HTTP {told.status} in another shape: {told.raw[:300]!r}")
    return str(told.status)


def _whole(text: str, finish: str | None) -> str:
    if finish == "stop" and text not in ANSWERS:
        raise Broken(f"another answer: {text[:200]!r}")
    return f"200 {finish}"


def _chat_answer(told: Told, *also: str) -> str:
    if told.status != 200:
        return refused(told, *also)
    choice = told.body["choices"][0]
    return _whole(choice["message"]["content"], choice["finish_reason"])


async def chat_whole(world: World) -> str:
    return _chat_answer(await world.call("POST", CHAT, json=world.method()))


async def chat_plain(world: World) -> str:
    began = time.monotonic()
    told = await world.call("POST", CHAT, json=ask(PLAIN, max_tokens=2048))
    if told.status == 200:
        world.plain_s.append((began, time.monotonic() - began))
    return _chat_answer(told)


async def chat_streamed(world: World, leave: float = 0.0, **fields: Any) -> str:
    """A stream, which the client leaves with the chance `leave` after each frame."""
    body = world.method(stream=True, **fields)
    async with world.session.post(world.url + CHAT, json=body, headers=world.headers()) as answer:
        if answer.status != 200:
            return refused(Told(answer.status, answer.headers, await answer.read()))
        found: list[dict[str, Any]] = []
        done = False
        async for block in world.frames(answer):
            if done or not block.startswith(b"data: "):
                raise Broken(f"a frame that should not be there: {block[:200]!r}")
            if block == b"data: [DONE]":
                done = True
                continue
            found.append(orjson.loads(block[6:]))
            if world.draws.random() < leave:
                return "left"
    error = found[-1].get("error")
    if error is not None:
        if error["code"] not in set().union(*_CODES.values()):
            raise Broken(f"a stream ended in {error}")
        return f"stream {error['code']}"
    if not done:
        raise Broken(f"a stream ended without [DONE], after {found[-1]}")
    finish = next((c["finish_reason"] for chunk in reversed(found) for c in chunk["choices"] if c["finish_reason"]), "")
    return _whole(joined(found), finish)


async def chat_all_text(world: World) -> str:
    return await chat_streamed(world, mrsa={"stream": "rollouts"})


async def chat_left(world: World) -> str:
    """A client that leaves in the middle, of a stream or before any answer."""
    if world.draws.random() < 0.6:
        return await chat_streamed(world, leave=0.2)
    with suppress(TimeoutError):
        async with asyncio.timeout(world.draws.random()):
            return await chat_whole(world)
    return "left"


async def chat_deadline(world: World) -> str:
    return _chat_answer(await world.call("POST", CHAT, json=world.method(mrsa={"deadline_s": 0.3})))


async def chat_limited(world: World) -> str:
    """One whose key may do little."""
    key = world.headers(world.draws.choice(("carol", "dave")))
    return _chat_answer(await world.call("POST", CHAT, json=world.method(), headers=key))


async def chat_twice(world: World) -> str:
    """Three of one key of idempotency at about the same time: one run, and another body is a conflict."""
    key = world.headers() | {"idempotency-key": f"key {world.draws.getrandbits(40)}"}
    body = world.method(stream=world.draws.random() < 0.3)

    async def one(pause_s: float) -> Told:
        await asyncio.sleep(pause_s)
        return await world.call("POST", CHAT, json=body, headers=key)

    told = [*await asyncio.gather(one(0), one(0.05), one(2 * world.draws.random()))]
    for answer in told:
        if answer.status != 200:
            refused(answer, *_CANCELLED)
    if not all(answer.status == 200 for answer in told):
        return "refused"
    if not body["stream"]:
        runs = {answer.body["mrsa"]["run_id"] for answer in told}
        if len(runs) != 1:
            raise Broken(f"one key had the runs {runs}")
    other = await world.call("POST", CHAT, json=world.method(), headers=key)
    if other.status != 409 and b'"error"' not in told[0].raw:  # a stream that ended in an error frees its key
        raise Broken(f"a key with another body: HTTP {other.status}")
    return "200 once"


async def _response(world: World, headers: dict[str, str] | None = None, **fields: Any) -> Told:
    body = _as_response(world.method(**fields))
    return await world.call("POST", RESPONSES, json=body, headers=headers or world.headers())


def _as_response(body: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in body.items() if name != "messages"}, "input": QUESTION[0]["content"]}


def _response_answer(body: dict[str, Any], *also: str) -> str:
    if body["status"] == "completed":
        messages = [item for item in body["output"] if item["type"] == "message"]
        _whole("".join(part["text"] for item in messages for part in item["content"]), "stop")
    elif body["status"] == "failed" and body["error"]["code"] not in set().union(*_CODES.values(), also):
        raise Broken(f"a response failed with {body['error']}")
    return str(body["status"])


async def response_whole(world: World) -> str:
    told = await _response(world)
    return _response_answer(told.body) if told.status == 200 else refused(told)


async def response_chained(world: World) -> str:
    """A conversation of two turns, whose first is deleted afterwards, and which another key does not see."""
    who, other = world.draws.sample(("alice", "bob"), 2)
    mine = world.headers(who)
    first = await _response(world, mine)
    if first.status != 200:
        return refused(first)
    place = f"{RESPONSES}/{first.body['id']}"
    second = await _response(world, mine, previous_response_id=first.body["id"])
    expect(await world.call("GET", f"{place}/input_items", headers=mine), 200)
    expect(await world.call("GET", place, headers=world.headers(other)), 404)
    expect(await world.call("DELETE", place, headers=mine), 200)
    expect(await world.call("GET", place, headers=mine), 404)
    return _response_answer(second.body) if second.status == 200 else refused(second)


async def response_background(world: World) -> str:
    """One that is polled until it has ended; some are cancelled, here or as runs."""
    mine = world.headers()
    told = await _response(world, mine, background=True)
    if told.status != 200:
        return refused(told)
    name: str = told.body["id"]
    if world.draws.random() < 0.4:
        await asyncio.sleep(world.draws.random())
        if world.draws.random() < 0.5:
            told = await world.call("POST", f"{RESPONSES}/{name}/cancel", headers=mine)
            if told.body["status"] not in _ENDED:
                raise Broken(f"a response that was cancelled is {told.body['status']}")
        else:
            told = await world.call("DELETE", f"/v1/runs/run_{name.partition('_')[2]}", headers=mine)
        expect(told, 200)
    while True:
        told = await world.call("GET", f"{RESPONSES}/{name}", headers=mine)
        expect(told, 200)
        if told.body["status"] in _ENDED:
            return _response_answer(told.body)
        await asyncio.sleep(0.5)


async def response_cut(world: World) -> str:
    """One in the background whose stream is cut again and again, and gone on with where it was cut."""
    mine, body = world.headers(), _as_response(world.method(stream=True, background=True))
    seen: list[dict[str, Any]] = []
    verb, path, what, cuts = "POST", RESPONSES, {"json": body}, 0
    while not (seen and seen[-1]["type"].rpartition(".")[2] in _ENDED):
        async with world.session.request(verb, world.url + path, headers=mine, **what) as answer:
            if answer.status != 200:
                return refused(Told(answer.status, answer.headers, await answer.read()))
            async for event in _events(world, answer):
                if event["type"] == "error" and event["sequence_number"] != len(seen):
                    break  # of this connection, and not of the response
                seen.append(event)
                if world.draws.random() < 0.05:
                    break
        if not seen:
            raise Broken("a stream in the background was empty")
        verb, what, cuts = "GET", {}, cuts + 1
        path = f"{RESPONSES}/{seen[0]['response']['id']}?stream=true&starting_after={len(seen) - 1}"
    if [event["sequence_number"] for event in seen] != list(range(len(seen))):
        raise Broken(f"a stream that was cut {cuts} times has other numbers: {[e['sequence_number'] for e in seen]}")
    last = seen[-1]["response"]
    text = "".join(event["delta"] for event in seen if event["type"] == "response.output_text.delta")
    if last["status"] == "completed":
        _whole(text, "stop")
    told = await world.call("GET", f"{RESPONSES}/{last['id']}", headers=mine)
    if told.body != last:
        raise Broken(f"a response that was streamed is another one when it is retrieved: {told.raw[:300]!r}")
    return _response_answer(last)


async def _events(world: World, answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for block in world.frames(answer):
        if block != b"data: [DONE]":
            name, _, data = block.partition(b"\ndata: ")
            event = orjson.loads(data)
            if name != f"event: {event['type']}".encode():
                raise Broken(f"a frame with another name: {block[:200]!r}")
            yield event


async def runs_read(world: World) -> str:
    """Runs listed, and one of them in every view that there is."""
    mine = world.headers()
    listed = await world.call("GET", f"/v1/runs?limit={world.draws.choice((5, 20, 100))}", headers=mine)
    expect(listed, 200)
    if not listed.body["data"]:
        return "none yet"
    run = world.draws.choice(listed.body["data"])["id"]
    expect(await world.call("GET", f"/v1/runs/{run}", headers=mine), 200, 404)
    expect(await world.call("GET", f"/v1/runs/{run}/traces/0/0", headers=mine), 200, 404, 502)
    view = world.draws.choice(("export", "events?after=1"))
    expect(await world.call("GET", f"/v1/runs/{run}/{view}", headers=mine), 200, 204, 404)
    return "200"


async def runs_watched(world: World) -> str:
    """Another client watches a run that goes on, and leaves at some time or reads to its end."""
    mine = world.headers()
    found = await world.call("GET", "/v1/runs?status=queued,running&limit=100", headers=mine)
    expect(found, 200)
    if not found.body["data"]:
        return "none yet"
    place = f"{world.url}/v1/runs/{world.draws.choice(found.body['data'])['id']}/events"
    async with world.session.get(place, headers=mine) as answer:
        if answer.status != 200:
            return expect(Told(answer.status, answer.headers, await answer.read()), 404)
        async for _ in world.frames(answer):
            if world.draws.random() < 0.02:
                return "left"
    return "200"


async def exported(world: World) -> str:
    """Training data of the newest runs, of which most is not read."""
    kind = world.draws.choice(("sft", "rl"))
    async with world.session.get(f"{world.url}/v1/export?format={kind}", headers=world.headers()) as answer:
        if answer.status != 200:
            return refused(Told(answer.status, answer.headers, await answer.read()))
        async for _ in answer.content.iter_chunked(65_536):
            if world.draws.random() < 0.3:
                return "left"
    return "200"


async def batch(world: World) -> str:
    """A batch from its file to its results, all of which are deleted; some are cancelled."""
    mine, count = world.headers(), 8
    lines = [
        orjson.dumps({"custom_id": str(at), "method": "POST", "url": CHAT, "body": world.method()}) + b"\n"
        for at in range(count)
    ]
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", b"".join(lines), filename="lines.jsonl")
    sent = await world.call("POST", "/v1/files", data=form, headers=mine)
    expect(sent, 200)
    order = {"input_file_id": sent.body["id"], "endpoint": CHAT, "completion_window": "1h"}
    told = await world.call("POST", "/v1/batches", json=order, headers=mine)
    expect(told, 200)
    place = f"/v1/batches/{told.body['id']}"
    if world.draws.random() < 0.2:
        expect(await world.call("POST", f"{place}/cancel", headers=mine), 200, 409)
    while told.body["status"] in ("validating", "in_progress", "finalizing", "cancelling"):
        await asyncio.sleep(1)
        told = await world.call("GET", place, headers=mine)
        expect(told, 200)
    made = told.body
    if made["status"] not in ("completed", "cancelled"):
        raise Broken(f"a batch is {made['status']}: {told.raw[:300]!r}")
    answered = 0
    for name in filter(None, (sent.body["id"], made["output_file_id"], made["error_file_id"])):
        content = await world.call("GET", f"/v1/files/{name}/content", headers=mine)
        expect(content, 200)
        answered += content.raw.count(b"\n") if name != sent.body["id"] else 0
        expect(await world.call("DELETE", f"/v1/files/{name}", headers=mine), 200)
    if made["status"] == "completed" and answered != count:
        raise Broken(f"a batch of {count} lines has {answered} results")
    return str(made["status"])


_BAD: list[tuple[Any, tuple[int, ...]]] = [
    (b"", (400,)),
    (b"{", (400,)),
    (b"[" * 100_000, (400,)),
    (b'{"model": "fake", "messages": "\xff"}', (400,)),
    (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, (400,)),
    (orjson.dumps(ask("nobody")), (404,)),
    (orjson.dumps(ask(METHOD, mrsa={"population": 10**9})), (400,)),
    (orjson.dumps(ask(METHOD, mrsa={"colour": "red"})), (400,)),
    (orjson.dumps(ask(METHOD, messages=[{"role": "user", "content": "x" * 200_000}], nonsense=1)), (400,)),
]


async def bad_body(world: World) -> str:
    content, statuses = world.draws.choice(_BAD)
    head = world.headers() | {"content-type": "application/json"}
    return expect(await world.call("POST", CHAT, data=content, headers=head), *statuses)


async def bad_key(world: World) -> str:
    head = world.draws.choice(({}, {"authorization": "Bearer sk-none"}, {"authorization": "Basic eDp5"}))
    expect(await world.call("POST", CHAT, json=world.method(), headers=head), 401)
    expect(await world.call("POST", CHAT, json=world.method(), headers=world.headers("reader")), 403)
    expect(await world.call("GET", "/metrics"), 403)
    return "401, 403"


async def bad_length(world: World) -> str:
    """Bodies that are too large, told so beforehand or not."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(2 * MOST_BODY_BYTES // 10_000):
            yield b" " * 10_000

    whole = b" " * (2 * MOST_BODY_BYTES)
    head = world.headers() | {"content-type": "application/json"}
    data = whole if world.draws.random() < 0.5 else pieces()
    try:
        return expect(await world.call("POST", CHAT, data=data, headers=head), 413)
    except aiohttp.ClientError:  # it is cut off while it still writes
        return "cut off"


async def _raw(world: World, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(sent)
    return reader, writer


_SLOW = [
    b"",
    b"POST /v1/chat/compl",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: app",
]
_HARDLY_HTTP = [
    b"\x00" * 1000,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /%00%ff%fe HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"GET / HTTP/1.1\r\na: " + b"x" * 200_000,
]


async def slow_head(world: World) -> str:
    """Headers or a body that never come to their end."""
    sent = world.draws.choice(_SLOW)
    if world.draws.random() < 0.3:
        key = world.headers()["authorization"]
        sent = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: {key}\r\n".encode()
        sent += b'content-type: application/json\r\ncontent-length: 999\r\n\r\n{"model'
    reader, writer = await _raw(world, sent)
    said = b""
    with suppress(ConnectionError):
        async with asyncio.timeout(LATE_S + 10):
            said = await reader.read()
    writer.close()
    if sent and not said.startswith(b"HTTP/1.1 408 "):
        raise Broken(f"a request that never came was answered with {said[:100]!r}")
    return "408" if said else "closed"


async def hardly_http(world: World) -> str:
    reader, writer = await _raw(world, world.draws.choice(_HARDLY_HTTP))
    said = b""
    with suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(LATE_S + 2):
            said = await reader.read(65_536)
    writer.close()
    if said.startswith(b"HTTP/1.1 5") or b"Traceback" in said:
        raise Broken(f"nonsense was answered with {said[:200]!r}")
    return said[9:12].decode() or "closed"


async def unread(world: World) -> str:
    """A client that asks for a stream and reads nothing of it, but stays."""
    key, body = world.headers()["authorization"], orjson.dumps(world.method(stream=True, mrsa={"stream": "rollouts"}))
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: {key}\r\ncontent-type: application/json\r\n"
    _, writer = await _raw(world, f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    writer.transport.pause_reading()  # type: ignore[attr-defined]  # one that reads
    await asyncio.sleep(world.draws.choice((1, 5, 20)))
    writer.transport.abort()
    return "left"


async def probed(world: World) -> str:
    expect(await world.call("GET", "/health/live", headers={}), 200)
    expect(await world.call("GET", "/v1/models"), 200, 503)
    return f"ready {(await world.call('GET', '/health/ready', headers={})).status}"


async def burst(world: World) -> str:
    """More runs at one moment than there are places for; half of their clients leave."""

    async def one() -> str:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5 + world.draws.random() if world.draws.random() < 0.5 else None):
                return await chat_whole(world)
        return "left"

    found = await asyncio.gather(*(one() for _ in range(60)))
    return "60, some overloaded" if "503 server_overloaded" in found else "60"


Kind = Callable[[World], Awaitable[str]]
# How often each is drawn, of their sum.
KINDS: dict[Kind, float] = {
    chat_whole: 12,
    chat_plain: 20,
    chat_streamed: 12,
    chat_all_text: 6,
    chat_left: 12,
    chat_deadline: 4,
    chat_limited: 6,
    chat_twice: 4,
    response_whole: 4,
    response_chained: 3,
    response_background: 6,
    response_cut: 6,
    runs_read: 5,
    runs_watched: 5,
    exported: 1,
    batch: 0.7,
    bad_body: 6,
    bad_key: 3,
    bad_length: 2,
    slow_head: 4,
    hardly_http: 3,
    unread: 2,
    probed: 6,
    burst: 0.3,
}
