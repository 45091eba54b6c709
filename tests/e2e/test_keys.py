"""Keys on a real server: by the official client, exchanged while it runs, and never in its log."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import httpx
import openai
import pytest

from mrsa_server.keyring import Scope
from tests.helpers.keys import Client, client
from tests.helpers.processes import start_server, wait_ready
from tests.helpers.serving import SMALL

pytestmark = pytest.mark.e2e


def asking(url: str, who: Client | None) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=who.secret if who else "sk-none", max_retries=0)


def ask(sdk: openai.OpenAI) -> str:
    messages = [{"role": "user", "content": "6*7?"}]
    made = sdk.chat.completions.create(model="scripted-mrsa", messages=messages, extra_body={"mrsa": SMALL})  # type: ignore[call-overload]
    return str(made.mrsa["run_id"])


def test_keys_by_the_official_client_and_in_the_log(tmp_path: Path) -> None:
    alice, bob, reader = client("alice", runs_per_minute=2), client("bob"), client("reader", Scope.RUNS_READ)
    file = tmp_path / "keys"
    file.write_text(f"{alice.line}\n{reader.line}\n")
    flags = ("--engine", "scripted", "--keys-file", str(file), "--log-format", "json", "--host", "0.0.0.0")
    server, url = start_server(*flags, stderr=subprocess.PIPE)
    with server:
        try:
            wait_ready(url)
            with pytest.raises(openai.AuthenticationError):
                ask(asking(url, None))
            with pytest.raises(openai.AuthenticationError):
                ask(asking(url, bob))
            with pytest.raises(openai.PermissionDeniedError):
                ask(asking(url, reader))
            run_id = ask(asking(url, alice))
            ask(asking(url, alice))
            with pytest.raises(openai.RateLimitError) as refused:
                ask(asking(url, alice))
            assert refused.value.code == "rate_limit_exceeded"
            assert 0 < int(refused.value.response.headers["retry-after"]) <= 60

            file.write_text(f"{bob.line}\n")  # exchanged, while it runs
            until = time.monotonic() + 10
            while httpx.get(f"{url}/v1/models", headers=bob.headers).status_code != 200:
                assert time.monotonic() < until
                time.sleep(0.1)
            with pytest.raises(openai.AuthenticationError):
                ask(asking(url, alice))
            ask(asking(url, bob))
            httpx.get(f"{url}/v1/models", params={"api_key": bob.secret}, headers=bob.headers)
        finally:
            server.terminate()
        assert server.stderr is not None
        said = server.stderr.read()
    assert '"key_id": "alice"' in said
    assert '"key_id": "bob"' in said
    assert run_id in said
    for one in (alice, bob, reader):
        assert one.secret not in said
        assert one.line.split(":")[1] not in said
    assert "sk-none" not in said
