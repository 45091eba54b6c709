"""A run of the method on a tiny ZAYA1: through `mrsa serve --engine vllm`, and over a plain `vllm serve`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.ports import free_port
from tests.helpers.processes import serving, wait_ready
from tests.helpers.serving import CHAT, QUESTION
from tests.helpers.tiny_model import write_tokenizer
from tests.helpers.tiny_zaya import write_tiny_zaya

pytestmark = pytest.mark.engine

STARTS_WITHIN_S = 120
BLOCK_TOKENS = 32
ARGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": BLOCK_TOKENS,
    "kv_cache_memory_bytes": 1 << 28,
    "max_num_batched_tokens": 256,
}
# As docs/zaya.md has them, but for those that make it small.
FLAGS = (
    "--prefix-cache-retention-interval 128 --reasoning-parser qwen3 --enable-auto-tool-choice "
    "--tool-call-parser zaya_xml --dtype float32 --enforce-eager --block-size 32 --kv-cache-memory-bytes 268435456 "
    "--max-num-batched-tokens 256 --enable-prompt-tokens-details --served-model-name zaya"
)
MRSA = {"population": 4, "rounds": 1, "set_size": 2, "rollout_tokens": 300, "tail_tokens": 96, "final_tokens": 64}
MRSA |= {"final_candidates": 4, "seed": 3}
QUESTIONS = [{"role": "user", "content": QUESTION[0]["content"] + " Think of boats and of trains. " * 20}]
BODY = {"model": "zaya-mrsa", "messages": QUESTIONS, "temperature": 0, "mrsa": MRSA}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zaya")
    with warnings.catch_warnings(action="ignore"):
        tokens = write_tokenizer(folder)
        write_tiny_zaya(folder, num_hidden_layers=4, vocab_size=tokens)
    return folder


@contextmanager
def vllm_serve(folder: Path) -> Iterator[str]:
    """A plain vLLM server beside this package: its plugin is found by the entry point."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--port", str(port), "--host", "127.0.0.1", *FLAGS.split()]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_ready(f"http://127.0.0.1:{port}", "/health", STARTS_WITHIN_S)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def ask(url: str, body: dict[str, Any] = BODY) -> dict[str, Any]:
    answer = httpx.post(url + CHAT, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def expect_shared_prefixes(first: dict[str, Any], again: dict[str, Any]) -> None:
    told = first["mrsa"]
    assert told["rounds"][1]["finished"] == 4, told
    assert first["choices"][0]["message"]["content"]
    assert first["choices"][0]["message"] == again["choices"][0]["message"]
    usage, later = first["usage"], again["usage"]
    # Four rollouts with one prompt, and four aggregations that begin with the same problem.
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] / 3
    # The same again: all but the last few tokens of each prompt.
    assert later["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens_details"]["cached_tokens"]


@pytest.fixture(scope="module")
def in_process(folder: Path) -> str:
    """What a server with vLLM in its process says; it is held to what it has to say."""
    words = ["--engine", "vllm", "--model", str(folder), "--served-model", "zaya", "--engine-args", json.dumps(ARGS)]
    with serving(*words, timeout_s=STARTS_WITHIN_S) as (_, url):
        first, again = ask(url), ask(url)
        metrics = httpx.get(url + "/metrics").text
    expect_shared_prefixes(first, again)
    assert "cached" in metrics
    return str(first["choices"][0]["message"]["content"])


def test_a_run_shares_its_prefixes(in_process: str) -> None:
    assert in_process


def test_a_run_over_plain_vllm_says_the_same(folder: Path, in_process: str) -> None:
    with vllm_serve(folder) as vllm:
        with serving("--engine-url", f"{vllm}/v1", timeout_s=STARTS_WITHIN_S) as (_, url):
            first, again = ask(url), ask(url)
        metrics = httpx.get(vllm + "/metrics").text
        call = "<zyphra_tool_call>\n<function=look>\n<parameter=place>\nBern\n</parameter>\n</function>\n"
        look = {"name": "look", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}}
        said = ask(
            vllm,
            {
                "model": "zaya",
                "messages": QUESTIONS,
                "tools": [{"type": "function", "function": look}],
                # It never ends by itself.
                "structured_outputs": {"regex": re.escape(f"{call}</zyphra_tool_call>") + "[a-z ]*"},
                "chat_template_kwargs": {"enable_thinking": False},
                "max_tokens": 120,
            },
        )
    expect_shared_prefixes(first, again)
    assert first["mrsa"]["tails"] == "exact"
    assert first["choices"][0]["message"]["content"] == in_process
    (hits,) = re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    assert float(hits) > first["usage"]["prompt_tokens_details"]["cached_tokens"]
    (found,) = said["choices"][0]["message"]["tool_calls"]
    assert (found["function"]["name"], json.loads(found["function"]["arguments"])) == ("look", {"place": "Bern"})
