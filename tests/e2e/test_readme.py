"""The README's Python runs as it stands, against the scripted engine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

README = Path(__file__).parent.parent.parent / "README.md"


def test_the_examples_of_the_readme_run(scripted_url: str) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL))
    assert code.count("http://127.0.0.1:8000/v1") == code.count("SmolLM2-135M-Instruct-mrsa") == 1
    code = code.replace("http://127.0.0.1:8000/v1", scripted_url).replace("SmolLM2-135M-Instruct", "scripted")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("\\boxed{") == 3
    assert "tokens in 3 rounds" in ran.stdout
    assert "**Round 0 of 2**" in ran.stdout
    assert "[run.finished  ]" in ran.stdout
