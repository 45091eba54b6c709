"""Between which ranks a ZAYA1 can be divided."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from mrsa_server.engines import CannotServe
from mrsa_server.engines.vllm import _check_ranks
from mrsa_server.zaya.ranks import check_ranks

MODEL = SimpleNamespace(num_key_value_heads=2)
NAMES = ("tensor_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size")


def parallel(**ranks: int) -> SimpleNamespace:
    return SimpleNamespace(**dict.fromkeys(NAMES, 1) | ranks)


def test_each_key_value_head_may_have_a_rank() -> None:
    check_ranks(MODEL, parallel())
    check_ranks(MODEL, parallel(tensor_parallel_size=2))


@pytest.mark.parametrize(
    ("name", "ranks", "said"),
    [
        ("tensor_parallel_size", 4, "tensor_parallel_size=4 does not divide the 2 key-value heads"),
        ("decode_context_parallel_size", 2, "decode_context_parallel_size=2 divides the tokens"),
        ("prefill_context_parallel_size", 2, "prefill_context_parallel_size=2 divides the tokens"),
    ],
)
def test_more_is_refused_with_the_field_and_what_to_do(name: str, ranks: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_ranks(MODEL, parallel(**{name: ranks}))
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=MODEL), parallel_config=parallel(**{name: ranks}))
    with pytest.raises(CannotServe, match=f"--engine-args: {said}.* Use data parallelism"):
        _check_ranks(cast(Any, config))
