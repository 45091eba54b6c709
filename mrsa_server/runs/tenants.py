"""What keys may use of this server, and what its runs may cost all together. Each replica counts for itself.

Runs and tokens a minute are buckets that a minute fills. A run is let in for the tokens that it may cost at most, and
gives back at its end what it did not use. One that may cost more than a minute's worth is let in when the bucket is
full, and what it owes is paid off before the next: so no run is too large for a key, and the mean holds.

Lines of batches yield to all others and have places of their own. They have a bucket of tokens of their own too, as
large as the other: while it is empty no further line of the key begins. Nor does one of a key that was taken away,
before its batch is over; what was in flight ends by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.budget import most_read_tokens, most_tokens
from harness.markovian_rsa import State
from harness.types import Params
from mrsa_server.api.errors import OverBudget, RateLimited
from mrsa_server.keyring import KeyRing
from mrsa_server.metrics import Metrics
from mrsa_server.runs.admission import Share
from mrsa_server.runs.record import Held

_BUSY_S = 5.0  # until another run of a key may have ended: nobody knows


@dataclass(eq=False, slots=True)
class Ticket:
    """One run's share; `tokens` are those that it was let in for.

    Attributes:
        key_id: Whose run it is.
        batch: Whether it is a line of a batch: of that only tokens are counted, and it was let in by `held`.
        tokens: Taken of the key's minute.
        committed: Taken of what all runs may cost together.
        begun: Whether it was let in for good.
        before: Tokens that it had cost when it was taken up here.
        priced: Whether it is known what it may cost.
        share: Of the engine; it counts what its generations have cost since.
    """

    key_id: str | None
    batch: bool = False
    tokens: int = 0
    committed: int = 0
    begun: bool = False
    before: int = 0
    priced: bool = False
    share: Share | None = None

    def spent(self, state: State | None) -> int:
        """What the run has cost so far.

        One that was ended from outside has cost what was in flight too, which its state does not know of: else whoever
        leaves before the last word would have all others for nothing.
        """
        counted = 0 if state is None else spent_tokens(state)
        if state is not None and state.outcome is not None:
            return counted
        return max(counted, self.before + round(self.share.spent_tokens if self.share is not None else 0))


class _Bucket:
    """What is left of a minute's worth; below zero it is owed."""

    def __init__(self, now: float) -> None:
        self._level: float | None = None
        self._at = now

    def left(self, per_minute: int, now: float) -> float:
        if self._level is None:
            self._level = float(per_minute)
        self._level = min(float(per_minute), self._level + (now - self._at) * per_minute / 60)
        self._at = now
        return self._level

    def wait_s(self, need: float, per_minute: int, now: float) -> float:
        """Seconds until so much is there, or all that a minute brings."""
        return max(0.0, min(need, per_minute) - self.left(per_minute, now)) * 60 / per_minute

    def take(self, amount: float) -> None:
        if self._level is not None:
            self._level -= amount


class _Tenant:
    """How far one key has used what it may."""

    def __init__(self, now: float) -> None:
        self.running = 0
        self.unpriced = 0  # lines of batches that were taken up, and nobody knows yet what for
        self.runs = _Bucket(now)
        self.tokens = _Bucket(now)
        self.batch_tokens = _Bucket(now)

    def tokens_of(self, ticket: Ticket) -> _Bucket:
        return self.batch_tokens if ticket.batch else self.tokens


class Tenants:
    """Lets runs in, by what their keys may use and by what all of them may cost.

    Args:
        ring: The keys, with their limits.
        metrics: Counts who was not let in.
        max_tokens: That all runs in flight may cost together at most; None for no bound.
        clock: Seconds.
    """

    def __init__(
        self,
        ring: KeyRing,
        metrics: Metrics,
        max_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.committed = 0
        self._ring = ring
        self._metrics = metrics
        self._max_tokens = max_tokens
        self._clock = clock
        self._tenants: dict[str | None, _Tenant] = {}
        metrics.budget.labels("committed").set_function(lambda: self.committed)
        metrics.budget.labels("limit").set_function(lambda: max_tokens or float("inf"))

    def salt(self, key_id: str | None) -> str | None:
        """What keeps a key's prompts apart in caches."""
        return self._ring.salt(key_id)

    def enter(self, key_id: str | None) -> Ticket:
        """Begin a run of a key, if it may begin one now; `leave` ends it.

        Raises:
            RateLimited: It may not.
        """
        limits, tenant, now = self._ring.limits(key_id), self._tenant(key_id), self._clock()
        if limits.concurrent_runs is not None and tenant.running >= limits.concurrent_runs:
            self._metrics.count_key_rejection(key_id, "key_concurrent")
            raise RateLimited(f"{tenant.running} runs of this key are in flight, as many as it may have.", _BUSY_S)
        if limits.runs_per_minute is not None:
            wait_s = tenant.runs.wait_s(1, limits.runs_per_minute, now)
            if wait_s > 0:
                self._metrics.count_key_rejection(key_id, "key_runs")
                raise RateLimited(f"This key may begin {limits.runs_per_minute} runs a minute.", wait_s)
            tenant.runs.take(1)
        tenant.running += 1
        return Ticket(key_id)

    def adopt(self, key_id: str | None, *, batch: bool) -> Ticket:
        """Count a run that goes on from its log: it was let in before, and is never refused."""
        tenant = self._tenant(key_id)
        if batch:
            tenant.unpriced += 1
        else:
            tenant.running += 1
        return Ticket(key_id, batch=batch, begun=True)

    def resume(self, ticket: Ticket, state: State) -> None:
        """What a run that was adopted has used before is not asked for again; a line of a batch pays for the rest."""
        self._price(ticket)
        ticket.tokens = ticket.before = spent_tokens(state)
        if not ticket.batch:
            self._commit(ticket, state.params, 0)
        elif (per_minute := self._ring.limits(ticket.key_id).tokens_per_minute) is not None:
            need, bucket = worst_tokens(state.params, 0), self._tenant(ticket.key_id).batch_tokens
            bucket.left(per_minute, self._clock())
            bucket.take(max(0, need - ticket.tokens))
            ticket.tokens = max(need, ticket.tokens)

    @property
    def held(self) -> Held | None:
        """Tells of which keys no line of a batch is to begin now; None where there are no keys."""
        return None if self._ring.open else self._held

    def _held(self, key_ids: Sequence[str]) -> list[str]:
        now = self._clock()
        return [key_id for key_id in key_ids if not self._ring.knows(key_id) or self._is_spent(key_id, now)]

    def _is_spent(self, key_id: str, now: float) -> bool:
        per_minute = self._ring.limits(key_id).tokens_per_minute
        if per_minute is None:
            return False
        tenant = self._tenant(key_id)
        return tenant.unpriced > 0 or tenant.batch_tokens.left(per_minute, now) <= 0

    def admit(self, ticket: Ticket, params: Params, prompt_tokens: int, *, promised: bool = False) -> None:
        """Let a run begin for what it may cost at most.

        Args:
            ticket: Of the run.
            params: Likewise.
            prompt_tokens: Of its question.
            promised: Whether it was told already that it will be made; then it is not refused.

        Raises:
            RateLimited: It is more than what is left of the key's minute.
            OverBudget: It is more than what all runs may cost, beside the others.
        """
        if ticket.batch:
            return
        need = worst_tokens(params, prompt_tokens)
        per_minute, tenant = self._ring.limits(ticket.key_id).tokens_per_minute, self._tenant(ticket.key_id)
        now = self._clock()
        if per_minute is not None:
            wait_s = tenant.tokens.wait_s(need, per_minute, now)
            if wait_s > 0 and not promised:
                self._metrics.count_key_rejection(ticket.key_id, "key_tokens")
                tenant.runs.take(-1)
                raise RateLimited(
                    f"This run may cost {need} tokens, and of this key's {per_minute} a minute "
                    f"{max(0, int(tenant.tokens.left(per_minute, now)))} are left: wait, or bound it by less effort or "
                    "mrsa.budget_tokens.",
                    wait_s,
                )
        most = self._max_tokens
        if most is not None and self.committed and self.committed + need > most and not promised:
            self._metrics.count_rejection("budget")
            tenant.runs.take(-1)
            raise OverBudget(need, self.committed, most)
        if per_minute is not None:
            tenant.tokens.take(need)
            ticket.tokens = need
        self._commit(ticket, params, prompt_tokens)
        ticket.begun = True

    def undo(self, ticket: Ticket) -> None:
        """As if the run had never been asked for: the server had no place for it."""
        self._tenant(ticket.key_id).runs.take(-1)
        self.leave(ticket, None)

    def leave(self, ticket: Ticket, state: State | None) -> None:
        """A run has ended: what it did not use of its tokens is given back."""
        limits, tenant = self._ring.limits(ticket.key_id), self._tenant(ticket.key_id)
        tenant.running -= not ticket.batch
        self._price(ticket)
        self.committed -= ticket.committed
        ticket.committed = 0
        per_minute = limits.tokens_per_minute
        # A key whose line was away when its run ended, as while a file is changed, has its tokens back with it.
        if ticket.begun and (per_minute is not None or ticket.tokens):
            bucket = tenant.tokens_of(ticket)
            if per_minute is not None:
                bucket.left(per_minute, self._clock())
            bucket.take(ticket.spent(state) - ticket.tokens)

    def headers(self, key_id: str | None) -> dict[str, str]:
        """How a key stands, in OpenAI's words; nothing of what has no limit."""
        limits, tenant, now = self._ring.limits(key_id), self._tenant(key_id), self._clock()
        found: dict[str, str] = {}
        for name, bucket, per_minute in (
            ("requests", tenant.runs, limits.runs_per_minute),
            ("tokens", tenant.tokens, limits.tokens_per_minute),
        ):
            if per_minute is not None:
                left = bucket.left(per_minute, now)
                found[f"x-ratelimit-limit-{name}"] = str(per_minute)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(left)))
                found[f"x-ratelimit-reset-{name}"] = f"{bucket.wait_s(per_minute, per_minute, now):.3f}s"
        if limits.concurrent_runs is not None:
            found["x-ratelimit-limit-concurrent"] = str(limits.concurrent_runs)
            found["x-ratelimit-remaining-concurrent"] = str(max(0, limits.concurrent_runs - tenant.running))
        return found

    def _price(self, ticket: Ticket) -> None:
        if ticket.batch and not ticket.priced:
            ticket.priced = True
            self._tenant(ticket.key_id).unpriced -= 1

    def _commit(self, ticket: Ticket, params: Params, prompt_tokens: int) -> None:
        ticket.committed = worst_tokens(params, prompt_tokens)
        self.committed += ticket.committed

    def _tenant(self, key_id: str | None) -> _Tenant:
        found = self._tenants.get(key_id)
        if found is None:
            found = self._tenants[key_id] = _Tenant(self._clock())
        return found


def worst_tokens(params: Params, prompt_tokens: int) -> int:
    """What a run costs at most: all that it may generate, its question once, and each tail wherever it is read."""
    return most_tokens(params) + prompt_tokens + most_read_tokens(params)


def spent_tokens(state: State) -> int:
    """What a run has cost so far: what it generated, and those of its prompts that no cache held."""
    usage = state.usage
    return usage.completion_tokens + state.charged_tokens + max(0, usage.prompt_tokens - usage.cached_tokens)
