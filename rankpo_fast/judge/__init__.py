"""Verdicts on passages, of language models and of people: questions, journal, agreement, report."""
