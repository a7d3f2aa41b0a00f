"""Every mutant is of the code as it stands: one that has aged would break nothing."""

from mutants import MUTANTS
from mutants.runner import ROOT, mutated


def test_none_has_aged():
    for mutant in MUTANTS:
        assert mutated(ROOT, mutant)  # exits, with its name, where its text is not there once
        named = [ROOT / part for part in mutant.tests if part.endswith(".py")]
        assert named and all(file.is_file() for file in named), mutant
