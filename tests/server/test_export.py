"""`/v1/export` and `mrsa export`: the prompts of stored runs and what was written to them, as trl takes them."""

from __future__ import annotations

import asyncio
import re
from array import array
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from structlog.testing import capture_logs

from harness.engine import Delta, EngineDead
from harness.events import Event, RolloutFinished, RunStarted
from harness.markovian_rsa import init
from harness.prompts import load_templates
from harness.scripted import Script, ScriptedEngine, run_virtual
from harness.types import Carry, Message, Params, Problem, RolloutRequest, Slot, TokenIds
from mrsa_server.api.training import prompt_of
from mrsa_server.cli import main
from mrsa_server.runs import codec
from mrsa_server.runs.record import NewRun
from mrsa_server.runs.store import RunStore
from tests.helpers.replicas import SIZES, replica, until_ended
from tests.helpers.runs import PROBLEM, TextJudge, go
from tests.helpers.serving import CHAT, ask, in_memory, on_port

DATA = Path(__file__).parents[1] / "data"
TEMPLATES = load_templates()
COLUMNS = {"tools", "run_id", "model", "round", "index", "answer", "agreement", "votes", "candidates"}
SFT = COLUMNS | {"prompt", "completion", "finish", "agrees"}
RL = COLUMNS | {"prompt", "rollouts"}
PARAMS = Params(
    population=4, set_size=2, rounds=2, final_candidates=3, rollout_tokens=80, tail_tokens=24, final_tokens=400, seed=3,
    carry=Carry.HYBRID,
)  # fmt: skip
LONG = replace(PARAMS, rollout_tokens=300)


@pytest.fixture(autouse=True)
def _quiet_server() -> Iterator[None]:
    with capture_logs():
        yield


class Keeping(ScriptedEngine):
    """Keeps what it was asked for, by run and slot."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.heard: dict[tuple[str, Slot], RolloutRequest] = {}

    async def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        self.heard[request.run_id, request.slot] = request
        async for delta in super().generate(request):
            yield delta


def answering(*answers: str, thinking: str = "let us see: {}", **options: Any) -> Keeping:
    """Rollouts that answer by their index, and end by themselves."""

    def say(request: RolloutRequest) -> Script:
        round, index = request.slot
        return Script(thinking.format(f"{round}.{index}"), f"so\n\n\\boxed{{{answers[index % len(answers)]}}}")

    return Keeping(say, **options)


def rows_of(text: str) -> list[dict[str, Any]]:
    """The rows of a stream, each of the shape that trl takes: the same columns of the same types, and no nulls."""
    assert text == "" or text.endswith("\n")
    rows = [orjson.loads(line) for line in text.split("\n")[:-1]]
    for row in rows:
        assert set(row) == (SFT if "completion" in row else RL)
        assert [(name, type(value)) for name, value in row.items()] == [
            (name, type(value)) for name, value in rows[0].items()
        ]
        for message in [*row["prompt"], *row.get("completion", ())]:
            assert isinstance(message["role"], str)
            assert isinstance(message["content"], str)
        assert row["prompt"][-1]["role"] in ("user", "tool", "assistant")  # `apply_chat_template` of trl takes no other
        if "completion" in row:
            assert [message["role"] for message in row["completion"]] == ["assistant"]
        orjson.loads(row["tools"])
    return rows


async def exported(client: httpx.AsyncClient, **query: Any) -> list[dict[str, Any]]:
    response = await client.get("/v1/export", params=query)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/jsonl"
    return rows_of(response.text)


async def summary(client: httpx.AsyncClient, **query: Any) -> dict[str, Any]:
    text = (await client.get("/v1/export", params=query | {"summary": "true"})).text
    found = orjson.loads(text.split("\n")[-2])
    assert found.pop("object") == "export.summary"
    assert found["rows"] == len(rows_of("".join(text.splitlines(keepends=True)[:-1])))
    assert isinstance(found, dict)
    return found


async def log_of(
    run_id: str, engine: ScriptedEngine | None = None, params: Params = PARAMS, problem: Problem = PROBLEM
) -> list[Event]:
    """All events of a run; in a thread, since a virtual clock is an event loop of its own."""
    fresh = init(run_id, problem, params, TEMPLATES)
    engine = engine or answering("42", "42", "7")
    return [fresh.started, *(await asyncio.to_thread(run_virtual, go(fresh, engine, judge=TextJudge())))[1]]


async def put(store: RunStore, run_id: str, log: list[Event], *, at: float = 1000.0, **fields: Any) -> None:
    """Store a run that has ended."""
    claim = await store.create(NewRun(run_id, "chat.completion", b"{}", "m", created_at=at, **fields), log[:1])
    await store.finish(claim, "finished", log[1:])


async def asked(client: httpx.AsyncClient, **fields: Any) -> str:
    mrsa = SIZES | fields.pop("mrsa", {})
    response = await client.post(CHAT, json=ask(mrsa=mrsa, **fields))
    assert response.status_code == 200, response.text
    return str(response.json()["mrsa"]["run_id"])


async def test_prompts_are_those_that_the_engine_was_given_and_completions_what_it_wrote(
    store: Any, store_url: str
) -> None:
    engine = answering("42", "7", thinking="we <think> \u2028 about </think> <|im_end|> {}")
    async with replica(engine, store_url) as client:
        ids = [
            await asked(client, mrsa={"final_candidates": 3, "carry": "answer", "seed": seed}) for seed in range(3)
        ]  # fmt: skip
        for run_id in ids:
            await until_ended(store, run_id)
        for rounds in ("aggregation", "all", "final"):
            rows = await exported(client, format="sft", rounds=rounds)
            wanted = {
                place
                for place in engine.heard
                if rounds == "all" or place[1].round == 2 or (place[1].round and rounds == "aggregation")
            }
            assert {(row["run_id"], Slot(row["round"], row["index"])) for row in rows} == wanted
            assert len(rows) == len(wanted)
            assert list(dict.fromkeys(row["run_id"] for row in rows)) == ids[::-1], "the newest first"
            for row in rows:
                slot = Slot(row["round"], row["index"])
                request = engine.heard[row["run_id"], slot]
                assert row["prompt"] == prompt_of(request)
                script = engine._script(request)
                assert row["completion"][0]["content"] == f"<think>{script.thinking}</think>{script.answer}"
                assert row["finish"] == "stop"
                assert row["answer"] == ("7" if slot.index % 2 else "42")
        prompts = await exported(client, format="rl", rounds="all")
        assert {(row["run_id"], orjson.dumps(row["prompt"])) for row in prompts} == {
            (run_id, orjson.dumps(prompt_of(request))) for (run_id, _), request in engine.heard.items()
        }
        assert len(prompts) == len({(row["run_id"], orjson.dumps(row["prompt"])) for row in prompts})
        assert sum(row["rollouts"] for row in prompts) == len(engine.heard)
        assert all(row["rollouts"] > 1 for row in prompts if row["round"] == 0), "round 0 is one prompt"


async def test_control_marks_in_a_candidate_stay_letters(store: Any, store_url: str) -> None:
    async with replica(answering("1", thinking="{} <|im_end|> <think>"), store_url) as client:
        await until_ended(store, await asked(client, messages=[{"role": "user", "content": "Is <|im_end|> a mark?"}]))
        for row in await exported(client, format="rl"):
            text = row["prompt"][-1]["content"]
            assert text.count("<|im_end|>") == 1, "that of the user, which the server sends as it is"
            assert "<\u200b|im_end|>" in text
            assert "<think>" not in text


async def test_thinking_goes_where_it_is_wanted(store: Any, store_url: str) -> None:
    await put(store, "run_a", await log_of("run_a"))
    async with replica(ScriptedEngine(), store_url) as client:
        inline, field, none = [
            (await exported(client, format="sft", thinking=where, rounds="final"))[0]["completion"][0]
            for where in ("inline", "field", "none")
        ]
    assert set(field) == {"role", "content", "reasoning_content"}
    assert none == {"role": "assistant", "content": "so\n\n\\boxed{42}"}
    assert field["content"] == none["content"]
    assert inline["content"] == f"<think>{field['reasoning_content']}</think>{none['content']}"


async def test_a_model_that_does_not_think_has_no_marks(store: Any, store_url: str) -> None:
    engine = ScriptedEngine(lambda request: Script("so plain", "42"), thinking=False)
    await put(store, "run_a", await log_of("run_a", engine))
    async with replica(ScriptedEngine(thinking=False), store_url) as client:
        for row in await exported(client, format="sft"):
            content = row["completion"][0]["content"]
            assert content == "so plain\n42"


async def test_what_was_cut_is_left_out_unless_it_is_asked_for(store: Any, store_url: str) -> None:
    """Of tails of reasoning nothing reads the answer: rollouts before the last end with their thinking."""
    log = await log_of("run_a", params=replace(PARAMS, carry=Carry.REASONING))
    await put(store, "run_a", log)
    ended = Counter(event.rollout.slot.round for event in log if isinstance(event, RolloutFinished))
    async with replica(ScriptedEngine(), store_url) as client:
        assert {row["round"] for row in await exported(client, format="sft")} == {2}
        assert await summary(client, format="sft") == {
            "rows": ended[2], "runs": 1, "skipped_runs": {}, "skipped_rollouts": {"cut": ended[1]},
        }  # fmt: skip
        rows = await exported(client, format="sft", only="all", rounds="all")
        assert len(rows) == ended.total()
        assert {(row["round"] < 2, row["finish"]) for row in rows} == {(True, "thought"), (False, "stop")}
        assert all(row["completion"][0]["content"].endswith("</think>") for row in rows if row["round"] < 2)


async def test_agreeing_are_those_with_the_answer_that_the_run_chose(store: Any, store_url: str) -> None:
    """As its judge says: 1/2 is 0.5."""
    engine = answering("1/2", "0.5", "7", "\\frac{1}{2}")
    log = await log_of("run_a", engine, replace(PARAMS, final_candidates=3))
    await put(store, "run_a", log)
    async with replica(ScriptedEngine(), store_url) as client:
        rows = await exported(client, format="sft")
        agreeing = await exported(client, format="sft", only="agreeing")
        assert agreeing == [row for row in rows if row["agrees"]]
        assert {row["agrees"] for row in rows} == {True, False}
        assert all(row["agrees"] == (row["answer"] != "7") for row in rows)
        assert {"1/2", "0.5", "\\frac{1}{2}"} <= {row["answer"] for row in rows if row["agrees"]}
        for row in rows:
            assert (row["votes"], row["candidates"]) == (2, 3)
            assert row["agreement"] == pytest.approx(2 / 3)
        said = await summary(client, format="sft", only="agreeing")
        assert said["skipped_rollouts"] == {"other_answer": len(rows) - len(agreeing)}
        for row in await exported(client, format="rl"):
            assert row["answer"] in ("1/2", "0.5")
            assert row["agreement"] == pytest.approx(2 / 3)


async def test_tools_stand_beside_the_last_prompts_alone(store: Any, store_url: str) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    messages = [
        {"role": "user", "content": "Use f."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "7"},
    ]
    engine = answering("42")
    async with replica(engine, store_url) as client:
        await until_ended(store, await asked(client, messages=messages, tools=tools, mrsa={"carry": "answer"}))
        rows = await exported(client, format="sft", rounds="all")
        assert {(row["round"], len(orjson.loads(row["tools"]) or ())) for row in rows} == {(0, 0), (1, 0), (2, 1)}
        assert {request.answer.tools is not None for (_, slot), request in engine.heard.items() if slot.round == 2} == {
            True
        }
        for row in rows:
            assert row["prompt"][1]["tool_calls"][0]["function"]["arguments"] == {"x": [1]}, "as chat templates take it"


async def test_what_cannot_be_told_exactly_is_left_out_and_counted(store: Any, store_url: str) -> None:
    log = await log_of("run_good")
    await put(store, "run_good", log)
    started = log[0]
    assert isinstance(started, RunStarted)
    await put(store, "run_old", [replace(started, templates="old"), *log[1:]])
    await put(store, "run_plain", await log_of("run_plain", params=replace(PARAMS, rounds=0)))
    bare = [replace(event, trace=None) if isinstance(event, RolloutFinished) else event for event in log]
    await put(store, "run_bare", bare)
    await put(store, "run_empty", [])
    await put(store, "run_going", log[:3])
    owner = RunStore(store_url, owner="other", lease_s=600)
    await owner.open()
    await owner.create(NewRun("run_on", "chat.completion", b"{}", "m"), log[:5])
    foreign: list[Event] = []
    for event in log:
        if isinstance(event, RolloutFinished) and event.rollout.slot == Slot(2, 0):
            assert event.trace is not None
            event = replace(
                event, trace=replace(event.trace, token_ids=array("I", [1 + i for i in event.trace.token_ids]))
            )
        foreign.append(event)
    await put(store, "run_other", foreign)
    prose = await log_of("run_prose", ScriptedEngine(lambda request: Script("hm", "words " * 40)), LONG)
    await put(store, "run_prose", prose)
    async with replica(ScriptedEngine(), store_url) as client:
        found = await summary(client, format="sft")
        assert found["skipped_runs"] == {"no_log": 1, "no_round": 2, "no_traces": 1, "other_prompts": 1}
        assert found["skipped_rollouts"] == {"other_words": 1}
        assert found["runs"] == 3
        assert {row["run_id"] for row in await exported(client, format="sft")} == {"run_good", "run_other", "run_prose"}
        found = await summary(client, format="rl")
        assert found["skipped_runs"] == {"no_answer": 1, "no_log": 1, "no_round": 2, "other_prompts": 1}
        assert (await summary(client, format="rl", run=["run_on", "run_good"]))["skipped_runs"] == {"going_on": 1}
    await owner.aclose()


async def test_a_run_of_a_newer_version_is_left_out(
    store: Any, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as newer:  # its name for a kind that is not known here
        newer.setattr(codec, "KINDS", codec.KINDS | {RolloutFinished: "rollout_ended"})
        await put(store, "run_new", await log_of("run_new"))
    async with replica(ScriptedEngine(), store_url) as client:
        for form in ("sft", "rl"):
            found = await summary(client, format=form)
            assert found == {"rows": 0, "runs": 0, "skipped_runs": {"other_version": 1}, "skipped_rollouts": {}}


async def test_runs_are_chosen_by_name_or_by_what_is_known_of_them(store: Any, store_url: str) -> None:
    log = await log_of("run")
    for number in range(6):
        await put(store, f"run_{number}", log, at=1000.0 * number)
    claim = await store.create(NewRun("run_x", "chat.completion", b"{}", "other", created_at=9e9), log[:1])
    await store.finish(claim, "failed", log[1:])
    async with replica(ScriptedEngine(), store_url) as client:
        rows = len(await exported(client, format="rl", run="run_0"))

        async def chosen(**query: Any) -> str:
            found = await exported(client, format="rl", **query)
            assert len(found) % rows == 0
            return "".join(dict.fromkeys(row["run_id"][4:] for row in found))

        assert await chosen() == "543210"
        assert await chosen(run=["run_2", "run_x", "run_2"]) == "2x"
        assert await chosen(status="failed") == "x"
        assert await chosen(status="failed,finished", model="other") == "x"
        assert await chosen(model="m", since="2000", until="4000.0") == "32"
        assert await chosen(since="1970-01-01T01:00Z", until="1970-01-01T02:00:00+01:00") == ""
        assert await chosen(until="1970-01-01T00:33:20") == "10", "a time without a zone is UTC"
        assert await chosen(since="20200101", status="failed") == "x"
        some = await exported(client, format="rl", limit=rows + 1)
        assert [row["run_id"] for row in some] == ["run_5"] * rows + ["run_4"]
        assert (await summary(client, format="rl", limit=rows + 1))["runs"] == 2


async def test_many_runs_are_read_page_by_page_and_each_once(store: Any, store_url: str) -> None:
    for number in range(120):
        await put(store, f"run_{number}", [], at=float(number // 3))
    async with replica(ScriptedEngine(), store_url) as client:
        assert (await summary(client, format="rl"))["skipped_runs"] == {"no_log": 120}


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({}, "format"),
        ({"format": "dpo"}, "format"),
        ({"rounds": "first"}, "rounds"),
        ({"only": "good"}, "only"),
        ({"format": "rl", "only": "agreeing"}, "only"),
        ({"format": "rl", "thinking": "none"}, "thinking"),
        ({"thinking": "some"}, "thinking"),
        ({"status": "running"}, "status"),
        ({"status": ""}, "status"),
        ({"limit": "0"}, "limit"),
        ({"limit": "-1"}, "limit"),
        ({"since": "yesterday"}, "since"),
        ({"since": "nan"}, "since"),
        ({"until": "9" * 30}, "until"),
        ({"until": ""}, "until"),
        ({"model": "a\u0000"}, "model"),
        ({"run": "run_none"}, "run"),
        ({"run": "a\u0000b"}, "run"),
        ({"run": [f"run_{n}" for n in range(101)]}, "run"),
        ({"run": "run_none", "since": "1"}, "since"),
        ({"summary": "1"}, "summary"),
        ({"page": "1"}, "page"),
    ],
)
async def test_a_bad_query_is_named(query: dict[str, Any], param: str, tmp_path: Path) -> None:
    async with in_memory(ScriptedEngine(), state_dir=tmp_path) as client:
        response = await client.get("/v1/export", params=query if param == "format" else {"format": "sft"} | query)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param


async def test_without_a_store_there_is_nothing_to_export_and_that_is_said() -> None:
    async with in_memory(ScriptedEngine()) as client:
        response = await client.get("/v1/export", params={"format": "sft"})
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "runs_not_stored"


class Unborn(ScriptedEngine):
    """Never starts."""

    async def start(self) -> None:
        await asyncio.Event().wait()


async def test_words_need_the_engine_and_prompts_do_not(store: Any, store_url: str) -> None:
    await put(store, "run_a", await log_of("run_a"))
    async with in_memory(Unborn(), up=False, database_url=store_url) as client:
        response = await client.get("/v1/export", params={"format": "sft"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_unavailable"
        assert response.headers["retry-after"]
        assert await exported(client, format="rl")


# From a terminal.


async def export(*words: str) -> int:
    return await asyncio.to_thread(main, ["export", *words])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@asynccontextmanager
async def served(tmp_path: Path, engine: ScriptedEngine) -> AsyncIterator[str]:
    async with on_port(engine, state_dir=tmp_path / "state") as (url, _):
        yield url


async def test_runs_are_exported_from_a_terminal(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    engine = answering("42", "42", "7", thinking="a line\u2028and another: {}")
    async with served(tmp_path, engine) as url, httpx.AsyncClient(base_url=url) as client:
        for seed in range(3):
            await asked(client, mrsa={"final_candidates": 3, "carry": "answer", "seed": seed})
        ids = [run["id"] for run in (await client.get("/v1/runs")).json()["data"]]
        for form in ("sft", "rl"):
            file = tmp_path / f"{form}.jsonl"
            assert await export("--format", form, "--url", url, "-o", str(file)) == 0
            out, err = capsysbinary.readouterr()
            rows = rows_of(file.read_text())
            assert rows == await exported(client, format=form)
            assert out == b""
            assert re.match(rf"{len(rows)} rows of 3 runs\n", err.decode())
            assert await export("--format", form, "--url", f"{url}/v1") == 0
            assert capsysbinary.readouterr().out == file.read_bytes()
        words = ("--run", ids[1], "--run", ids[0], "--only", "agreeing", "--rounds", "final", "--thinking", "none")
        assert await export("--format", "sft", "--url", url, *words) == 0
        out, err = capsysbinary.readouterr()
        rows = rows_of(out.decode())
        assert {row["run_id"] for row in rows} == set(ids[:2])
        assert all(row["agrees"] and row["round"] == 2 for row in rows)
        assert b"with another answer than the run's" in err
        assert await export("--format", "rl", "--url", url, "--since", "2100-01-01") == 0
        assert capsysbinary.readouterr() == (b"", b"0 rows of 0 runs\n")
    assert names(tmp_path) == ["rl.jsonl", "sft.jsonl", "state"]


async def test_a_refusal_is_told_and_leaves_no_file(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    file = tmp_path / "rows.jsonl"
    async with served(tmp_path, ScriptedEngine()) as url:
        assert await export("--format", "rl", "--only", "all", "--url", url, "-o", str(file)) == 1
        assert b"only: is for format=sft" in capsysbinary.readouterr().err
        assert await export("--format", "rl", "--url", url, "-o", str(tmp_path / "none" / "rows")) == 1
        assert b"No such file" in capsysbinary.readouterr().err
    assert await export("--format", "rl", "--url", url, "-o", str(file)) == 1
    assert b"no server answers" in capsysbinary.readouterr().err
    assert not file.exists()


class Dying(ScriptedEngine):
    """Dies when it has read so many texts out of ids."""

    left = 1 << 30

    async def decode(self, token_ids: TokenIds) -> str:
        self.left -= 1
        if self.left < 0:
            raise EngineDead("it is gone")
        return await super().decode(token_ids)


async def test_a_stream_that_is_cut_leaves_what_was_there_before(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("of before\n")
    engine = Dying()
    async with served(tmp_path, engine) as url, httpx.AsyncClient(base_url=url) as client:
        for seed in range(4):
            await asked(client, mrsa={"seed": seed})
        engine.left = 7
        assert await export("--format", "sft", "--url", url, "-o", str(file)) == 1
        assert b"the export was cut" in capsysbinary.readouterr().err
        assert file.read_text() == "of before\n"
        engine.left = 7
        with pytest.raises(httpx.RemoteProtocolError):  # nor can it look whole to anybody else
            await client.get("/v1/export", params={"format": "sft"})
    assert names(tmp_path) == ["rows.jsonl", "state"]


async def test_an_end_that_is_missing_is_noticed_where_a_proxy_hides_the_cut(
    tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\ncontent-length: 13\r\nconnection: close\r\n\r\n{"prompt":[]}')
        await writer.drain()
        writer.close()

    file = tmp_path / "rows.jsonl"
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await export("--format", "rl", "--url", f"127.0.0.1:{port}", "-o", str(file)) == 1
    assert b"its end is missing" in capsysbinary.readouterr().err
    assert names(tmp_path) == []


# As files that a reader can look at.

GOLDEN = Problem(
    (
        Message("system", ("You are terse.",)),
        Message("user", ("What is 6 times 7? Put it in \\boxed{}.",)),
    )
)


@pytest.mark.parametrize("form", ["sft", "rl"])
async def test_the_export_of_a_small_run_reads_as_its_golden_file(form: str, store: Any, store_url: str) -> None:
    log = await log_of("run_golden", answering("42", "41", "42"), replace(PARAMS, rounds=1), GOLDEN)
    await put(store, "run_golden", log)
    async with replica(ScriptedEngine(), store_url) as client:
        text = (await client.get("/v1/export", params={"format": form})).text
    golden = DATA / f"export_{form}.jsonl"
    assert text == golden.read_text(encoding="utf-8"), "if the change is meant, write it anew and read the difference"
