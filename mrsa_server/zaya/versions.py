"""The names that differ between vLLM 0.26 and 0.33, each under one name."""

from __future__ import annotations

from vllm.model_executor.layers.fused_moe import layer

# In 0.26 `FusedMoE`, the same function.
fused_moe = getattr(layer, "FusedMoEFactory", None) or layer.FusedMoE
