"""Labels: the rules, the records, and what is made of them."""

from dataclasses import dataclass
from typing import Literal

from rankpo_fast.fields import (
    Config,
    check_above,
    check_at_least,
    check_names,
    check_seed,
    flag,
    require,
)


@dataclass(frozen=True)
class LabelConfig(Config):
    """Rules and records to rows of stage 1 and evaluation sets."""

    _argument_group_name = "label"

    config: str = flag("The rule file, YAML: texts, maps, rules.")
    queries: str = flag("Records that search: .jsonl, .csv, .tsv or .parquet.")
    items: str = flag("Records that are found, likewise.")
    output_dir: str = flag("For the rows, the evaluation sets and the report.")
    negatives: Literal["random", "near_misses"] = flag(
        "Drawn from all items; or such as meet all rules but one, which the row names.", "random"
    )
    num_negatives: int = flag("Of a query, at most.", 5)
    max_positives: int = flag("Of a query, in rows of stage 1: of more, so many are drawn.", 16)
    validation_share: float = flag("Of the queries, kept from training.", 0.05)
    test_share: float = flag("Likewise.", 0.05)
    max_evaluation_queries: int = flag("Of a split; the rest of it is left out.", 1000)
    disjoint_items: bool = flag(
        "Split the items too, in the same shares: a query finds those of its split alone.", False
    )
    engine: Literal["duckdb", "spark"] = flag(
        "Where the joins run; records are read by DuckDB.", "duckdb"
    )
    memory_gb: float = flag("That the engine may take before it goes to disk.", 4.0)
    max_pairs: int = flag("That the joins may make; rules that make more are refused.", 500_000_000)
    seed: int = flag("Of splits and draws.", 42)
    overwrite_output_dir: bool = flag("Replace the files of an earlier run.", False)

    def check(self) -> None:
        check_names(self, "config", "queries", "items", "output_dir")
        check_at_least(self, 0, "num_negatives", "validation_share", "test_share")
        check_at_least(self, 1, "max_positives", "max_evaluation_queries", "max_pairs")
        check_above(self, 0, "memory_gb")
        check_seed(self)
        held_out = self.validation_share + self.test_share
        require(self, "test_share", "below 1 together with --validation_share", held_out < 1)
