"""The official Node client against a running server; it is installed once, beside its package.json."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

NODE = Path(__file__).parent / "node"


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node")
def test_the_node_client_completes_streams_calls_tools_and_throws(scripted_url: str) -> None:
    if not (NODE / "node_modules" / "openai").is_dir():
        install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
        subprocess.run(install, cwd=NODE, check=True, timeout=300)
    done = subprocess.run(
        ["node", "check.mjs", scripted_url], cwd=NODE, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
