"""What encodes, searches and measures, and trains nothing."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankpo_fast.config.model import EncoderConfig
from rankpo_fast.data.memory import Rows, Source
from rankpo_fast.errors import InputError
from rankpo_fast.fields import (
    Config,
    check_above,
    check_at_least,
    check_names,
    check_seed,
    flag,
    require,
)
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
class EvaluatedConfig(EncoderConfig):
    """What is measured: a model, two that are compared, or rankings without one."""

    model_name_or_path: str | None = flag("Hub name or directory of the model.", None)  # type: ignore[assignment]
    compare: list[str] = flag("Models to measure on the same data, two in all.", [])
    run_files: list[str] = flag("Rankings in TREC's format, measured without a model.", [])

    def check(self) -> None:
        super().check()
        check_names(self, "compare", "run_files")
        names = [name for name, _ in self.systems]
        if not names:
            raise InputError("one of these is required: --model_name_or_path, --compare, "
                             "--run_files")  # fmt: skip
        if self.compare and len(names) == 1:
            raise InputError(f"--compare has {names[0]} alone: give another model beside it")
        if len(names) > 2 or len(set(names)) < len(names):
            raise InputError(f"two different models or runs can be compared, got "
                             f"{', '.join(names)}")  # fmt: skip

    @property
    def systems(self) -> list[tuple[str, bool]]:
        """What is measured, in order, and whether it is a model."""
        models = [self.model_name_or_path] if self.model_name_or_path is not None else []
        return [
            *((name, True) for name in [*models, *self.compare]),
            *((name, False) for name in self.run_files),
        ]


@dataclass(frozen=True)
class EvaluateOutputConfig(Config):
    """What `evaluate` leaves on disk."""

    _argument_group_name = "output"

    output: str | None = flag("Also write the figures to this JSON file.", None)
    output_run: str | None = flag("Write the rankings there, in TREC's format.", None)
    report: str | None = flag("New directory for a report with a picture.", None)
    group_key: str | None = flag(
        "Key of query rows, or of their metadata: figures also of the queries of each value.", None
    )
    margin_scale: float = flag(
        "beta / temperature of the training, by which margins become probabilities in the report.",
        20.0,
    )

    def check(self) -> None:
        check_names(self, "output", "output_run", "report", "group_key")
        check_above(self, 0, "margin_scale")
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


@dataclass(frozen=True, kw_only=True)
class MiningConfig(Config):
    """Which passages that the model ranks high become hard negatives."""

    method: Literal["topk", "sample", "cluster"] = flag(
        "The best ranked of the range, drawn from it, or drawn with a part for each cluster.",
        "sample",
    )
    clusters: int = flag("Of the candidates of a query, by k-means, for --method cluster.", 10)
    decay: float = flag(
        "Weight of a candidate for each better ranked one of its cluster, for --method cluster.",
        0.5,
    )
    search_range: str = flag("Ranks to take from, first and one past the last.", "0-100")
    max_score: float | None = flag("Drop candidates whose cosine with the query is higher.", None)
    absolute_margin: float | None = flag(
        "Drop candidates not this much below the query's lowest positive.", None
    )
    relative_margin: float | None = flag(
        "Likewise, in shares of that positive's cosine (of its size, where it is below 0).", None
    )
    reranker: str | None = flag(
        "Cross-encoder that scores all candidates; those as good as a positive are dropped.", None
    )
    reranker_margin: float = flag(
        "Drop candidates whose score by --reranker is not this much below that of the query's "
        "lowest positive.", 0.0
    )  # fmt: skip
    reranker_max_length: int | None = flag(
        "Tokens of query and passage together. [the reranker's]", None
    )
    reranker_bf16: bool = flag("Its weights and activations in bf16 rather than fp32.", False)
    index_dir: str | None = flag(
        "Directory for passage vectors, in fp16 on disk instead of in memory, and kept.", None
    )

    def check(self) -> None:
        check_names(self, "reranker", "index_dir")
        check_at_least(self, 1, "clusters", "reranker_max_length")
        require(self, "decay", "in (0, 1]", 0 < self.decay <= 1)
        for name in ("clusters", "decay"):
            if name in self.changed() and self.method != "cluster":
                raise InputError(f"--{name} is for --method cluster, not {self.method}")
        check_at_least(self, 0, "absolute_margin", "relative_margin", "reranker_margin")
        of_reranker = [n for n in self.changed() if n.startswith("reranker_")]
        if self.reranker is None and of_reranker:
            raise InputError(f"--{of_reranker[0]} needs --reranker, a cross-encoder")
        inside = self.max_score is None or -1 < self.max_score <= 1
        require(self, "max_score", "a cosine in (-1, 1]", inside)
        first, last = self.ranks
        require(self, "search_range", "FIRST-LAST with FIRST < LAST", first < last)

    def check_width(self, name: str) -> None:
        """InputError where the range has fewer ranks than negatives are asked for."""
        (first, last), wanted = self.ranks, getattr(self, name)
        if last - first < wanted:
            raise InputError(
                f"--search_range {self.search_range} is narrower than --{name} {wanted}"
            )

    @property
    def ranks(self) -> tuple[int, int]:
        match = re.fullmatch(r"([0-9]{1,12})-([0-9]{1,12})", self.search_range)
        require(self, "search_range", "FIRST-LAST, for instance 0-100", match is not None)
        assert match is not None
        first, last = map(int, match.groups())
        return first, last


@dataclass(frozen=True)
class MineConfig(MiningConfig):
    """Hard negatives: passages the model ranks high that are no known positives of the query."""

    _argument_group_name = "mining"

    train_data: list[Source] = flag("Rows of stage 1; their positives are kept.")
    corpus_data: Source | None = flag("JSONL of passages to search. [those of --train_data]", None)
    num_negatives: int = flag("Negatives per query.", 10)
    combine: bool = flag("Keep the negatives a row has, before the mined ones.", False)
    seed: int = flag("Of --method sample and cluster.", 42)

    def check(self) -> None:
        super().check()
        check_names(self, "train_data", "corpus_data")
        check_at_least(self, 1, "num_negatives")
        check_seed(self)
        self.check_width("num_negatives")


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
