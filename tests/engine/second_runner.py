"""ZAYA1 on vLLM's second model runner, which 0.32 takes where Triton works: `python -m tests.engine.second_runner DIR`.

It needs Triton, which has no compiler for CPUs in its wheel; so its kernels are interpreted. A process of its own, for
all of that is settled at the import of vLLM.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

from tests.engine.test_zaya import Ask, expect_same, prompt, serving, write


class _Driver:
    """All that vLLM asks of one."""

    @staticmethod
    def is_active() -> bool:
        return True


def main(folder: Path) -> None:
    """Mixed, chunked, cached and aborted requests, and as many that draw on one prompt at once."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    from triton import backends

    backends.backends["cpu"] = SimpleNamespace(driver=_Driver, compiler=None)
    model = write(folder, num_hidden_layers=3)
    with serving(folder, max_num_batched_tokens=48, max_num_seqs=6) as served:
        runner = served.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        assert type(runner).__module__ == "vllm.v1.worker.cpu.model_runner"
        same = [Ask(prompt(65), 5) for _ in range(4)]
        lengths = (1, 2, 31, 32, 33, 64, 65, 129)
        mixed = [Ask(prompt(length, 7), 6, at % 4, 2 if at == 3 else None) for at, length in enumerate(lengths)]
        for asks in (same, mixed, mixed):
            said = served.answer(asks)
            expect_same(model.reference, asks, said)
        assert said[-1].cached_tokens == 128


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
