"""Texts that count as one, each numbered once."""

from collections.abc import Collection

from torch import Tensor


class DistinctTexts(dict[str, int]):
    """Distinct texts, numbered as they come; iterates in that order."""

    def id(self, text: str) -> int:
        return self.setdefault(text, len(self))

    def ids(self, texts: Collection[str]) -> list[int]:
        """The ids of the distinct ones among `texts`."""
        return list(dict.fromkeys(map(self.id, texts)))


def first_places(rows: Tensor) -> list[int]:
    """For each text the first one with the same row: its own place if that is itself."""
    first: dict[int, int] = {}
    return [first.setdefault(row, place) for place, row in enumerate(rows.tolist())]
