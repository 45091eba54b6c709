"""Hugging Face's cache of models as it lies on this disk; huggingface_hub itself comes with vLLM alone."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", re.ASCII)  # of a model at Hugging Face
_TRUE = {"1", "on", "yes", "true"}


def find_model(model: str) -> Path | None:
    """The folder of a model: its path, or the snapshot of its name that vLLM loads where it cannot ask the hub."""
    if model and os.path.isdir(model):  # unlike Path's, it raises for nothing
        return Path(model)
    if not _NAME.fullmatch(model):
        return None
    stored = hub_cache() / f"models--{model.replace('/', '--')}"
    try:
        commit = (stored / "refs/main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = stored / "snapshots" / commit
    return folder if commit.isalnum() and folder.is_dir() else None


def hub_cache() -> Path:
    """Where it is; the variables as huggingface_hub reads them."""
    home = os.getenv("HF_HOME", os.path.join(os.getenv("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    home = os.path.expandvars(os.path.expanduser(home))
    hub = os.getenv("HF_HUB_CACHE", os.getenv("HUGGINGFACE_HUB_CACHE", os.path.join(home, "hub")))
    return Path(os.path.expandvars(os.path.expanduser(hub)))


def offline() -> bool:
    """Whether nothing may be downloaded."""
    return (os.getenv("HF_HUB_OFFLINE") or os.getenv("TRANSFORMERS_OFFLINE") or "").lower() in _TRUE


def download(model: str) -> str | None:
    """The command that loads a model down; None for what cannot be its name."""
    return f"hf download {model}" if _NAME.fullmatch(model) else None
