"""RankPO for sentence-transformers' trainer, and the reference margins that it learns from."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sentence_transformers.base.losses.merged_forward import embed_columns
from torch import Tensor, nn

from rankpo_fast.integrations.sentence_transformers.duplicates import Features
from rankpo_fast.integrations.sentence_transformers.inputs import check_columns, named_if_unpooled
from rankpo_fast.losses import RankPOLoss as PairLoss
from rankpo_fast.ops.rankpo import pair_similarities

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer


class RankPOLoss(nn.Module):
    """RankPO (arXiv 2503.10723) over (query, chosen, rejected) columns.

    A label column holds reference margins, as `with_reference_margins` makes it: the reference
    model's similarity of chosen minus that of rejected. Without one it is SimRankPO.

    Args:
        beta, temperature, gamma_beta_ratio, label_smoothing, loss_type, sft_weight, rankpo_weight:
            as in `rankpo_fast.rankpo_loss`.

    Raises:
        ValueError: another number of columns, columns of unequal length, labels that are no margins
            or a model without pooling.
    """

    def __init__(self, model: "SentenceTransformer", **options: Any) -> None:
        super().__init__()
        self.model = model
        self.loss = PairLoss(**options)

    def forward(
        self, sentence_features: Iterable[Features], labels: Tensor | None = None
    ) -> Tensor:
        with named_if_unpooled():
            embeddings = embed_columns(self.model, sentence_features)
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None
    ) -> Tensor:
        check_columns(embeddings, at_least=3, any_negatives=False)
        if len(embeddings) > 3:
            raise ValueError(
                f"RankPOLoss takes the columns query, chosen, rejected, got {len(embeddings)}"
            )
        if labels is not None and not labels.is_floating_point():
            if not labels.any():  # nobody set them: `smart_batching_collate` makes zeros
                return self.loss(*embeddings)
            raise ValueError(
                f"labels of RankPOLoss are reference margins, got {labels.dtype}: remove the "
                "column, or make it with `with_reference_margins`"
            )
        return self.loss(*embeddings, reference_margins=labels)

    def get_config_dict(self) -> dict[str, Any]:
        return dict(self.loss.options)

    @property
    def citation(self) -> str:
        return """
@misc{zhang2025rankpo,
    title={RankPO: Preference Optimization for Job-Talent Matching},
    author={Yafei Zhang and Murray Wang and Yu Wang and Xiaohui Wang},
    year={2025},
    eprint={2503.10723},
    archivePrefix={arXiv},
}
"""


def with_reference_margins(
    dataset: "Dataset",
    model: "SentenceTransformer",
    batch_size: int = 32,
    prompts: str | dict[str, str] | None = None,
) -> "Dataset":
    """The dataset with a column "label" for `RankPOLoss`: margins of a frozen reference model.

    Args:
        dataset: its columns are query, chosen, rejected, in this order.
        model: the reference, which need not be in memory while training.
        batch_size: texts encoded at a time.
        prompts: as in the arguments of the trainer: of all columns, or by column.
    """
    if len(dataset.column_names) != 3:
        raise ValueError(f"columns must be query, chosen, rejected, got {dataset.column_names}")
    embeddings = [
        # A prompt, if an empty one: the trainer knows nothing of a model's default.
        model.encode(
            list(dataset[name]),
            prompt=prompts if isinstance(prompts, str) else (prompts or {}).get(name, ""),
            batch_size=batch_size,
            convert_to_tensor=True,
        )
        for name in dataset.column_names
    ]
    chosen_B, rejected_B = pair_similarities(*embeddings)
    return dataset.add_column("label", (chosen_B - rejected_B).tolist())
