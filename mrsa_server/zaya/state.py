"""What CCA remembers of a sequence, in vLLM's hybrid KV cache: the projections of its last few tokens.

To vLLM it is a sliding window of a few tokens, and so its own manager does all that is hard: the state is found again
at every block of a cached prefix, is freed behind the window, survives chunks of any size and goes with a preempted
request. Nothing is copied when a sequence enters a new block, and a sequence that does not move is not touched.

A block of the window holds the last `kept` of its tokens: token p lies in row `p % block_size % kept` of its block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op, kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import SlidingWindowSpec


@dataclass(frozen=True, slots=True)
class Steps:
    """Which rows of the state one step of the engine reads and writes, the same for all layers.

    R requests, T tokens, W tokens of window, n rows to write.

    Attributes:
        read_block: `[R, W]` block of each token before the request's first, oldest first.
        read_row: `[R, W]` its row in there.
        known: `[R, W, 1]` whether there is such a token.
        write_block: `[n]` blocks; 0, which vLLM gives to nobody, where nothing is to be written.
        write_row: `[n]` rows in there.
        write_token: `[n]` which tokens of the step; None where each request has one.
        heads: For each distance from 1 to W, the tokens of the step whose token that far back is a remembered one:
            their index in the step, their request and the column of `read_block`. Empty where each request has one
            token.
    """

    read_block: Tensor
    read_row: Tensor
    known: Tensor
    write_block: Tensor
    write_row: Tensor
    write_token: Tensor | None
    heads: tuple[tuple[Tensor, Tensor, Tensor], ...]


class StepsBuilder(AttentionMetadataBuilder):  # type: ignore[misc]  # vLLM is no typed package here
    """Makes `Steps` once a step. Lengths of queries it reads on the CPU, positions on the device: it never waits."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.window, self.kept, self.block_size = layer.window, layer.kept, kv_cache_spec.block_size
        # A CUDA graph reads where it read when it was captured.
        rows = vllm_config.scheduler_config.max_num_seqs
        self._lasting = {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, shape, dtype in (
                ("read_block", (rows, self.window), torch.int64),
                ("read_row", (rows, self.window), torch.int64),
                ("known", (rows, self.window, 1), torch.bool),
                ("write_block", (rows,), torch.int64),
                ("write_row", (rows,), torch.int64),
            )
        }

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **_: object) -> Steps:
        batch = common_attn_metadata
        requests = batch.num_reqs
        table = batch.block_table_tensor[:requests]
        start = batch.query_start_loc[: requests + 1].long()
        length = start.diff()  # 0 where a CUDA graph is wider than the batch
        end = batch.seq_lens[:requests].long()
        first = end - length
        before = first[:, None] + torch.arange(-self.window, 0, device=first.device)
        known = (before >= 0) & (length > 0)[:, None]
        at = before.clamp(min=0)
        read_block = self._blocks(table, at // self.block_size, known)
        if batch.max_query_len == 1:
            at_end = (end - 1).clamp(min=0)[:, None]
            write_block = self._blocks(table, at_end // self.block_size, (length > 0)[:, None])[:, 0]
            return self._one_token_each(read_block, self._rows(at), known, write_block, self._rows(at_end[:, 0]))
        lengths = np.diff(batch.query_start_loc_cpu[: requests + 1].numpy())
        heads = tuple(self._head(distance, lengths, start) for distance in range(1, self.window + 1))
        request, ordinal, last = (self._to_device(part) for part in _writes(lengths, self.block_size, self.kept))
        block = first[request] // self.block_size + ordinal
        after = torch.minimum((block + 1) * self.block_size, end[request])
        written = after - 1 - last
        live = written >= torch.maximum(first[request], block * self.block_size)
        moved = torch.where(live, written - first[request], 0)
        column = block.clamp(max=table.shape[1] - 1)
        return Steps(
            read_block,
            self._rows(at),
            known[..., None],
            torch.where(live, table[request, column].long(), 0),
            self._rows(written.clamp(min=0)),
            start[request] + moved,
            heads,
        )

    def _one_token_each(
        self, read_block: Tensor, read_row: Tensor, known: Tensor, write_block: Tensor, write_row: Tensor
    ) -> Steps:
        lasting = []
        values = (read_block, read_row, known[..., None], write_block, write_row)
        for place, value in zip(self._lasting.values(), values, strict=True):
            place = place[: len(value)]
            lasting.append(place.copy_(value))
        return Steps(*lasting, None, ())

    def _rows(self, position: Tensor) -> Tensor:
        return position % self.block_size % self.kept

    @staticmethod
    def _blocks(table: Tensor, column: Tensor, live: Tensor) -> Tensor:
        column = column.clamp(max=table.shape[1] - 1)
        return torch.where(live, table.gather(1, column).long(), 0)

    def _head(self, distance: int, lengths: np.ndarray, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        requests, places = np.nonzero(lengths[:, None] > np.arange(distance))
        request, place = self._to_device(requests), self._to_device(places)
        return start[request] + place, request, place + self.window - distance

    def _to_device(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values.astype(np.int64, copy=False))
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _writes(lengths: np.ndarray, block_size: int, kept: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows that a step may have to write: its request, which of its blocks, how far from the end in there.

    More than there are, for how a request lies in its blocks is known on the device alone.
    """
    blocks = np.where(lengths > 0, (lengths + block_size - 2) // block_size + 1, 0)
    each = np.minimum(lengths, kept)
    counts = blocks * each
    request = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return request, number // each[request], number % each[request]


class StateBackend(AttentionBackend):  # type: ignore[misc]
    """Tells vLLM who makes the metadata of the state's layers and how large its blocks are."""

    @staticmethod
    def get_name() -> str:
        return "ZAYA_CCA_STATE"

    @staticmethod
    def get_builder_cls() -> type[StepsBuilder]:
        return StepsBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Until vLLM 0.31 or so; later it makes the shape from the specification alone."""
        return num_blocks, 2 * num_kv_heads * block_size * head_size


class CcaState(nn.Module, AttentionLayerBase):  # type: ignore[misc]
    """The memory of one CCA layer.

    Args:
        width: Numbers that are remembered of a token.
        window: Tokens back that are asked for.
        num_kv_heads: Of the attention on this rank, whose pages the state shares its memory with.
        head_dim: Its.
        cache_config: vLLM's.
        prefix: The layer's name, unique and with its index.
    """

    def __init__(
        self, width: int, window: int, num_kv_heads: int, head_dim: int, cache_config: CacheConfig, prefix: str
    ) -> None:
        super().__init__()
        config = get_current_vllm_config()
        self.prefix, self.width, self.window = prefix, width, window
        self.kept = window + (config.num_speculative_tokens if config.speculative_config else 0)
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.dtype = config.model_config.dtype
        self.page_dtype = kv_cache_dtype_str_to_dtype(cache_config.cache_dtype, config.model_config)
        self.kv_cache = torch.tensor([])
        known = config.compilation_config.static_forward_context
        if prefix in known:
            raise ValueError(f"two layers are called {prefix}")
        known[prefix] = self
        ops = config.compilation_config.splitting_ops
        if ops and OP not in ops:  # it reads what changes from step to step, so it is left out of CUDA graphs of pieces
            ops.append(OP)

    def get_attn_backend(self) -> type[StateBackend]:
        return StateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> SlidingWindowSpec:
        """A window whose pages are as large as those of the attention: one pool serves both.

        Raises:
            ValueError: The state does not fit into such a page.
        """
        spec = SlidingWindowSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_dim,
            dtype=self.page_dtype,
            sliding_window=self.window + 1,
        )
        row = self.width * self.dtype.itemsize
        if self.kept * row > spec.page_size_bytes or self.kept > spec.block_size:
            a_token = spec.page_size_bytes // spec.block_size
            least = max(-(-self.kept * row // a_token), self.kept)
            raise ValueError(
                f"a KV cache block of {spec.block_size} tokens ({spec.page_size_bytes} bytes) is too small for the CCA "
                f"state of {self.kept} tokens ({self.kept * row} bytes): --block-size {least} or more"
            )
        return spec

    def exchange(self, rows: Tensor, past: Tensor) -> None:
        """Fetch the rows of earlier tokens and remember those of this step.

        Args:
            rows: `[T, width]` of this step's tokens.
            past: `[W, T, width]`, filled here: `past[j - 1]` is `rows` j tokens earlier, 0 before a sequence's start.
        """
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures its memory
            past.zero_()
            return
        steps: Steps = metadata[self.prefix]
        pages = self._pages()
        before = pages[steps.read_block, steps.read_row]
        before = torch.where(steps.known, before, 0)
        if steps.write_token is None:
            requests = len(before)
            past[:, :requests] = before.transpose(0, 1).flip(0)
            past[:, requests:] = 0
            pages[steps.write_block, steps.write_row] = rows[:requests]
            return
        for distance, (token, request, column) in enumerate(steps.heads, 1):
            earlier = past[distance - 1]
            earlier[:distance] = 0
            earlier[distance:] = rows[:-distance]
            earlier[token] = before[request, column]
        pages[steps.write_block, steps.write_row] = rows[steps.write_token]

    def _pages(self) -> Tensor:
        """`[blocks, kept, width]` of this layer, wherever vLLM's layout has put its blocks."""
        cache = self.kv_cache
        size = cache.element_size()
        per_row = self.width * self.dtype.itemsize
        raw = cache.view(torch.uint8) if cache.dtype != torch.uint8 else cache
        return (
            torch.as_strided(raw, (len(cache), self.kept * per_row), (cache.stride(0) * size, 1), raw.storage_offset())
            .view(self.dtype)
            .unflatten(1, (self.kept, self.width))
        )


def _exchange(rows: Tensor, past: Tensor, layer_name: str) -> None:
    get_forward_context().no_compile_layers[layer_name].exchange(rows, past)


def _exchange_fake(rows: Tensor, past: Tensor, layer_name: str) -> None:
    return


OP = "mrsa::cca_exchange"
_LIBRARY = torch.library.Library("mrsa", "FRAGMENT")

direct_register_custom_op(
    op_name="cca_exchange",
    op_func=_exchange,
    mutates_args=["past"],
    fake_impl=_exchange_fake,
    target_lib=_LIBRARY,
)
