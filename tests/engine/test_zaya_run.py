"""A run of the method on a tiny ZAYA1, through `mrsa serve --engine vllm`, with vLLM's own processes behind it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import httpx
import pytest

from tests.helpers.processes import serving
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


def test_a_run_shares_its_prefixes(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        tokens = write_tokenizer(tmp_path)
        write_tiny_zaya(tmp_path, num_hidden_layers=4, vocab_size=tokens)
    mrsa = {"population": 4, "rounds": 1, "set_size": 2, "rollout_tokens": 300, "tail_tokens": 96, "final_tokens": 64}
    mrsa |= {"final_candidates": 4, "seed": 3}
    words = ["--engine", "vllm", "--model", str(tmp_path), "--served-model", "zaya", "--engine-args", json.dumps(ARGS)]
    with serving(*words, timeout_s=STARTS_WITHIN_S) as (_, url):
        question = [{"role": "user", "content": QUESTION[0]["content"] + " Think of boats and of trains. " * 20}]
        body = {"model": "zaya-mrsa", "messages": question, "temperature": 0, "mrsa": mrsa}
        answer = httpx.post(url + CHAT, json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        first = answer.json()
        again = httpx.post(url + CHAT, json=body, timeout=120).json()
        metrics = httpx.get(url + "/metrics").text
    told = first["mrsa"]
    assert told["rounds"][1]["finished"] == 4, told
    assert first["choices"][0]["message"]["content"]
    assert first["choices"][0]["message"] == again["choices"][0]["message"]
    usage, later = first["usage"], again["usage"]
    # Four rollouts with one prompt, and four aggregations that begin with the same problem.
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] / 3
    # The same again: all but the last few tokens of each prompt.
    assert later["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens_details"]["cached_tokens"]
    assert "cached" in metrics
