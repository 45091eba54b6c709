"""Engines behind the one Protocol of `harness.engine`: token ids in, token ids out."""
