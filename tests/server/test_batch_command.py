"""`mrsa batch` against a real server: what is sent, what is written, and how it goes on after anything."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from structlog.testing import capture_logs

from harness.scripted import ScriptedEngine
from mrsa_server import batch as command
from mrsa_server.cli import main
from mrsa_server.problems import BadProblems, Wanted, write_batch
from mrsa_server.runs import batch_keeper
from tests.helpers.ports import free_port
from tests.helpers.replicas import SIZES, slow
from tests.helpers.serving import CHAT, RESPONSES, on_port

MRSA = [word for name, value in SIZES.items() for word in ("--mrsa", f"{name}={value}")]


@pytest.fixture(autouse=True)
def _quiet_and_soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(batch_keeper, "_POLL_S", 0.05)
    monkeypatch.setattr(command, "_POLL_S", 0.05)
    with capture_logs():
        yield


@pytest.fixture
async def url(tmp_path: Path) -> AsyncIterator[str]:
    async with on_port(ScriptedEngine(), state_dir=tmp_path / "state") as (found, _):
        yield found


async def batch(*words: object) -> int:
    return await asyncio.to_thread(main, ["batch", *map(str, words)])


async def noted(problems: Path, output: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the files that a command writes said each time, of one that came to its end."""
    real, notes = command._replace, []

    def replace(path: Path, write: Any) -> None:
        real(path, write)
        notes.append(path.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(command, "_replace", replace)
        assert await batch(problems, "-o", output, "--url", url, *MRSA) == 0
    return notes


def written(path: Path, *lines: object) -> Path:
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()]


def sent(path: Path, wanted: Wanted = Wanted("m")) -> list[dict[str, Any]]:  # noqa: B008  # it is frozen
    file = io.BytesIO()
    write_batch(path, wanted, file)
    return [orjson.loads(line) for line in file.getvalue().splitlines()]


def test_problems_are_lines_in_any_of_their_forms(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "?"}]
    path = written(
        tmp_path / "p",
        {"problem": "?", "answer": "42"},
        {"prompt": "?", "id": 7},
        {"question": "?", "id": "q"},
        {"input": "?"},
        {"messages": asked, "custom_id": "c", "temperature": 2},
        {"custom_id": "o", "method": "POST", "url": CHAT, "body": {"messages": asked, "model": "other", "mrsa": False}},
        {"body": {"messages": asked, "max_tokens": 5, "mrsa": {"rounds": 9}}},
    )
    path.write_bytes(b"\xef\xbb\xbf\n" + path.read_bytes())
    wanted = Wanted("m", {"rounds": 1}, max_tokens=3, temperature=0.5)
    usual = {"messages": asked, "model": "m", "mrsa": {"rounds": 1}, "max_completion_tokens": 3, "temperature": 0.5}
    found = sent(path, wanted)
    assert [line["custom_id"] for line in found] == ["line-2", "7", "q", "line-5", "c", "o", "line-8"]
    assert [line["body"] for line in found[:4]] == [usual] * 4
    assert found[4]["body"] == usual | {"temperature": 2}
    assert found[5]["body"] == usual | {"model": "other", "mrsa": False}
    assert found[6]["body"]["mrsa"] == {"rounds": 9}
    assert found[6]["body"]["max_tokens"] == 5
    assert "max_completion_tokens" not in found[6]["body"]
    assert {(line["method"], line["url"]) for line in found} == {("POST", CHAT)}
    (one,) = sent(written(path, {"url": RESPONSES, "body": {"input": "?"}}), wanted)
    assert (one["url"], one["body"]["max_output_tokens"]) == (RESPONSES, 3)


def test_a_line_says_itself_how_it_is_answered_and_columns_of_data_sets_are_told_and_not_sent(tmp_path: Path) -> None:
    path = written(
        tmp_path / "p",
        {"problem": "?", "answer": "42", "mrsa": {"rounds": 2}, "max_tokens": 9, "seed": 3, "model": "other"},
        {"question": "?", "level": 5, "answer": "1", "reasoning_effort": "high", "temperature": None, "metadata": {}},
        {"messages": [], "prompt": "?", "mrsa": False, "stop": ["x"]},
        {"body": {"input": "?", "reasoning": {"effort": "low"}}, "url": RESPONSES, "method": "POST", "temperature": 1},
    )
    lines = path.read_bytes().splitlines(keepends=True)
    wanted = Wanted("m", {"rounds": 1, "effort": "medium"}, max_tokens=5, temperature=0.5)
    file = io.BytesIO()
    path.write_bytes(b"".join(lines[:3]))
    problems = write_batch(path, wanted, file)
    assert dict(problems.ids) == {"line-1": 1, "line-2": 2, "line-3": 3}
    assert problems.unused == ("answer", "level", "metadata", "prompt")
    usual = {"messages": [{"role": "user", "content": "?"}], "temperature": 0.5}
    first, second, third = (orjson.loads(line)["body"] for line in file.getvalue().splitlines())
    mrsa = {"rounds": 2, "effort": "medium"}
    assert first == usual | {"model": "other", "mrsa": mrsa, "max_tokens": 9, "seed": 3}
    own = {"model": "m", "mrsa": {"rounds": 1}, "reasoning_effort": "high", "max_completion_tokens": 5}
    assert second == usual | own, "its effort goes before that of the flags"
    assert (third["mrsa"], third["stop"]) == (False, ["x"])
    path.write_bytes(lines[3])
    assert write_batch(path, wanted, file).unused == ("temperature",)
    assert "effort" not in orjson.loads(file.getvalue().splitlines()[-1])["body"]["mrsa"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ([1], "must be a JSON object"),
        ({"text": "?"}, "none of messages"),
        ({"problem": 7}, "problem must be text"),
        ({"input": [{}]}, "input must be text"),
        ({"body": []}, "body must be an object"),
        ({"body": {}, "url": "/v1/embeddings"}, "url must be"),
        ({"problem": "?", "id": 1.5}, "id must be"),
        ({"problem": "?", "id": "line-1"}, "is that of line 1"),
        ({"body": {}, "url": RESPONSES}, "those before it to"),
    ],
)
def test_a_line_that_cannot_be_sent_is_named(tmp_path: Path, line: object, reason: str) -> None:
    path = written(tmp_path / "p", {"problem": "?"}, line)
    with pytest.raises(BadProblems, match=rf"p:2: .*{reason}"):
        sent(path)
    with pytest.raises(BadProblems, match="no problems"):
        sent(written(path))


async def test_problems_are_answered_in_their_order(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = written(tmp_path / "p.jsonl", *({"problem": f"{number}?", "id": number} for number in range(12)))
    output = tmp_path / "r.jsonl"
    assert await batch(problems, "-o", output, "--url", url, *MRSA, "--effort", "low", "--max-tokens", "250") == 0
    found = read(output)
    assert [line["custom_id"] for line in found] == [str(number) for number in range(12)]
    for line in found:
        assert line["response"]["body"]["choices"][0]["message"]["content"]
        params = line["response"]["body"]["mrsa"]["params"]
        assert (params["population"], params["effort"]) == (SIZES["population"], "low")
    told = capsys.readouterr().err
    assert "12 lines: 12 answered, 0 without an answer" in told
    assert " tokens generated and " in told
    assert sorted(os.listdir(tmp_path)) == ["p.jsonl", "r.jsonl", "state"]
    assert await batch(problems, "-o", output, "--url", url, *MRSA) == 1
    assert "--force overwrites it" in capsys.readouterr().err
    before = problems.read_bytes()
    assert await batch(problems, "-o", problems, "--force", "--url", url, *MRSA) == 1
    assert "holds the problems" in capsys.readouterr().err
    assert problems.read_bytes() == before
    written(problems, {"problem": "again"})
    assert await batch(problems, "-o", output, "--url", url, *MRSA, "--force") == 0
    assert len(read(output)) == 1


async def test_lines_without_an_answer_are_among_the_results(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = written(
        tmp_path / "p.jsonl",
        {"problem": "a"},
        {"body": {"messages": [{"role": "user", "content": "b"}], "stream": True}},
        {"problem": "c"},
        {"body": {"messages": [], "model": "gpt-6"}},
    )
    output = tmp_path / "r.jsonl"
    assert await batch(problems, "-o", output, "--url", url, *MRSA) == 1
    assert [line["response"]["status_code"] for line in read(output)] == [200, 400, 200, 400]
    told = capsys.readouterr().err
    assert "4 lines: 2 answered, 2 without an answer" in told
    assert "line 2: invalid_value: stream: a line of a batch cannot be streamed\n" in told
    assert "line 4: invalid_value: messages: " in told


async def test_why_lines_have_no_answer_is_told_by_reason(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [{"problem": "?", "model": "gpt-6"} for _ in range(12)]
    problems = written(
        tmp_path / "p.jsonl", {"problem": "a", "level": 3}, *bad, *({"problem": "?", "top_p": -n} for n in range(1, 15))
    )
    problems.write_bytes(b"\n" + problems.read_bytes())
    assert await batch(problems, "-o", tmp_path / "r", "--url", url, *MRSA) == 1
    told = capsys.readouterr().err
    assert "Not sent, for they are no part of a request: level.\n" in told
    assert "12 lines (3, 4, 5, 6, 7, 8, 9, 10, ...): model_not_found: The model 'gpt-6' is not served here.\n" in told
    assert "14 lines (15, 16, 17, 18, 19, 20, 21, 22, ...): invalid_value: top_p: " in told


def test_no_more_than_some_reasons_are_told() -> None:
    many = {command.Reason("code", f"reason {number}"): [number] * number for number in range(1, 16)}
    told = list(command.Results(200, many).told())
    assert told[0].startswith("15 lines (15, ")
    assert told[-1] == "and 15 lines for 5 other reasons"
    assert len(told) == 11


async def test_a_batch_is_followed_over_a_restart_of_its_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    problems = written(tmp_path / "p.jsonl", *({"problem": f"{number}?"} for number in range(10)))
    output, state = tmp_path / "r.jsonl", tmp_path / "state"
    async with on_port(slow(0.02), state_dir=state, at=port, max_batch_runs=3) as (url, app):
        asking = asyncio.create_task(batch(problems, "-o", output, "--url", url, *MRSA))
        async with httpx.AsyncClient(base_url=url) as client:
            await until_begun(client)
        await app.state.runner.drain(0)
    await asyncio.sleep(0.5)
    async with on_port(slow(), state_dir=state, at=port):
        async with asyncio.timeout(40):
            assert await asking == 0
    assert len(read(output)) == 10
    told = capsys.readouterr().err
    assert told.count("Waiting for the server: ") == told.count("The server is back.\n") == 1


async def until_begun(client: httpx.AsyncClient) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            found = (await client.get("/v1/batches")).json()["data"]
            if found and found[0]["mrsa"]["running"]:
                return dict(found[0])
            await asyncio.sleep(0.05)


async def started(*words: object) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mrsa_server", "batch", *map(str, words)),
        stderr=asyncio.subprocess.PIPE,
        # Tests that run in a shell's background inherit that it is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
async def test_a_command_that_was_stopped_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: signal.Signals
) -> None:
    problems = written(tmp_path / "p.jsonl", *({"problem": f"{number}?"} for number in range(8)))
    output, note = tmp_path / "r.jsonl", tmp_path / "r.jsonl.batch"
    async with (
        on_port(slow(0.02), state_dir=tmp_path / "state", max_batch_runs=2) as (url, _),
        httpx.AsyncClient(base_url=url) as client,
    ):
        words = (problems, "-o", output, "--url", url, *MRSA)
        process = await started(*words)
        begun = await until_begun(client)
        await asyncio.sleep(0.3)  # until it has noted that
        assert begun["id"] in note.read_text()
        process.send_signal(how)
        _, told = await process.communicate()
        if how is signal.SIGINT:
            assert process.returncode == 130
            assert b"the same command comes back to it" in told
        assert await batch(*words, "--effort", "high") == 1
        assert "other problems or flags" in capsys.readouterr().err
        assert await batch(*words) == 0
        assert f"Going on with {begun['id']}" in capsys.readouterr().err
        assert len((await client.get("/v1/batches")).json()["data"]) == 1
    assert len(read(output)) == 8
    assert not note.exists()


class Killed(BaseException):
    """No handler of errors is to see it."""


@pytest.mark.parametrize("notes", [1, 2, 3])
async def test_a_command_that_was_killed_before_it_had_begun_begins_one_batch(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: int
) -> None:
    problems, output = written(tmp_path / "p.jsonl", {"problem": "?"}), tmp_path / "r.jsonl"
    real, left = command._replace, notes

    def replace(path: Path, write: Any) -> None:
        nonlocal left
        real(path, write)
        left -= 1
        if not left:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(command, "_replace", replace)
        with pytest.raises(Killed):
            await batch(problems, "-o", output, "--url", url, *MRSA)
    assert await batch(problems, "-o", output, "--url", url, *MRSA) == 0
    assert len(read(output)) == 1
    async with httpx.AsyncClient(base_url=url) as client:
        assert len((await client.get("/v1/batches")).json()["data"]) == 1


async def test_a_batch_that_was_begun_without_a_word_reaching_us_is_found_again(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems, output = written(tmp_path / "p.jsonl", {"problem": "?"}), tmp_path / "r.jsonl"
    notes = await noted(problems, output, url, monkeypatch)
    output.unlink()
    (tmp_path / "r.jsonl.batch").write_bytes(notes[1])  # its file is known, and not its batch
    assert await batch(problems, "-o", output, "--url", url, *MRSA) == 0
    assert len(read(output)) == 1
    async with httpx.AsyncClient(base_url=url) as client:
        assert len((await client.get("/v1/batches")).json()["data"]) == 1


async def test_a_batch_is_cancelled_and_what_it_has_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = written(tmp_path / "p.jsonl", *({"problem": f"{number}?"} for number in range(20)))
    output = tmp_path / "r.jsonl"
    async with (
        on_port(slow(0.02), state_dir=tmp_path / "state", max_batch_runs=2) as (url, _),
        httpx.AsyncClient(base_url=url) as client,
    ):
        words = (problems, "-o", output, "--url", url, *MRSA)
        assert await batch(*words, "--cancel") == 1
        assert "nothing goes on" in capsys.readouterr().err
        asking = asyncio.create_task(batch(*words))
        await until_begun(client)
        assert await batch(*words, "--cancel") == 0
        async with asyncio.timeout(30):
            assert await asking == 1
    told = capsys.readouterr().err
    assert "is cancelling" in told
    assert "The batch was cancelled." in told
    results = read(output)
    assert len(results) == 20
    assert results[-1]["error"]["code"] == "batch_cancelled"


async def test_what_cannot_be_done_is_said(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems, output = written(tmp_path / "p", {"problem": "?"}), tmp_path / "r"
    for words, reason in (
        ((tmp_path / "none", "-o", output, "--url", url), "No such file"),
        ((written(tmp_path / "bad", {}), "-o", output, "--url", url), "bad:1: it has none of"),
        ((problems, "-o", tmp_path / "no" / "r", "--url", url), "is no folder"),
        ((problems, "-o", output, "--url", f"http://127.0.0.1:{free_port()}"), "no server answers"),
    ):
        assert await batch(*words) == 1
        assert reason in capsys.readouterr().err
    (tmp_path / "r.batch").write_text("something else")
    assert await batch(problems, "-o", output, "--url", url) == 1
    assert "is none of this command's" in capsys.readouterr().err
    async with on_port(ScriptedEngine()) as (other, _):
        assert await batch(problems, "-o", tmp_path / "s", "--url", other) == 1
        assert "--state-dir" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--window", "1y"), "--window: must be hours or days such as 24h or 7d, and at most 30d, not '1y'"),
        (("--mrsa", "populaton=4"), "--mrsa populaton: is none of effort, population, rounds, "),
        (("--mrsa", "rounds=many"), "--mrsa rounds: Input should be a valid integer"),
        (("--mrsa", 'stop_when_agreed={"share": 2}'), "--mrsa stop_when_agreed share: Input should be less"),
        (("--max-tokens", "0"), "--max-tokens: Input should be greater"),
        (("--temperature", "9"), "--temperature: Input should be less"),
    ],
)
async def test_flags_that_the_server_would_refuse_are_refused_before_anything_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], reason: str
) -> None:
    problems = written(tmp_path / "p", {"problem": "?"})
    nobody = f"http://127.0.0.1:{free_port()}"
    assert await batch(problems, "-o", tmp_path / "r", "--url", nobody, *words) == 1
    assert f"mrsa batch: {reason}" in capsys.readouterr().err


async def test_a_batch_that_is_gone_can_be_begun_anew(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    problems, output = written(tmp_path / "p", {"problem": "?"}), tmp_path / "r"
    notes = await noted(problems, output, url, monkeypatch)
    output.unlink()
    note = orjson.loads(notes[2]) | {"batch_id": "batch_0"}
    (tmp_path / "r.batch").write_bytes(orjson.dumps(note))
    assert await batch(problems, "-o", output, "--url", url, *MRSA) == 1
    assert f"There is no batch 'batch_0'. To begin anew, remove {tmp_path / 'r.batch'}." in capsys.readouterr().err


async def test_a_batch_that_the_server_refuses_leaves_nothing_to_go_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = written(tmp_path / "p", {"problem": "x" * 3000}, {"problem": "?"})
    async with on_port(ScriptedEngine(), state_dir=tmp_path / "state", max_body_bytes=1000) as (url, _):
        assert await batch(problems, "-o", tmp_path / "r", "--url", url) == 1
    assert "line 1: body: must be at most 1000 bytes" in capsys.readouterr().err
    assert not (tmp_path / "r.batch").exists()


async def test_a_file_is_written_with_the_rights_of_its_folder(url: str, tmp_path: Path) -> None:
    problems, output = written(tmp_path / "p", {"problem": "?"}), tmp_path / "r"
    assert await batch(problems, "-o", output, "--url", url, *MRSA) == 0
    assert oct(output.stat().st_mode & 0o777) == oct(problems.stat().st_mode & 0o777)
    assert os.access(output, os.R_OK)
