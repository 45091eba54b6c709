"""A vLLM that dies under a run: the server loads it anew, and the run goes on from what has ended."""

from __future__ import annotations

import asyncio
import gc
import warnings
from typing import Any

import psutil
import pytest

from mrsa_server.engines.embedded import EmbeddedEngine
from tests.helpers.serving import CHAT, in_memory

pytestmark = pytest.mark.engine


@pytest.mark.asyncio
async def test_a_run_survives_the_death_of_vllm_s_process() -> None:
    with warnings.catch_warnings(action="ignore"):  # what torch and vLLM warn of and leave open is theirs
        report, answer = await asked_while_vllm_is_killed()
        gc.collect()
    assert report["lost_tokens"] > 0
    assert report["rounds"][1]["finished"] == 1
    assert answer


async def asked_while_vllm_is_killed() -> tuple[dict[str, Any], str]:
    """The report and the answer of a run whose engine lost its process in the first round."""
    others = set(psutil.Process().children(recursive=True))
    async with in_memory(EmbeddedEngine(), up=False, engine_wait_s=180.0) as client:
        await client.app.state.runner.host.wait_up(180)  # type: ignore[attr-defined]

        async def kill() -> None:
            await asyncio.sleep(2)
            children = set(psutil.Process().children(recursive=True)) - others
            max(children, key=lambda child: child.memory_info().rss).kill()

        body = {
            "model": "SmolLM2-135M-Instruct-mrsa",
            "messages": [{"role": "user", "content": "Tell me a story about a lighthouse."}],
            "mrsa": {"population": 4, "rounds": 1, "rollout_tokens": 300, "tail_tokens": 64, "final_tokens": 64},
        }
        killing = asyncio.create_task(kill())
        response = await client.post(CHAT, json=body, timeout=400)
        await killing
        assert response.status_code == 200, response.text
        return response.json()["mrsa"], response.json()["choices"][0]["message"]["content"]
