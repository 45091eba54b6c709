"""Servers as a user starts them: `mrsa serve` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.helpers.ports import free_port


@pytest.fixture(scope="session")
def scripted_url() -> Iterator[str]:
    """Base URL of `mrsa serve --engine scripted`, with `/v1`."""
    port = free_port()
    words = [sys.executable, "-m", "mrsa_server", "serve", "--engine", "scripted", "--port", str(port)]
    with subprocess.Popen([*words, "--log-level", "warning"]) as server:
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert time.monotonic() < deadline, "the server did not come up"
                assert server.poll() is None, "the server ended"
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
    assert server.returncode in (0, -15)
