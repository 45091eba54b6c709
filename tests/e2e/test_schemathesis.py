"""schemathesis over the document that the server gives of itself: no 5xx, and no answer that is not in it."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from mrsa_server.keyring import Scope
from tests.helpers.keys import client, ring
from tests.helpers.processes import serving
from tests.helpers.serving import CHAT, RESPONSES, SMALL, ask

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
EXAMPLES = 25  # of each operation and phase
ROOT = client("root", Scope.ADMIN)


def make(http: httpx.Client) -> dict[str, str]:
    """One of everything, by the names of parameters."""
    run = http.post(CHAT, json=ask(mrsa=SMALL)).json()["mrsa"]["run_id"]
    body = {"model": "scripted-mrsa", "input": "6*7?", "mrsa": SMALL, "background": True}
    response = http.post(RESPONSES, json=body).json()["id"]
    line = {"custom_id": "1", "method": "POST", "url": CHAT, "body": ask(mrsa=SMALL)}
    sent = {"file": ("in.jsonl", orjson.dumps(line))}
    file = http.post("/v1/files", files=sent, data={"purpose": "batch"}).json()["id"]
    batch = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    names = {"run_id": run, "response_id": response, "file_id": file, "model": "scripted"}
    return names | {"batch_id": http.post("/v1/batches", json=batch).json()["id"]}


def pointed(document: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The document with the names of what is there, so that most requests find something, and none deletes it."""
    del document["paths"]["/v1/responses/compact"]  # a GET of it asks for the response of this name
    for operations in document["paths"].values():
        for method, operation in operations.items():
            for parameter in operation["parameters"]:
                if parameter["in"] == "path" and method != "delete":
                    known = names.get(parameter["name"])
                    parameter["schema"] |= {"enum": [known, "nothing"]} if known else {"maximum": 3}
    for name in ("ChatBody", "ResponsesBody"):
        document["components"]["schemas"][name]["properties"]["model"]["enum"] = ["scripted", "scripted-mrsa"]
    return document


@pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_the_server_is_as_its_document_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRSA_KEYS", ring(ROOT).get_secret_value())
    small = ("--max-rollout-tokens", "64", "--max-population", "8", "--max-rounds", "2", "--max-queued", "4096")
    with serving("--engine", "scripted", "--state-dir", str(tmp_path / "state"), *small) as (_, url):
        with httpx.Client(base_url=url, headers=ROOT.headers, timeout=30) as http:
            names = make(http)
            time.sleep(2)  # until the batch has ended
            document = pointed(http.get("/openapi.json").json(), names)
        (tmp_path / "openapi.json").write_bytes(orjson.dumps(document))
        words = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", url]
        words += ["--header", f"Authorization: Bearer {ROOT.secret}", "--checks", ",".join(CHECKS)]
        words += ["--max-examples", str(EXAMPLES), "--seed", "1", "--generation-database", ":memory:"]
        words += ["--phases", "examples,coverage,fuzzing", "--request-timeout", "60", "--no-color"]
        words += ["--continue-on-failure", "--suppress-health-check", "all"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20_000:]
