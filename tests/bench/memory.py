"""Whether a server keeps anything of the runs that it has ended: `python -m tests.bench.memory [--runs 10000]`.

Asks a server on the scripted engine one run after another (N=8, T=1, C=4, F=8) and prints its resident memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import httpx
import psutil

from tests.helpers.ports import free_port

_BODY = {
    "model": "scripted-mrsa",
    "messages": [{"role": "user", "content": "How many primes are below 100?"}],
    "mrsa": {"population": 8, "rounds": 1, "final_candidates": 8, "rollout_tokens": 400, "tail_tokens": 200},
}


def main() -> None:
    """Print runs and memory, a line for each tenth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    runs = parser.parse_args().runs
    port = free_port()
    command = [sys.executable, "-m", "mrsa_server", "serve", "--engine", "scripted", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = psutil.Process(server.pid)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for _ in range(100):
                try:
                    client.get("/health/ready").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
            began = time.perf_counter()
            for number in range(1, runs + 1):
                client.post("/v1/chat/completions", json=_BODY).raise_for_status()
                if number == 100 or number % max(1, runs // 10) == 0:
                    memory = process.memory_info().rss / 2**20
                    print(f"{number:6} runs  {time.perf_counter() - began:6.1f} s  {memory:6.1f} MB", flush=True)
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
