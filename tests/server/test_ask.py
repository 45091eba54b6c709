"""`mrsa ask` against a real server on the scripted engine: what is printed, where, and how it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from rich.console import Console
from structlog.testing import capture_logs

from harness.engine import Delta, EngineError
from harness.scripted import Script, ScriptedEngine
from harness.types import RolloutRequest
from mrsa_server.ask import Board
from mrsa_server.cli import main
from tests.helpers.ports import free_port
from tests.helpers.serving import on_port

SMALL = ["--population", "4", "--rounds", "1", "--set-size", "2", "--rollout-tokens", "200", "--final-tokens", "400"]


@pytest.fixture(autouse=True)
def _quiet_server() -> Iterator[None]:
    """The server shares this process, and its log would share standard output."""
    with capture_logs():
        yield


def scripted() -> ScriptedEngine:
    return ScriptedEngine(lambda request: Script(f"thought {request.slot}", f"The answer is {6 * 7}."))


async def ask(*words: str) -> int:
    return await asyncio.to_thread(main, ["ask", *words])


async def test_the_answer_goes_to_stdout_and_the_rounds_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    async with on_port(scripted()) as (url, _):
        assert await ask("What is 6 times 7?", "--url", url, *SMALL) == 0
    out, err = capsys.readouterr()
    assert out == "The answer is 42.\n"
    assert "Markovian RSA: population 4, rounds 1, set size 2, rollout tokens 200" in err
    assert err.count("round 0, rollout") == 2
    assert "round 1, rollout 0:" in err
    assert "tokens generated and" in err
    assert "2 rollouts were never started" in err


async def test_quiet_prints_the_answer_alone_and_a_path_of_the_api_will_do(capsys: pytest.CaptureFixture[str]) -> None:
    async with on_port(scripted()) as (url, _):
        assert await ask("What?", "--url", f"{url}/v1", "--quiet", *SMALL) == 0
    assert capsys.readouterr() == ("The answer is 42.\n", "")


async def test_a_refusal_is_told_as_the_server_words_it(capsys: pytest.CaptureFixture[str]) -> None:
    async with on_port(scripted()) as (url, _):
        assert await ask("hm", "--url", url, "--population", "4", "--final-candidates", "9") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "final_candidates" in err
    assert "at most population (4)" in err


async def test_a_run_that_fails_prints_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine(lambda _: Script("", "", EngineError("no luck today")))
    async with on_port(engine) as (url, _):
        assert await ask("hm", "--url", url, *SMALL) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "no luck today" in err


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--temperature", "nan"), ("--deadline-s", "inf"), ("--deadline-s", "soon"), ("--stop-when-agreed", "nan,3")],
)
def test_a_number_that_json_does_not_know_is_named(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["ask", "hm", flag, value])
    assert ended.value.code == 2
    assert f"argument {flag}" in capsys.readouterr().err


async def test_a_server_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert await ask("hm", "--url", url) == 1
    assert f"no server answers at {url}" in capsys.readouterr().err


async def test_a_connection_that_breaks_is_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    class Breaking(ScriptedEngine):
        async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
            stopping.set()
            await asyncio.sleep(60)
            yield Delta()

    stopping = asyncio.Event()
    async with on_port(Breaking()) as (url, app):
        asking = asyncio.create_task(ask("hm", "--url", url, *SMALL))
        await stopping.wait()
        await app.state.runner.drain(0)
        assert await asking == 1
    assert capsys.readouterr().out == ""


def test_the_board_draws_rounds_as_they_fill() -> None:
    board = Board()
    events: list[dict[str, Any]] = [
        {"event": "run.started", "params": {"population": 4, "rounds": 1}},
        {"event": "round.started", "round": 0, "rollouts": 3},
        {"event": "rollout.finished", "round": 0, "index": 1, "tokens": 10, "seconds": 1.0, "finish": "thought"},
        {"event": "rollout.failed", "round": 0, "index": 2, "tokens": 1, "seconds": 0.5, "error": "[red]lost"},
    ]
    for event in events:
        board.take({"choices": [], "mrsa": event})
    console = Console(width=100)
    with console.capture() as capture:
        console.print(board.render())
    assert "●✗○" in capture.get()
