"""Who may import whom (the rooms of the README), read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAF = {"types", "engine", "events", "lineage", "tails", "budget", "prompts", "selection"}
ASYNC = {"run", "scripted"}  # eval will join them
STORE = {
    "batch_store",
    "bells",
    "codec",
    "database",
    "file_store",
    "lanes",
    "outage",
    "record",
    "store",
    "store_errors",
    "tables",
    "transactions",
}
FILES = sorted([*ROOT.glob("harness/**/*.py"), *ROOT.glob("mrsa_server/**/*.py")])


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who reads whom"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    found, room = imports(path), path.relative_to(ROOT).parts
    if room[0] == "harness":
        assert not any(
            name.split(".")[0] in {"mrsa_server", "pydantic", "fastapi", "starlette", "vllm"} for name in found
        )
        if path.stem in LEAF:
            allowed = {f"harness.{name}" for name in LEAF}
            assert {name for name in found if name.startswith("harness")} <= allowed
        if path.stem == "types":
            assert not any(name.startswith("harness") for name in found)
        if path.stem not in ASYNC and path.stem != "engine":
            tree = ast.walk(ast.parse(path.read_text()))
            assert not any(isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor) for node in tree)
    elif room[1] in {"settings.py", "metrics.py", "otel.py", "tracing.py", "engines"}:
        assert not any(name.startswith(("mrsa_server.api", "mrsa_server.runs", "mrsa_server.app")) for name in found)
    elif room[1] == "runs":
        assert not any(name.startswith(("mrsa_server.app", "mrsa_server.cli")) for name in found)
        assert {name for name in found if name.startswith("mrsa_server.api")} <= {
            f"mrsa_server.api.{name}" for name in ("wire", "sse", "errors")
        }
        if path.stem in STORE:
            allowed = {"mrsa_server", "mrsa_server.migrations", "mrsa_server.runs"}
            allowed |= {f"mrsa_server.runs.{name}" for name in STORE}
            assert {name for name in found if name.startswith("mrsa_server")} <= allowed
    elif room[1] == "api":
        assert not any(name.startswith(("mrsa_server.app", "mrsa_server.cli")) for name in found)
    if room[1] != "migrations" and path.stem not in STORE:
        assert not any(name.split(".")[0] in {"sqlalchemy", "alembic"} for name in found), "SQL is the store's alone"
    if room[1:] != ("otel.py",):
        assert not any(name.split(".")[0] == "opentelemetry" for name in found), "spans are made in one place alone"
    if room[:2] != ("mrsa_server", "zaya") and path.name not in {"vllm.py", "vllm_cpu.py", "vllm_scheduler.py"}:
        # The latter two are imported by vLLM itself, in its worker and its scheduler.
        assert not any(name.split(".")[0] == "vllm" for name in found), "vllm is imported in its engine alone"


def at_top(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]


def test_vllm_is_imported_lazily() -> None:
    top = at_top(ROOT / "mrsa_server/engines/vllm.py")
    assert not any("vllm" == (getattr(node, "module", None) or node.names[0].name).split(".")[0] for node in top)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_opentelemetry_is_imported_lazily(path: Path) -> None:
    assert not any(getattr(node, "module", None) == "mrsa_server.otel" for node in at_top(path))
