"""Every error of the store. None of them carries SQL, parameters or the password of its URL.

StoreError
    StoreUnavailable  the database does not answer; nobody knows whether a write arrived, and it may be repeated
    GivenUp           who wanted it written waits no more; nothing was
    SchemaMismatch    its tables are not those of this version; names the command that mends it
    Fenced            the run belongs to another owner by now, or has ended: its old owner writes nothing more
    KeyTaken          the idempotency key stands for another run; carries its id and the digest of its body
    RunExists         a run of this id is there already
    NoSuchRun         there is no run of this id, or it was deleted
    NoSuchFile        the same of a file
    BatchLost         a batch is kept by another server by now, or has come further
"""

from __future__ import annotations


class StoreError(Exception):
    """Something that the store could not do."""


class StoreUnavailable(StoreError):
    """The database does not answer, or not in time. What was being written may be there or not.

    Args:
        reason: Why, as far as that is known; a client may read it.
        place: Which database, for the operator.
    """

    def __init__(self, reason: str, place: str | None = None) -> None:
        super().__init__(f"The store{'' if place is None else f' {place}'} is not available: {reason}")
        self.reason = reason


class GivenUp(StoreError):
    """Who wanted it written waits no more; nothing was."""

    def __init__(self, name: str) -> None:
        super().__init__(f"Nobody waits for {name} any more; it was not written.")


class SchemaMismatch(StoreError):
    """The tables are not those of this version."""

    def __init__(self, current: str | None, head: str, known: bool) -> None:
        found = "has no tables yet" if current is None else f"is at schema {current}"
        advice = "run `mrsa db upgrade`" if known else "it was made by a newer version, which this one cannot read"
        super().__init__(f"The database {found} and this version needs {head}: {advice}.")
        self.current = current
        self.head = head


class Fenced(StoreError):
    """Another owner has taken the run over, or it has ended; nothing was written."""

    def __init__(self, run_id: str, fence: int, now: int | None, status: str | None) -> None:
        state = "is gone" if now is None else f"is {status} under fence {now}"
        super().__init__(f"Run {run_id} {state}; a write under fence {fence} is refused.")
        self.run_id = run_id
        self.fence = fence


class KeyTaken(StoreError):
    """The idempotency key stands for another run: the same request again if the digests are equal."""

    def __init__(self, run_id: str, digest: bytes) -> None:
        super().__init__(f"The idempotency key stands for run {run_id}.")
        self.run_id = run_id
        self.digest = digest


class RunExists(StoreError):
    """A run of this id is there already."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"There is a run {run_id} already.")
        self.run_id = run_id


class NoSuchRun(StoreError):
    """There is no run of this id, or it was deleted."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"There is no run {run_id}.")
        self.run_id = run_id


class NoSuchFile(StoreError):
    """There is no file of this id, or it was deleted."""

    def __init__(self, file_id: str) -> None:
        super().__init__(f"There is no file {file_id}.")
        self.file_id = file_id


class BatchLost(StoreError):
    """Another server keeps the batch by now, or somebody has cancelled it; nothing was written."""

    def __init__(self, batch_id: str, fence: int) -> None:
        super().__init__(f"Batch {batch_id} is kept under another fence than {fence}, or is not where it was.")
        self.batch_id = batch_id
        self.fence = fence
