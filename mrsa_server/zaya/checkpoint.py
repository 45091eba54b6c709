"""A ZAYA1 on disk: which names and shapes a folder must hold, and which it does. Reads headers alone, needs no vLLM."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from mrsa_server.zaya import ARCHITECTURE

PUBLISHED = "Zyphra/ZAYA1-8B"  # at Hugging Face

Shape = tuple[int, ...]

_INDEX = "model.safetensors.index.json"
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E5M2": 1, "U8": 1, "I8": 1, "F64": 8, "I32": 4, "I64": 8}
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own bound
_PLAIN = frozenset({"BF16", "F16", "F32", "F64"})  # what weights are that need no scale beside them
_LAYER_TYPES = ("hybrid", "hybrid_sliding")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_TEMPLATE, _SETTINGS = "chat_template.jinja", "tokenizer_config.json"
_FORK = "{folder} is laid out for Zyphra's own fork of vLLM, not as transformers 5.16 and later do"

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


class OtherModel(NotZaya):
    """It holds another model, which vLLM may well know."""


class OtherLayout(NotZaya):
    """It holds a ZAYA1 whose weights are named and cut as Zyphra's fork of vLLM has them."""


class Incomplete(NotZaya):
    """Files are missing that its index names, or all of its weights."""


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
        odd = {} if self.quantized else {name: self.tensors[name].dtype for name in wanted.keys() & found.keys()}
        odd = {name: dtype for name, dtype in odd.items() if dtype not in _PLAIN}
        return (
            *_some("missing", missing),
            *_some("not of ZAYA1 as transformers names it", unknown),
            *(f"{name} has the shape {found[name]}, not {wanted[name]} as by config.json" for name in wrong[:5]),
            *((f"... and {len(wrong) - 5} more of a wrong shape",) if len(wrong) > 5 else ()),
            *_some(f"stored as {', '.join(sorted(set(odd.values())))}, without a quantization_config", sorted(odd)),
        )


def read(folder: Path) -> Checkpoint:
    """Read a folder's `config.json` and the headers of its weights.

    Raises:
        NotZaya: It is not there, is broken, or is another model.
    """
    try:
        config = _object("config.json", (folder / "config.json").read_bytes())
        architectures = config.get("architectures")
        if not isinstance(architectures, list) or ARCHITECTURE not in architectures:
            raise OtherModel(f"{folder} holds {architectures}, not {ARCHITECTURE}")
        files, names = _files(folder)
        if any(map(_of_the_fork, names)):
            raise OtherLayout(_FORK.format(folder=folder))
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise Incomplete("; ".join(_some(f"{folder} lacks {len(absent)} of its {len(files)} files", absent)))
        tensors = {name: tensor for file in files for name, tensor in _header(file)}
    except NotZaya:
        raise
    except (OSError, ValueError) as error:
        raise NotZaya(f"{folder} cannot be read: {error}") from error
    if not tensors:
        raise Incomplete(f"{folder} holds no weights (*.safetensors)")
    if any(map(_of_the_fork, tensors)):
        raise OtherLayout(_FORK.format(folder=folder))
    full = {**_DEFAULTS, **config}
    trouble = next(_refused(full, len(tensors)), None)
    if trouble is not None:
        raise NotZaya(f"{folder}/config.json: {trouble}")
    return Checkpoint(full, tensors)


class Fault(NamedTuple):
    """Why a folder cannot be served.

    Attributes:
        texts: In words, one or more.
        mend: The command that helps; None where none is known.
        other: Whether it is another model, which may be served for all that is known here.
    """

    texts: tuple[str, ...]
    mend: str | None
    other: bool = False


def examine(folder: Path, model: str) -> tuple[Checkpoint | None, Fault | None]:
    """Read a folder and look for all that is wrong with it.

    Args:
        folder: Where the model lies.
        model: What it was asked for as: the folder, or a name at Hugging Face.
    """
    try:
        checkpoint = read(folder)
    except OtherModel as error:
        return None, Fault((str(error),), None, other=True)
    except OtherLayout as error:
        return None, Fault(
            (str(error),), f"hf download {PUBLISHED}   # is as transformers has it: serve it by that name"
        )
    except NotZaya as error:
        return None, Fault((str(error),), _again(model, isinstance(error, Incomplete)))
    problems, lacks = checkpoint.problems(), tuple(_lacking(folder))
    if not problems and not lacks:
        return checkpoint, None
    return checkpoint, Fault((*problems, *lacks), _again(model, not problems))


def _again(model: str, incomplete: bool) -> str:
    forced = "" if incomplete else "--force-download "
    if Path(model).is_dir():
        return f"hf download {forced}{PUBLISHED} --local-dir {quote(model)}   # if it is a copy of that"
    return f"hf download {forced}{model}"


def _lacking(folder: Path) -> Iterator[str]:
    """What else a server needs of a folder and does not find, in words."""
    if not any((folder / name).exists() for name in _TOKENIZERS):
        yield f"no tokenizer ({' or '.join(_TOKENIZERS)})"
    elif not (folder / _TEMPLATE).exists():
        try:
            settings = _object(_SETTINGS, (folder / _SETTINGS).read_bytes())
        except (OSError, ValueError):
            settings = {}
        if not settings.get("chat_template"):
            yield f"no chat template ({_TEMPLATE}, or chat_template in {_SETTINGS})"


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


def _refused(config: Mapping[str, Any], tensors: int) -> Iterator[str]:
    """What of a configuration neither transformers nor vLLM would take, in words."""
    for name, value in _DEFAULTS.items():
        found = config[name]
        if type(found) is not type(value) or (type(found) is int and found < 1):
            yield f"{name} is {found!r}"
            return  # what follows counts with them
    layers, heads, kv_heads = (
        config[f"num_{what}"] for what in ("hidden_layers", "attention_heads", "key_value_heads")
    )
    if config["num_experts_per_tok"] != 1:
        yield f"num_experts_per_tok={config['num_experts_per_tok']}: ZAYA1 takes one expert"
    if layers > tensors:
        yield f"num_hidden_layers is {layers}, and there are {tensors} tensors"
    if heads % kv_heads:
        yield f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}"
    if config["cca_time0"] == config["cca_time1"] == 1:
        yield "cca_time0=1 and cca_time1=1 leave no convolution"
    kinds = config.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in _LAYER_TYPES for kind in kinds):
        yield f"layer_types is no list of {layers} of {' or '.join(_LAYER_TYPES)}"
    elif "hybrid_sliding" in kinds and not isinstance(config.get("sliding_window"), int):
        yield f"layer_types has hybrid_sliding, and sliding_window is {config.get('sliding_window')!r}"


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of the weights, and the names of the tensors where an index tells them."""
    index = folder / _INDEX
    if not index.exists():
        return sorted(folder.glob("*.safetensors")), []
    where = _object(_INDEX, index.read_bytes()).get("weight_map")
    if not isinstance(where, dict):
        raise ValueError(f"{_INDEX} has no weight_map")
    for name in where.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{_INDEX} names {name!r}, which is no file beside it")
    return [folder / name for name in sorted(set(where.values()))], list(where)


def _of_the_fork(name: str) -> bool:
    return ".zaya_block." in name


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    """A safetensors file begins with the length of its header, 8 bytes little-endian, and the header as JSON."""
    size = file.stat().st_size
    if not file.is_file():
        raise ValueError(f"{file.name} is no file")
    with file.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{file.name} is no safetensors file")
        content = stream.read(length)
    if len(first) + len(content) < 8 + length:
        raise ValueError(f"{file.name} ends after {size} bytes, within its header: download it again")
    header = _object(f"the header of {file.name}", content)
    ends = 0
    for name, part in header.items():
        if name == "__metadata__":
            continue
        match part:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
                isinstance(count, int) and count >= 0 for count in shape
            ):
                tensor = Stored(dtype, tuple(shape))
                if dtype in _BYTES and end - begin != tensor.size_bytes:
                    raise ValueError(f"{file.name} gives {_shown(name)} {end - begin} bytes, not {tensor.size_bytes}")
                ends = max(ends, end)
                yield name, tensor
            case _:
                raise ValueError(f"{file.name} does not describe {_shown(name)} as safetensors does")
    if size != 8 + length + ends:
        raise ValueError(f"{file.name} has {size} bytes, not {8 + length + ends}: download it again")


def _object(what: str, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no JSON object")
    return found


def _shown(name: str) -> str:
    """Names come from elsewhere and go to a terminal."""
    return name if name.isprintable() else ascii(name)


def _some(what: str, names: list[str]) -> Iterator[str]:
    if names:
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{what}: {', '.join(map(_shown, names[:3]))}{rest}"
