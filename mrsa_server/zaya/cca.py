"""Compressed convolutional attention: queries and keys pass two causal convolutions, half the values come a token late.

From the model's report and https://arxiv.org/abs/2510.04476. What of it needs earlier tokens is asked from `state`;
everything else is plain arithmetic on the tokens of a step, so that torch.compile may fuse it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope

from mrsa_server.zaya.state import CcaState


class CcaAttention(nn.Module):  # type: ignore[misc]  # torch is no typed package here
    """Attention of one layer.

    Args:
        config: The model's, as transformers reads it.
        layer_index: Which layer.
        cache_config: vLLM's.
        quant_config: vLLM's.
        prefix: The layer's name.
    """

    def __init__(
        self,
        config: Any,
        layer_index: int,
        cache_config: CacheConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        self.head_dim: int = config.head_dim
        self.num_kv_heads = config.num_key_value_heads // ranks
        self.num_heads = config.num_attention_heads // ranks
        self.mixed = (self.num_heads + self.num_kv_heads) * self.head_dim
        values = self.num_kv_heads * self.head_dim
        # Of all values the first half is the current token's, in whatever heads that falls.
        self.current_values = min(max(config.num_key_value_heads * self.head_dim // 2 - rank * values, 0), values)
        self.depthwise_taps, self.grouped_taps = config.cca_time0, config.cca_time1
        self.window = self.depthwise_taps + self.grouped_taps - 2
        if self.window < 1:
            raise ValueError(f"cca_time0={config.cca_time0} and cca_time1={config.cca_time1} leave no convolution")

        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        heads = self.num_heads + self.num_kv_heads
        # `[taps, channels]`, the latest token last.
        self.depthwise = _parameter(self.depthwise_taps, self.mixed, load=self._load_depthwise)
        self.depthwise_bias = _parameter(self.mixed, load=self._load_channels)
        # `[heads, taps * channels in, channels out]`, the latest token last.
        self.grouped = _parameter(heads, self.grouped_taps * self.head_dim, self.head_dim, load=self._load_grouped)
        self.grouped_bias = _parameter(self.mixed, load=self._load_channels)
        self.temperature = _parameter(self.num_kv_heads, load=self._load_temperature, dtype=torch.float32)
        self._rank, self._total_heads = rank, config.num_attention_heads

        layer_type = config.layer_types[layer_index]
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters[layer_type],
            is_neox_style=True,
        )
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=config.sliding_window if layer_type == "hybrid_sliding" else None,
            prefix=f"{prefix}.attn",
        )
        self.state = CcaState(
            self.mixed + values, self.window, self.num_kv_heads, self.head_dim, cache_config, f"{prefix}.state"
        )

    def forward(self, positions: Tensor, hidden: Tensor) -> Tensor:
        """`[T, hidden]` in and out."""
        rows, _ = self.qkv_proj(hidden)
        past = rows.new_empty(self.window, *rows.shape)
        torch.ops.mrsa.cca_exchange(rows, past, self.state.prefix)
        query, key = self._mix(rows, past)
        query, key = self.rotary_emb(positions, query, key)
        output, _ = self.o_proj(self.attn(query, key, self._values(positions, rows, past[0])))
        return output

    def _mix(self, rows: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Convolutions, the mean of each group around them, and the norm; in float32 but for the matrix product."""
        count, dtype = len(rows), rows.dtype
        weight, bias = self.depthwise.float(), self.depthwise_bias.float()
        back = [rows[:, : self.mixed].float(), *(past[at, :, : self.mixed].float() for at in range(self.window))]
        taps = []
        for distance in reversed(range(self.grouped_taps)):
            tap = bias
            for at in range(self.depthwise_taps):
                tap = torch.addcmul(tap, weight[self.depthwise_taps - 1 - at], back[distance + at])
            taps.append(tap.to(dtype).view(count, -1, self.head_dim))
        mixed = torch.bmm(torch.cat(taps, dim=-1).transpose(0, 1), self.grouped).transpose(0, 1).float()
        mixed = mixed + self.grouped_bias.float().view(-1, self.head_dim)

        queries, keys = back[0].split([self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim], dim=-1)
        grouped = queries.view(count, self.num_kv_heads, -1, self.head_dim)
        mean = (grouped + keys.view(count, self.num_kv_heads, 1, self.head_dim)) * 0.5
        query = mixed[:, : self.num_heads] + mean.reshape(count, self.num_heads, self.head_dim)
        key = mixed[:, self.num_heads :] + mean.mean(dim=2)
        floor = torch.finfo(dtype).eps
        query = self._unit(query, floor)
        key = self._unit(key, floor) * self.temperature[:, None]
        return query.to(dtype).reshape(count, -1), key.to(dtype).reshape(count, -1)

    def _unit(self, heads: Tensor, floor: float) -> Tensor:
        length = torch.linalg.vector_norm(heads, dim=-1, keepdim=True).clamp(min=floor)
        return heads * (self.head_dim**0.5 / length)

    def _values(self, positions: Tensor, rows: Tensor, previous: Tensor) -> Tensor:
        late = slice(self.mixed + self.current_values, None)
        delayed = previous[:, late]
        if self.qkv_proj.bias is not None:  # what comes before the first token is a projection of zeros
            delayed = torch.where((positions == 0)[:, None], self.qkv_proj.bias[late], delayed)
        return torch.cat((rows[:, self.mixed : late.start], delayed), dim=-1)

    def _own(self, loaded: Tensor) -> Tensor:
        """The channels of this rank's queries and keys, of those of all."""
        queries = loaded[: self._total_heads * self.head_dim]
        keys = loaded[self._total_heads * self.head_dim :]
        of_queries, of_keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        own = queries.narrow(0, self._rank * of_queries, of_queries), keys.narrow(0, self._rank * of_keys, of_keys)
        return torch.cat(own)

    def _load_channels(self, parameter: Tensor, loaded: Tensor) -> None:
        _copy(parameter, self._own(loaded))

    def _load_depthwise(self, parameter: Tensor, loaded: Tensor) -> None:
        _copy(parameter, self._own(loaded)[:, 0].T)

    def _load_grouped(self, parameter: Tensor, loaded: Tensor) -> None:
        heads = self._own(loaded).unflatten(0, (-1, self.head_dim))  # [heads, out, in, taps]
        _copy(parameter, heads.permute(0, 3, 2, 1).flatten(1, 2))

    def _load_temperature(self, parameter: Tensor, loaded: Tensor) -> None:
        _copy(parameter, loaded.narrow(0, self._rank * self.num_kv_heads, self.num_kv_heads))


def _parameter(*shape: int, load: Any, dtype: Any = None) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
    parameter.weight_loader = load
    return parameter


def _copy(parameter: Tensor, loaded: Tensor) -> None:
    if parameter.shape != loaded.shape:
        raise ValueError(f"a weight of shape {tuple(loaded.shape)} where {tuple(parameter.shape)} is expected")
    parameter.data.copy_(loaded)
