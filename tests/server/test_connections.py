"""What only a real connection shows: clients that leave, are slow, send too much; and how the server leaves."""

from __future__ import annotations

import asyncio
import gc
import socket
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import httpx
import orjson
import pytest
import uvicorn

from harness.scripted import Script, ScriptedEngine, Speed
from mrsa_server import serve
from mrsa_server.api.sse import EventStream
from mrsa_server.runs.runner import Run
from mrsa_server.serve import Unpipelined
from tests.helpers.keys import client, ring
from tests.helpers.serving import CHAT, SMALL, ask, chunks, in_memory, on_port


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]), limit=1 << 26)


def post(body: bytes, **headers: str) -> bytes:
    fields = {"host": "x", "content-type": "application/json", "content-length": str(len(body)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return f"POST {CHAT} HTTP/1.1\r\n{head}\r\n".encode() + body


async def until(condition: Callable[[], bool], seconds: float = 2.0) -> float:
    """Seconds until a condition held."""
    start = time.perf_counter()
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  what is waited for has no event to set
            await asyncio.sleep(0.005)
    return time.perf_counter() - start


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_client_that_leaves_aborts_every_generation_of_its_run(streamed: bool) -> None:
    engine = ScriptedEngine(speed=Speed(step_s=0.05))
    async with on_port(engine) as (url, app):
        _, writer = await connect(url)
        writer.write(
            post(orjson.dumps(ask(stream=streamed, mrsa={"population": 8, "rounds": 1, "final_candidates": 8})))
        )
        await until(lambda: engine.open_requests > 6)
        writer.close()
        assert await until(lambda: engine.open_requests == 0) < 1.0
        await until(lambda: not app.state.runner._runs)


async def test_a_client_that_sends_a_second_request_and_leaves_ends_its_run() -> None:
    engine = ScriptedEngine(speed=Speed(step_s=0.05))
    async with on_port(engine) as (url, app):
        _, writer = await connect(url)
        body = post(orjson.dumps(ask(mrsa=SMALL)))
        writer.write(body)
        await until(lambda: engine.open_requests == 2)
        writer.write(body * 3)
        await asyncio.sleep(0.05)
        writer.close()
        assert await until(lambda: engine.open_requests == 0) < 1.0
        await until(lambda: not app.state.runner._runs)
        assert engine.total_requests == 2


async def test_the_first_of_two_requests_sent_at_once_is_answered_and_the_connection_closed() -> None:
    async with on_port(ScriptedEngine(speed=Speed(step_s=0.0001))) as (url, _):
        reader, writer = await connect(url)
        writer.write(post(orjson.dumps(ask(mrsa=SMALL))) * 2)
        async with asyncio.timeout(5):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1") == 1
        assert b"connection: close" in answer
        writer.close()


async def test_half_a_request_behind_another_puts_nothing_into_the_answer() -> None:
    engine = ScriptedEngine(lambda _: Script("hm", " ".join(map(str, range(3_000)))), speed=Speed(step_s=0.01))
    async with on_port(engine, header_timeout_s=0.2) as (url, _):
        reader, writer = await connect(url)
        writer.write(post(orjson.dumps(ask("scripted", stream=True, max_tokens=10_000))))
        await reader.readuntil(b"data: ")
        writer.write(b"GET /v1/mod")
        async with asyncio.timeout(5):
            rest = await reader.read()
        assert b"408" not in rest
        assert b"HTTP/1.1" not in rest
        assert b"[DONE]" not in rest
        writer.close()


async def test_one_client_that_leaves_takes_no_other_run_with_it() -> None:
    engine = ScriptedEngine(speed=Speed(step_s=0.001))
    async with on_port(engine) as (url, _), httpx.AsyncClient(base_url=url) as client:
        task = asyncio.create_task(client.post(CHAT, json=ask(mrsa=SMALL)))
        _, writer = await connect(url)
        writer.write(post(orjson.dumps(ask(mrsa=SMALL))))
        await until(lambda: engine.open_requests == 4)
        writer.close()
        assert (await task).status_code == 200


async def test_the_first_bytes_leave_before_any_generation_has_ended() -> None:
    engine = ScriptedEngine(speed=Speed(step_s=0.05))
    async with on_port(engine) as (url, _), httpx.AsyncClient(base_url=url) as client:
        start = time.perf_counter()
        async with client.stream("POST", CHAT, json=ask(stream=True)) as response:
            first = await anext(response.aiter_lines())
        assert time.perf_counter() - start < 1
        assert orjson.loads(first.removeprefix("data: "))["mrsa"]["event"] == "run.started"


async def test_a_slow_reader_slows_no_run_and_loses_no_text() -> None:
    text = " ".join(map(str, range(100_000, 143_000)))

    def script(request: object) -> Script:
        return Script("hm", text)

    engine = ScriptedEngine(script, chunk_tokens=8)
    async with on_port(engine, max_rollout_tokens=1_000_000) as (url, app):
        reader, writer = await connect(url)
        writer.transport.pause_reading()
        body = ask("scripted", stream=True, max_tokens=400_000)
        async with asyncio.timeout(20):
            writer.write(post(orjson.dumps(body)))
            await until(lambda: engine.total_requests == 1, 5)
            await until(lambda: not app.state.runner._runs, 15)  # it ends while nobody reads
            writer.transport.resume_reading()
            got = bytearray()
            while b"[DONE]" not in got[-64:]:
                got += await reader.read(1 << 16)
        writer.close()
    frames = [part for part in got.decode().replace("\r\n", "\n").split("\n") if part.startswith("data: {")]
    found = [orjson.loads(part.removeprefix("data: ")) for part in frames]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in found) == text.strip()
    assert len(found) < 33_000  # of 37,600 deltas: those that nobody had read yet were joined


async def test_a_body_that_does_not_arrive_is_cut_off() -> None:
    async with on_port(body_timeout_s=0.2) as (url, _):
        reader, writer = await connect(url)
        writer.write(post(b"{" + b" " * 99)[:-50])
        async with asyncio.timeout(2):
            answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"request_timeout" in answer
        writer.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_is_too_large_is_refused_before_it_is_read(chunked: bool) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * 1024

    async with on_port(max_body_bytes=4096) as (url, _), httpx.AsyncClient(base_url=url) as client:
        content = parts() if chunked else b" " * 65_536
        response = await client.post(CHAT, content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"


async def test_a_server_that_leaves_ends_its_streams_with_an_error_that_says_so() -> None:
    engine = ScriptedEngine(speed=Speed(step_s=0.05))
    async with on_port(engine) as (url, app), httpx.AsyncClient(base_url=url) as client:
        streamed = asyncio.create_task(client.post(CHAT, json=ask(stream=True)))
        whole = asyncio.create_task(client.post(CHAT, json=ask()))
        await until(lambda: engine.open_requests > 8)
        drain = asyncio.create_task(app.state.runner.drain(0.2))
        await asyncio.sleep(0.05)
        assert (await client.get("/health/ready")).status_code == 503
        assert (await client.get("/health/live")).status_code == 200
        refused = await client.post(CHAT, json=ask())
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_shutting_down")
        await drain
        assert chunks((await streamed).text)[-1]["error"]["code"] == "server_shutting_down"
        assert (await whole).status_code == 503
        assert engine.open_requests == 0


async def test_nothing_of_a_finished_run_is_kept() -> None:
    alive: weakref.WeakSet[Run] = weakref.WeakSet()
    async with in_memory() as client:
        runner = client.app.state.runner  # type: ignore[attr-defined]
        submit = runner.submit

        def watched(*args: Any) -> Run:
            run: Run = submit(*args)
            alive.add(run)
            return run

        runner.submit = watched
        for number in range(20):
            key = {"idempotency-key": str(number)} if number % 3 == 0 else {}
            await client.post(CHAT, json=ask(mrsa=SMALL, stream=number % 2 == 0), headers=key)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        gc.collect()
        assert len(alive) == 0


async def test_a_client_that_reads_nothing_is_cut_off_and_its_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unpipelined, "unread_s", 0.3)
    engine = ScriptedEngine(lambda _: Script("much " * 2_000_000, "\\boxed{1}"), chunk_tokens=50_000)
    async with on_port(engine) as (url, app):
        reader, writer = await connect(url)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(post(orjson.dumps(ask(stream=True, mrsa={**SMALL, "stream": "rollouts"}))))
        await until(lambda: app.state.runner._runs)
        await until(lambda: not app.state.runner._runs, 10)
        assert engine.open_requests == 0
        assert (await asyncio.to_thread(httpx.get, url + "/health/live")).status_code == 200
        writer.close()


async def test_a_client_that_leaves_little_unread_is_cut_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Unpipelined, "unread_s", 0.5)
    made: list[Unpipelined] = []
    connection_made = Unpipelined.connection_made

    def noted(protocol: Unpipelined, transport: asyncio.Transport) -> None:
        made.append(protocol)
        connection_made(protocol, transport)

    monkeypatch.setattr(Unpipelined, "connection_made", noted)
    async with on_port() as (url, _):
        with socket.socket() as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            found.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(found, ("127.0.0.1", int(url.rpartition(":")[2])))
            await until(lambda: made)
            transport, answered = made[0].transport, 0
            while not transport.get_write_buffer_size():  # until an answer does not fit into what the system holds
                await loop.sock_sendall(found, b"GET /%s HTTP/1.1\r\nhost: x\r\n\r\n" % (b"x" * 20_000))
                answered += 1
                await until(lambda count=answered: made[0].server_state.total_requests == count)  # type: ignore[misc]
            transport.close()  # as uvicorn does with one that is at rest
            await until(lambda: not made[0].server_state.connections, 3)


async def test_a_connection_that_is_reused_slowly_is_not_cut_off() -> None:
    async with on_port(header_timeout_s=0.3) as (url, _):
        async with httpx.AsyncClient(base_url=url) as http:
            for _ in range(3):
                assert (await http.get("/health/live")).status_code == 200
                await asyncio.sleep(0.4)
            sockets = [connection for connection in http._transport._pool.connections]  # type: ignore[attr-defined]
            assert len(sockets) == 1


def keyless(head: str = "") -> bytes:
    """A request with a body in chunks, up to what may stand behind it."""
    return f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{head}".encode()


async def test_a_key_behind_a_body_is_no_key() -> None:
    alice, body = client("alice"), orjson.dumps(ask(mrsa=SMALL))
    chunked = keyless("transfer-encoding: chunked\r\nconnection: close\r\n") + b"\r\n%x\r\n%s\r\n0\r\n" % (
        len(body),
        body,
    )
    async with on_port(keys=ring(alice)) as (url, _):
        reader, writer = await connect(url)
        writer.write(chunked + f"authorization: Bearer {alice.secret}\r\n\r\n".encode())
        async with asyncio.timeout(5):
            assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
        writer.close()


@pytest.mark.parametrize("piece", [b"a: b\r\n" * 1_000, b"x" * 6_000], ids=["many", "long"])
@pytest.mark.parametrize("keys", [True, False], ids=["refused", "read"])
async def test_what_follows_a_body_without_end_is_cut_off(piece: bytes, keys: bool) -> None:
    settings = {"keys": ring(client("alice"))} if keys else {}
    async with on_port(**settings) as (url, _):
        _, writer = await connect(url)
        writer.write(keyless("transfer-encoding: chunked\r\n") + b"\r\n2\r\n{}\r\n0\r\na: ")
        sent = 0
        with pytest.raises(ConnectionError):  # noqa: PT012  whichever of the sends finds it closed
            while sent < 20_000_000:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
                sent += len(piece)
        assert sent < 2_000_000
        writer.close()


async def test_an_empty_line_keeps_no_connection() -> None:
    async with on_port(header_timeout_s=0.3) as (url, _):
        reader, writer = await connect(url)
        writer.write(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"}")
        writer.write(b"\r\n")
        async with asyncio.timeout(3):
            assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("in_process", [False, True])
async def test_the_heap_is_settled_again_only_for_an_engine_that_was_loaded_anew(
    in_process: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[None] = []
    monkeypatch.setattr(serve, "settle_heap", lambda: settled.append(None))
    engine = ScriptedEngine()
    engine.in_process = in_process
    async with in_memory(engine) as client:
        app = client.app  # type: ignore[attr-defined]
        host = app.state.runner.host
        server = serve.DrainingServer(uvicorn.Config(app), app, grace_s=0)
        for _ in range(3):
            await server.on_tick(1)
            host.lost("it was away for a moment")
            await server.on_tick(1)
            await host.wait_up(5)
        assert len(settled) == (3 if in_process else 1)


async def test_a_stream_that_ends_before_its_first_frame_is_empty_and_no_error() -> None:
    async def frames() -> AsyncGenerator[bytes, None]:
        for part in ():
            yield part

    transport = httpx.ASGITransport(EventStream(frames, lambda _: b"broken"))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        response = await client.get("/")
    assert (response.status_code, response.content) == (200, b"")
