"""`mrsa model check`: whether a folder holds a ZAYA1 that vLLM will load, said from its files alone."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from shlex import quote

from mrsa_server.hub import download, find_model, hub_cache
from mrsa_server.zaya.checkpoint import Checkpoint, examine

_WRONG = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do with which folder."""
    parser.epilog = f"No weight is loaded and no GPU needed. Exits with {_WRONG} if the model cannot be served."
    parser.add_argument("action", choices=("check",), help="compare names and shapes with those that ZAYA1 has")
    parser.add_argument(
        "model",
        metavar="DIR|NAME",
        help="a folder with `config.json` and `*.safetensors`, or a name that Hugging Face's cache has",
    )


def run(arguments: argparse.Namespace) -> int:
    """Say what is there and what is wrong with it; the exit status."""
    model: str = arguments.model
    folder = find_model(model)
    if folder is None:
        return _wrong((f"{model!r} is no folder here, and not in {hub_cache()}",), download(model))
    checkpoint, fault = examine(folder, model)
    if checkpoint:
        print("\n".join(describe(checkpoint)))
    if fault or not checkpoint:
        return _wrong(*fault[:2]) if fault else _WRONG
    unread = ", but for its experts, whose layout is vLLM's to read" if checkpoint.quantized else ""
    print(f"ok: {len(checkpoint.tensors)} tensors, each of the name and shape that ZAYA1 has{unread}")
    print(f"    mrsa serve --model {quote(model)}")
    return 0


def _wrong(texts: tuple[str, ...], command: str | None) -> int:
    for line in texts:
        print(f"mrsa model: {line}", file=sys.stderr)
    if command:
        print(f"    {command}", file=sys.stderr)
    return _WRONG


def describe(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Its size, and what follows from it, in lines."""
    config, tensors = checkpoint.config, checkpoint.tensors
    weights = sum(math.prod(tensor.shape) for tensor in tensors.values())
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += tensor.size_bytes
    kinds = ", ".join(dtype for dtype, _ in dtypes.most_common())
    heads = config["num_key_value_heads"]
    ranks = ", ".join(str(ranks) for ranks in range(1, heads + 1) if heads % ranks == 0)
    return (
        f"{config['num_hidden_layers']} layers, {config['num_experts']} experts, {weights / 1e9:.2f} billion weights, "
        f"{checkpoint.weight_bytes / 1e9:.2f} GB ({kinds})",
        f"KV cache {checkpoint.token_bytes / 1024:g} KiB a token in bf16; tensor_parallel_size {ranks}",
    )
