"""What the method asks of an engine: one Protocol, and whose fault an error is.

EngineError     this generation failed: the population shrinks, the run goes on
GenerationLost  its engine went away, and there is another: the rollout is asked for again
EngineDead      the engine is gone: nothing is recorded, the run can go on when it is back
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from harness.types import Finish, Message, RolloutRequest, TokenIds


class EngineError(Exception):
    """One generation failed; `status` is the HTTP status of a remote engine, where there was one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class GenerationLost(EngineError):
    """A generation broke off for no fault of its own, as where one engine of several went; another try may end well."""


class EngineDead(Exception):
    """The engine is gone or cannot be reached. No rollout is to blame."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What an engine knows of its tokens.

    Attributes:
        think_open: Ids of `<think>`; empty for a model that does not think.
        think_close: Ids of `</think>`; empty likewise.
        ids_per_token: 1.0 where ids are true tokens. An engine without ids counts characters instead, and says
            here how many of them make a token, as measured so far.
        exact: Whether ids are true tokens of the model.
        context_tokens: Longest prompt and generation together; None where not known.
    """

    think_open: tuple[int, ...] = ()
    think_close: tuple[int, ...] = ()
    ids_per_token: float = 1.0
    exact: bool = True
    context_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What an engine has generated since the delta before.

    A think marker comes whole, in a delta of its own with an empty text. The first delta of a generation carries what
    is known of its prompt; the last carries `finish`.

    Attributes:
        token_ids: New ids, `think_open` and `think_close` among them.
        text: The same as text, as far as it can be decoded yet.
        finish: STOP or LENGTH on the last delta.
        prompt_tokens: Tokens of the prompt, on the first or the last delta; None elsewhere.
        cached_tokens: Of these, tokens that the prefix cache held; None where not known.
        thinking: On the first delta: whether the prompt itself ends inside an open `<think>`.
        completion_tokens: On the last delta: the engine's own count, where ids are not true tokens.
    """

    token_ids: TokenIds = ()
    text: str = ""
    finish: Finish | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    thinking: bool = False
    completion_tokens: int | None = None


class Engine(Protocol):
    """A model that continues prompts. Closing the generator of `generate` aborts the request at once."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What is known of the tokens; may be refined while the engine runs."""
        ...

    def generate(self, request: RolloutRequest) -> AsyncGenerator[Delta, None]:
        """Generate up to `request.max_tokens` tokens.

        Raises:
            EngineError: This generation failed.
            EngineDead: The engine is gone.
        """
        ...

    async def decode(self, token_ids: TokenIds) -> str:
        """The text of some ids, special tokens left out.

        Raises:
            EngineError, EngineDead: As `generate`.
        """
        ...

    async def count(self, messages: tuple[Message, ...]) -> int | None:
        """Tokens of a rendered prompt; None where the engine cannot tell before it generates.

        Raises:
            EngineError: The prompt cannot be rendered (a role that the chat template refuses, say).
            EngineDead: As `generate`.
        """
        ...


class EngineAround:
    """An engine around another, which answers for all but `generate`: that is for who is around it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def vocabulary(self) -> Vocabulary:
        """The engine's."""
        return self._engine.vocabulary

    async def decode(self, token_ids: TokenIds) -> str:
        """The engine's."""
        return await self._engine.decode(token_ids)

    async def count(self, messages: tuple[Message, ...]) -> int | None:
        """The engine's."""
        return await self._engine.count(messages)
