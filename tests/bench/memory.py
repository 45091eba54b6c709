"""Whether a server keeps anything of the runs that it has ended: `python -m tests.bench.memory [--runs 10000]`.

Asks a server on the scripted engine for runs of N=8, T=1, C=4, F=8, 16 at a time, and prints its resident memory.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil

from tests.helpers.processes import serving

_BODY = {
    "model": "scripted-mrsa",
    "messages": [{"role": "user", "content": "How many primes are below 100?"}],
    "mrsa": {
        "population": 8,
        "rounds": 1,
        "final_candidates": 8,
        "rollout_tokens": 100,
        "tail_tokens": 50,
        "final_tokens": 100,
    },
}


def main() -> None:
    """Print runs and memory, a line for each tenth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    runs = parser.parse_args().runs
    with serving("--engine", "scripted") as (server, url):
        process = psutil.Process(server.pid)
        began = time.perf_counter()
        done = 0
        with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(16) as pool:
            for response in pool.map(lambda _: client.post("/v1/chat/completions", json=_BODY), range(runs)):
                response.raise_for_status()
                done += 1
                if done == 100 or done % max(1, runs // 10) == 0:
                    memory = process.memory_info().rss / 2**20
                    print(f"{done:6} runs  {time.perf_counter() - began:6.1f} s  {memory:6.1f} MB", flush=True)


if __name__ == "__main__":
    main()
