"""A ZAYA1 on disk: which names and shapes a folder must hold, and which it does. Reads headers alone, needs no vLLM."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mrsa_server.zaya import ARCHITECTURE

Shape = tuple[int, ...]

_INDEX = "model.safetensors.index.json"
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1, "F64": 8, "I32": 4, "I64": 8}
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound

# Of `ZayaConfig`; a file leaves out what is as here.
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262_272,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "moe_intermediate_size": 2048,
    "num_experts": 16,
    "num_experts_per_tok": 1,
    "router_hidden_size": 256,
    "cca_time0": 2,
    "cca_time1": 2,
    "attention_bias": False,
    "lm_head_bias": False,
    "tie_word_embeddings": True,
}


class NotZaya(ValueError):
    """The folder holds no ZAYA1 that can be read."""


class Stored(NamedTuple):
    """A tensor as a file's header describes it."""

    dtype: str
    shape: Shape

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _BYTES.get(self.dtype, 2)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder's configuration, with defaults, and its tensors."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def quantized(self) -> bool:
        """Whether its experts are stored in a way of their own."""
        return bool(self.config.get("quantization_config"))

    @property
    def token_bytes(self) -> int:
        """Of the KV cache in bf16."""
        config = self.config
        return int(2 * config["num_key_value_heads"] * config["head_dim"] * 2 * config["num_hidden_layers"])

    def problems(self) -> tuple[str, ...]:
        """What keeps it from being loaded, in words; nothing where it can be."""
        wanted = dict(expected(self.config))
        found = {name: tensor.shape for name, tensor in self.tensors.items()}
        if self.config["tie_word_embeddings"]:
            found.pop("lm_head.weight", None)
        if self.quantized:
            wanted = {name: shape for name, shape in wanted.items() if ".mlp.experts." not in name}
            found = {name: shape for name, shape in found.items() if ".mlp.experts." not in name}
        missing = sorted(wanted.keys() - found.keys())
        unknown = sorted(found.keys() - wanted.keys())
        wrong = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
        return (
            *_some("missing", missing),
            *_some("not of ZAYA1 as transformers names it", unknown),
            *(f"{name} has the shape {found[name]}, not {wanted[name]}" for name in wrong[:5]),
            *((f"... and {len(wrong) - 5} more of a wrong shape",) if len(wrong) > 5 else ()),
        )


def read(folder: Path) -> Checkpoint:
    """Read a folder's `config.json` and the headers of its weights.

    Raises:
        NotZaya: It is not there, is broken, or is another model.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        architectures = config.get("architectures")
        tensors = {name: tensor for file in _files(folder) for name, tensor in _header(file)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise NotZaya(f"{folder} cannot be read: {error}") from error
    if not isinstance(architectures, list) or ARCHITECTURE not in architectures:
        raise NotZaya(f"{folder} holds {architectures}, not {ARCHITECTURE}")
    if not tensors:
        raise NotZaya(f"{folder} holds no weights (*.safetensors)")
    if any(".zaya_block." in name for name in tensors):
        raise NotZaya(f"{folder} is laid out for Zyphra's own fork of vLLM, not as transformers 5.16 and later do")
    full = {**_DEFAULTS, **config}
    for name, value in _DEFAULTS.items():
        if type(full[name]) is not type(value):
            raise NotZaya(f"{folder}/config.json: {name} is {full[name]!r}")
    if full["num_experts_per_tok"] != 1:
        raise NotZaya(f"num_experts_per_tok={full['num_experts_per_tok']}: ZAYA1 takes one expert")
    return Checkpoint(full, tensors)


def expected(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Name and shape of each tensor that transformers writes for a configuration."""
    hidden, width, experts = config["hidden_size"], config["router_hidden_size"], config["num_experts"]
    head, heads, kv_heads = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    queries, keys, inner = heads * head, kv_heads * head, config["moe_intermediate_size"]
    scaling = ("hidden_states_scale", "hidden_states_bias", "residual_scale", "residual_bias")
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.input_hidden_states_scale", (hidden,)
    yield "model.input_hidden_states_bias", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)
    if config["lm_head_bias"]:
        yield "lm_head.bias", (config["vocab_size"],)
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        projection, gate = f"{layer}.self_attn.qkv_proj", f"{layer}.mlp.gate"
        projected = {"q_proj": queries, "k_proj": keys, "v_proj_current": keys // 2, "v_proj_delayed": keys // 2}
        for name, outputs in projected.items():
            yield f"{projection}.{name}.weight", (outputs, hidden)
            if config["attention_bias"]:
                yield f"{projection}.{name}.bias", (outputs,)
        yield f"{projection}.conv_qk_depthwise.weight", (queries + keys, 1, config["cca_time0"])
        yield f"{projection}.conv_qk_depthwise.bias", (queries + keys,)
        yield f"{projection}.conv_qk_grouped.weight", (queries + keys, head, config["cca_time1"])
        yield f"{projection}.conv_qk_grouped.bias", (queries + keys,)
        yield f"{layer}.self_attn.qk_norm.temp", (kv_heads,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        if config["attention_bias"]:
            yield f"{layer}.self_attn.o_proj.bias", (hidden,)
        yield f"{gate}.down_proj.weight", (width, hidden)
        yield f"{gate}.down_proj.bias", (width,)
        if index:
            yield f"{gate}.router_states_scale", (width,)
        yield f"{gate}.balancing_biases", (experts + 1,)
        yield f"{gate}.router_mlp.norm.weight", (width,)
        for name in ("fc1", "fc2"):
            yield f"{gate}.router_mlp.{name}.weight", (width, width)
            yield f"{gate}.router_mlp.{name}.bias", (width,)
        yield f"{gate}.router_mlp.out_proj.weight", (experts + 1, width)
        yield f"{layer}.mlp.experts.gate_up_proj", (experts, 2 * inner, hidden)
        yield f"{layer}.mlp.experts.down_proj", (experts, hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        for place in ("post_attention_residual_scale", "post_mlp_residual_scale"):
            for name in scaling:
                yield f"{layer}.{place}.{name}", (hidden,)


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    """A safetensors file begins with the length of its header, 8 bytes little-endian, and the header as JSON."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(stream.read(length))
    size = max((part["data_offsets"][1] for name, part in header.items() if name != "__metadata__"), default=0)
    if file.stat().st_size != 8 + length + size:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes, not {8 + length + size}: download it again")
    for name, part in header.items():
        if name != "__metadata__":
            yield name, Stored(part["dtype"], tuple(part["shape"]))


def _some(what: str, names: list[str]) -> Iterator[str]:
    if names:
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{what}: {', '.join(names[:3])}{rest}"
