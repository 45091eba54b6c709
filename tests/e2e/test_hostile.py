"""A real server process and clients that mean it harm: each is refused or cut off, and the others are served on."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import psutil
import pytest

from tests.helpers.processes import serving
from tests.helpers.serving import CHAT, RESPONSES, SMALL, ask

pytestmark = pytest.mark.e2e
LATE_S = 1.0
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, psutil.Process]]:
    late = ("--header-timeout-s", str(LATE_S), "--body-timeout-s", str(LATE_S), "--max-body-bytes", "1000000")
    with serving("--engine", "scripted", *late) as (process, url):
        yield url, psutil.Process(process.pid)


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20)


def read(found: socket.socket) -> bytes:
    """All that comes until the server closes; a reset is an end too."""
    parts = []
    try:
        while part := found.recv(65_536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def serves(url: str, within_s: float = 5.0) -> None:
    began = time.perf_counter()
    assert httpx.post(url + CHAT, json=ask(mrsa=SMALL), timeout=20).status_code == 200
    assert httpx.get(url + "/health/live").status_code == 200
    assert time.perf_counter() - began < within_s


HEADS = {
    "nothing": b"",
    "half a line": b"POST /v1/chat/compl",
    "half a head": b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: app",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_slow_headers_are_cut_off(server: tuple[str, psutil.Process], head: bytes) -> None:
    url, _ = server
    with connect(url) as found:
        began = time.perf_counter()
        found.sendall(head)
        said = read(found)
        assert LATE_S * 0.5 < time.perf_counter() - began < LATE_S + 3
    assert said.startswith(b"HTTP/1.1 408 ") or (not head and not said)
    serves(url)


def test_headers_that_drip_have_the_same_time_as_those_that_wait(server: tuple[str, psutil.Process]) -> None:
    url, _ = server
    with connect(url) as found:
        began = time.perf_counter()
        found.sendall(b"GET /v1/models HTTP/1.1\r\n")
        with pytest.raises(ConnectionError):  # noqa: PT012  whichever of the sends finds it closed
            for number in range(200):
                found.sendall(b"x-%d: y\r\n" % number)
                time.sleep(0.05)
        assert time.perf_counter() - began < LATE_S + 3


async def test_five_hundred_slow_clients_keep_nobody_else_waiting(server: tuple[str, psutil.Process]) -> None:
    url, process = server
    port, before = int(url.rpartition(":")[2]), process.num_fds()
    opened = [await asyncio.open_connection("127.0.0.1", port) for _ in range(500)]
    for _, writer in opened:
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost:")
    await asyncio.to_thread(serves, url)
    async with asyncio.timeout(LATE_S + 10):
        for reader, _ in opened:
            assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
    for _, writer in opened:
        writer.close()
    await asyncio.sleep(0.5)
    assert process.num_fds() < before + 20
    await asyncio.to_thread(serves, url)


@pytest.mark.parametrize("endless", ["line", "header", "headers"])
def test_headers_without_end_are_cut_off_and_not_kept(server: tuple[str, psutil.Process], endless: str) -> None:
    url, process = server
    serves(url)
    before = process.memory_info().rss
    piece = b"a: b\r\n" * 10_000 if endless == "headers" else b"x" * 60_000
    sent = 0
    with connect(url) as found:
        found.sendall({"line": b"GET /", "header": b"GET / HTTP/1.1\r\na: ", "headers": b"GET / HTTP/1.1\r\n"}[endless])
        try:
            while sent < 200_000_000:
                found.sendall(piece)
                sent += len(piece)
        except ConnectionError:
            pass
        said = read(found)
    assert said.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 ")) or not said, said[:200]
    assert sent < 20_000_000
    assert process.memory_info().rss - before < 30_000_000
    serves(url)


def post(path: str, **headers: str) -> bytes:
    fields = {"host": "x", "content-type": "application/json", **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode()


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_slow_bodies_are_cut_off(server: tuple[str, psutil.Process], path: str) -> None:
    url, _ = server
    with connect(url) as found:
        began = time.perf_counter()
        found.sendall(post(path, **{"content-length": "1000"}) + b'{"model"')
        said = read(found)
        assert time.perf_counter() - began < LATE_S + 3
    assert said.startswith(b"HTTP/1.1 408 ")
    serves(url)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_huge_body_is_refused_and_never_held(server: tuple[str, psutil.Process], chunked: bool) -> None:
    url, process = server
    serves(url)
    before, sent = process.memory_info().rss, 0
    length = {"transfer-encoding": "chunked"} if chunked else {"content-length": str(10**12)}
    piece = b"%x\r\n%s\r\n" % (60_000, b"x" * 60_000) if chunked else b"x" * 60_000
    with connect(url) as found:
        found.sendall(post(CHAT, **length))
        began = time.perf_counter()
        try:
            while time.perf_counter() - began < LATE_S + 5:
                found.sendall(piece)
                sent += len(piece)
        except ConnectionError:
            pass
        assert time.perf_counter() - began < LATE_S + 4, "whoever goes on after the answer is cut off"
        said = read(found)
    assert said.startswith(b"HTTP/1.1 413 ") or not said, said[:200]
    assert process.memory_info().rss - before < 40_000_000
    serves(url)


def schema(inner: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": inner}}}


def nested(levels: int) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": nested(levels - 1)}} if levels else {}


GRAMMARS: list[dict[str, Any]] = [
    schema({"type": "string", "pattern": "(a{900}){900}"}),
    schema({"type": "string", "pattern": "(" * 120 + "a" + ")*" * 120}),
    schema({"type": "string", "pattern": "(?=a)b"}),
    schema({"type": "string", "pattern": "a" * 300}),
    schema({"type": "string", "pattern": "[" * 200}),
    schema({"type": "string", "pattern": "(a"}),
    schema({"type": "array", "maxItems": 10**9}),
    schema({"type": "string", "minLength": 10**9}),
    schema({"$ref": "#"}),
    schema({"$ref": "https://example.com/s.json"}),
    schema({"$ref": "file:///etc/passwd"}),
    schema(nested(60)),
    schema({"enum": ["x" * 70_000]}),
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(60)}}], "tool_choice": "required"},
    {"stop": ["x"] * 17},
    {"chat_template": "{{ 1 }}"},
    {"chat_template_kwargs": {"x": 1}},
    {"trust_remote_code": True},
    {"guided_regex": "(a+)+$"},
    {"guided_grammar": "root ::= root"},
    {"structured_outputs": {"regex": "(a+)+$"}},
    {"structural_tag": "{}"},
    {"cache_salt": "x"},
    {"priority": -(10**9)},
    {"extra_body": {"n": 10**6}},
    {"logits_processors": ["os.system"]},
    {"n": 10**6},
    {"best_of": 10**6},
    {"prompt_logprobs": 10**6},
]


@pytest.mark.parametrize("fields", GRAMMARS, ids=lambda fields: str(fields)[:70])
def test_a_hostile_grammar_or_engine_option_is_refused_at_once(
    server: tuple[str, psutil.Process], fields: dict[str, Any]
) -> None:
    url, _ = server
    began = time.perf_counter()
    response = httpx.post(url + CHAT, json=ask(mrsa=SMALL, **fields), timeout=30)
    assert response.status_code == 400, response.text[:300]
    assert time.perf_counter() - began < 5
    assert httpx.get(url + "/health/live").status_code == 200


def test_texts_that_are_slow_to_read_are_read_in_time(server: tuple[str, psutil.Process]) -> None:
    url, _ = server
    for text in (
        "\\boxed{" * 50_000,
        "</think>" * 50_000,
        "<tool_call>" * 30_000,
        "<|im_end|>" * 30_000,
        "=====0123456789abcdef=====\n" * 20_000,
        "# Candidates\n## Candidate 3\ncandidate 3 is correct\n" * 8_000,
        "[INST]" * 60_000,
    ):
        began = time.perf_counter()
        body = ask(mrsa=SMALL, messages=[{"role": "user", "content": text}])
        response = httpx.post(url + CHAT, json=body, timeout=60)
        assert response.status_code in (200, 400), response.text[:300]
        assert time.perf_counter() - began < 15, text[:20]
    serves(url)


def raw(line: str, *headers: str) -> bytes:
    return "\r\n".join((line, "host: x", *headers, "", "")).encode()


HARDLY_HTTP = [
    b"\x00" * 1000,
    raw("GET / HTTP/9.9"),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    raw("CONNECT example.com:443 HTTP/1.1"),
    raw("GET http://169.254.169.254/latest HTTP/1.1"),
    raw("GET /%00%ff%fe HTTP/1.1", "connection: close"),
    raw("GET /v1/runs/..%2f..%2fetc HTTP/1.1", "connection: close"),
    raw(f"POST {CHAT} HTTP/1.1", "content-length: 5", "transfer-encoding: chunked") + b"0\r\n\r\n",
    raw(f"POST {CHAT} HTTP/1.1", "content-length: 5", "content-length: 6") + b"xxxxx",
    raw("GET /v1/models HTTP/1.1", "upgrade: websocket", "connection: upgrade", "sec-websocket-key: x"),
    raw("GET /v1/models HTTP/1.1", ": y"),
]


@pytest.mark.parametrize("sent", HARDLY_HTTP, ids=lambda sent: repr(sent[:30]))
def test_what_is_hardly_http_breaks_nothing(server: tuple[str, psutil.Process], sent: bytes) -> None:
    url, _ = server
    with connect(url) as found:
        found.sendall(sent)
        found.settimeout(LATE_S + 5)
        try:
            said = found.recv(65_536)
        except (ConnectionError, TimeoutError):
            said = b""
    assert not said.startswith(b"HTTP/1.1 5"), said[:300]
    assert b"Traceback" not in said
    serves(url)


def test_numbers_of_every_size_end_in_an_answer_or_a_400(server: tuple[str, psutil.Process]) -> None:
    url, _ = server
    names = ("n", "seed", "max_completion_tokens", "max_tokens", "top_k", "temperature", "top_p", "rsa_n", "rsa_t")
    inner = ("population", "rounds", "set_size", "rollout_tokens", "tail_tokens", "final_tokens", "final_candidates")
    inner += ("budget_tokens", "quorum", "start_small", "deadline_s")
    with httpx.Client(base_url=url, timeout=30) as http:
        for number in ("-1", "0", "9007199254740993", "1e309", "-1e-9", "9" * 400, "0.5"):
            given = number.encode()
            bodies = [b'{"%s": %s' % (name.encode(), given) for name in names]
            bodies += [b'{"mrsa": {"%s": %s}' % (name.encode(), given) for name in inner]
            for body in bodies:
                rest = orjson.dumps({"model": "scripted", "messages": [{"role": "user", "content": "x"}]})
                response = http.post(CHAT, content=body + b"," + rest[1:], headers=JSON)
                assert response.status_code in (200, 400), (body, response.text[:300])
    serves(url)
