"""Both stages by the Trainer of transformers (tried with 5.0.0 and 5.24.0).

One line to change in the scripts of arXiv 2503.10723:

    from rankpo_fast.integrations.hf_trainer import RankPOTrainer  # was: from rankpo_trainer

and of `contrastive_trainer` alike. (They were written for transformers 4: what else they ask of it,
`overwrite_output_dir` for one, 5 may no longer have.) A batch is {"query": features, "passage":
features}, what tokenizers return each, the passages in groups of equal size per query, the one to
rank first at its head. B queries with G passages each, S texts of L tokens, D dims.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, cast

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
from rankpo_fast.model.pooling import pool_padded
from rankpo_fast.ops.common import unit_rows
from rankpo_fast.ops.info_nce import info_nce_loss_and_grads
from rankpo_fast.ops.options import InfoNCEBatch
from rankpo_fast.ops.rankpo import (
    pair_similarities,
    rankpo_loss,
    rankpo_loss_and_grads,
)
from rankpo_kernels.problem import MixtureOptions, compute_dtype

require("transformers", "5", tried="5.0.0 and 5.24.0")
require("accelerate", "1.1", tried="1.15.0")

from accelerate.utils import gather_object  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402
from transformers.trainer_utils import EvalLoopOutput, TrainOutput  # noqa: E402

if TYPE_CHECKING:
    from datasets import Dataset

POOLINGS = ("last", "mean", "cls")
# what a batch of stage 1 may have besides
MORE = [
    of.name
    for of in fields(InfoNCEBatch)
    if of.name not in ("queries", "passages") and not of.name.startswith("own_")
]
LossAndGrads = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


class EmbeddingTrainer(Trainer):
    """What both stages share: texts to vectors, vectors to loss and metrics.

    The loss is computed in fp32 outside of autocast, and is a mean over the rows of a micro-batch;
    the gradient of a step is that of the mean over its micro-batches. Metrics are means over rows
    since the last log (in evaluation over all rows, with those that accelerate repeats to give all
    ranks full batches) and ranks; the device is asked when they are logged. Columns are left to the
    collator, whatever `remove_unused_columns` says. DDP does not bear checkpointing with
    `use_reentrant=True`, since a step runs the model twice.

    Args:
        pooling: "last", "mean" or "cls" of the tokens that attention_mask has, on either side;
            of a model that returns a tensor [S, D], or an own `embed`, none.
        tokenizer: the processing_class.
        trainer: all others of transformers' Trainer.
    """

    model: nn.Module  # Trainer's __init__ has it made where model_init is given

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        pooling: str = "last",
        tokenizer: Any = None,
        **trainer: Any,
    ):
        if isinstance(model, str):
            raise ValueError(f"model must be a model: AutoModel.from_pretrained({model!r})")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        if trainer.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func is given, but the loss is this trainer's own")
        if args is not None and args.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor is of the Trainer's cross entropy: here label_smoothing of "
                "InfoNCELoss or RankPOArguments"
            )
        if isinstance(trainer.get("train_dataset"), dict):
            raise ValueError("train_dataset is a dict: only eval_dataset may be several")
        if tokenizer is not None:
            trainer["processing_class"] = tokenizer
        args = TrainingArguments("tmp_trainer") if args is None else copy.copy(args)
        args.remove_unused_columns = False  # columns are those of texts, not the model's arguments
        config: Any = copy.copy(args.accelerator_config)  # by now an AcceleratorConfig
        args.accelerator_config = config
        if config.dispatch_batches:
            raise ValueError("dispatch_batches=True cuts passages to the number of queries")
        config.dispatch_batches = False  # None is True for an IterableDataset
        self.pooling = pooling
        self._sums: dict[bool, dict[str, Tensor]] = {}  # by whether in training
        super().__init__(model, args, **trainer)
        self.model_accepts_loss_kwargs = False  # so it divides by the number of micro-batches
        self._adapt(self.model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._adapt(model)
        return model

    def _adapt(self, model: nn.Module) -> None:
        """A pooler of BERT's kind gets no gradient, for which DDP waits where it does not look for
        such parameters, as with gradient checkpointing."""
        model = beneath(model)
        of_transformers = type(model).__module__.startswith("transformers.")
        pooler = getattr(model, "pooler", None) if of_transformers else None
        if pooler is not None and type(self).embed is EmbeddingTrainer.embed:
            pooler.requires_grad_(False)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._sums.clear()  # of steps after the last log
        return super().train(*args, **kwargs)

    def embed(self, model: nn.Module, features: dict[str, Tensor]) -> Tensor:
        """Vectors [S, D] of texts, not normalised."""
        output = model(**features)
        if isinstance(output, Tensor):
            return output
        states = getattr(output, "last_hidden_state", None)  # [S, L, D]
        if states is None:
            raise ValueError(
                f"{type(output).__name__} of the model has no last_hidden_state to make vectors "
                f"of: load it by AutoModel, or override embed"
            )
        mask = features.get("attention_mask")
        mask = torch.ones_like(features["input_ids"]) if mask is None else mask
        return pool_padded(states, mask, self.pooling)

    def loss_and_grads(self, queries: Tensor, passages: Tensor, batch: dict) -> LossAndGrads:
        """(loss, d_queries [B, D], d_passages [B * G, D], means over the rows by name) of vectors
        without graph."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, Any]:
        q, p = self._vectors(model, inputs)
        loss, dq, dp, metrics = self.loss_and_grads(q.detach(), p.detach(), inputs)
        sums = self._sums.setdefault(torch.is_grad_enabled(), {})
        for name, value in ({"rows": torch.ones_like(loss)} | metrics).items():
            sums[name] = sums.get(name, 0) + len(q) * value
        tangent = (q * dq).sum() + (p * dp).sum()
        loss = loss + (tangent - tangent.detach())  # the value of loss with these gradients
        return (loss, (q, p)) if return_outputs else loss

    def _vectors(self, model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
        if missing := {"query", "passage"} - batch.keys():
            raise ValueError(
                f"the collator's batch has no {', '.join(sorted(missing))}, only {[*batch]}"
            )
        q, p = (self.embed(model, batch[side]) for side in ("query", "passage"))
        return q.to(compute_dtype(q.dtype)), p.to(compute_dtype(p.dtype))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Predictions are the cosines [B, G] of a query and its passages, labels [B] all 0."""
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(inputs)
            loss, vectors = cast(
                tuple[Tensor, Any], self.compute_loss(model, inputs, return_outputs=True)
            )
        if prediction_loss_only or vectors is None:
            return loss, None, None
        q, p = map(unit_rows, vectors)
        cosines = (q[:, None] * p.view(len(q), -1, p.shape[1])).sum(2)
        return loss, cosines, torch.zeros(len(q), dtype=torch.int64, device=q.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._means(training=True)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        prefix, means = kwargs.get("metric_key_prefix", "eval"), self._means(training=False)
        cast(dict, output.metrics).update({f"{prefix}_{name}": x for name, x in means.items()})
        return output

    def _means(self, training: bool) -> dict[str, float]:
        sums = self._sums.pop(training, None)
        if not sums:
            return {}
        values = self.accelerator.reduce(torch.stack([*sums.values()]), "sum").tolist()
        totals = dict(zip(sums, values, strict=True))
        rows = totals.pop("rows")
        return {name: total / rows for name, total in totals.items()}


class ContrastiveTrainer(EmbeddingTrainer):
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

    def loss_and_grads(self, queries: Tensor, passages: Tensor, batch: dict) -> LossAndGrads:
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


class RankPOTrainer(EmbeddingTrainer):
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
        MixtureOptions(**self.options)  # names what is wrong
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
            raise ValueError("rows have no reference: give them as eval_dataset to RankPOTrainer")
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

    def loss_and_grads(self, queries: Tensor, passages: Tensor, batch: dict) -> LossAndGrads:
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
