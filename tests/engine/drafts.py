"""ZAYA1 with drafts that are rejected: `python -m tests.engine.drafts DIR`.

A process of its own: drafts import llvmlite, and vLLM 0.32 on a CPU starts no further engine in a process that has it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from tests.engine.test_zaya import Ask, expect_same, prompt, serving, write


def main(folder: Path) -> None:
    """What was drafted is written into the state, and overwritten; the second time out of the cache."""
    model = write(folder)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with serving(folder, speculative_config=drafts, max_num_batched_tokens=128) as served:
        asks = [Ask(prompt(length), 40, after) for length, after in ((1, 0), (31, 0), (64, 1), (129, 2))]
        for _ in range(2):
            expect_same(model.reference, asks, served.answer(asks))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
