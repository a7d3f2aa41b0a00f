"""A loss at several prefixes of the embeddings."""

from collections.abc import Iterable
from random import sample
from typing import TYPE_CHECKING, Any

from sentence_transformers.sentence_transformer import losses as theirs
from torch import Tensor, nn

from rankpo_fast.integrations.sentence_transformers.duplicates import Features

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class MatryoshkaLoss(theirs.MatryoshkaLoss):
    """A loss at several prefixes of the embeddings (Kusupati et al. 2022). Arguments as theirs.

    Around one of our four losses of queries and documents all prefixes come from one product;
    around any other, and around a subclass of them with methods of its own, it is theirs.

    Raises:
        ValueError: a method of the loss was replaced after this one was made around it.
    """

    def __init__(self, model: "SentenceTransformer", loss: nn.Module, *args: Any, **kwargs: Any):
        fused = hasattr(loss, "changes") and not loss.changes()  # before theirs decorates it
        super().__init__(model, loss, *args, **kwargs)
        self.fused = fused
        if fused:
            vars(loss).pop("calculate_loss", None)  # theirs, which would cut a second time

    def drawn(self) -> dict[str, Any]:
        """matryoshka_dims and matryoshka_weights of one step."""
        dims, count = range(len(self.matryoshka_dims)), self.n_dims_per_step
        drawn = sorted(sample(dims, count)) if 0 < count < len(dims) else dims
        return {
            "matryoshka_dims": [self.matryoshka_dims[i] for i in drawn],
            "matryoshka_weights": [float(self.matryoshka_weights[i]) for i in drawn],
        }

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        if not self.fused:
            return super().forward(sentence_features, labels)
        if changed := self.loss.changes():
            raise ValueError(
                f"{', '.join(changed)} of {type(self.loss).__name__} was replaced after the "
                "MatryoshkaLoss around it was made: make that last"
            )
        self.loss.prefixes = self.drawn()
        try:
            return self.loss(sentence_features, labels)
        finally:
            del self.loss.prefixes
