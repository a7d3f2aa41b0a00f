"""The rows of both stages."""

import math
from dataclasses import dataclass, fields
from typing import Any

from rankpo_fast.data.memory import Source
from rankpo_fast.errors import InputError
from rankpo_fast.fields import (
    Config,
    check_above,
    check_at_least,
    check_names,
    flag,
    require,
)


def _check_data(config: Any) -> None:
    check_names(config, "train_data")
    weights, files = config.train_data_weights, len(config.train_data)
    if weights is None:
        return
    fine = all(math.isfinite(weight) and weight > 0 for weight in weights)
    require(config, "train_data_weights", "finite numbers > 0", fine)
    rule = f"one number for each of the {files} files of --train_data"
    require(config, "train_data_weights", rule, len(weights) == files)


@dataclass(frozen=True)
class ContrastiveDataConfig(Config):
    """Rows of stage 1."""

    _argument_group_name = "data"

    train_data: list[Source] = flag(
        'JSONL files of {"query": str, "positives": [str], "negatives": [str]}, or as other tools '
        "write them; also .gz, .zst, .parquet, - for standard input, owner/name of the hub."
    )
    train_data_weights: list[float] | None = flag(
        "How often a row of each file comes in an epoch, 0.5: every other time. [1 each]", None
    )
    num_negatives: int = flag("Sampled per query and epoch, besides the batch's other passages.", 5)

    def check(self) -> None:
        require(self, "train_data", "at least one file or row", len(self.train_data) > 0)
        _check_data(self)
        check_at_least(self, 0, "num_negatives")


@dataclass(frozen=True)
class RankPODataConfig(Config):
    """Rows of stage 2: preference pairs, which may be left out where grades or a teacher's scores
    are given."""

    _argument_group_name = "data"

    train_data: list[Source] = flag(
        'JSONL files of {"query", "passage1", "passage2", "preferred": "A" or "B"}, or of '
        '{"prompt", "chosen", "rejected"}; also .gz, .zst, .parquet, -, owner/name of the hub.',
        [],
    )
    train_data_weights: list[float] | None = flag(
        "How often a row of each file comes in an epoch, 0.5: every other time. [1 each]", None
    )
    use_confidence: bool = flag("Weight pairs by confidence_score / 100.", False)

    def check(self) -> None:
        _check_data(self)
        if self.use_confidence and not self.train_data:
            raise InputError("--use_confidence needs --train_data")


@dataclass(frozen=True)
class ReplayConfig(Config):
    """Rows of stage 1 that stage 2 goes on with, so that it does not forget them; none: no replay.

    The loss of a step is stage 2's + replay_weight * InfoNCE of as many batches of these rows.
    """

    _argument_group_name = "replay"

    replay_data: list[Source] = flag(
        "JSONL files of stage 1, of whose loss the model is reminded in stage 2.", []
    )
    # Where the demo's nDCG@20 * alignment is highest (validation split of seed 1).
    replay_weight: float = flag("Of their loss, beside that of stage 2.", 0.1)
    replay_batch_size: int | None = flag(
        "Rows of them per batch. [--per_device_train_batch_size]", None
    )
    replay_num_negatives: int = flag("As --num_negatives in stage 1.", 5)
    replay_temperature: float = flag("As --temperature in stage 1.", 0.02)

    def check(self) -> None:
        check_names(self, "replay_data")
        check_above(self, 0, "replay_weight", "replay_temperature")
        check_at_least(self, 1, "replay_batch_size")
        check_at_least(self, 0, "replay_num_negatives")
        for name, default in ((f.name, f.default) for f in fields(self) if f.name != "replay_data"):
            if not self.replay_data and getattr(self, name) != default:
                raise InputError(f"--{name} needs --replay_data, the JSONL files of stage 1")


NO_REPLAY = ReplayConfig()
