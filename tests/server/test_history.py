"""`mrsa runs` against a real server: what is printed, and how it fails."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from harness.scripted import Script, ScriptedEngine
from mrsa_server.cli import main
from tests.helpers.ports import free_port
from tests.helpers.replicas import SIZES, slow
from tests.helpers.serving import CHAT, ask, on_port


@pytest.fixture(autouse=True)
def _quiet_server() -> Iterator[None]:
    with capture_logs():
        yield


async def runs(*words: str) -> int:
    return await asyncio.to_thread(main, ["runs", *words])


async def asked(url: str, **mrsa: object) -> str:
    async with httpx.AsyncClient(timeout=60) as client:
        response = await client.post(url + CHAT, json=ask(mrsa={**SIZES, **mrsa}))
        return str(response.json()["mrsa"]["run_id"])


async def running(url: str) -> str:
    async with httpx.AsyncClient() as client, asyncio.timeout(10):
        while True:
            found = (await client.get(f"{url}/v1/runs", params={"status": "running"})).json()["data"]
            if found and found[0]["events"] > 3:
                return str(found[0]["id"])
            await asyncio.sleep(0.01)


async def test_runs_are_listed_shown_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with on_port(ScriptedEngine(), state_dir=tmp_path) as (url, _):
        first, second = await asked(url, seed=1), await asked(url, seed=2)
        assert await runs("list", "--url", url) == 0
        out = capsys.readouterr().out
        assert out.index(second) < out.index(first)
        assert "finished" in out
        assert await runs("list", "--url", f"{url}/v1", "--limit", "1", "--json") == 0
        assert [run["id"] for run in json.loads(capsys.readouterr().out)] == [second]
        assert await runs("list", "--url", url, "--status", "failed") == 0
        assert "No runs." in capsys.readouterr().out
        assert await runs("show", first, "--url", url) == 0
        out = capsys.readouterr().out
        assert "tokens generated and" in out
        assert "●" in out
        assert "\\boxed{" in out
        assert await runs("show", first, "--url", url, "--json") == 0
        assert json.loads(capsys.readouterr().out)["id"] == first
        log = tmp_path / "log.jsonl"
        assert await runs("export", first, "--url", url, "-o", str(log)) == 0
        assert await runs("export", first, "--url", url) == 0
        assert capsys.readouterr().out == log.read_text()
        assert json.loads(log.read_text().splitlines()[-1])["kind"] == "run_finished"


async def test_tables_fit_a_narrow_terminal_and_are_whole_in_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with on_port(ScriptedEngine(), state_dir=tmp_path) as (url, _):
        run_id = await asked(url, population=40, rounds=2)
        for terminal in (True, False):
            monkeypatch.setattr(sys.stdout, "isatty", lambda there=terminal: there)
            monkeypatch.setenv("COLUMNS", "80")
            assert await runs("list", "--url", url) == 0
            listed = capsys.readouterr().out.splitlines()
            assert len(listed) == 2, "a head and a run"
            assert re.search(rf"{run_id} +finished +.*20[0-9]{{2}}-[0-9-]+ [0-9:]{{8}} +[0-9.]+ *$", listed[1])
            assert await runs("show", run_id, "--url", url) == 0
            shown = capsys.readouterr().out.splitlines()
            assert [line.split()[0] for line in shown[2:] if re.match(r" +[0-9]", line)] == ["0", "1", "2"]
            if terminal:
                bare = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(listed + shown))
                assert max(map(len, bare.splitlines())) <= 80
            else:
                assert "scripted-mrsa" in listed[1]


@pytest.mark.parametrize("limit", ["0", "-3", "x"])
def test_a_limit_that_is_none_is_named(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["runs", "list", "--limit", limit])
    assert f"--limit: must be a whole number from 1 on, not '{limit}'" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["export", "watch", "show"])
async def test_a_reader_who_has_enough_is_no_error(tmp_path: Path, action: str) -> None:
    async with on_port(ScriptedEngine(), state_dir=tmp_path) as (url, _):
        run_id = await asked(url)
        reading, writing = os.pipe()
        os.close(reading)
        command = [sys.executable, "-m", "mrsa_server", "runs", action, run_id, "--url", url]
        process = await asyncio.create_subprocess_exec(*command, stdout=writing, stderr=asyncio.subprocess.PIPE)
        os.close(writing)
        _, said = await process.communicate()
    assert said == b""
    assert process.returncode


async def test_runs_of_a_batch_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"problem": "?"}\n{"problem": "!"}\n')
    sizes = [word for name, value in SIZES.items() for word in ("--mrsa", f"{name}={value}")]
    async with on_port(ScriptedEngine(), state_dir=tmp_path / "state") as (url, _):
        words = ["batch", str(problems), "-o", str(tmp_path / "r"), "--url", url, *sizes]
        assert await asyncio.to_thread(main, words) == 0
        alone = await asked(url)
        capsys.readouterr()
        assert await runs("list", "--url", url, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found) == 3
        (batch_id,) = {run["batch_id"] for run in found} - {None}
        assert await runs("list", "--url", url, "--batch", batch_id) == 0
        out = capsys.readouterr().out
    assert alone not in out
    assert out.count("run_") == 2


async def test_a_run_is_watched_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with on_port(slow(), state_dir=tmp_path) as (url, _):
        asking = asyncio.create_task(asked(url))
        run_id = await running(url)
        assert await runs("watch", run_id, "--url", url) == 0
        assert run_id == await asking
    lines = capsys.readouterr().out.splitlines()
    assert "run started" in lines[0]
    assert "run finished" in lines[-1]
    assert sum("rollout finished: round 2, rollout 0" in line for line in lines) == 1


async def test_a_run_is_watched_over_a_restart_of_its_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    async with on_port(slow(0.02), state_dir=tmp_path, lease_s=0.5, at=port) as (url, app):
        asking = asyncio.create_task(asked(url))
        run_id = await running(url)
        watching = asyncio.create_task(runs("watch", run_id, "--url", url))
        await asyncio.sleep(0.2)
        await app.state.runner.drain(0)
        with pytest.raises(KeyError):
            await asking  # a 503 without an answer
    async with on_port(slow(), state_dir=tmp_path, lease_s=0.5, at=port) as (url, _):
        async with asyncio.timeout(20):
            assert await watching == 0
        watched = capsys.readouterr().out
        assert await runs("show", run_id.replace("run_", "chatcmpl-"), "--url", url) == 0
        assert re.search(r", up to [0-9,]+ lost with their engine or server", capsys.readouterr().out)
    lines = watched.splitlines()
    assert sum("run started" in line for line in lines) == 1
    assert sum("run resumed" in line for line in lines) == 1
    assert "run finished" in lines[-1]


async def test_a_run_is_cancelled_and_whoever_watches_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with on_port(slow(0.05), state_dir=tmp_path) as (url, _), httpx.AsyncClient(timeout=60) as client:
        asking = asyncio.create_task(client.post(url + CHAT, json=ask(mrsa=SIZES)))
        run_id = await running(url)
        watching = asyncio.create_task(runs("watch", run_id, "--url", url))
        assert await runs("cancel", run_id, "--url", url) == 0
        assert (await asking).status_code == 409
        assert await watching == 1
        assert await runs("cancel", run_id, "--url", url) == 0
    out, err = capsys.readouterr()
    assert f"{run_id} is being ended" in out
    assert f"{run_id} had ended before: cancelled" in out
    assert "The run was cancelled." in err


async def test_what_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with on_port(ScriptedEngine(), state_dir=tmp_path) as (url, _):
        for action in ("show", "watch", "cancel", "export"):
            assert await runs(action, "run_none", "--url", url) == 1
            assert "There is no run 'run_none'." in capsys.readouterr().err
        assert await runs("list", "--url", url, "--status", "done") == 1
        assert "status: must be one of queued" in capsys.readouterr().err
    async with on_port(ScriptedEngine()) as (url, _):
        assert await runs("list", "--url", url) == 1
        assert "--state-dir" in capsys.readouterr().err
    assert await runs("list", "--url", url) == 1
    assert f"no server answers at {url}" in capsys.readouterr().err


async def test_no_answer_does_anything_to_the_terminal_of_who_looks_at_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine(lambda _: Script("hm", "\x1b[2J\x9b31m\x07one\r\ttwo\nthree"))
    async with on_port(engine, state_dir=tmp_path) as (url, _):
        name = await asked(url, seed=1)
        assert await runs("show", name, "--url", url) == 0
        assert await runs("watch", name, "--url", url) == 0
    out = capsys.readouterr().out
    assert "one" in out
    assert "two\nthree" in out
    assert not set("\x1b\x9b\x07\r") & set(out)
