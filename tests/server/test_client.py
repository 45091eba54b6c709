"""What the commands share that ask a running server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrsa_server import cli
from mrsa_server.client import KEY_VARIABLE, connect, lines
from tests.helpers.keys import client, ring
from tests.helpers.serving import on_port


@given(st.lists(st.text().map(lambda text: text.replace("\n", "").encode()), min_size=1), st.integers(1, 9))
def test_a_line_ends_at_its_newline_alone_however_it_arrives(written: list[bytes], size: int) -> None:
    whole = b"\n".join(written)

    def parts() -> Iterator[bytes]:
        for start in range(0, len(whole), size):
            yield whole[start : start + size]

    found = list(lines(httpx.Response(200, content=parts())))
    assert found == (written if written[-1] else written[:-1])


def test_a_word_of_a_model_ends_no_line() -> None:
    said = 'data: {"text": "one\u2028two\x0b\x85"}'.encode()
    assert list(lines(httpx.Response(200, content=said + b"\n\n"))) == [said, b""]


@pytest.mark.parametrize("key", [None, "", "sk-mrsa-x"])
def test_the_key_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch, key: str | None) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if key is not None:
        monkeypatch.setenv(KEY_VARIABLE, key)
    with connect("http://localhost:1", httpx.Timeout(1)) as http:
        assert http.headers.get("authorization") == (f"Bearer {key}" if key else None)


def test_a_key_out_of_a_file_may_end_with_a_newline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-mrsa-x\r\n")
    with connect("http://localhost:1", httpx.Timeout(1)) as http:
        assert http.headers["authorization"] == "Bearer sk-mrsa-x"


@pytest.mark.parametrize("key", ["sk-mrsa-x\ny", "sk-mrsa-é"])
def test_what_can_be_no_key_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(SystemExit, match=KEY_VARIABLE) as refused:
        connect("http://localhost:1", httpx.Timeout(1))
    assert "sk-" not in str(refused.value)


async def test_who_asks_without_a_key_is_told_where_it_is_taken_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    async with on_port(keys=ring(client("alice"))) as (url, _):
        for words in (["ask", "1+1?"], ["runs", "list"], ["export", "--format", "rl"]):
            assert await asyncio.to_thread(cli.main, [*words, "--url", url]) != 0
            said = capsys.readouterr().err
            assert "A key is needed" in said
            assert KEY_VARIABLE in said
