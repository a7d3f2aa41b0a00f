"""`rankpo-fast contrastive`: stage 1."""

from rankpo_fast.train.contrastive import train_contrastive as run

__all__ = ["run"]
