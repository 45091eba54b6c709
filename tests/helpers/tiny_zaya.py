"""ZAYA1 of random weights, as transformers writes it: the reference that our model for vLLM is held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 256


def write_tiny_zaya(folder: Path, seed: int = 0, **config: Any) -> Any:
    """Write a ZAYA1 that costs next to nothing, and give transformers' model of it.

    Weights are drawn so that everything matters: transformers begins with keys of length 0 and with vectors of ones.

    Args:
        folder: Where it is written, as transformers and vLLM read it; without a tokenizer.
        seed: Of the weights.
        config: Fields of `ZayaConfig` that differ.

    Returns:
        The `ZayaForCausalLM`, in float32.
    """
    from transformers import ZayaConfig

    tiny = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "router_hidden_size": 32,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model = random_zaya(ZayaConfig(**tiny | config), seed)
    model.save_pretrained(folder)
    return model


def random_zaya(config: Any, seed: int) -> Any:
    """A model of random weights, on which answers depend on all of them."""
    import torch
    from transformers import ZayaForCausalLM

    torch.manual_seed(seed)
    model = ZayaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("inv_freq"):
                continue
            if name.endswith(("_scale", "norm.weight")):
                weight.normal_(1, 0.2)
            elif name.endswith("temp"):
                weight.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "biases")):
                weight.normal_(0, 0.1)
            else:
                inputs = weight[0].numel() if "conv" in name else weight.shape[-1]
                weight.normal_(0, 1 if "embed" in name else inputs**-0.5)
        # Embeddings are tied: where the residual is mostly the token itself, that token comes again and again.
        model.model.input_hidden_states_scale.mul_(0.05)
        model.model.norm.weight.mul_(0.6 * (128 / config.hidden_size) ** 0.5)
    return model
