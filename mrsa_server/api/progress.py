"""What happens in a run -> what clients read of it under `mrsa`, the same on every route. Nothing here awaits."""

from __future__ import annotations

from harness.events import (
    AnswersAgreed,
    QuorumReached,
    RolloutAborted,
    RolloutDelta,
    RolloutFailed,
    RolloutFinished,
    RunResumed,
    SetSkipped,
    ToppedUp,
)
from harness.selection import extract_answer
from harness.types import Rollout
from mrsa_server.runs.runner import Item, RoundFinished, RoundStarted

_SNIPPET = 200  # characters of an answer or an error in a progress event

Fields = dict[str, object]


def told(item: Item) -> Fields | None:
    """The event that a client reads, its name under `event`; None for what is not told."""
    match item:
        case RoundStarted(round, rollouts):
            return {"event": "round.started", "round": round, "rollouts": rollouts}
        case RolloutDelta(slot, _, answer, tokens):
            return {
                "event": "rollout.delta",
                "round": slot.round,
                "index": slot.index,
                "tokens": tokens,
                "answer": answer,
            }
        case RolloutFinished(rollout) | RolloutAborted(rollout):
            return _ended(rollout)
        case RolloutFailed(slot, error, usage, seconds):
            return {
                "event": "rollout.failed",
                "round": slot.round,
                "index": slot.index,
                "tokens": usage.completion_tokens,
                "seconds": _ms(seconds),
                "error": error[:_SNIPPET],
            }
        case RunResumed(slots):
            return {"event": "run.resumed", "rollouts": len(slots)}
        case AnswersAgreed(slots, ended):
            return {"event": "answers.agreed", "round": slots[0].round, "votes": len(slots), "ended": ended}
        case SetSkipped(slot, source):
            return {"event": "set.skipped", "round": slot.round, "index": slot.index, "source": source.index}
        case QuorumReached(round, stragglers):
            return {"event": "quorum.reached", "round": round, "stragglers": len(stragglers)}
        case ToppedUp(slots):
            return {"event": "population.topped_up", "rollouts": len(slots)}
        case RoundFinished(round, stats, seconds):
            return {
                "event": "round.finished",
                "round": round,
                "rollouts": stats.started,
                "finished": stats.finished,
                "failed": stats.failed,
                "tokens": stats.usage.completion_tokens,
                "seconds": _ms(seconds),
            }
    return None


def _ended(rollout: Rollout) -> Fields:
    fields: Fields = {
        "event": "rollout.finished",
        "round": rollout.slot.round,
        "index": rollout.slot.index,
        "tokens": rollout.usage.completion_tokens,
        "seconds": _ms(rollout.seconds),
        "finish": rollout.finish.value,
    }
    answer = answer_of(rollout)
    return fields if answer is None else {**fields, "answer": answer}


def answer_of(rollout: Rollout) -> str | None:
    """The answer that a rollout came to, where one could be told, cut to what can be shown."""
    answer = extract_answer(rollout.answer) if rollout.answer else None
    return None if answer is None else answer[:_SNIPPET]


def tail_text(rollout: Rollout) -> str:
    """A tail under its heading, as reasoning that people read."""
    tokens = f"{rollout.usage.completion_tokens:,}"
    return f"[round {rollout.slot.round}, rollout {rollout.slot.index}: {tokens} tokens]\n{rollout.tail.text}\n\n"


def _ms(seconds: float) -> float:
    return round(seconds, 3)
