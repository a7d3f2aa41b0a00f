"""Rounds: a model mines its own hard negatives and is trained on them, again and again."""
