"""A vLLM that dies under a run: the server loads it anew, and the run goes on from what has ended."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from tests.helpers.processes import serving
from tests.helpers.serving import CHAT

pytestmark = pytest.mark.engine


def test_a_run_survives_the_death_of_vllm_s_process() -> None:
    body = {
        "model": "SmolLM2-135M-Instruct-mrsa",
        "messages": [{"role": "user", "content": "Tell me a story about a lighthouse."}],
        "mrsa": {"population": 4, "rounds": 1, "rollout_tokens": 300, "tail_tokens": 64, "final_tokens": 64},
    }
    flags = ("--engine", "embedded", "--engine-wait-s", "180")
    with serving(*flags, timeout_s=180) as (server, url), ThreadPoolExecutor(1) as pool:
        asking = pool.submit(httpx.post, url + CHAT, json=body, timeout=400)
        with pytest.raises(TimeoutError):
            asking.result(2)  # it is under way
        children = psutil.Process(server.pid).children(recursive=True)
        max(children, key=lambda child: child.memory_info().rss).kill()
        response = asking.result(400)
    assert response.status_code == 200, response.text
    report = response.json()["mrsa"]
    assert report["lost_tokens"] > 0
    assert report["rounds"][1]["finished"] == 1
    assert response.json()["choices"][0]["message"]["content"]
