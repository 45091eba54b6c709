"""Settings -> engine. Each engine is imported here and only when it is asked for: the core installs without vLLM."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from harness.engine import Engine
from mrsa_server.descriptors import SHORT_CALLS
from mrsa_server.lean import without_rich
from mrsa_server.settings import Settings


class ServedEngine(Engine, Protocol):
    """An engine with a life of its own, as the server needs it."""

    model: str  # the name it is served under; of a remote engine known once it has started

    @property
    def in_process(self) -> bool:
        """Whether it lives and dies with this process: once dead, only `aclose` and `start` bring it back."""
        ...

    async def start(self) -> None:
        """Load, connect; returns when the first `generate` can be answered.

        Raises:
            EngineDead: It cannot be reached yet; another try may succeed.
        """
        ...

    async def aclose(self) -> None:
        """Free everything; may be called before `start` has ended."""
        ...

    async def healthy(self) -> bool:
        """Whether a `generate` would be answered now. Cheap: it is asked every few seconds."""
        ...


@runtime_checkable
class KnowsItsMemory(Protocol):
    """An engine that knows its own memory."""

    @property
    def memory_tokens(self) -> int | None:
        """Tokens that its KV cache holds, prompts and generations together; None where not known."""
        ...


def memory_tokens(engine: ServedEngine) -> int | None:
    """Tokens that a started engine's memory holds; None where it cannot tell, as most remote ones."""
    return engine.memory_tokens if isinstance(engine, KnowsItsMemory) else None


def build(settings: Settings) -> ServedEngine:
    """The engine that the settings name, not yet started.

    Raises:
        ImportError: If its extra is not installed.
    """
    match settings.engine:
        case "openai":
            with without_rich():
                from mrsa_server.engines.openai_http import OpenAIEngine

            assert settings.engine_url is not None  # Settings sees to it
            key = settings.engine_api_key
            return OpenAIEngine(
                settings.engine_url,
                settings.model,
                api_key=key.get_secret_value() if key else None,
                read_timeout_s=settings.engine_timeout_s,
                max_tokens_field=settings.engine_max_tokens_field,
                priority=settings.engine_priority,
                max_connections=settings.max_inflight_calls + SHORT_CALLS,
            )
        case "vllm":
            from mrsa_server.engines.vllm import VllmEngine

            assert settings.model is not None  # Settings sees to it
            return VllmEngine(
                settings.model,
                served_name=settings.served_model,
                max_model_len=settings.engine_context_tokens,
                extra=settings.engine_args,
            )
        case "embedded":
            from mrsa_server.engines.embedded import EmbeddedEngine

            return EmbeddedEngine()
        case "scripted":
            from harness.scripted import ScriptedEngine, Speed

            # Slow enough to see it stream, fast enough to wait for it.
            speed = Speed(step_s=1 / 4000)
            return ScriptedEngine(speed=speed, chunk_tokens=16, model=settings.model or "scripted")
