"""Train embedding models to rank: fused contrastive and RankPO losses, a two-stage trainer."""

from rankpo_fast.losses import (
    InBatchRankPOLoss,
    InfoNCELoss,
    RankPOGroupLoss,
    RankPOLoss,
    SigLIPLoss,
)
from rankpo_fast.ops.in_batch import (
    in_batch_rankpo_loss,
    in_batch_rankpo_loss_and_grads,
    siglip_loss,
)
from rankpo_fast.ops.info_nce import info_nce_loss, info_nce_loss_and_grads
from rankpo_fast.ops.rankpo import rankpo_loss, rankpo_loss_and_grads
from rankpo_fast.ops.rankpo_group import rankpo_group_loss

__version__ = "0.1.0"
__all__ = [
    "InBatchRankPOLoss",
    "InfoNCELoss",
    "RankPOGroupLoss",
    "RankPOLoss",
    "SigLIPLoss",
    "in_batch_rankpo_loss",
    "in_batch_rankpo_loss_and_grads",
    "info_nce_loss",
    "info_nce_loss_and_grads",
    "rankpo_group_loss",
    "rankpo_loss",
    "rankpo_loss_and_grads",
    "siglip_loss",
]
