"""Rules that hold of the whole source, and were learnt from what broke elsewhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mrsa_server.api.auth import rule_of
from mrsa_server.app import ROUTERS
from tests.helpers.keys import client, ring
from tests.helpers.serving import CHAT, SMALL, ask, in_memory

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted([*ROOT.glob("mrsa_server/**/*.py"), *ROOT.glob("harness/**/*.py")])
SQL = ["' OR '1'='1", "'; DROP TABLE runs; --", "1) UNION SELECT body FROM runs --"]
HOSTILE = [*SQL, '"', "\\", "%", "_", "\x00", "\ud7ff"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sql_is_made_of_constants_and_bound_parameters(path: Path) -> None:
    """CVE-2026-42208 of LiteLLM: an Authorization header met SQL before authentication."""
    if "migrations" in path.parts:  # steps of the schema: nothing of a request is there
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "text",
            "exec_driver_sql",
            "literal_column",
        ):
            assert all(isinstance(argument, ast.Constant) for argument in node.args), f"{path}:{node.lineno}"


def test_litellm_is_no_part_of_it() -> None:
    """Its release on PyPI was compromised in March 2026."""
    for path in (ROOT / "pyproject.toml", *ROOT.glob("requirements/*.txt")):
        assert "litellm" not in path.read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_that_comes_with_a_model_is_run(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False
        assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("eval", "exec"))


async def test_hostile_names_find_nothing_and_break_nothing(tmp_path: Path) -> None:
    one = client("one")
    async with in_memory(keys=ring(one), state_dir=tmp_path) as http:
        run = (await http.post(CHAT, json=ask(mrsa=SMALL), headers=one.headers)).json()["mrsa"]["run_id"]
        for word in HOSTILE:
            wild = {"authorization": f"Bearer {word.encode('ascii', 'ignore').decode() or 'x'}".replace("\x00", "0")}
            assert (await http.get("/v1/runs", headers=wild)).status_code == 401
            for router in ROUTERS:
                for route in router.routes:
                    path, rule = getattr(route, "path", ""), rule_of(getattr(route, "endpoint", None))
                    if "{" not in path or rule is None:
                        continue
                    for method in getattr(route, "methods", ()):
                        where = path.replace("{", "\0").replace("}", "\0").split("\0")
                        quoted = "".join(f"%{byte:02x}" for byte in word.encode())
                        where[1::2] = [quoted] * len(where[1::2])
                        answer = await http.request(method, "".join(where), headers=one.headers)
                        assert answer.status_code in (400, 404), (method, path, word, answer.text)
            for query in ("after", "model", "status", "batch"):
                answer = await http.get("/v1/runs", params={query: word}, headers=one.headers)
                assert answer.status_code in (200, 400), (query, word)
                assert answer.status_code == 400 or answer.json()["data"] == []
            again = await http.post(
                CHAT, json=ask(mrsa=SMALL), headers={**one.headers, "idempotency-key": quoted_ascii(word)}
            )
            assert again.status_code in (200, 400)
        assert (await http.get(f"/v1/runs/{run}", headers=one.headers)).status_code == 200


def quoted_ascii(word: str) -> str:
    return "".join(character for character in word if " " <= character <= "~") or "x"
