"""Rounds of mining and training: stage 1 as the paper has it."""

from dataclasses import dataclass
from typing import Literal

from rankpo_fast.config.retrieval import MiningConfig
from rankpo_fast.data.memory import Source
from rankpo_fast.fields import check_at_least, check_names, flag


@dataclass(frozen=True, kw_only=True)
class RoundsConfig(MiningConfig):
    """How often negatives are mined and trained on, and which of them each round has."""

    _argument_group_name = "rounds"

    rounds: int = flag("How often negatives are mined, and the model trained on.", 3)
    mode: Literal["combined", "incremental"] = flag(
        "A round trains on the negatives of the rows and of all rounds so far, or on those of the "
        "newest round alone.", "combined"
    )  # fmt: skip
    mine_first: bool = flag(
        "No training on --train_data as it is before the first round: the model retrieves already.",
        False,
    )
    mining_corpus: Source | None = flag(
        "JSONL of passages to search for negatives. [those of --train_data]", None
    )
    mined_negatives: int = flag(
        "Negatives mined per row and round, of which --num_negatives are drawn in an epoch.", 10
    )

    def check(self) -> None:
        super().check()
        check_names(self, "mining_corpus")
        check_at_least(self, 1, "rounds", "mined_negatives")
        self.check_width("mined_negatives")
