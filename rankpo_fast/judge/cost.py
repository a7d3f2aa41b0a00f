"""Tokens and money: estimated before a question is asked, counted by what the server says after."""

from collections.abc import Iterable, Mapping
from typing import Any

from rankpo_fast.errors import InputError
from rankpo_fast.judge.journal import Answer
from rankpo_fast.judge.server import Judge

BYTES_PER_TOKEN = 4  # on the safe side: the prompts of the authors' 100 answers have 4.9


class Tokens:
    """Counts with a tokenizer, else by bytes."""

    def __init__(self, tokenizer: str | None):
        self.exact = tokenizer is not None
        if tokenizer is not None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(tokenizer)
            except (OSError, ValueError) as error:
                said = str(error).splitlines()[0]
                raise InputError(f"--tokenizer {tokenizer}: {said}") from None

    def count(self, text: str) -> int:
        if self.exact:
            return len(self._tokenizer(text, verbose=False)["input_ids"])
        return -(-len(text.encode()) // BYTES_PER_TOKEN)


def tokens_of(answer: Answer) -> tuple[int, int]:
    """Of the prompt and of the answer, as the server counted them."""
    usage = answer.get("usage") or {}
    return usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0


class Budget:
    """What has been spent, and what may still be."""

    def __init__(
        self, judges: Mapping[str, Judge], answers: Iterable[Answer], limit: float | None = None
    ):
        self._judges, self._limit = judges, limit
        self._held = 0.0  # for questions under way
        self.spent = sum(self.cost(answer) for answer in answers)

    def cost(self, answer: Answer) -> float:
        judge = self._judges.get(answer["judge"])
        return (judge and judge.cost(*tokens_of(answer))) or 0.0

    def hold(self, most: float) -> bool:
        """Whether a question that costs at most so much may be asked: then it is set aside."""
        if self._limit is not None and self.spent + self._held + most > self._limit:
            return False
        self._held += most
        return True

    def settle(self, most: float, spent: float) -> None:
        self._held -= most
        self.spent += spent


def usage_of(usage: dict[str, Any] | None, prompt: int, answer: int) -> dict[str, Any]:
    """The server's count, or ours where it gives none."""
    if usage is not None and isinstance(usage.get("prompt_tokens"), int):
        return usage
    return {"prompt_tokens": prompt, "completion_tokens": answer, "estimated": True}
