"""What training costs: the engine beside sentence-transformers' trainer, its levers beside each
other, and how soon it has learnt."""

from . import end_to_end, steps

QUESTIONS = [*steps.QUESTIONS, end_to_end.QUESTION]
