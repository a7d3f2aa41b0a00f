"""Settings of the commands that train nothing, beside those of config.py that they share."""

import re
from dataclasses import dataclass
from typing import Literal

from rankpo_fast.errors import InputError
from rankpo_fast.fields import (
    check_at_least,
    check_choices,
    check_names,
    check_seed,
    flag,
    require,
)
from rankpo_fast.paths import same_file


@dataclass(frozen=True)
class EvaluateOutputConfig:
    """What `evaluate` leaves on disk."""

    _argument_group_name = "output"

    output: str | None = flag("Also write the figures to this JSON file.", None)
    output_run: str | None = flag("Write the rankings there, in TREC's format.", None)

    def __post_init__(self) -> None:
        check_names(self, "output", "output_run")
        if self.output is None or self.output_run is None:
            return
        if same_file(self.output, self.output_run):
            raise InputError(f"--output and --output_run are both {self.output}: give two names")


@dataclass(frozen=True)
class EncodeConfig:
    """Texts to vectors."""

    _argument_group_name = "encode"

    input: str = flag("JSONL file, also .gz, .zst, .parquet, - or owner/name of the hub.")
    output: str = flag("The vectors [rows, dims], fp32, length 1: a .npy file.")
    text_key: str = flag('Key of the text in a row; before "text" goes its "title".', "text")
    role: Literal["query", "passage"] = flag(
        "Decides prefix and limit.", "passage", aliases=["--as"]
    )
    max_length: int | None = flag("Tokens kept of a text. [the limit of its role]", None)

    def __post_init__(self) -> None:
        check_choices(self)
        check_names(self, "input", "output", "text_key")
        check_at_least(self, 1, "max_length")
        require(self, "output", "a name that ends in .npy", self.output.endswith(".npy"))


@dataclass(frozen=True)
class MineConfig:
    """Hard negatives: passages the model ranks high that are no known positives of the query."""

    _argument_group_name = "mining"

    train_data: list[str] = flag("Rows of stage 1; their positives are kept.")
    output_file: str = flag("The rows with mined negatives, as JSONL.")
    corpus_data: str | None = flag("JSONL of passages to search. [those of --train_data]", None)
    method: Literal["topk", "sample"] = flag(
        "The best ranked of the range, or drawn from it.", "sample"
    )
    search_range: str = flag("Ranks to take from, first and one past the last.", "0-100")
    num_negatives: int = flag("Negatives per query.", 10)
    max_score: float | None = flag("Drop candidates whose cosine with the query is higher.", None)
    absolute_margin: float | None = flag(
        "Drop candidates not this much below the query's lowest positive.", None
    )
    relative_margin: float | None = flag(
        "Likewise, in shares of that positive's cosine (of its size, where it is below 0).", None
    )
    combine: bool = flag("Keep the negatives a row has, before the mined ones.", False)
    seed: int = flag("Of --method sample.", 42)

    def __post_init__(self) -> None:
        check_choices(self)
        check_names(self, "train_data", "output_file", "corpus_data")
        check_at_least(self, 1, "num_negatives")
        check_at_least(self, 0, "absolute_margin", "relative_margin")
        inside = self.max_score is None or -1 < self.max_score <= 1
        require(self, "max_score", "a cosine in (-1, 1]", inside)
        check_seed(self)
        first, last = self.ranks
        require(self, "search_range", "FIRST-LAST with FIRST < LAST", first < last)
        if last - first < self.num_negatives:
            wanted = f"--num_negatives {self.num_negatives}"
            raise InputError(f"--search_range {self.search_range} is narrower than {wanted}")

    @property
    def ranks(self) -> tuple[int, int]:
        match = re.fullmatch(r"([0-9]{1,12})-([0-9]{1,12})", self.search_range)
        require(self, "search_range", "FIRST-LAST, for instance 0-100", match is not None)
        assert match is not None
        first, last = map(int, match.groups())
        return first, last
