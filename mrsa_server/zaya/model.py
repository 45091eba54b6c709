"""ZAYA1 for vLLM's V1 engine: layers of CCA and of experts around a residual that stays in float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from mrsa_server.zaya.cca import CcaAttention
from mrsa_server.zaya.ranks import check_ranks
from mrsa_server.zaya.router import Experts, RmsNorm

# What transformers calls the parameters of CCA, and how they are called here.
_RENAMED = {
    ".self_attn.qkv_proj.conv_qk_depthwise.weight": ".self_attn.depthwise",
    ".self_attn.qkv_proj.conv_qk_depthwise.bias": ".self_attn.depthwise_bias",
    ".self_attn.qkv_proj.conv_qk_grouped.weight": ".self_attn.grouped",
    ".self_attn.qkv_proj.conv_qk_grouped.bias": ".self_attn.grouped_bias",
    ".self_attn.qk_norm.temp": ".self_attn.temperature",
}


class ResidualScaling(nn.Module):  # type: ignore[misc]  # torch is no typed package here
    """`(output + b) * a + (residual + d) * c`, each a learned vector; in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden_states_scale = _vector(width)
        self.hidden_states_bias = _vector(width)
        self.residual_scale = _vector(width)
        self.residual_bias = _vector(width)

    def forward(self, output: Tensor, residual: Tensor) -> Tensor:
        output = (output.float() + self.hidden_states_bias) * self.hidden_states_scale
        return output + (residual + self.residual_bias) * self.residual_scale


class Layer(nn.Module):  # type: ignore[misc]
    """CCA, then the experts."""

    def __init__(self, vllm_config: VllmConfig, index: int, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        self.self_attn = CcaAttention(config, index, vllm_config.cache_config, quant_config, f"{prefix}.self_attn")
        self.mlp = Experts(config, index, quant_config, f"{prefix}.mlp")
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_residual_scale = ResidualScaling(config.hidden_size)
        self.post_mlp_residual_scale = ResidualScaling(config.hidden_size)

    def forward(self, positions: Tensor, residual: Tensor, router: Tensor | None) -> tuple[Tensor, Tensor]:
        """The residual, `[T, hidden]` in float32, and the router's state."""
        output = self.self_attn(positions, self.input_layernorm(residual))
        residual = self.post_attention_residual_scale(output, residual)
        output, router = self.mlp(self.post_attention_layernorm(residual), router)
        return self.post_mlp_residual_scale(output, residual), router


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class ZayaModel(nn.Module):  # type: ignore[misc]
    """Token ids to hidden states."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.input_hidden_states_scale = _vector(config.hidden_size)
        self.input_hidden_states_bias = _vector(config.hidden_size)
        layers = (Layer(vllm_config, at, f"{prefix}.layers.{at}") for at in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """`[T, hidden]`, normed. `intermediate_tensors` is None: vLLM divides no layers of a model that it cannot."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        residual = (inputs_embeds.float() + self.input_hidden_states_bias) * self.input_hidden_states_scale
        router = None
        for layer in self.layers:
            residual, router = layer(positions, residual, router)
        return self.norm(residual)


class ZayaForCausalLM(nn.Module, SupportsQuant):  # type: ignore[misc]
    """The model as vLLM's registry knows it."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": [f"qkv_proj.{part}" for part in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")]
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        check_ranks(config, vllm_config.parallel_config)
        self.config = config
        self.model = ZayaModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            bias=config.lm_head_bias,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states, getattr(self.lm_head, "bias", None))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load what transformers' `save_pretrained` writes, in any order.

        Returns:
            Names of the parameters here that have been loaded.

        Raises:
            ValueError: A name or a shape is none of ZAYA1's, or half of a layer's values is missing.
        """
        own = dict(self.named_parameters())
        loaded: set[str] = set()
        halves: dict[str, dict[str, Tensor]] = {}
        for name, weight in weights:
            if name.startswith("lm_head.weight") and self.config.tie_word_embeddings:
                continue
            head, experts, rest = name.partition(".mlp.experts.")
            if experts:
                module = self.get_submodule(f"{head}.mlp.experts")
                loaded |= {f"{head}.mlp.experts.{part}" for part in module.load_weights([(rest, weight)])}
                continue
            head, projection, rest = name.partition(".self_attn.qkv_proj.")
            kind, _, suffix = rest.partition(".")
            if projection and kind in {"q_proj", "k_proj"}:
                loaded.add(_load(own, f"{head}.self_attn.qkv_proj.{suffix}", weight, kind[0]))
            elif projection and kind in {"v_proj_current", "v_proj_delayed"}:
                target = f"{head}.self_attn.qkv_proj.{suffix}"
                halves.setdefault(target, {})[kind] = weight
                if len(halves[target]) == 2:
                    both = halves.pop(target)
                    loaded.add(_load(own, target, torch.cat((both["v_proj_current"], both["v_proj_delayed"])), "v"))
            else:
                loaded.add(_load(own, _renamed(name), weight))
        if halves:
            raise ValueError(f"half of the values is missing for {', '.join(sorted(halves))}")
        return loaded


def _vector(width: int) -> nn.Parameter:
    """In float32 like the residual that it scales, whatever the model is in."""
    return nn.Parameter(torch.empty(width, dtype=torch.float32))


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _load(own: dict[str, nn.Parameter], name: str, weight: Tensor, *shard: str) -> str:
    parameter = own.get(name)
    if parameter is None:
        raise ValueError(f"the checkpoint holds {name}, which is no weight of ZAYA1 as transformers names them")
    getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight, *shard)
    return name
