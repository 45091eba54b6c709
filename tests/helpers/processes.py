"""Servers as a user starts them: `mrsa serve` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.helpers.ports import free_port


def start_server(*flags: str, stderr: int | None = None, store: bool = False) -> tuple[subprocess.Popen[str], str]:
    """`mrsa serve` with these flags on a free port, and its URL; it may not answer yet.

    It stores no runs, unless a flag says where or it is to have its usual `store`.
    """
    port = free_port()
    words = [sys.executable, "-m", "mrsa_server", "serve", "--port", str(port)]
    words += [*(() if store else ("--state-dir", "none")), *flags]
    return subprocess.Popen(words, stderr=stderr, text=True), f"http://127.0.0.1:{port}"


def wait_ready(url: str, path: str = "/health/ready", timeout_s: float = 30) -> None:
    """Wait until a path answers 200."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if httpx.get(url + path).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"{url}{path} was not ready within {timeout_s} s")


@contextmanager
def serving(*flags: str, timeout_s: float = 30) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that is ready, ended in order at the block's end."""
    server, url = start_server(*flags, "--log-level", "warning")
    with server:
        try:
            wait_ready(url, timeout_s=timeout_s)
            yield server, url
        finally:
            server.terminate()
    assert server.returncode in (0, -15)


class Replica:
    """One `mrsa serve`, that can be killed and comes back on its port."""

    def __init__(self, store_url: str, lease_s: float, *flags: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._flags = flags
        self._env = os.environ | {"MRSA_DATABASE_URL": store_url, "MRSA_LEASE_S": str(lease_s)}
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-m", "mrsa_server", "serve", "--engine", "scripted", "--port", str(self.port)]
        self.process = subprocess.Popen([*words, "--log-level", "error", *self._flags], env=self._env)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
