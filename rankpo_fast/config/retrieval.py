"""What encodes, searches and measures, and trains nothing."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankpo_fast.data.memory import Rows, Source
from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config, check_at_least, check_names, check_seed, flag, require
from rankpo_fast.paths import same_file


@dataclass(frozen=True)
class EvaluationConfig(Config):
    """What an encoder is measured on: retrieval, preference pairs, or both."""

    _argument_group_name = "evaluation"

    query_data: Source | None = flag("JSONL of queries, or a BEIR directory.", None)
    corpus_data: Source | None = flag("JSONL that --query_data refers to by row number.", None)
    preference_data: list[Source] | None = flag(
        "Held-out preference rows (as for stage 2), for the alignment.", None
    )
    cutoffs: list[int] = flag("Ranks at which to measure.", [1, 5, 10, 20, 100])
    legacy_metrics: bool = flag(
        "The original code's, without grades; they read as high or higher.", False
    )
    split: str | None = flag(
        "Which qrels/SPLIT.tsv of a BEIR directory. [test, else dev, else the first; it is said]",
        None,
    )
    keep_same_id: bool = flag(
        "Rank a BEIR document for the query of the same id too, which BEIR leaves out.", False
    )

    def check(self) -> None:
        check_names(self, "query_data", "corpus_data", "split", "preference_data")
        require(self, "cutoffs", "whole numbers >= 1", min(self.cutoffs, default=0) >= 1)
        object.__setattr__(self, "cutoffs", sorted(set(self.cutoffs)))
        if self.corpus_data is not None and self.query_data is None:
            raise InputError("--corpus_data needs --query_data")
        data = self.query_data
        is_file = data is not None and (isinstance(data, Rows) or not Path(data).is_dir())
        if is_file and self.corpus_data is None:
            raise InputError("--query_data needs --corpus_data, unless it is a BEIR directory")
        for name, given in (("split", self.split is not None), ("keep_same_id", self.keep_same_id)):
            if given and (self.query_data is None or is_file):
                raise InputError(f"--{name} needs --query_data to be a BEIR directory")

    @property
    def asked(self) -> bool:
        return self.query_data is not None or self.preference_data is not None

    def check_asked(self) -> None:
        if not self.asked:
            raise InputError("nothing to measure: give --query_data, --preference_data, or both")


@dataclass(frozen=True)
class EvaluateOutputConfig(Config):
    """What `evaluate` leaves on disk."""

    _argument_group_name = "output"

    output: str | None = flag("Also write the figures to this JSON file.", None)
    output_run: str | None = flag("Write the rankings there, in TREC's format.", None)

    def check(self) -> None:
        check_names(self, "output", "output_run")
        if self.output is None or self.output_run is None:
            return
        if same_file(self.output, self.output_run):
            raise InputError(f"--output and --output_run are both {self.output}: give two names")


@dataclass(frozen=True)
class EncodeConfig(Config):
    """Texts to vectors."""

    _argument_group_name = "encode"

    input: Source = flag("JSONL file, also .gz, .zst, .parquet, - or owner/name of the hub.")
    output: str = flag("The vectors [rows, dims], fp32, length 1: a .npy file.")
    text_key: str = flag('Key of the text in a row; before "text" goes its "title".', "text")
    role: Literal["query", "passage"] = flag(
        "Decides prefix and limit.", "passage", aliases=["--as"]
    )
    max_length: int | None = flag("Tokens kept of a text. [the limit of its role]", None)

    def check(self) -> None:
        check_names(self, "input", "output", "text_key")
        check_at_least(self, 1, "max_length")
        require(self, "output", "a name that ends in .npy", self.output.endswith(".npy"))


@dataclass(frozen=True)
class MineConfig(Config):
    """Hard negatives: passages the model ranks high that are no known positives of the query."""

    _argument_group_name = "mining"

    train_data: list[Source] = flag("Rows of stage 1; their positives are kept.")
    corpus_data: Source | None = flag("JSONL of passages to search. [those of --train_data]", None)
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

    def check(self) -> None:
        check_names(self, "train_data", "corpus_data")
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


@dataclass(frozen=True)
class MineOutputConfig(Config):
    """What `mine` leaves on disk."""

    _argument_group_name = "output"

    output_file: str = flag("The rows with mined negatives, as JSONL.")

    def check(self) -> None:
        check_names(self, "output_file")


@dataclass(frozen=True)
class ScoreConfig(Config):
    """Scores by a cross-encoder, for stage 2 to learn from."""

    _argument_group_name = "score"

    reranker: str = flag(
        "Cross-encoder of transformers, a directory or owner/name of the hub, whose head has one "
        "label or two."
    )
    train_data: list[Source] = flag(
        "Rows of either stage, graded or scored ones, whose passages are scored; or BEIR "
        "directories: what they judge."
    )
    output_file: str = flag('The rows {"query", "passages", "scores"}, as JSONL.')
    max_length: int | None = flag("Tokens of query and passage together. [the model's]", None)
    split: str | None = flag(
        "Which qrels/SPLIT.tsv of a BEIR directory. [train, or the only one]", None
    )
    bf16: bool = flag("Weights and activations in bf16 rather than fp32.", False)

    def check(self) -> None:
        check_names(self, "reranker", "train_data", "output_file", "split")
        require(self, "train_data", "at least one file or row", len(self.train_data) > 0)
        check_at_least(self, 1, "max_length")
        directories = (not isinstance(x, Rows) and Path(x).is_dir() for x in self.train_data)
        if self.split is not None and not any(directories):
            raise InputError("--split needs --train_data to be a BEIR directory")
