"""Train embedding models to rank: fused contrastive and RankPO losses, a two-stage trainer.

The losses need torch alone. What trains and encodes is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

import rankpo_fast.begin  # noqa: F401  (before others that need torch)
from rankpo_fast.errors import InputError, TrainingStopped
from rankpo_fast.extras import require_extra
from rankpo_fast.losses import (
    DistillKLLoss,
    InBatchRankPOLoss,
    InfoNCELoss,
    MarginMSELoss,
    RankPOGroupLoss,
    RankPOLoss,
    SigLIPLoss,
)
from rankpo_fast.ops.distillation import distill_kl_loss, margin_mse_loss
from rankpo_fast.ops.in_batch import (
    in_batch_rankpo_loss,
    in_batch_rankpo_loss_and_grads,
    siglip_loss,
)
from rankpo_fast.ops.info_nce import info_nce_loss, info_nce_loss_and_grads
from rankpo_fast.ops.rankpo import rankpo_loss, rankpo_loss_and_grads
from rankpo_fast.ops.rankpo_group import rankpo_group_loss

if TYPE_CHECKING:
    from rankpo_fast.functions import evaluate, merge_models, mine_hard_negatives
    from rankpo_fast.model.encoder import Encoder
    from rankpo_fast.retrieval.search import search
    from rankpo_fast.train.callbacks import Callback
    from rankpo_fast.train.result import TrainingResult
    from rankpo_fast.trainers import ContrastiveTrainer, RankPOTrainer

__version__ = "0.1.0"
# What needs transformers: name -> module.
_LATE = {
    "Callback": "train.callbacks",
    "ContrastiveTrainer": "trainers",
    "Encoder": "model.encoder",
    "RankPOTrainer": "trainers",
    "TrainingResult": "train.result",
    "evaluate": "functions",
    "merge_models": "functions",
    "mine_hard_negatives": "functions",
    "search": "retrieval.search",
}
__all__ = [
    "Callback",
    "ContrastiveTrainer",
    "Encoder",
    "InputError",
    "RankPOTrainer",
    "TrainingResult",
    "TrainingStopped",
    "evaluate",
    "merge_models",
    "mine_hard_negatives",
    "search",
    "DistillKLLoss",
    "InBatchRankPOLoss",
    "InfoNCELoss",
    "MarginMSELoss",
    "RankPOGroupLoss",
    "RankPOLoss",
    "SigLIPLoss",
    "distill_kl_loss",
    "in_batch_rankpo_loss",
    "in_batch_rankpo_loss_and_grads",
    "info_nce_loss",
    "info_nce_loss_and_grads",
    "margin_mse_loss",
    "rankpo_group_loss",
    "rankpo_loss",
    "rankpo_loss_and_grads",
    "siglip_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        require_extra(f"rankpo_fast.{name}", "train")
    except InputError as error:
        raise ImportError(str(error)) from None
    value = getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
