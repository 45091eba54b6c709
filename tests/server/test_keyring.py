"""Lines of keys, and the ring that finds whose a secret is."""

from __future__ import annotations

import asyncio
import hmac
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrsa_server import cli, keyring
from mrsa_server.keyring import BadKeys, KeyRing, Limits, Scope, new_key, read_keys
from mrsa_server.settings import Settings
from tests.helpers.keys import client, ring

HEX = "ab" * 32


@given(
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", fullmatch=True),
    st.frozensets(st.sampled_from(Scope), min_size=1),
    st.builds(Limits, *[st.none() | st.integers(1, 10**12)] * 3),
)
def test_a_line_is_read_as_it_was_written(name: str, scopes: frozenset[Scope], limits: Limits) -> None:
    key, _ = new_key(name, scopes, limits)
    assert read_keys(f"# a comment\n\n  {key.line}  \n") == (key,)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "id"),
        (":", "id"),
        ("a b:x:inference:", "id"),
        (f"../x:{HEX}:inference:", "id"),
        ("alice:secret:inference:", "SHA-256"),
        (f"alice:{HEX.upper()}:inference:", "SHA-256"),
        (f"alice:{HEX}::", "scopes"),
        (f"alice:{HEX}:runs:", "scopes"),
        (f"alice:{HEX}:inference,:", "scopes"),
        (f"alice:{HEX}:inference;admin", "scopes"),
        (f"alice:{HEX}:inference:runs=5", "limits"),
        (f"alice:{HEX}:inference:concurrent_runs=1,concurrent_runs=2", "limits"),
        (f"alice:{HEX}:inference:concurrent_runs=0", "between 1"),
        (f"alice:{HEX}:inference:concurrent_runs=1e3", "whole number"),
        (f"alice:{HEX}:inference:concurrent_runs=-1", "whole number"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_never_shown(line: str, said: str) -> None:
    with pytest.raises(BadKeys, match=r"^line 2: ") as error:
        read_keys(f"#\n{line or ':'}\n")
    assert said in str(error.value)
    assert HEX not in str(error.value)
    assert "secret" not in str(error.value).replace("of the secret", "")


def test_two_keys_of_one_id_differ_in_the_secret_alone() -> None:
    one, two = client("a"), client("a")
    assert len(read_keys(f"{one.line}\n{two.line}")) == 2
    with pytest.raises(BadKeys, match="line 2: keys of one id"):
        read_keys(f"{one.line}\n{client('a', Scope.ADMIN).line}")
    with pytest.raises(BadKeys, match="line 2: the secret"):
        read_keys(f"{one.line}\nb{one.line}")


def test_a_secret_is_compared_with_every_key_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [client(f"k{number}") for number in range(5)]
    found = KeyRing(None, read_keys("\n".join(one.line for one in clients)))
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(keyring.hmac, "compare_digest", spy)
    for secret, name in ((clients[0].secret, "k0"), (clients[4].secret, "k4"), ("x", None), ("", None), ("é", None)):
        compared.clear()
        caller = found.find(secret)
        assert (caller.key_id if caller else None) == name
        assert len(compared) == 5
        assert all(len(one) == len(other) == 32 for one, other in compared)


def test_neither_a_key_nor_a_ring_shows_a_digest() -> None:
    one = client("a")
    (key,) = read_keys(one.line)
    assert one.line.split(":")[1] not in repr((key, KeyRing(None, [key]), Settings(engine="scripted", keys=ring(one))))
    assert key.digest not in repr(key).encode()


def test_salts_differ_between_keys_and_are_the_same_at_every_server() -> None:
    a, b = client("a"), client("b")
    one, other = (KeyRing(None, read_keys(text)) for text in (f"{a.line}\n{b.line}", f"{b.line}\n{a.line}"))
    assert one.salt("a") == other.salt("a") != one.salt("b")
    assert one.salt("gone") not in (one.salt("a"), one.salt("b"), one.salt(None), None)
    assert KeyRing().salt(None) is None


async def test_a_file_is_read_anew_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "_LOOK_S", 0.01)
    file, a, b, c = tmp_path / "keys", client("a"), client("b"), client("c")
    file.write_text(f"{a.line}\n")
    found = KeyRing(file, read_keys(c.line))
    keeping = asyncio.create_task(found.keep())
    known = [bool(found.find(one.secret)) for one in (a, b, c)]
    assert known == [True, False, True]
    for text, expected in (
        (f"{b.line}\n", [False, True, True]),
        ("half a li", [False, True, True]),
        (f"{a.line}\n{b.line}\n", [True, True, True]),
        ("", [False, False, True]),
    ):
        file.write_text(text)
        async with asyncio.timeout(5):
            while [bool(found.find(one.secret)) for one in (a, b, c)] != expected:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert [bool(found.find(one.secret)) for one in (a, b, c)] == expected
    file.unlink()
    await asyncio.sleep(0.05)
    assert not found.open
    assert found.find(a.secret) is None
    file.write_text(a.line)
    async with asyncio.timeout(5):
        while found.find(a.secret) is None:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.01)
    keeping.cancel()


async def test_a_file_that_is_being_written_locks_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "_LOOK_S", 3600)
    file, a, b = tmp_path / "keys", client("a"), client("b")
    file.write_text(f"{a.line}\n")
    found = KeyRing(file)
    looks = iter(["", f"{a.line}\n", f"{b.line}\n", f"{b.line}\n"])
    known = []

    async def sleep(_: float) -> None:
        known.append([bool(found.find(one.secret)) for one in (a, b)])
        if (text := next(looks, None)) is None:
            raise asyncio.CancelledError
        file.write_text(text)

    monkeypatch.setattr(keyring.asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await found.keep()
    assert known == [[True, False]] * 4 + [[False, True]]


@pytest.mark.parametrize("text", [None, "", "# nothing\n", "x", b"\xff"])
def test_a_server_does_not_start_with_keys_that_cannot_be_read(tmp_path: Path, text: str | bytes | None) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadKeys):
        KeyRing(file)


def test_a_new_key_is_printed_once_and_its_secret_is_in_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["keys", "new", "alice", "--scopes", "inference,runs:read", "--concurrent-runs", "4"]) == 0
    line, secret = capsys.readouterr().out.split()
    assert line.endswith(":inference,runs:read:concurrent_runs=4")
    caller = KeyRing(None, read_keys(line)).find(secret)
    assert caller is not None
    assert (caller.key_id, caller.limits.concurrent_runs) == ("alice", 4)

    file = tmp_path / "keys"
    for name in ("alice", "bob"):
        assert cli.main(["keys", "new", name, "--file", str(file)]) == 0
        secret = capsys.readouterr().out.strip()
        assert secret not in file.read_text()
        found = KeyRing(file).find(secret)
        assert found is not None
        assert found.key_id == name
    assert file.stat().st_mode & 0o777 == 0o600
    before = file.read_text()
    for words in ("alice --scopes admin", "../x", "carl --scopes root", "d --concurrent-runs 0"):
        assert cli.main(["keys", "new", *words.split(), "--file", str(file)]) == 3
    assert file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]


def test_ten_thousand_keys_are_read_and_looked_up_in_no_time() -> None:
    lines = [f"key-{number}:{number:064x}:inference:tokens_per_minute=5" for number in range(10_000)]
    began = time.process_time()
    found = KeyRing(None, read_keys("\n".join(lines)))
    assert all(found.limits(name).tokens_per_minute == 5 for name in found.ids)
    assert len({found.salt(name) for name in found.ids}) == 10_000
    assert time.process_time() - began < 5, "each with each other takes minutes"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "keys"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(BadKeys, match=r"keys: (is no file|Is a directory)"):
        KeyRing(path)


async def test_a_file_that_becomes_a_pipe_changes_nothing_until_it_is_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "_LOOK_S", 0.01)
    one, two, path = client("a"), client("b"), tmp_path / "keys"
    path.write_text(one.line)
    found = KeyRing(path)
    keeping = asyncio.create_task(found.keep())
    path.unlink()
    os.mkfifo(path)
    await asyncio.sleep(0.05)
    assert found.ids == ("a",)
    path.unlink()
    path.write_text(two.line)
    async with asyncio.timeout(5):
        while found.ids != ("b",):  # noqa: ASYNC110  what is waited for has no event to set
            await asyncio.sleep(0.01)
    keeping.cancel()
