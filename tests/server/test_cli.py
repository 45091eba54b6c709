"""`mrsa` on the command line: what it says of itself, and of what it cannot take."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from mrsa_server import __version__
from mrsa_server.cli import main
from mrsa_server.serve import add_arguments, read_settings
from mrsa_server.settings import Settings


def settings(*words: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_settings(vars(parser.parse_args(words)), parser)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_help_names_every_flag_with_its_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, info in Settings.model_fields.items():
        if info.title is not None:
            assert "--" + name.replace("_", "-") in text
            assert f"MRSA_{name.upper()}" in text.replace("\n", "")
    assert "--engine-api-key" not in text  # a secret on a command line is everybody's


def test_flags_win_over_variables_and_these_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRSA_PORT", "9001")
    monkeypatch.setenv("MRSA_ENGINE", "openai")
    monkeypatch.setenv("MRSA_ENGINE_URL", "http://localhost:1/v1")
    monkeypatch.setenv("MRSA_ENGINE_API_KEY", "secret")
    found = settings("--port", "9002", "--engine-args", '{"dtype": "float32"}')
    assert (found.port, found.engine, found.host) == (9002, "openai", "127.0.0.1")
    assert found.engine_args == {"dtype": "float32"}
    assert found.engine_api_key is not None
    assert "secret" not in repr(found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--port", "x"), "--port [MRSA_PORT]"),
        (("--max-runs", "0"), "--max-runs [MRSA_MAX_RUNS]"),
        (("--engine", "openai"), "--engine-url"),
        (("--engine", "vllm"), "--model"),
        (("--engine", "magic"), "invalid choice"),
        (("--keep-alive-s", "nan"), "--keep-alive-s"),
    ],
)
def test_a_bad_value_is_named(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        settings(*words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_server_loads_nothing_for_terminals() -> None:
    program = (
        "import sys; from mrsa_server.cli import main\n"
        "try:\n"
        "    main(['serve', '--help'])\n"
        "except SystemExit:\n"
        "    from mrsa_server.engines.build import build; from mrsa_server.settings import Settings\n"
        "    build(Settings(engine='openai', engine_url='http://localhost:1/v1'))\n"
        "print('rich' in sys.modules)\n"
        "import rich.console\n"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("words", "engine"),
    [
        ((), "embedded"),
        (("--model", "Zyphra/ZAYA1-8B"), "vllm"),
        (("--engine-url", "http://localhost:1/v1"), "openai"),
        (("--engine-url", "http://localhost:1/v1", "--model", "m"), "openai"),
        (("--engine", "scripted", "--model", "m"), "scripted"),
    ],
)
def test_what_is_given_names_the_engine(words: tuple[str, ...], engine: str) -> None:
    assert settings(*words).engine == engine
