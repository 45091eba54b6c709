"""Between which ranks a ZAYA1 can be divided: the model asks in each of vLLM's workers, our engine before them."""

from __future__ import annotations

from typing import Any

_ONE_RANK = ("decode_context_parallel_size", "prefill_context_parallel_size")
_INSTEAD = "Use data parallelism for more GPUs"


def check_ranks(config: Any, parallel: Any) -> None:
    """Refuse what it cannot do. Of layers between ranks vLLM itself says that it cannot.

    Args:
        config: The model's, as transformers reads it.
        parallel: vLLM's `ParallelConfig`.

    Raises:
        ValueError: Its heads or its tokens cannot be divided so.
    """
    ranks = parallel.tensor_parallel_size
    if config.num_key_value_heads % ranks:
        raise ValueError(
            f"tensor_parallel_size={ranks} does not divide the {config.num_key_value_heads} key-value heads of "
            f"ZAYA1: its keys are made of all the queries of their group. {_INSTEAD}"
        )
    for name in _ONE_RANK:
        ranks = getattr(parallel, name)
        if ranks > 1:
            raise ValueError(
                f"{name}={ranks} divides the tokens of a sequence between ranks, and ZAYA1 makes each key of the "
                f"tokens before it too. {_INSTEAD}"
            )
