"""What a row of the mutants is made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` in `file`, where it occurs once, becomes `new`; `tests` are arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
