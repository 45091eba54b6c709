"""Engines behind the one Protocol of `harness.engine`: token ids in, token ids out."""

# Tokens of a rollout that nobody watches come this many at a time, where vLLM can: less work for the event loop. One
# that is cut, at a deadline say, loses up to so many of its last ones.
UNWATCHED_INTERVAL = 128
# Deltas of all rollouts that somebody watches, where they can be joined: few streams get each token at once, 64 of them
# 16 deltas a second each. A delta costs the server some 0.1 ms, however many tokens it has.
WATCHED_DELTAS_PER_S = 1000.0
LONGEST_WAIT_S = 0.5  # however many are watched


class CannotServe(ValueError):
    """An engine was given what it cannot serve. The words say all: no trace of where that was found helps."""
