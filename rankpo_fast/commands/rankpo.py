"""`rankpo-fast rankpo`: stage 2."""

from rankpo_fast.train.rankpo import train_rankpo as run

__all__ = ["run"]
