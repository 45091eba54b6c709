"""Files of a ZAYA1 that hold no numbers: headers, and as many bytes as they say."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrsa_server.zaya.checkpoint import expected

SMALL: Mapping[str, Any] = {
    "architectures": ["ZayaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "router_hidden_size": 4,
    "cca_time0": 2,
    "cca_time1": 2,
    "attention_bias": False,
    "lm_head_bias": False,
    "tie_word_embeddings": True,
}


def write_headers(folder: Path, config: Mapping[str, Any] = SMALL, shapes: Mapping[str, Any] | None = None) -> None:
    """`config.json`, an empty tokenizer and chat template, and the tensors in two files with an index."""
    (folder / "tokenizer.json").touch()
    (folder / "chat_template.jinja").touch()
    (folder / "config.json").write_text(json.dumps(dict(config)))
    names = sorted((dict(expected(config)) if shapes is None else shapes).items())
    where = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = folder / f"model-{number}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in part:
            size = 2
            for length in shape:
                size *= length
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
            where[name] = file.name
        words = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(words)) + words + bytes(end))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
