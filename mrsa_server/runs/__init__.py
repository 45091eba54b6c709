"""What owns a run while it is alive."""
