"""Everything that can be set about a server, once. Environment variables are `MRSA_` and the field's name.

`title` groups a setting in `--help`; a setting without one has no flag (secrets belong into the environment).
"""

from __future__ import annotations

import os
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

EngineKind = Literal["embedded", "vllm", "openai", "scripted"]


class Effort(StrEnum):
    """How much work a question is worth; the names are those of OpenAI's `reasoning_effort`."""

    NONE = "none"
    MINIMAL = "minimal"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    XHIGH = "xhigh"
    MAX = "max"


_ENGINE = "engine"
_SERVER = "server"
_METHOD = "method"
_LIMITS = "limits"
_LOGS = "logs"

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def usual_state_dir() -> Path | None:
    """Where state belongs by the XDG Base Directory specification; None for a user without a home."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    if given.is_absolute():
        return given / "mrsa-server"
    try:
        return Path.home() / ".local" / "state" / "mrsa-server"
    except RuntimeError:
        return None


class Settings(BaseSettings):
    """The settings of one server."""

    model_config = SettingsConfigDict(env_prefix="MRSA_", extra="forbid")

    engine: EngineKind = Field(
        "embedded",
        title=_ENGINE,
        description="where the model runs: `embedded` (a small model on this CPU, nothing to set up), "
        "`vllm` (in this process; what --model alone means), `openai` (any OpenAI-compatible server; what --engine-url "
        "means), `scripted` (no model: made-up text, for trying out)",
    )
    model: str | None = Field(
        None,
        title=_ENGINE,
        description="name or path of the model, as the engine knows it; "
        "for `--engine openai` by default the first that the server lists",
    )
    engine_url: str | None = Field(
        None,
        title=_ENGINE,
        description="base URL of the server behind `--engine openai`, such as http://localhost:8001/v1",
    )
    engine_api_key: SecretStr | None = Field(None, description="key for the server behind `--engine openai`")
    engine_priority: bool | None = Field(
        None,
        title=_ENGINE,
        description="send priorities to `--engine openai` where it is vLLM, which heeds them with "
        "--scheduling-policy priority; by default until it refuses one",
    )
    engine_cache_salt: bool | None = Field(
        None,
        title=_ENGINE,
        description="send a salt for each API key to `--engine openai`, so that none finds out by the engine's prefix "
        "cache what another asked; by default to a server that takes token ids (vLLM), until it refuses one",
    )
    engine_max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens",
        title=_ENGINE,
        description="how `--engine openai` bounds a chat where the server takes no token ids; OpenAI's own models want "
        "max_completion_tokens",
    )
    engine_context_tokens: Count | None = Field(
        None,
        title=_ENGINE,
        description="longest prompt and generation together for `--engine vllm`; by default the model's own",
    )
    engine_args: dict[str, JsonValue] = Field(
        default_factory=dict,
        title=_ENGINE,
        description="further arguments of `--engine vllm` as JSON, vLLM's EngineArgs",
    )
    engine_wait_s: Seconds = Field(
        30.0, title=_ENGINE, description="seconds that a request waits for an engine that is starting or gone"
    )

    engine_sleeps: bool = Field(
        False,
        title=_ENGINE,
        description="the engine is scaled to zero at rest: the server is ready without it, and who waits for it "
        "(--engine-wait-s) counts as queued in the metrics, by which it is woken",
    )
    engine_timeout_s: Seconds = Field(
        600.0,
        title=_ENGINE,
        description="seconds of silence after which a generation of `--engine openai` is given up; a server that is "
        "gone is found out after 15",
    )

    host: str = Field(
        "127.0.0.1",
        title=_SERVER,
        description="address to listen on; one that others can reach needs keys, or --open",
    )
    port: int = Field(8000, ge=0, le=65_535, title=_SERVER, description="port to listen on; 0 takes a free one")
    keys_file: Path | None = Field(
        None,
        title=_SERVER,
        description="file of API keys, one in a line (`mrsa keys new` makes them), read anew when it changes; "
        "MRSA_KEYS holds such lines too. Without keys anybody may ask",
    )
    keys: SecretStr | None = Field(None, description="API keys beside those of --keys-file, as its lines")
    open: bool = Field(
        False,
        title=_SERVER,
        description="let anybody ask at an address that others can reach, where there are no keys",
    )
    metrics_open: bool = Field(
        False,
        title=_SERVER,
        description="let anybody read /metrics; by default that takes a key with the scope `metrics`, where there are "
        "keys",
    )
    served_model: str | None = Field(
        None, title=_SERVER, description="name of the model towards clients; the method is served as NAME-mrsa"
    )
    keep_alive_s: Seconds = Field(
        10.0, title=_SERVER, description="seconds of silence after which a stream says it lives"
    )
    shutdown_grace_s: float = Field(
        20.0, ge=0, title=_SERVER, description="seconds that runs in flight get to end after SIGTERM"
    )

    state_dir: Path | Literal["none"] | None = Field(
        None,
        title=_SERVER,
        description="folder of a SQLite file in which runs outlive the server, unless MRSA_DATABASE_URL is set; "
        "`none` keeps them in memory. By default $XDG_STATE_HOME/mrsa-server or ~/.local/state/mrsa-server, and memory "
        "where that cannot be written",
    )
    lease_s: Seconds = Field(
        10.0,
        title=_SERVER,
        description="seconds after which a server that is silent has lost its runs to the next that shares the store",
    )
    keep_runs_days: float = Field(
        30.0, gt=0, title=_SERVER, description="days for which runs are kept after their end; inf keeps them for ever"
    )
    keep_traces_days: float = Field(
        7.0,
        ge=0,
        title=_SERVER,
        description="the same of all that their rollouts wrote, which is the most of it; 0 stores none of that, and "
        "runs go on over a crash all the same",
    )
    database_url: SecretStr | None = Field(
        None, description="where runs outlive the server, of several replicas: postgresql+asyncpg://USER@HOST/NAME"
    )

    default_effort: Effort | None = Field(
        None,
        title=_METHOD,
        description="effort of a request to NAME-mrsa that names none; by default medium, and low with `embedded`",
    )
    default_temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        allow_inf_nan=False,
        title=_METHOD,
        description="temperature of a request that names none; by default 1.0, as the method's authors sample, and 0.3 "
        "with `embedded`, whose small model writes nonsense at 1.0",
    )
    inline_images: Literal["note", "refuse"] = Field(
        "note",
        title=_METHOD,
        description="what becomes of an image inside a message: a note to the model that it is not shown, or a 400",
    )

    max_inflight_tokens: Count | None = Field(
        None,
        title=_LIMITS,
        description="tokens in the engine at once, prompts and what is expected to be generated; the rollouts of all "
        "runs wait for room in one queue. By default what the engine's KV cache holds, or 2.6 million where it cannot "
        "tell (one H200 with ZAYA1-8B)",
    )
    max_inflight_calls: Count = Field(
        4096,
        title=_LIMITS,
        description="generations in the engine at once, however small; fewer where file descriptors are scarce",
    )
    # Tokens bound the work, so this bounds memory alone: at its end a `medium` run holds 2 MB, one of `max` 11.
    max_runs: Count = Field(1024, title=_LIMITS, description="runs in flight; more wait")
    max_queued: int = Field(1024, ge=0, title=_LIMITS, description="runs that may wait; more are a 503")
    max_batch_runs: Count = Field(
        256, title=_LIMITS, description="runs of batches in flight, beside those of --max-runs; more wait in the store"
    )
    max_committed_tokens: Count = Field(
        1_000_000_000,
        title=_LIMITS,
        description="tokens that all runs in flight and waiting may cost together at most; a run that could bring more "
        "is a 503. One that is alone is let in",
    )
    max_body_bytes: Count = Field(8 * 2**20, title=_LIMITS, description="largest request body")
    max_file_bytes: Count = Field(100 * 2**20, title=_LIMITS, description="largest file that can be uploaded")
    header_timeout_s: Seconds = Field(
        15.0, title=_LIMITS, description="seconds within which the headers of a request must have arrived"
    )
    body_timeout_s: Seconds = Field(30.0, title=_LIMITS, description="seconds within which a body must have arrived")
    max_population: Count = Field(64, title=_LIMITS, description="largest population")
    max_rounds: Count = Field(32, title=_LIMITS, description="most aggregation rounds")
    max_rollout_tokens: Count = Field(131_072, title=_LIMITS, description="most tokens of one rollout, final or not")
    max_tail_tokens: Count = Field(32_768, title=_LIMITS, description="longest tail")
    max_deadline_s: Seconds = Field(86_400.0, title=_LIMITS, description="longest deadline of a run")
    max_budget_tokens: Count = Field(1_000_000_000, title=_LIMITS, description="largest token budget of a run")

    max_unstreamed_s: Seconds = Field(
        590.0,
        title=_LIMITS,
        description="longest worst case in seconds of a run that is not streamed; the SDKs give up at 600",
    )
    idempotency_keep_s: Seconds = Field(
        86_400.0, title=_LIMITS, description="seconds for which an ended run answers to its Idempotency-Key"
    )
    max_idempotency_keys: Count = Field(
        256, title=_LIMITS, description="ended runs that are kept for their Idempotency-Key"
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", title=_LOGS, description="least severity")
    log_format: Literal["auto", "json", "text"] = Field(
        "auto", title=_LOGS, description="`auto` is text in a terminal and JSON elsewhere"
    )

    @property
    def store_url(self) -> SecretStr | None:
        """Where runs are stored; None where they live in memory."""
        if self.database_url is not None:
            return self.database_url
        folder = usual_state_dir() if self.state_dir is None else self.state_dir
        if folder is None or folder == "none":
            return None
        return SecretStr(f"sqlite:///{Path(folder).absolute() / 'runs.db'}")

    @property
    def store_is_asked_for(self) -> bool:
        """Whether somebody said where runs are to be stored; else a server without a store will do."""
        return self.database_url is not None or self.state_dir is not None

    @property
    def usual_effort(self) -> Effort:
        """The effort of a request that asks for the method and names none."""
        if self.default_effort is not None:
            return self.default_effort
        return Effort.LOW if self.engine == "embedded" else Effort.MEDIUM

    @property
    def usual_temperature(self) -> float:
        """The temperature of a request that names none."""
        if self.default_temperature is not None:
            return self.default_temperature
        return 0.3 if self.engine == "embedded" else 1.0

    @model_validator(mode="before")
    @classmethod
    def _engine_by_what_it_is_given(cls, given: dict[str, object]) -> dict[str, object]:
        if given.get("engine") is not None:
            return given
        named = [name for name in ("engine_url", "model") if given.get(name) is not None]
        return {**given, "engine": {"engine_url": "openai", "model": "vllm"}[named[0]]} if named else given

    @property
    def has_keys(self) -> bool:
        """Whether a key is needed to ask."""
        return self.keys_file is not None or self.keys is not None

    @model_validator(mode="after")
    def _open_on_purpose(self) -> Settings:
        if not (self.has_keys or self.open or _is_loopback(self.host)):
            raise ValueError(
                f"--host {self.host} can be reached by others, and there are no keys: give --keys-file or "
                "MRSA_KEYS, or --open (MRSA_OPEN) where anybody may ask"
            )
        return self

    @model_validator(mode="after")
    def _engine_and_model_agree(self) -> Settings:
        if self.engine == "openai" and self.engine_url is None:
            raise ValueError("--engine openai needs --engine-url (MRSA_ENGINE_URL)")
        if self.engine == "vllm" and self.model is None:
            raise ValueError("--engine vllm needs --model (MRSA_MODEL)")
        if self.engine == "embedded" and self.model is not None:
            raise ValueError("--engine embedded has a model of its own: --model (MRSA_MODEL) is for the other engines")
        return self


def _is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address; what a name stands for may change, so it counts as none."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
