"""A loss at several prefixes of the embeddings."""

from collections.abc import Iterable, Mapping
from random import sample
from typing import TYPE_CHECKING, Any, Protocol, cast

from sentence_transformers.sentence_transformer import losses as theirs
from torch import Tensor, nn

from rankpo_fast.integrations.sentence_transformers.duplicates import Features

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class TakesPrefixes(Protocol):
    """One of our four losses of queries and documents."""

    prefixes: Mapping[str, Any]

    def changes(self) -> list[str]: ...

    def __call__(self, features: Iterable[Features], labels: Tensor | None) -> Tensor: ...


class MatryoshkaLoss(theirs.MatryoshkaLoss):
    """A loss at several prefixes of the embeddings (Kusupati et al. 2022). Arguments as theirs.

    Around one of our four losses of queries and documents all prefixes come from one product;
    around any other, and around a subclass of them with methods of its own, it is theirs.

    Raises:
        ValueError: a method of the loss was replaced after this one was made around it.
    """

    def __init__(self, model: "SentenceTransformer", loss: nn.Module, *args: Any, **kwargs: Any):
        changes = getattr(loss, "changes", None)
        fused = changes is not None and not changes()  # before theirs decorates it
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
            return super().forward(sentence_features, cast(Tensor, labels))
        loss = cast(TakesPrefixes, self.loss)
        if changed := loss.changes():
            raise ValueError(
                f"{', '.join(changed)} of {type(self.loss).__name__} was replaced after the "
                "MatryoshkaLoss around it was made: make that last"
            )
        loss.prefixes = self.drawn()
        try:
            return loss(sentence_features, labels)
        finally:
            del loss.prefixes
