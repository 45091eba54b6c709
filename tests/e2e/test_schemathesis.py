"""schemathesis over the document that the server gives of itself: no 5xx, and no answer that is not in it."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.keys import client, ring
from tests.helpers.processes import serving

pytestmark = pytest.mark.e2e
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "ignored_auth",
)
EXAMPLES = 25  # for each operation and phase


@pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_the_server_is_as_its_document_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = client("one")
    monkeypatch.setenv("MRSA_KEYS", ring(one).get_secret_value())
    small = ("--max-rollout-tokens", "64", "--max-population", "8", "--max-rounds", "2", "--max-queued", "4096")
    with serving("--engine", "scripted", "--state-dir", str(tmp_path / "state"), "--metrics-open", *small) as (_, url):
        words = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json"]
        words += ["--header", f"Authorization: Bearer {one.secret}", "--checks", ",".join(CHECKS)]
        words += ["--max-examples", str(EXAMPLES), "--seed", "1", "--generation-database", ":memory:"]
        words += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "60", "--workers", "2"]
        words += ["--no-color", "--continue-on-failure", "--suppress-health-check", "all"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]
