"""Engines behind the one Protocol of `harness.engine`: token ids in, token ids out."""

# Tokens of a rollout that nobody watches come this many at a time, where vLLM can: less work for the event loop.
UNWATCHED_INTERVAL = 16
