"""`mrsa model check`: whether a folder holds a ZAYA1 that vLLM will load, said from its files alone."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

from mrsa_server.zaya.checkpoint import Checkpoint, NotZaya, read

_WRONG = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do with which folder."""
    parser.epilog = f"No weight is loaded and no GPU needed. Exits with {_WRONG} if the model cannot be served."
    parser.add_argument("action", choices=("check",), help="compare names and shapes with those that ZAYA1 has")
    parser.add_argument("folder", type=Path, metavar="DIR", help="with `config.json` and `*.safetensors`")


def run(arguments: argparse.Namespace) -> int:
    """Say what is there and what is wrong with it; the exit status."""
    try:
        checkpoint = read(arguments.folder)
    except NotZaya as error:
        print(f"mrsa model: {error}", file=sys.stderr)
        return _WRONG
    print("\n".join(describe(checkpoint)))
    problems = checkpoint.problems()
    for problem in problems:
        print(f"mrsa model: {problem}", file=sys.stderr)
    if problems:
        return _WRONG
    unread = ", but for its experts, whose layout is vLLM's to read" if checkpoint.quantized else ""
    print(f"ok: {len(checkpoint.tensors)} tensors, each of the name and shape that ZAYA1 has{unread}")
    return 0


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
