"""Pairs to be judged, the judges, and what becomes of their answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankpo_fast.data.memory import Source
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

Mode = Literal["pair", "grade", "list"]


@dataclass(frozen=True)
class PairsConfig(Config):
    """Pairs of passages that a model finds for a query, to be judged."""

    _argument_group_name = "pairs"

    query_data: Source = flag(
        'JSONL of rows with a "query" (and "query_id"), rows of stage 1 too, or a BEIR directory.'
    )
    corpus_data: Source | None = flag(
        'JSONL of {"text"} (and "_id") to search. [the directory\'s; of stage 1 the passages of '
        "its rows]", None,
    )  # fmt: skip
    split: str | None = flag("As in `evaluate`.", None)
    top_k: int = flag("Candidates of a query: the best ranked of the corpus.", 100)
    pairs_per_query: int = flag("Pairs drawn for a query.", 5)
    sampling: Literal["uniform", "stratified", "uncertainty"] = flag(
        "Any two candidates; ranks spread evenly over --strata; or those whose order the model is "
        "least sure of.", "uniform",
    )  # fmt: skip
    strata: int = flag("Parts of the ranks that `stratified` pairs with each other.", 5)
    temperature: float = flag(
        "Of `uncertainty`: drawn by p (1 - p), p = sigmoid(difference of cosines / temperature).",
        0.02,
    )
    seed: int = flag("Of the draw, and of which passage comes first.", 42)
    output_file: str = flag("The pairs, as JSONL.", "pairs.jsonl")

    def check(self) -> None:
        check_names(self, "query_data", "corpus_data", "split", "output_file")
        check_at_least(self, 2, "top_k")
        check_at_least(self, 1, "pairs_per_query", "strata")
        check_above(self, 0, "temperature")
        check_seed(self)
        if self.strata != 5 and self.sampling != "stratified":
            raise InputError("--strata needs --sampling stratified")
        if self.temperature != 0.02 and self.sampling != "uncertainty":
            raise InputError("--temperature needs --sampling uncertainty")
        if self.strata > self.top_k:
            raise InputError(f"--strata {self.strata} are more than --top_k {self.top_k}")


@dataclass(frozen=True)
class JudgeConfig(Config):
    """Who is asked, over OpenAI's protocol, and how hard."""

    _argument_group_name = "judges"

    model: list[str] = flag("Models that judge, by the names that the server gives them.", [])
    base_url: str | None = flag(
        "Of the server, as http://localhost:8000/v1. [that of OpenAI]", None
    )
    judges: str | None = flag(
        "YAML list of {model, base_url, api_key_env, price_in, price_out}, in place of these "
        "flags: judges of several servers.", None,
    )  # fmt: skip
    api_key_env: str | None = flag(
        "Variable of the environment with the key. [OPENAI_API_KEY, if it is set]", None
    )
    temperature: float = flag("At which answers are drawn.", 0.0)
    max_answer_tokens: int = flag("Of an answer.", 512)
    structured: bool = flag(
        "Ask for JSON by a schema; a server that refuses is asked in words, which is said.", True
    )
    logprobs: bool = flag(
        "Confidence by the verdict's token probabilities where served, else the stated one.", False
    )
    concurrency: int = flag("Questions under way at once.", 8)
    timeout: float = flag("Seconds for an answer.", 120.0)
    max_retries: int = flag("Of a question: after 429, 5xx, a stall or a lost connection.", 5)
    requests_per_minute: float | None = flag("At most, of each judge.", None)
    tokens_per_minute: float | None = flag("At most, of each judge, answers included.", None)
    price_in: float | None = flag("Of a million tokens of prompts.", None)
    price_out: float | None = flag("Of a million tokens of answers.", None)
    max_cost: float | None = flag(
        "Ask no more where the next answer could cost more than this in all, the journal's "
        "included.", None,
    )  # fmt: skip

    def check(self) -> None:
        check_names(self, "model", "base_url", "judges", "api_key_env")
        check_at_least(self, 0, "temperature", "max_retries", "price_in", "price_out")
        check_at_least(self, 1, "max_answer_tokens", "concurrency")
        check_above(self, 0, "timeout")
        for name in ("requests_per_minute", "tokens_per_minute", "max_cost"):
            if getattr(self, name) is not None:
                check_above(self, 0, name)
        repeated = len(set(self.model)) < len(self.model)
        require(self, "model", "different names", not repeated)
        prices = (self.price_in, self.price_out)
        if (self.price_in is None) != (self.price_out is None):
            raise InputError("--price_in and --price_out go together")
        if self.judges is not None:
            if self.model or self.base_url or self.api_key_env or prices != (None, None):
                raise InputError("--judges says model, base_url, key and prices: leave those out")
        elif self.max_cost is not None and None in prices:
            raise InputError("--max_cost needs --price_in and --price_out, per million tokens")


@dataclass(frozen=True)
class PeopleConfig(Config):
    """People as judges, on a page of this machine."""

    _argument_group_name = "people"

    people: bool = flag("Ask people, in place of models: serve the pairs on a page.", False)
    host: str = flag("Where the page is served; another than this machine's own is warned of.",
                     "127.0.0.1")  # fmt: skip
    port: int = flag("Of the page; 0 takes a free one.", 8377)
    annotators: int | None = flag(
        "End once so many have judged every pair. [at Ctrl-C; the same command goes on]", None
    )

    def check(self) -> None:
        check_names(self, "host")
        require(self, "port", "in [0, 65535]", 0 <= self.port <= 65535)
        check_at_least(self, 1, "annotators")
        if not self.people and (others := [*self.changed()]):
            raise InputError(f"--{others[0]} needs --people")


@dataclass(frozen=True)
class AnnotateConfig(Config):
    """What is judged, and what becomes of the answers."""

    _argument_group_name = "annotate"

    pairs: Source | None = flag(
        'JSONL of {"query", "passage1", "passage2"}, as `pairs` writes it; for --mode grade and '
        'list of {"query", "passages"} too.', None,
    )  # fmt: skip
    output: str | None = flag("The judged rows, as JSONL: preferences, or graded rows.", None)
    mode: Mode = flag(
        "Which of two; a grade from 0 to 3 of each passage; or a ranking of a query's.", "pair"
    )
    prompt: str | None = flag(
        "Text file of the prompt, or of what people are told. [the one of --write_prompt]", None
    )
    orders: Literal["both", "one"] | None = flag(
        "Show the passages in both orders, or in the row's alone. [both; a grade has none]", None
    )
    flips: Literal["tie", "drop"] = flag(
        "A verdict that turns with the order is a tie, or none.", "tie"
    )
    consensus: Literal["majority", "bradley_terry"] | None = flag(
        "Of verdicts: by pair, or by strengths fitted to all pairs of a query. [bradley_terry of "
        "several judges, majority of one]", None,
    )  # fmt: skip
    ties_file: str | None = flag("Write ties there, as graded rows of equal grades.", None)
    retry_unparsed: int = flag("Ask again so often where an answer does not parse.", 0)
    journal: str | None = flag("Answers as they come. [OUTPUT.journal.jsonl]", None)
    report: str | None = flag(
        "Figures (.json), and beside it a picture. [OUTPUT.report.json]", None
    )
    dry_run: bool = flag("Say requests, tokens and cost, and ask nothing.", False)
    tokenizer: str | None = flag(
        "Directory or hub name of a tokenizer that counts for --dry_run and the limits. [a token "
        "is 4 bytes]", None,
    )  # fmt: skip
    batch_out: str | None = flag(
        "Ask nothing: write the open questions as OpenAI's batch file (`vllm run-batch`).", None
    )
    batch_in: str | None = flag("Ask nothing: take the answers from a batch's results.", None)
    report_on: Source | None = flag("Only report on rows that are judged already.", None)
    write_prompt: str | None = flag("Only write the default prompt of --mode there.", None)

    def check(self) -> None:
        check_names(
            self, "pairs", "output", "prompt", "journal", "report", "ties_file", "tokenizer",
            "batch_out", "batch_in", "report_on", "write_prompt",
        )  # fmt: skip
        check_at_least(self, 0, "retry_unparsed")
        alone = [name for name in ("write_prompt", "report_on") if getattr(self, name) is not None]
        if alone and (len(alone) > 1 or self.pairs is not None or self.output is not None):
            raise InputError(f"--{alone[0]} stands alone, without --pairs and --output")
        if not alone and (self.pairs is None or self.output is None):
            raise InputError("annotate needs --pairs and --output (or --report_on, --write_prompt)")
        if self.mode == "grade" and self.orders is not None:
            raise InputError("--orders needs --mode pair or list: a grade is of one passage")
        for name, given in (
            ("ties_file", self.ties_file), ("consensus", self.consensus),
            ("flips", self.flips == "drop"),
        ):  # fmt: skip
            if given and self.mode != "pair":
                raise InputError(f"--{name} needs --mode pair")
        if self.flips == "drop" and not self.both:
            raise InputError("--flips drop needs --orders both")
        for name in ("dry_run", "batch_in"):
            if self.batch_out is not None and getattr(self, name):
                raise InputError(f"--batch_out and --{name} exclude each other")
        if self.dry_run and self.batch_in is not None:
            raise InputError("--dry_run and --batch_in exclude each other")
        if self.report is not None and not self.report.endswith(".json"):
            raise InputError(f"--report must be a .json file, got {self.report}")

    @property
    def both(self) -> bool:
        """Whether every question is asked in two orders."""
        return self.mode != "grade" and self.orders != "one"

    @property
    def journal_path(self) -> Path:
        return Path(self.journal or f"{self.output}.journal.jsonl")

    @property
    def report_path(self) -> Path:
        return Path(self.report or f"{self.report_on or self.output}.report.json")

    @property
    def picture_path(self) -> Path:
        return self.report_path.with_suffix(".png")
