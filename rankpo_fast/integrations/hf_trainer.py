"""Both stages by the Trainer of transformers (tried with 5.0.0 and 5.24.0).

One line to change in the scripts of arXiv 2503.10723:

    from rankpo_fast.integrations.hf_trainer import HFRankPOTrainer as RankPOTrainer

and of `contrastive_trainer` alike. (They were written for transformers 4: what else they ask of it,
`overwrite_output_dir` for one, 5 may no longer have.) A batch is {"query": features, "passage":
features}, what tokenizers return each, the passages in groups of equal size per query, the one to
rank first at its head. B queries with G passages each, D dims.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from rankpo_fast.config import PAPER_MAX_PASSAGE_LENGTH, PAPER_MAX_QUERY_LENGTH
from rankpo_fast.integrations import require
from rankpo_fast.integrations.hf_models import at_rest, beneath, drop_nothing
from rankpo_fast.integrations.hf_rows import (
    RankPODataCollatorWithPadding,
    WithReference,
    each,
    tokenized,
)
from rankpo_fast.losses import InfoNCELoss
from rankpo_fast.ops.info_nce import info_nce_loss_and_grads
from rankpo_fast.ops.options import InfoNCEBatch, RankPOOptions
from rankpo_fast.ops.rankpo import (
    pair_similarities,
    rankpo_loss,
    rankpo_loss_and_grads,
)
from rankpo_kernels.problem import MixtureOptions

require("transformers", "5", tried="5.0.0 and 5.24.0")
require("accelerate", "1.1", tried="1.15.0")

from accelerate.utils import gather_object  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

from rankpo_fast.integrations.hf_embedding import EmbeddingTrainer, LossParts  # noqa: E402

if TYPE_CHECKING:
    from datasets import Dataset

# what a batch of stage 1 may have besides
MORE = [
    of.name
    for of in fields(InfoNCEBatch)
    if of.name not in ("queries", "passages") and not of.name.startswith("own_")
]


class HFContrastiveTrainer(EmbeddingTrainer):
    """Stage 1: each query against all passages of the batch, and of the other ranks' batches.

    Further keys of a batch are arguments of `info_nce_loss`, such as passage_ids and weights. A
    model that takes query and passage and returns its own `.loss`, as the original's
    ModelForTraining, is trained by that, without `loss` and pooling.

    Args:
        loss: default `InfoNCELoss(process_group=dist.group.WORLD)` where there are several ranks;
            `InfoNCELoss()` leaves each with its own negatives.
        more: `EmbeddingTrainer`'s.

    Raises:
        ValueError: a loss of another kind, or a batch that does not fit.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        loss: InfoNCELoss | None = None,
        **more: Any,
    ):
        if loss is not None and not isinstance(loss, InfoNCELoss):
            raise ValueError(f"loss must be an InfoNCELoss, got {type(loss).__name__}")
        if loss is not None and loss.log_scale is not None:
            raise ValueError("loss learns its temperature, which no optimizer here would step")
        if loss is not None and loss.options.get("reduction", "mean") != "mean":
            raise ValueError("loss must have reduction='mean': steps and ranks are averaged")
        super().__init__(model, args, **more)
        ranks = dist.group.WORLD if self.args.world_size > 1 else None
        self.loss = InfoNCELoss(process_group=ranks) if loss is None else loss
        taken = inspect.signature(beneath(self.model).forward).parameters
        self._model_has_loss = {"query", "passage"} <= taken.keys()
        if self._model_has_loss and (loss is not None or self.pooling != "last"):
            raise ValueError(
                f"{type(beneath(self.model)).__name__} takes query and passage, and returns its "
                "own loss: leave loss and pooling out"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, Any]:
        if not self._model_has_loss:
            return super().compute_loss(model, inputs, return_outputs)
        loss = model(**inputs).loss
        if loss is None:
            raise ValueError(f"{type(self.model).__name__} returns no loss in evaluation")
        return (loss, None) if return_outputs else loss

    def loss_and_grads(self, queries: Tensor, passages: Tensor, batch: dict) -> LossParts:
        more = {name: value for name, value in batch.items() if name not in ("query", "passage")}
        if unknown := ", ".join(sorted(more.keys() - {*MORE})):
            raise ValueError(
                f"a batch has query, passage and any of {', '.join(MORE)}: no {unknown}"
            )
        temperature, options = self.loss.temperature, self.loss.options
        loss, grads, stats = info_nce_loss_and_grads(
            queries, passages, temperature=temperature, **options, **more
        )
        return loss, grads.queries, grads.passages, stats._asdict()


# --- stage 2 ---


@dataclass
class RankPOArguments(TrainingArguments):
    """Settings of stage 2 under the original's names; the defaults are those of the authors'
    script, as in `rankpo_loss`, not those of their code (beta 1.0, temperature 0.02, with a
    reference)."""

    reference_free: bool = True
    beta: float = 2.0
    temperature: float = 0.1
    gamma_beta_ratio: float = 0.0
    label_smoothing: float = 0.0
    loss_type: str = "sigmoid"  # or "hinge"
    sft_weight: float = 0.0
    rankpo_weight: float = 1.0
    disable_dropout: bool = True  # of the model, attention and LoRA
    max_query_length: int = PAPER_MAX_QUERY_LENGTH  # tokens
    max_passage_length: int = PAPER_MAX_PASSAGE_LENGTH
    dataset_num_proc: int | None = None  # processes that tokenise


OF_THE_ORIGINAL = {  # its methods that a subclass may have changed: where that is done here
    "single_forward": "embed, before the vectors are normalised",
    "concatenated_forward": "embed, or loss_and_grads",
    "get_batch_loss_metrics": "loss_and_grads",
    "rankpo_loss": "loss_and_grads",
    "store_metrics": "log",
    "tokenize_row": "nothing, and give rows of texts",
}


class HFRankPOTrainer(EmbeddingTrainer):
    """Stage 2 on rows {"query", "passage1", "passage2", "preferred": "A" or "B"}, with the
    arguments of the original's trainer in its order.

    The reference is computed here, once: two similarities a row, not a second model in memory;
    `ref_model` goes back to the device that it came from. It may be `model` itself, as it starts.

    Args:
        args: `RankPOArguments`, or the original's; what it has besides is not looked at.
        data_collator: makes the batch of rows {"query", "chosen", "rejected"} of token ids; default
            `RankPODataCollatorWithPadding` of the tokenizer.
        train_dataset, eval_dataset: a `datasets.Dataset` or a list; the latter may be a dict of
            them. Without a reference evaluate and predict take such rows too.
        peft_config: `model` becomes `get_peft_model(model, peft_config)`.
        compute_metrics: of predictions [rows, 2], similarities of chosen and rejected, and of
            label_ids [rows], all 0.
        pooling: "last" as in the original, or as in `EmbeddingTrainer`.

    Raises:
        ValueError: naming the row that is no pair, the argument that is missing, or a method of the
            original's that a subclass overrides in vain.
    """

    args: RankPOArguments

    def __init__(
        self,
        model: nn.Module | None = None,
        ref_model: nn.Module | None = None,
        args: RankPOArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        model_init: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        compute_metrics: Callable | None = None,
        pooling: str = "last",
    ):  # fmt: skip
        for name in [name for name in OF_THE_ORIGINAL if hasattr(self, name)]:
            raise ValueError(
                f"{type(self).__name__}.{name} is never called here: "
                f"override {OF_THE_ORIGINAL[name]}"
            )
        missing = [name for name in RankPOArguments.__annotations__ if not hasattr(args, name)]
        if args is None or missing:
            raise ValueError(f"args must be RankPOArguments, or have their {', '.join(missing)}")
        if tokenizer is None:
            raise ValueError("tokenizer is missing: rows are texts")
        if (ref_model is None) != args.reference_free:
            raise ValueError("ref_model goes with reference_free=False, and may be model itself")
        self.args = args  # which options are read from
        RankPOOptions(**self.options)  # names what is wrong
        if peft_config is not None:
            from peft import get_peft_model

            if model is None:
                raise ValueError("peft_config goes with model, not with model_init")
            itself, model = ref_model is model, get_peft_model(model, peft_config)
            ref_model = model if itself else ref_model
        if data_collator is None:
            if tokenizer.pad_token_id is None:
                raise ValueError("tokenizer.pad_token is None: set it, to its eos_token for one")
            data_collator = RankPODataCollatorWithPadding(tokenizer.pad_token_id)
        of_tokens = partial(tokenized, tokenizer, args)
        super().__init__(
            model, args, pooling=pooling, tokenizer=tokenizer, data_collator=data_collator,
            train_dataset=each(of_tokens, train_dataset),
            eval_dataset=each(of_tokens, eval_dataset), model_init=model_init,
            callbacks=callbacks, optimizers=optimizers, compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )  # fmt: skip
        if ref_model is not None:
            referenced = partial(self._referenced, ref_model)
            with at_rest(ref_model, self.args.device):
                self.train_dataset = each(referenced, self.train_dataset)
                self.eval_dataset = each(referenced, self.eval_dataset)
            self.data_collator = WithReference(data_collator)

    @property
    def options(self) -> dict[str, Any]:
        """Of the loss, as args have them now: a search over hyper-parameters sets them there."""
        return {field.name: getattr(self.args, field.name) for field in fields(MixtureOptions)}

    def _adapt(self, model: nn.Module) -> None:
        super()._adapt(model)
        if self.args.disable_dropout:
            drop_nothing(model)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return super().get_eval_dataloader(self._of_tokens(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return super().get_test_dataloader(self._of_tokens(test_dataset))

    def _of_tokens(self, rows: Any) -> Any:
        """Rows that evaluate or predict got, which may be texts."""
        if rows is None or isinstance(rows, str) or "preferred" not in next(iter(rows), {}):
            return rows
        if not self.args.reference_free:
            raise ValueError("rows have no reference: give them as eval_dataset to HFRankPOTrainer")
        return tokenized(self.processing_class, self.args, rows)

    @torch.no_grad()
    def _referenced(self, model: nn.Module, rows: "Dataset") -> "Dataset":
        """Rows with `reference`, similarities of chosen and of rejected; each rank computes its
        share."""
        ranks, rank = self.args.world_size, self.args.process_index
        share = Subset(rows, range(rank * len(rows) // ranks, (rank + 1) * len(rows) // ranks))
        similarities = []
        for batch in DataLoader(share, self.args.eval_batch_size, collate_fn=self.data_collator):
            with self.accelerator.autocast():
                q, p = self._vectors(model, self._prepare_inputs(batch))
            similarities += pair_similarities(q, p[::2], p[1::2]).T.tolist()
        return rows.add_column("reference", gather_object(similarities))

    def loss_and_grads(self, queries: Tensor, passages: Tensor, batch: dict) -> LossParts:
        if len(passages) != 2 * len(queries):
            raise ValueError(
                f"a batch of {len(queries)} queries has {len(passages)} passages, not chosen and "
                f"rejected of each"
            )
        q, c, r = queries, passages[::2], passages[1::2]
        margins: Tensor | None = None
        reference: float | Tensor = 0.0
        if "reference" in batch:
            reference_B2 = batch["reference"].view(torch.float32)
            margins, reference = reference_B2[:, 0] - reference_B2[:, 1], reference_B2.mean(0)
        loss, grads, stats = rankpo_loss_and_grads(
            q, c, r, reference_margins=margins, **self.options
        )
        metrics = stats.metrics(self.options["beta"], reference)
        sft, rankpo = self.options["sft_weight"], self.options["rankpo_weight"]
        sft_loss: float | Tensor = 0.0
        if sft:
            alone = self.options | {"sft_weight": 1.0, "rankpo_weight": 0.0}
            metrics["sft_loss"] = sft_loss = rankpo_loss(q, c, r, **alone)
        if rankpo:
            metrics["rankpo_loss"] = (loss - sft * sft_loss) / rankpo
        d_passages = torch.stack([grads.chosen, grads.rejected], 1).flatten(0, 1)
        return loss, grads.queries, d_passages, metrics
