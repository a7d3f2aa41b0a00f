"""What is minimised: a loss over the batches of some rows, with its weight in the whole.

    loss of a step = sum over tasks of weight * mean of the task's loss over its batches

U and N distinct query and passage texts of a batch, D dims.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, Self, TypeVar

from torch import Tensor, nn

from rankpo_fast.data.batches import (
    ContrastiveBatch,
    ContrastiveData,
    PreferenceBatch,
    PreferenceData,
)
from rankpo_fast.data.group_batches import GroupBatch, GroupData
from rankpo_fast.data.retained import RetainedBatch, RetainedData
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.train.run import Run

BatchT = TypeVar("BatchT", ContrastiveBatch, PreferenceBatch, GroupBatch, RetainedBatch)


class LossOutput(NamedTuple):
    """Of a batch; all on the device, without a graph."""

    loss: Tensor  # 0-dim
    d_queries: Tensor  # [U, D]
    d_passages: Tensor  # [N, D]
    metrics: dict[str, Tensor]  # 0-dim
    others: Sequence[tuple[nn.Parameter, Tensor]] = ()  # what the loss itself learns: gradients
    own_loss: Tensor | None = None  # 0-dim, for the log: without what holds it to a reference


@dataclass(frozen=True, eq=False)
class TrainingTask(ABC, Generic[BatchT]):
    """Rows as batches, their texts, and what is asked of the encoder on them."""

    data: ContrastiveData | PreferenceData | GroupData | RetainedData
    texts: Texts
    weight: float = field(default=1.0, kw_only=True)
    prefix: str = field(default="", kw_only=True)  # of its metrics, to tell them from another's
    flag: str = field(default="--train_data", kw_only=True)  # through which its rows were given

    @property
    def by_rows(self) -> bool:
        """Whether the loss is a sum over rows, so that ranks can share them out."""
        return True

    @property
    def rates(self) -> dict[str, float]:
        """Peak learning rates of parameters, by their names in the encoder, that have their own."""
        return {}

    def without_texts(self) -> Self:
        """It, with token ids alone."""
        return replace(self, data=self.data.without_texts())

    def ready(self, run: Run, encoder: Encoder) -> Self:
        """It, once all ranks have the encoder as it starts; they all call it."""
        return self

    @abstractmethod
    def loss(self, queries: Tensor, passages: Tensor, batch: BatchT) -> LossOutput:
        """Of the vectors [U, D] and [N, D] of the batch's texts, not normalised."""


def scatter_sum(n: int, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """Zeros [n, D] plus rows [k, D] at places [k] of each part; the order of sums is fixed."""
    _, rows = parts[0]
    total = rows.new_zeros(n, rows.shape[1])
    for places, rows in parts:
        total.index_put_((places,), rows, accumulate=True)
    return total
