"""The server's metrics, in a registry of their own. No label is ever taken from what a user wrote."""

from __future__ import annotations

from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from harness.types import Usage

# A checkpoint takes some milliseconds; whoever waits for a lock or a lost database gives up after ten seconds.
_STORE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
# A plain answer takes a second, a run at the highest effort an hour.
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200, 3600)

RunStatus = Literal["finished", "stopped", "failed", "cancelled", "refused"]
StoreOperation = Literal["write", "read", "renew", "claim", "prune", "other"]
Rejection = Literal[
    "overloaded",
    "shutting_down",
    "connections",
    "unauthorized",
    "forbidden",
    "body",
    "prompt_tokens",
    "budget",
    "key_runs",
    "key_tokens",
    "key_concurrent",
]


class Metrics:
    """What a server counts; one instance a server."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.store: StoreMetrics | None = None
        ProcessCollector(registry=registry)
        self.tasks = Gauge("mrsa_tasks", "Tasks of the event loop", registry=registry)
        self.queued = Gauge("mrsa_runs_queued", "Runs that wait for a place or for the engine", registry=registry)
        self.left_behind = Gauge(
            "mrsa_runs_left_behind",
            "Unfinished runs of the whole store that nobody has, while the engine is away",
            registry=registry,
        )
        self.running = Gauge("mrsa_runs_running", "Runs in flight", registry=registry)
        self.engine_up = Gauge("mrsa_engine_up", "Whether the engine answers", registry=registry)
        self.inflight_tokens = Gauge(
            "mrsa_inflight_tokens", "Tokens that the rollouts in the engine count for", registry=registry
        )
        self.max_inflight_tokens = Gauge(
            "mrsa_inflight_tokens_limit", "Tokens that may be in the engine at once", registry=registry
        )
        self.rollouts_waiting = Gauge(
            "mrsa_rollouts_waiting", "Rollouts that wait for room in the engine", registry=registry
        )
        self.admission_seconds = Histogram(
            "mrsa_rollout_admission_seconds",
            "Seconds that a rollout waited for room in the engine",
            buckets=(0.001, 0.01, *_SECONDS),
            registry=registry,
        )
        self._runs = Counter("mrsa_runs", "Runs that have ended", ["status"], registry=registry)
        self.run_seconds = Histogram(
            "mrsa_run_duration_seconds", "From admission to the end", buckets=_SECONDS, registry=registry
        )
        self.round_seconds = Histogram(
            "mrsa_round_duration_seconds",
            "From a round's first start to its last end",
            buckets=_SECONDS,
            registry=registry,
        )
        self._rollouts = Counter("mrsa_rollouts", "Rollouts that have ended", ["outcome"], registry=registry)
        self.skipped = Counter(
            "mrsa_rollouts_skipped",
            "Rollouts of the barrier loop that were never started",
            ["reason"],
            registry=registry,
        )
        self._tokens = Counter("mrsa_tokens", "Tokens read and generated", ["kind"], registry=registry)
        self.agreement = Histogram(
            "mrsa_answer_agreement",
            "Share of the candidates that agree with the chosen one, of runs with several",
            buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
            registry=registry,
        )
        self._rejections = Counter(
            "mrsa_admission_rejections", "Runs that were not let in", ["reason"], registry=registry
        )

        self.budget = Gauge(
            "mrsa_budget_tokens",
            "Tokens that the runs in flight may cost at most, and that all may together",
            ["state"],
            registry=registry,
        )
        # Ids of keys are the operator's words, and as many as there are lines in his file.
        self._key_runs = Counter("mrsa_key_runs", "Runs of a key that have ended", ["key", "status"], registry=registry)
        self._key_tokens = Counter("mrsa_key_tokens", "Tokens that the runs of a key cost", ["key"], registry=registry)
        self._key_rejections = Counter(
            "mrsa_key_rejections",
            "Runs of a key that were not let in for its limits",
            ["key", "reason"],
            registry=registry,
        )

    def count_run(self, status: RunStatus) -> None:
        """A run has ended."""
        self._runs.labels(status).inc()

    def count_rollout(self, outcome: str, usage: Usage) -> None:
        """A rollout has ended; `outcome` is a `Finish` or `failed`."""
        self._rollouts.labels(outcome).inc()
        for kind, tokens in (
            ("prompt", usage.prompt_tokens),
            ("cached", usage.cached_tokens),
            ("reasoning", usage.reasoning_tokens),
            ("answer", usage.completion_tokens - usage.reasoning_tokens),
        ):
            if tokens:
                self._tokens.labels(kind).inc(tokens)

    def count_lost(self, rollouts: int, tokens: int) -> None:
        """Generations broke off with their engine or their server, and are asked for again."""
        self._rollouts.labels("lost").inc(rollouts)
        self._tokens.labels("lost").inc(tokens)

    def count_rejection(self, reason: Rejection) -> None:
        """A run was not let in."""
        self._rejections.labels(reason).inc()

    def count_key_rejection(self, key_id: str | None, reason: Rejection) -> None:
        """A run was not let in, since its key has used what it may."""
        self.count_rejection(reason)
        if key_id is not None:
            self._key_rejections.labels(key_id, reason).inc()

    def count_key_run(self, key_id: str, status: RunStatus, tokens: int) -> None:
        """A run of a key has ended."""
        self._key_runs.labels(key_id, status).inc()
        self._key_tokens.labels(key_id).inc(tokens)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class StoreMetrics:
    """What the store of a server does; only where there is one. It is the store's `Observer`.

    Args:
        metrics: Those of the server.
    """

    def __init__(self, metrics: Metrics) -> None:
        seconds = Histogram(
            "mrsa_store_seconds",
            "Seconds of a call of the store, the wait for a connection in it",
            ["operation"],
            buckets=_STORE_SECONDS,
            registry=metrics.registry,
        )
        self._seconds = {name: seconds.labels(name) for name in get_args(StoreOperation)}
        self._takeovers = Counter(
            "mrsa_lease_takeovers",
            "Runs taken up that a server had lost or left behind",
            registry=metrics.registry,
        )
        self._fenced = Counter(
            "mrsa_fenced_writes", "Writes to runs that another server has by now", registry=metrics.registry
        )

        self.up = Gauge("mrsa_store_up", "Whether the store answers", registry=metrics.registry)

    def store_call(self, operation: StoreOperation, seconds: float) -> None:
        """A call has ended."""
        self._seconds[operation].observe(seconds)

    def takeovers(self, runs: int) -> None:
        """Runs of a lost owner were taken."""
        self._takeovers.inc(runs)

    def fenced(self, writes: int) -> None:
        """Writes were refused."""
        self._fenced.inc(writes)
