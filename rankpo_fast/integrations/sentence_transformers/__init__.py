"""Sentence-transformers' in-batch losses without a score matrix, and RankPO for its trainer.

    from rankpo_fast.integrations.sentence_transformers import MultipleNegativesRankingLoss

in place of `from sentence_transformers.losses import ...` is all that changes: names, arguments,
losses and gradients are theirs. `sentence_features` are one dict of tensors a column, padded or
flattened; B texts a column, D dims; documents of a batch lie column by column, positives first.
What differs, for all losses:

* They are of fp32 where the embeddings are of bf16 or fp16; theirs are of the embeddings' dtype.
* Labels, which theirs do not look at, are an error where they tell rows apart.
* Across ranks the negatives of MultipleNegativesRankingLoss come through the process group, not
  through `all_gather_with_grad` of their module: who replaces that replaces nothing.
* A method or module of theirs that is overridden, in a subclass or on an object, is called; where
  the fused loss stands for it, their own code runs, with a warning.

Tried with sentence-transformers 6.0 to 6.2.
"""

from rankpo_fast.integrations import require

require("sentence-transformers", at_least="6.0", tried="6.0 to 6.2")

from rankpo_fast.integrations.sentence_transformers.duplicates import text_ids  # noqa: E402
from rankpo_fast.integrations.sentence_transformers.guided import (  # noqa: E402
    CachedGISTEmbedLoss,
    GISTEmbedLoss,
)
from rankpo_fast.integrations.sentence_transformers.liger import use_liger_kernel  # noqa: E402
from rankpo_fast.integrations.sentence_transformers.matryoshka import MatryoshkaLoss  # noqa: E402
from rankpo_fast.integrations.sentence_transformers.ranking import (  # noqa: E402
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from rankpo_fast.integrations.sentence_transformers.rankpo import (  # noqa: E402
    RankPOLoss,
    with_reference_margins,
)

LOSSES = [
    CachedGISTEmbedLoss, CachedMultipleNegativesRankingLoss, GISTEmbedLoss, MatryoshkaLoss,
    MultipleNegativesRankingLoss, RankPOLoss,
]  # fmt: skip
__all__ = [loss.__name__ for loss in LOSSES]
__all__ += ["text_ids", "use_liger_kernel", "with_reference_margins"]

for loss in LOSSES:
    loss.__module__ = __name__  # a model card names a loss by it: by what can be imported
