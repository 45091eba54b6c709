"""What the log says, and what it never does."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from typing import Literal

import pytest
import structlog

from harness.engine import Delta
from harness.scripted import ScriptedEngine
from harness.types import RolloutRequest
from mrsa_server import logs
from tests.helpers.serving import CHAT, SMALL, ask, in_memory

SECRET = "the launch code is 4711"


class Broken(ScriptedEngine):
    """Breaks with the prompt at hand."""

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        prompt = [message.text for message in request.messages]
        yield Delta((256,))
        raise RuntimeError(f"a bug with {len(prompt)} messages")


@pytest.fixture
def clean_logs() -> Iterator[None]:
    """Logging as it was before."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.reset_defaults()


@pytest.mark.usefixtures("clean_logs")
@pytest.mark.parametrize(("terminal", "without"), [(True, ""), (True, "1"), (False, "")])
def test_colors_are_for_terminals(
    terminal: bool, without: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", without)
    logs.configure("info", "text")
    structlog.get_logger("test").info("a line")
    written = capsys.readouterr().err
    assert "a line" in written
    assert ("\x1b[" in written) is (terminal and not without)


@pytest.mark.usefixtures("clean_logs")
@pytest.mark.parametrize("form", ["text", "json"])
async def test_the_log_of_a_run_that_broke_tells_where_and_nothing_of_the_prompt(
    form: Literal["text", "json"], capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure("info", form)
    messages = [{"role": "user", "content": SECRET}]
    async with in_memory(Broken()) as client:
        assert (await client.post(CHAT, json=ask(mrsa=SMALL, messages=messages))).status_code == 500
        del client.app.state.asking  # type: ignore[attr-defined]
        assert (await client.post(CHAT, json=ask(messages=messages))).status_code == 500
    written = capsys.readouterr().err
    assert "run broke" in written
    assert "request broke" in written
    assert "a bug with 1 messages" in written
    assert "Traceback" in written
    assert SECRET not in written
    assert "4711" not in written
    assert len(written) < 30_000


def test_no_client_writes_to_the_terminal_of_who_reads_the_log() -> None:
    path = "/\x1b[2J\x9b31m"
    configure = "import structlog; from mrsa_server import logs; logs.configure('info', 'text')"
    code = f"{configure}; structlog.get_logger('x').info('request', path={path!r}, key_id='bob')"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert r"/\x1b[2J\x9b31m" in said
    assert "\x1b[2J" not in said
    assert "\x9b" not in said
    assert len(said.splitlines()) == 1
