"""Where prefixes of ZAYA1 can be taken up again, of vLLM's versions that can be told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mrsa_server.engines.vllm import _keep_states


@pytest.mark.parametrize(
    ("block_size", "interval"), [(16, 128), (32, 128), (48, 144), (128, 128), (256, 256), (None, 128)]
)
def test_the_interval_is_of_whole_blocks(block_size: int | None, interval: int) -> None:
    config = SimpleNamespace(block_size=block_size, prefix_cache_retention_interval=0)
    _keep_states(config)
    assert config.prefix_cache_retention_interval == interval


def test_a_version_that_keeps_all_is_left_alone() -> None:
    config = SimpleNamespace(block_size=16)
    _keep_states(config)
    assert vars(config) == {"block_size": 16}
