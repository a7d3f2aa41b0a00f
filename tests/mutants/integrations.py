"""The adapter of sentence-transformers."""

from mutants.mutant import Mutant
from mutants.suites import of

RANKING = "rankpo_fast/integrations/sentence_transformers/ranking.py"
MATRYOSHKA = "rankpo_fast/integrations/sentence_transformers/matryoshka.py"
DUPLICATES = "rankpo_fast/integrations/sentence_transformers/duplicates.py"
GUIDED = "rankpo_fast/integrations/sentence_transformers/guided.py"

MUTANTS = [
    Mutant(
        "scale-has-its-gradient-too-soon", RANKING,
        "before, self.scale.grad = self.scale.grad, None",
        "before = self.scale.grad",
        of("tests/integrations/test_sentence_transformers_losses.py", "learnt"),
    ),
    Mutant(
        "ranks-add-up-the-scale", RANKING,
        "grad / dist.get_world_size()",
        "grad",
        of("tests/integrations/test_sentence_transformers_ranks.py", "learnt"),
    ),
    Mutant(
        "cut-for-good", MATRYOSHKA,
        "            del loss.prefixes",
        "            pass",
        of("tests/integrations/test_sentence_transformers_losses.py", "two_matryoshkas"),
    ),
    Mutant(
        "ids-of-padding", DUPLICATES,
        ") * mask).sum(1)",
        ")).sum(1)",
        of("tests/integrations/test_sentence_transformers.py", "one_id"),
    ),
    Mutant(
        "the-guide-writes-into-the-model", GUIDED,
        "[dict(column) for column in features]",
        "features",
        of("tests/integrations/test_sentence_transformers_losses.py", "their_matryoshka"),
    ),
]  # fmt: skip
