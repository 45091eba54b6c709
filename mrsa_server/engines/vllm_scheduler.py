"""vLLM's scheduler, which keeps new tokens back for a while. Imported by vLLM in its engine process, by name.

What a token costs the server is the way of its delta: a message between vLLM's processes, vLLM's output processor, and
everything after these. vLLM's own `stream_interval` acts behind the first two. Here tokens wait where they are made:

    watched     all of them together, as long as keeps the server at `WATCHED_DELTAS_PER_S`: one alone waits for nothing
    unwatched   until one request has `hold` tokens, then all that wait are sent

The first tokens of a request, its last, and what says more than token ids are never kept back. A request says by
`extra_args` which it is (`holding`); one that says nothing is treated as stock vLLM treats it. What waits when a
request is aborted is lost with it.

Of vLLM this uses, the same in 0.26 to 0.33: `update_from_output`, which returns by client what is sent to it, and
`requests`, which holds the requests that are alive.
"""

from __future__ import annotations

import time
from operator import attrgetter, is_not
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

from mrsa_server.engines import LONGEST_WAIT_S, WATCHED_DELTAS_PER_S

_KEY = "mrsa_hold"


def holding(hold: int) -> dict[str, int]:
    """`extra_args` of a request: how many tokens may wait; 0 for one that is watched."""
    return {_KEY: hold}


def standing_for(chosen: type) -> str | None:
    """The class here, by name, that stands for the scheduler that vLLM has chosen; None for one that is not known."""
    return {Scheduler: "HoldingScheduler", AsyncScheduler: "HoldingAsyncScheduler"}.get(chosen)


class _Blank:
    """Tells whether a struct of vLLM, some fields aside, holds nothing."""

    def __init__(self, blank: Any, *aside: str) -> None:
        self._read = attrgetter(*(name for name in blank.__struct_fields__ if name not in aside))
        self._blank = self._read(blank)

    def __call__(self, found: Any) -> bool:
        return not any(map(is_not, self._read(found), self._blank))


# The headers of a trace are the same in each output of a request.
_ids_alone = _Blank(EngineCoreOutput("", []), "request_id", "new_token_ids", "trace_headers")
_no_message = _Blank(EngineCoreOutputs(), "engine_index", "timestamp", "outputs", "weight_version")


class _Waiting:
    """Outputs that wait, by request: the first one with all tokens since, and its client."""

    def __init__(self) -> None:
        self.outputs: dict[str, tuple[int, EngineCoreOutput]] = {}

    def add(self, client: int, output: EngineCoreOutput) -> int:
        """Keep an output; how many tokens of its request wait now."""
        waiting = self.outputs.get(output.request_id)
        if waiting is None:
            output.new_token_ids = list(output.new_token_ids)  # vLLM's own list must not grow
            self.outputs[output.request_id] = client, output
            return len(output.new_token_ids)
        ids: list[int] = waiting[1].new_token_ids
        ids += output.new_token_ids
        return len(ids)

    def join(self, output: EngineCoreOutput) -> None:
        """Put the tokens that wait before those of an output that does not."""
        waiting = self.outputs.pop(output.request_id, None)
        if waiting is not None:
            output.new_token_ids = waiting[1].new_token_ids + output.new_token_ids

    def release(self, alive: dict[str, Any], messages: dict[int, EngineCoreOutputs]) -> None:
        """Put everything that waits into the messages; what was aborted meanwhile is dropped."""
        for client, output in self.outputs.values():
            if output.request_id not in alive:
                continue
            message = messages.get(client)
            if message is None:
                message = messages[client] = EngineCoreOutputs(outputs=[])
            message.outputs.append(output)
        self.outputs.clear()


class _Holding:
    """What both of vLLM's schedulers are given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watched = _Waiting()
        self._unwatched = _Waiting()
        self._released = 0.0  # when the watched ones were, on the monotonic clock

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; of its messages, outputs are missing that wait, and messages that have nothing else."""
        messages: dict[int, EngineCoreOutputs] = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        alive: dict[str, Any] = self.requests  # type: ignore[attr-defined]
        watched, unwatched, full = self._watched, self._unwatched, False
        for client, message in messages.items():
            at_once: list[EngineCoreOutput] = []
            for output in message.outputs:
                hold = _hold(alive.get(output.request_id))
                if hold is None or not _ids_alone(output):
                    watched.join(output)
                    unwatched.join(output)
                    at_once.append(output)
                elif hold:
                    full = unwatched.add(client, output) >= hold or full
                else:
                    watched.add(client, output)
            message.outputs = at_once
        if watched.outputs:
            now = time.monotonic()
            if now - self._released >= min(len(watched.outputs) / WATCHED_DELTAS_PER_S, LONGEST_WAIT_S):
                self._released = now
                watched.release(alive, messages)
        if full:
            unwatched.release(alive, messages)
        return {client: message for client, message in messages.items() if message.outputs or not _no_message(message)}


class HoldingScheduler(_Holding, Scheduler):  # type: ignore[misc]  # vLLM is no typed package here
    """vLLM's scheduler that waits for each step's tokens."""


class HoldingAsyncScheduler(_Holding, AsyncScheduler):  # type: ignore[misc]
    """vLLM's scheduler that plans a step before the tokens of the last are there."""


def _hold(request: Any) -> int | None:
    """What a request said; None where it has ended, or said nothing."""
    params = None if request is None else request.sampling_params
    extra = None if params is None else params.extra_args
    return None if extra is None else extra.get(_KEY)
