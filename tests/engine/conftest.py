"""Real engines on vLLM's CPU build, each loaded once: the embedded model, and a tiny one that thinks by the book."""

from __future__ import annotations

import gc
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import pytest
import pytest_asyncio

from harness.engine import Delta
from harness.types import Finish, Message, RolloutRequest, Slot
from mrsa_server.engines.embedded import EmbeddedEngine
from mrsa_server.engines.vllm import VllmEngine
from tests.engine.book import write_book

E = TypeVar("E", bound=VllmEngine)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine() -> AsyncIterator[EmbeddedEngine]:
    """SmolLM2-135M-Instruct, as `--engine embedded` serves it."""
    async with running(EmbeddedEngine()) as engine:
        yield engine


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def book(engine: EmbeddedEngine, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    """A model that recites `tests.engine.book`: which token follows is known. One request runs at a time."""
    folder = tmp_path_factory.mktemp("book")
    with warnings.catch_warnings(action="ignore"):
        write_book(folder, tokenizer=engine.folder)
    extra = {
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "kv_cache_memory_bytes": 1 << 27,
        "max_num_seqs": 1,
    }
    async with running(VllmEngine(str(folder), dtype="float32", max_model_len=512, extra=extra)) as book:
        yield book


@asynccontextmanager
async def running(engine: E) -> AsyncIterator[E]:
    """Start and stop an engine. What torch and vLLM warn of at their import and leave open at their end is theirs."""
    with warnings.catch_warnings(action="ignore"):
        await engine.start()
    yield engine
    with warnings.catch_warnings(action="ignore"):
        await engine.aclose()
        gc.collect()


@dataclass(frozen=True)
class Generation:
    """All deltas of one generation."""

    deltas: list[Delta]

    @property
    def ids(self) -> list[int]:
        return [i for delta in self.deltas for i in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def finish(self) -> Finish | None:
        assert all(delta.finish is None for delta in self.deltas[:-1])
        return self.deltas[-1].finish


async def generate(engine: VllmEngine, request: RolloutRequest) -> Generation:
    return Generation([delta async for delta in engine.generate(request)])


def ask(text: str = "Tell me about ships.", max_tokens: int = 32, **rest: object) -> RolloutRequest:
    """A request of one user message."""
    return RolloutRequest("run", Slot(0, 0), (Message("user", (text,)),), max_tokens, **rest)  # type: ignore[arg-type]


async def busy(engine: VllmEngine) -> bool:
    """Whether vLLM's scheduler, in its own process, holds any request."""
    assert engine._llm is not None
    return bool(await engine._llm.engine_core.call_utility_async("has_work"))
