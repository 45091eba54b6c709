"""`llm-comply`, a compliance test that nobody here wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import serving

pytestmark = pytest.mark.e2e


def comply(url: str, model: str, form: str) -> dict[str, Any]:
    """What it finds; it ends with an error where a check fails."""
    program = Path(sys.executable).with_name("llm-comply")
    words = ["--base-url", url, "--model", model, "--format", form, "--api-key", "none", "--json"]
    done = subprocess.run([program, *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary: dict[str, Any] = json.loads(done.stdout)["summary"]
    return summary


@pytest.mark.parametrize("model", ["scripted", "scripted-mrsa"])
def test_all_eight_chat_checks_pass(scripted_url: str, model: str) -> None:
    assert comply(scripted_url, model, "openai-chat")["passed"] == 8


def test_all_thirteen_open_responses_checks_pass() -> None:
    """One of them is made only where the model's name is that of one which reasons."""
    with serving("--engine", "scripted", "--served-model", "deepseek-r-scripted") as (_, url):
        for model in ("deepseek-r-scripted", "deepseek-r-scripted-mrsa"):
            assert comply(f"{url}/v1", model, "open-responses")["passed"] == 13
