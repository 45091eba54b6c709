"""The tools of `make venv-deploy`, and the chart as it is rendered for each shape that its values files make."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "chart"
REVISION = "0123456789abcdef0123456789abcdef01234567"
POSTGRES = ["--set-json", 'networkPolicy.postgres=[{"ipBlock":{"cidr":"10.20.0.5/32"}}]']
PINNED = ["--set", f"image.digest=sha256:{'a' * 64}"]
IMAGE = ["--set", "model.source=image", "--set", "model.image.reference=registry.example/zaya1@sha256:" + "b" * 64]
# Values files beside values.yaml, and what only its user can know.
SHAPES: dict[str, tuple[tuple[str, ...], Sequence[str]]] = {
    "plain": ((), ()),
    "cpu": (("cpu",), ()),
    "cuda": (("cuda",), ()),
    "rocm": (("rocm",), ()),
    "cuda-pool": (("cuda", "pool"), POSTGRES),
    "rocm-pool": (("rocm", "pool"), POSTGRES),
    "cuda-knative": (("cuda", "knative"), POSTGRES),
    "rocm-knative": (("rocm", "knative"), POSTGRES),
    "cpu-knative": (("cpu", "knative"), POSTGRES),
    "cuda-image": (("cuda",), (*IMAGE, *PINNED)),
    "rocm-pool-image": (("rocm", "pool"), (*IMAGE, *POSTGRES, "--set", "store.postgres.migrate=init")),
    "external": (("pool",), ("--set", "engine.externalUrl=https://engines.example/v1")),
}
Document = dict[str, Any]
Tool = Callable[..., subprocess.CompletedProcess[str]]


def folder() -> Path:
    """Where the tools are: beside the Python that runs the tests, unless MRSA_DEPLOY_TOOLS says where."""
    return Path(os.environ.get("MRSA_DEPLOY_TOOLS", Path(sys.prefix) / "deploy" / "bin"))


@pytest.fixture(scope="session")
def tool() -> Tool:
    """Runs one of the tools; its failure is the test's, unless `check` is false."""
    if not (folder() / "helm").exists():
        pytest.fail("the tools are missing: `make venv-deploy`, or MRSA_DEPLOY_TOOLS=DIR")

    def run(*words: str | Path, stdin: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [str(folder() / words[0]), *map(str, words[1:])]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def flags(shape: str) -> list[str]:
    """Of helm, for one of `SHAPES`."""
    files, others = SHAPES[shape]
    given = [word for name in files for word in ("--values", str(CHART / f"values-{name}.yaml"))]
    return [*given, "--set", f"model.revision={REVISION}", *others]


@pytest.fixture(scope="session")
def render(tool: Tool) -> Callable[..., str]:
    """What helm makes of a shape, with further flags."""
    made: dict[tuple[str, ...], str] = {}

    def run(shape: str, *more: str) -> str:
        if (shape, *more) not in made:
            words = ["template", "mrsa", CHART, "--namespace", "ai", *flags(shape), *more]
            made[(shape, *more)] = tool("helm", *words).stdout
        return made[(shape, *more)]

    return run


@pytest.fixture(scope="session")
def objects(render: Callable[..., str]) -> Callable[..., dict[tuple[str, str], Document]]:
    """The same by kind and name."""

    def run(shape: str, *more: str) -> dict[tuple[str, str], Document]:
        found = [document for document in yaml.safe_load_all(render(shape, *more)) if document]
        return {(document["kind"], document["metadata"]["name"]): document for document in found}

    return run
