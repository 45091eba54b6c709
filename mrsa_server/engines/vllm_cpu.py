"""vLLM's CPU worker with one fault mended. Imported by vLLM in its worker process, by name, and by nothing else."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class Worker(CPUWorker):  # type: ignore[misc]  # vLLM is no typed package here
    """Lets a request with a seed be prefilled in chunks.

    A chunk that is not the last samples a token that is thrown away, and vLLM (seen in 0.26 and 0.32) then rewinds the
    request's generator by an offset that only GPU generators have: the engine dies of "CPU Generator does not use
    offset". Here such a generator is put aside while the token is sampled, so there is nothing to rewind, and a seed
    gives the same tokens however the prompt was cut.
    """

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        if not hasattr(runner, "discard_request_mask"):  # vLLM's second model runner, which keeps seeds in another way
            return
        sample_tokens = runner.sample_tokens

        def sample_without_discarded(*args: Any, **kwargs: Any) -> Any:
            batch = runner.input_batch
            discarded = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
            aside = {index: batch.generators.pop(index) for index in discarded if index in batch.generators}
            try:
                return sample_tokens(*args, **kwargs)
            finally:
                batch.generators.update(aside)

        runner.sample_tokens = sample_without_discarded
