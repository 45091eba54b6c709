"""`llm-comply`, a compliance test that nobody here wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("model", ["scripted", "scripted-mrsa"])
def test_all_eight_chat_checks_pass(scripted_url: str, model: str) -> None:
    comply = Path(sys.executable).with_name("llm-comply")
    words = ["--base-url", scripted_url, "--model", model, "--format", "openai-chat", "--api-key", "none", "--json"]
    done = subprocess.run([comply, *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] == 8, done.stdout
