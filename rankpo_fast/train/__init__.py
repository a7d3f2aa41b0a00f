"""Training: the loop, its two stages, and what a run leaves on disk."""
