"""The life of `mrsa serve` as a process: it leaves in order, and it leaves when its engine can never start."""

from __future__ import annotations

import signal
import subprocess
import time

import httpx
import pytest

from tests.helpers.ports import free_port
from tests.helpers.processes import start_server, wait_ready
from tests.helpers.serving import CHAT, ask, chunks

pytestmark = pytest.mark.e2e


def serve(*flags: str) -> tuple[subprocess.Popen[str], str]:
    return start_server("--log-format", "json", *flags, stderr=subprocess.PIPE)


def test_sigterm_lets_a_short_run_end_and_tells_a_long_one() -> None:
    server, url = serve("--engine", "scripted", "--shutdown-grace-s", "1")
    with server:
        wait_ready(url)
        long = ask(stream=True, mrsa={"effort": "xhigh", "rounds": 30})
        with httpx.stream("POST", url + CHAT, json=long, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            start = time.monotonic()
            rest = "\n".join(lines)
        assert chunks(rest.strip())[-1]["error"]["code"] == "server_shutting_down"
        assert server.wait(10) in (0, -signal.SIGTERM)
        assert 0.5 < time.monotonic() - start < 8


def test_an_engine_that_can_never_start_ends_the_server() -> None:
    server, _ = serve("--engine", "vllm", "--model", "/nowhere")
    _, said = server.communicate(timeout=60)
    assert server.returncode == 3
    assert "engine cannot start" in said


def test_a_remote_engine_that_is_not_there_yet_is_waited_for() -> None:
    nobody = free_port()
    server, url = serve("--engine", "openai", "--engine-url", f"http://127.0.0.1:{nobody}/v1", "--engine-wait-s", "0.3")
    with server:
        try:
            wait_ready(url, "/health/live")
            assert httpx.get(url + "/health/ready").status_code == 503
            response = httpx.post(url + CHAT, json=ask("whatever"))
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_unavailable"
        finally:
            server.terminate()
