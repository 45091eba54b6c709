"""The mixture of experts of one layer: an MLP as router, which also reads the router of the layer before (EDA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization import QuantizationConfig

from mrsa_server.zaya.versions import fused_moe


class Router(nn.Module):  # type: ignore[misc]  # torch is no typed package here
    """Scores of all experts and, last, of the one that does nothing.

    Args:
        config: The model's.
        first: Whether no layer comes before.
    """

    def __init__(self, config: Any, first: bool) -> None:
        super().__init__()
        width = config.router_hidden_size
        self.down_proj = nn.Linear(config.hidden_size, width)
        self.router_states_scale = None if first else nn.Parameter(torch.empty(width))
        self.router_mlp = _Scores(width, config.num_experts + 1, config.rms_norm_eps)
        # They steer which expert is taken, not how much it counts. Float32, whatever the model is.
        self.balancing_biases = nn.Parameter(torch.empty(config.num_experts + 1, dtype=torch.float32))

    def forward(self, hidden: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[T, experts + 1]` logits, and what the next layer's router is to add."""
        state = self.down_proj(hidden)
        if self.router_states_scale is not None and previous is not None:
            state = state + previous * self.router_states_scale
        return self.router_mlp(state), state

    def choose(self, hidden_states: Tensor, gating_output: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        """As vLLM asks a routing function: weights and ids, `[T, 1]`. To skip is to take expert 0 with weight 0."""
        probabilities = torch.softmax(gating_output, dim=-1, dtype=torch.float32)
        chosen = (probabilities + self.balancing_biases).argmax(dim=-1, keepdim=True)
        skipped = chosen == gating_output.shape[-1] - 1
        weights = probabilities.gather(-1, chosen).masked_fill(skipped, 0.0)
        return weights, chosen.masked_fill(skipped, 0).to(torch.int32)


class _Scores(nn.Module):  # type: ignore[misc]
    def __init__(self, width: int, outputs: int, epsilon: float) -> None:
        super().__init__()
        self.norm = RmsNorm(width, epsilon)
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, outputs, bias=False)

    def forward(self, state: Tensor) -> Tensor:
        state = nn.functional.gelu(self.fc1(self.norm(state)))
        return self.out_proj(nn.functional.gelu(self.fc2(state)))


class RmsNorm(nn.Module):  # type: ignore[misc]
    """In float32, from any dtype to that of its weight."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.float()
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.epsilon)
        return (hidden * self.weight.float()).to(self.weight.dtype)


class Experts(nn.Module):  # type: ignore[misc]
    """Router and experts of one layer, the experts on vLLM's fused kernels."""

    def __init__(self, config: Any, layer_index: int, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.gate = Router(config, first=layer_index == 0)
        self.experts = fused_moe(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            activation=config.hidden_act,
            renormalize=False,
            custom_routing_function=self.gate.choose,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, hidden: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """`[T, hidden]`, and the router's state for the next layer."""
        logits, state = self.gate(hidden, previous)
        return self.experts(hidden_states=hidden, router_logits=logits), state
