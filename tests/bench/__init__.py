"""Figures that a stranger can repeat. Run by hand; none of them fails a test."""
