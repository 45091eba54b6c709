"""Where a server stores its runs: in a file out of the box, where somebody says, or in memory where it must."""

from __future__ import annotations

import pwd
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from pydantic import SecretStr

from mrsa_server import logs
from mrsa_server.app import create_app
from mrsa_server.cli import main
from mrsa_server.runs.store_errors import SchemaMismatch, StoreUnavailable
from mrsa_server.settings import Settings
from tests.helpers.processes import start_server, wait_ready
from tests.helpers.serving import CHAT, SMALL, ask, in_memory

UNUSABLE = "/proc/nowhere"  # where not even root makes a folder
WARNING = "runs live in memory and end with this server"


def stored_in(settings: Settings) -> str | None:
    url = settings.store_url
    return None if url is None else url.get_secret_value().removeprefix("sqlite:///")


def test_the_folder_is_the_one_for_state_unless_somebody_names_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert stored_in(Settings()) == f"{tmp_path}/mrsa-server/runs.db"
    monkeypatch.setenv("HOME", "/home/me")
    for nothing in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", nothing)
        assert stored_in(Settings()) == "/home/me/.local/state/mrsa-server/runs.db"
    monkeypatch.setenv("MRSA_STATE_DIR", "/elsewhere")
    assert stored_in(Settings()) == "/elsewhere/runs.db"
    monkeypatch.setenv("MRSA_STATE_DIR", "none")
    assert stored_in(Settings()) is None
    assert stored_in(Settings(state_dir=Path("none"))) == f"{Path.cwd()}/none/runs.db"
    monkeypatch.setenv("MRSA_DATABASE_URL", "postgresql://me@localhost/runs")
    assert Settings().store_url == SecretStr("postgresql://me@localhost/runs")


async def test_out_of_the_box_runs_are_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    async with in_memory(state_dir=None) as client:
        answer = (await client.post(CHAT, json=ask(mrsa=SMALL))).json()
        assert (await client.get(f"/v1/runs/{answer['mrsa']['run_id']}")).status_code == 200
    assert (tmp_path / "mrsa-server" / "runs.db").exists()


async def test_where_the_usual_folder_cannot_be_used_the_server_starts_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", UNUSABLE)
    async with in_memory(state_dir=None) as client:
        assert (await client.post(CHAT, json=ask(mrsa=SMALL))).status_code == 200
        assert (await client.get("/health/ready")).status_code == 200
        assert (await client.get("/v1/runs")).json()["error"]["code"] == "runs_not_stored"


async def test_a_user_without_a_home_is_served_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError("nobody")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert Settings().store_url is None
    async with in_memory(state_dir=None) as client:
        assert (await client.post(CHAT, json=ask(mrsa=SMALL))).status_code == 200


async def test_a_folder_that_was_named_and_cannot_be_used_is_an_error() -> None:
    app = create_app(Settings(engine="scripted", state_dir=Path(UNUSABLE)))
    with pytest.raises(StoreUnavailable, match=UNUSABLE):
        async with app.router.lifespan_context(app):
            pass


async def test_a_file_of_a_newer_version_is_an_error_wherever_it_lies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    async with in_memory(state_dir=None):
        pass
    with closing(sqlite3.connect(tmp_path / "mrsa-server" / "runs.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    app = create_app(Settings(engine="scripted"))
    with pytest.raises(SchemaMismatch, match="newer version"):
        async with app.router.lifespan_context(app):
            pass


def log_of_a_server(monkeypatch: pytest.MonkeyPatch, state_home: str) -> str:
    """What a server with its usual store says from its start to its end."""
    monkeypatch.setenv("XDG_STATE_HOME", state_home)
    flags = ("--engine", "scripted", "--log-format", "json")
    server, url = start_server(*flags, stderr=subprocess.PIPE, store=True)
    with server:
        try:
            wait_ready(url)
        finally:
            server.terminate()
        _, said = server.communicate(timeout=30)
    return said


def test_serve_says_where_runs_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = log_of_a_server(monkeypatch, str(tmp_path))
    assert said.count('"runs are stored"') == 1
    assert f"{tmp_path}/mrsa-server/runs.db" in said
    assert "warning" not in said


def test_serve_warns_once_where_it_must_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    said = log_of_a_server(monkeypatch, UNUSABLE)
    assert said.count("warning") == said.count(WARNING) == 1
    assert f'"folder": "{UNUSABLE}/mrsa-server"' in said
    assert "--state-dir DIR" in said


def test_serve_says_that_its_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "mrsa_server", "serve", "--engine", "scripted", "--port", str(port)]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 3
    assert said.stderr == f"mrsa serve: 127.0.0.1:{port} is taken by another program: --port names another\n"


def test_serve_names_a_folder_that_cannot_be_used() -> None:
    server, _ = start_server("--engine", "scripted", "--state-dir", UNUSABLE, stderr=subprocess.PIPE)
    _, said = server.communicate(timeout=30)
    assert server.returncode == 3
    assert f"mrsa serve: The store is not available: {UNUSABLE}" in said


@pytest.mark.parametrize("missing", ["asyncpg", "greenlet", "sqlalchemy.ext.asyncio"])
@pytest.mark.parametrize("command", [("serve", "--engine", "scripted"), ("db", "current"), ("db", "upgrade")])
def test_a_postgres_url_without_what_it_needs_says_what_to_install(
    command: tuple[str, ...], missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MRSA_DATABASE_URL", "postgresql://ann:secret@db.example/runs")
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    assert main(list(command)) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mrsa {command[0]}: The store is not available: Postgres needs {missing}")
    assert line.endswith(': pip install "mrsa-server[postgres]"')
    assert "secret" not in line


def test_db_looks_where_the_server_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["db", "upgrade"]) == 0
    assert f"{tmp_path}/mrsa-server/runs.db" in capsys.readouterr().out
    assert main(["db", "current", "--state-dir", "none"]) == 3
    assert "Set MRSA_DATABASE_URL, or give --state-dir" in capsys.readouterr().err
