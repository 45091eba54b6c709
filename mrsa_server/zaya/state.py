"""What CCA remembers of a sequence, in vLLM's hybrid KV cache: the projections of its last few tokens.

To vLLM it is a sliding window of a few tokens, and so its own manager does all that is hard: the state is found again
at every block of a cached prefix, is freed behind the window, survives chunks of any size and goes with a preempted
request. Nothing is copied when a sequence enters a new block, and a sequence that does not move is not touched.

Of its tokens a block holds the last W, for whoever goes on behind it, each in a row of its own; before them come those
where a sequence stands in the midst of the block, in a ring. vLLM lets a request go on behind a block that another one
fills in the same step: so the ends of blocks are written before anything is read, and the ring is written after.
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
class Writes:
    """Rows of the state to be written. All are `[n]`.

    Attributes:
        block: 0, which vLLM gives to nobody, where nothing is to be written.
        row: In the block.
        token: Which tokens of the step; None where each request has one.
    """

    block: Tensor
    row: Tensor
    token: Tensor | None


@dataclass(frozen=True, slots=True)
class Steps:
    """Which rows of the state one step of the engine reads and writes, the same for all layers.

    Attributes:
        before: What is written before anything is read.
        block: `[requests, W]` of each token before a request's first in this step, oldest first.
        row: `[requests, W]` in the block.
        known: `[requests, W, 1]` whether there is such a token.
        heads: For each distance from 1 to W, the tokens of the step whose token that far back is a remembered one:
            their index in the step, their request and the column of `block`. Empty where each request has one token.
        after: What is written at last; None where each request has one token.
    """

    before: Writes
    block: Tensor
    row: Tensor
    known: Tensor
    heads: tuple[tuple[Tensor, Tensor, Tensor], ...]
    after: Writes | None


class StepsBuilder(AttentionMetadataBuilder):  # type: ignore[misc]  # vLLM is no typed package here
    """Makes `Steps` once a step. Lengths of queries it reads on the CPU, positions on the device: it never waits."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        self.window, self.ring, self.block_size = layer.window, layer.ring, kv_cache_spec.block_size
        # A CUDA graph reads where it read when it was captured.
        widest = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(vllm_config.scheduler_config.max_num_seqs, widest)
        self._lasting = tuple(
            torch.zeros(shape, dtype=dtype, device=device)
            for shape, dtype in (
                ((rows,), torch.int64),
                ((rows,), torch.int64),
                ((rows, self.window), torch.int64),
                ((rows, self.window), torch.int64),
                ((rows, self.window, 1), torch.bool),
            )
        )

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **_: object) -> Steps:
        batch = common_attn_metadata
        requests = batch.num_reqs
        table = batch.block_table_tensor[:requests]
        start = batch.query_start_loc[: requests + 1].long()
        length = start.diff()  # 0 where a CUDA graph is wider than the batch
        end = batch.seq_lens[:requests].long()
        first = end - length
        back = first[:, None] + torch.arange(-self.window, 0, device=first.device)
        known = (back >= 0) & (length > 0)[:, None]
        back = back.clamp(min=0)
        block = torch.where(known, table.gather(1, back // self.block_size), 0).long()
        if batch.max_query_len == 1:
            at = (end - 1).clamp(min=0)
            own = table.gather(1, (at // self.block_size)[:, None])[:, 0]
            own = torch.where(length > 0, own, 0).long()
            return self._one_token_each(own, self._rows(at), block, self._rows(back), known[..., None])

        def writes(request: Tensor, position: Tensor) -> Writes:
            live = (position >= first[request]) & (position < end[request])
            at = position.clamp(min=0)
            column = (at // self.block_size).clamp(max=table.shape[1] - 1)
            token = start[request] + torch.where(live, position - first[request], 0)
            return Writes(torch.where(live, table[request, column], 0).long(), self._rows(at), token)

        lengths = np.diff(batch.query_start_loc_cpu[: requests + 1].numpy())
        # How a request lies in its blocks is known on the device alone: these are the most that it may touch.
        blocks = np.where(lengths > 0, (lengths + self.block_size - 2) // self.block_size + 1, 0)
        of_end, ordinal, from_end = self._numbered(blocks, np.full_like(lengths, self.window))
        of_ring, _, from_last = self._numbered(np.minimum(lengths, 1), np.minimum(lengths, self.ring))
        return Steps(
            writes(of_end, (first[of_end] // self.block_size + ordinal + 1) * self.block_size - 1 - from_end),
            block,
            self._rows(back),
            known[..., None],
            tuple(self._head(distance, lengths, start) for distance in range(1, self.window + 1)),
            writes(of_ring, end[of_ring] - 1 - from_last),
        )

    def _one_token_each(self, own: Tensor, at: Tensor, block: Tensor, row: Tensor, known: Tensor) -> Steps:
        own, at, block, row, known = (
            place[: len(value)].copy_(value)
            for place, value in zip(self._lasting, (own, at, block, row, known), strict=True)
        )
        return Steps(Writes(own, at, None), block, row, known, (), None)

    def _rows(self, position: Tensor) -> Tensor:
        offset = position % self.block_size
        of_end = offset - (self.block_size - self.window)
        return torch.where(of_end >= 0, of_end, self.window + offset % self.ring)

    def _head(self, distance: int, lengths: np.ndarray, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        requests, places = np.nonzero(lengths[:, None] > np.arange(distance))
        request, place = self._to_device(requests), self._to_device(places)
        return start[request] + place, request, place + self.window - distance

    def _numbered(self, counts: np.ndarray, each: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """For each request `counts` times `each` items: the request, which of its counts, which of the each."""
        items = counts * each
        request = np.repeat(np.arange(len(items)), items)
        number = np.arange(items.sum()) - np.repeat(np.cumsum(items) - items, items)
        ordinal, which = np.divmod(number, each[request])
        return self._to_device(request), self._to_device(ordinal), self._to_device(which)

    def _to_device(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values.astype(np.int64, copy=False))
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


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
        # One more than is read, for a step of one token writes first; and drafts that are rejected are overwritten.
        self.ring = window + 1 + (config.num_speculative_tokens if config.speculative_config else 0)
        self.kept = window + self.ring
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
        a_token = spec.page_size_bytes // spec.block_size
        least = max(-(-self.kept * row // a_token), self.kept)
        if spec.block_size < least:
            least = -(-least // 16) * 16  # what attention takes everywhere
            raise ValueError(
                f"a KV cache block of {spec.block_size} tokens ({spec.page_size_bytes} bytes) cannot hold the CCA "
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
        else:
            move(self._pages(), rows, past, metadata[self.prefix])

    def _pages(self) -> Tensor:
        """`[blocks, kept, width]` of this layer, wherever vLLM's layout has put its blocks.

        Raises:
            ValueError: The layout tears a block of one layer apart.
        """
        cache = self.kv_cache.view(torch.uint8)
        size = cache[0].numel()
        strides = zip(cache.shape[1:], cache.stride()[1:], strict=True)
        if 1 + sum((length - 1) * stride for length, stride in strides) != size:
            raise ValueError("the CCA state needs a KV cache layout of whole blocks: unset VLLM_KV_CACHE_LAYOUT")
        wanted = self.kept * self.width * self.dtype.itemsize
        pages = cache.as_strided((len(cache), wanted), (cache.stride(0), 1))
        return pages.view(self.dtype).unflatten(1, (self.kept, self.width))


def move(pages: Tensor, rows: Tensor, past: Tensor, steps: Steps) -> None:
    """One step of one layer.

    Args:
        pages: `[blocks, kept, width]` of the layer, read and written.
        rows: `[T, width]`, see `CcaState.exchange`.
        past: `[W, T, width]`, filled.
        steps: What is to be read and written.
    """
    _write(pages, rows, steps.before)
    before = torch.where(steps.known, pages[steps.block, steps.row], 0)
    if steps.after is None:
        requests = len(before)
        past[:, :requests] = before.transpose(0, 1).flip(0)
        past[:, requests:] = 0
        return
    for distance, (token, request, column) in enumerate(steps.heads, 1):
        earlier = past[distance - 1]
        earlier[:distance] = 0
        earlier[distance:] = rows[:-distance]
        earlier[token] = before[request, column]
    _write(pages, rows, steps.after)


def _write(pages: Tensor, rows: Tensor, writes: Writes) -> None:
    pages[writes.block, writes.row] = rows[: len(writes.block)] if writes.token is None else rows[writes.token]


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
