"""What both stages share by the Trainer of transformers: texts to vectors, vectors to loss and
metrics. For `hf_trainer`, which names the versions that it needs before it imports this.

B queries with G passages each, S texts of L tokens, D dims.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from rankpo_fast.integrations.hf_models import beneath
from rankpo_fast.model.pooling import pool_padded
from rankpo_fast.ops.common import unit_rows
from rankpo_kernels.problem import compute_dtype

POOLINGS = ("last", "mean", "cls")
LossParts = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


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

    def loss_and_grads(self, queries: Tensor, passages: Tensor, batch: dict) -> LossParts:
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

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        kwargs["metric_key_prefix"] = metric_key_prefix
        output = super().evaluation_loop(*args, **kwargs)
        means = {f"{metric_key_prefix}_{k}": x for k, x in self._means(training=False).items()}
        cast(dict, output.metrics).update(means)
        return output

    def _means(self, training: bool) -> dict[str, float]:
        sums = self._sums.pop(training, None)
        if not sums:
            return {}
        values = self.accelerator.reduce(torch.stack([*sums.values()]), "sum").tolist()
        totals = dict(zip(sums, values, strict=True))
        rows = totals.pop("rows")
        return {name: total / rows for name, total in totals.items()}
