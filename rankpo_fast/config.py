"""Settings: one frozen dataclass per room, each the flags of that room on the command line.

Field names are the flags (`learning_rate` is `--learning_rate` and `--learning-rate`), defaults are
those of the paper's scripts, and help texts say in brackets what holds where a default is None.
Every class checks its own values: what cannot be used is an InputError naming flag and value.
"""

import math
import os
import re
import warnings
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from rankpo_fast.errors import InputError
from rankpo_fast.paths import same_file

if TYPE_CHECKING:
    import torch

REPORTERS = ("tensorboard", "wandb", "trackio", "mlflow")
PAPER_SPECIAL_TOKENS = [
    "<keyword>", "</keyword>", "<title>", "</title>", "<abstract>", "</abstract>", "<sep>",
]  # fmt: skip
PAPER_MAX_QUERY_LENGTH = 1280  # tokens
PAPER_MAX_PASSAGE_LENGTH = 4096
AutoOrBool = bool | Literal["auto"]  # auto: as suits the machine, which the start says


def _flag(help: str, default: Any = MISSING, **argparse_settings: Any) -> Any:
    """One flag: its help text, its default (none: required), and what else argparse should know."""
    metadata = {"help": help, **argparse_settings}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _require(config: Any, name: str, rule: str, holds: bool) -> None:
    if not holds:
        raise InputError(f"--{name} must be {rule}, got {getattr(config, name)!r}")


def _check_choices(config: Any) -> None:
    """argparse checks these on the command line; this serves those who build a config in Python."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            choices = get_args(hint)
            _require(config, name, f"one of {', '.join(choices)}", value in choices)
        elif hint == AutoOrBool:
            _require(config, name, "auto, true or false", value == "auto" or value in (True, False))


def _check_above(config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(config, name, "finite", math.isfinite(value))
        _require(config, name, f"> {low}", value > low)


def _check_at_least(config: Any, low: float, *names: str) -> None:
    """None stands for "not given" and passes."""
    for name in names:
        value = getattr(config, name)
        _require(config, name, "finite", value is None or math.isfinite(value))
        _require(config, name, f">= {low}", value is None or value >= low)


def _check_weights(config: Any) -> None:
    weights, files = config.train_data_weights, len(config.train_data)
    if weights is None:
        return
    fine = all(math.isfinite(weight) and weight > 0 for weight in weights)
    _require(config, "train_data_weights", "finite numbers > 0", fine)
    rule = f"one number for each of the {files} files of --train_data"
    _require(config, "train_data_weights", rule, len(weights) == files)


def _check_seed(config: Any) -> None:
    _require(config, "seed", "in [0, 2**63)", 0 <= config.seed < 2**63)


def _check_names(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        for item in value if isinstance(value, list) else [value]:
            _require(config, name, "a name, not empty", item is None or bool(str(item).strip()))


def _read_newlines(config: Any, name: str) -> None:
    """Backslash and n, which quotes of shells and YAML keep as they are, become a line's end."""
    value = getattr(config, name)
    if value is not None and "\\n" in value:
        object.__setattr__(config, name, value.replace("\\n", "\n"))
        warnings.warn(f"--{name}: backslash and n in it are read as a newline", stacklevel=4)


@dataclass(frozen=True)
class EncoderConfig:
    """Which encoder, and how it reads text; enough to evaluate, encode or mine with it."""

    _argument_group_name = "model"

    model_name_or_path: str = _flag("Hub name or directory of the model.")
    tokenizer_name: str | None = _flag("Tokenizer, if not the model's.", None)
    pooling: Literal["auto", "last", "mean", "cls"] = _flag(
        "auto: as the model directory says, else last (causal models) or mean.", "auto"
    )
    attn_implementation: Literal[
        "auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen_attn",
        "sdpa", "eager",
    ] = _flag("auto: the fastest here, which the start names; eager pads.", "auto")  # fmt: skip
    packing: bool = _flag("Texts end to end, none padded; false: padded to similar lengths.", True)
    query_prefix: str | None = _flag("Goes before every query. [as the model says]", None)
    passage_prefix: str | None = _flag("Goes before every passage. [as the model says]", None)
    max_query_length: int | None = _flag(
        "Tokens kept of a query. [as the model says, else 1280]", None
    )
    max_passage_length: int | None = _flag(
        "Tokens kept of a passage. [as the model says, else 4096]", None
    )
    append_eos: bool | None = _flag(
        "Texts end with the tokenizer's end of text. [as the model says]", None,
        nargs="?", const=True,
    )  # fmt: skip
    bf16: AutoOrBool = _flag(
        "Autocast: vectors good to two digits; auto: where it is faster than fp32.", False
    )

    def __post_init__(self) -> None:
        _check_names(self, "model_name_or_path", "tokenizer_name")
        for name in ("query_prefix", "passage_prefix"):
            _read_newlines(self, name)
        _check_choices(self)
        _check_at_least(self, 1, "max_query_length", "max_passage_length")


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """The encoder to train. `special_tokens=["paper"]` becomes the paper's list."""

    bf16: AutoOrBool = _flag(
        "Autocast, weights and losses stay fp32; auto: where it is faster, on a CPU as measured.",
        "auto",
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag(
        "Of the saved weights; checkpoints stay fp32. auto: as the model had them.", "auto"
    )
    from_scratch: bool = _flag("Random weights: only config and tokenizer are read.", False)
    special_tokens: list[str] = _flag("Added to the tokenizer; paper: the paper's own.", [])
    gradient_checkpointing: AutoOrBool = _flag(
        "Less memory for a third more compute; auto: where a micro-batch does not fit without.",
        "auto",
    )
    disable_dropout: bool = _flag("Every dropout at 0.", False)
    torch_compile: bool = _flag("Compile the layers: a slow start, then faster steps.", False)
    use_liger_kernel: bool | None = _flag(
        "Liger's kernels in the model. [where installed, on a GPU]", None, nargs="?", const=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_names(self, "special_tokens")
        given = self.special_tokens
        tokens = [t for g in given for t in (PAPER_SPECIAL_TOKENS if g == "paper" else [g])]
        object.__setattr__(self, "special_tokens", list(dict.fromkeys(tokens)))


@dataclass(frozen=True)
class ContrastiveDataConfig:
    """Rows of stage 1."""

    _argument_group_name = "data"

    train_data: list[str] = _flag(
        'JSONL files of {"query": str, "positives": [str], "negatives": [str]}, or as other tools '
        "write them; also .gz, .zst, .parquet, - for standard input, owner/name of the hub."
    )
    train_data_weights: list[float] | None = _flag(
        "How often a row of each file comes in an epoch, 0.5: every other time. [1 each]", None
    )
    num_negatives: int = _flag(
        "Sampled per query and epoch, besides the batch's other passages.", 5
    )

    def __post_init__(self) -> None:
        _check_names(self, "train_data")
        _check_weights(self)
        _check_at_least(self, 0, "num_negatives")


@dataclass(frozen=True)
class RankPODataConfig:
    """Rows of stage 2."""

    _argument_group_name = "data"

    train_data: list[str] = _flag(
        'JSONL files of {"query", "passage1", "passage2", "preferred": "A" or "B"}, or of '
        '{"prompt", "chosen", "rejected"}; also .gz, .zst, .parquet, -, owner/name of the hub.'
    )
    train_data_weights: list[float] | None = _flag(
        "How often a row of each file comes in an epoch, 0.5: every other time. [1 each]", None
    )
    use_confidence: bool = _flag("Weight pairs by confidence_score / 100.", False)

    def __post_init__(self) -> None:
        _check_names(self, "train_data")
        _check_weights(self)


@dataclass(frozen=True)
class ReplayConfig:
    """Rows of stage 1 that stage 2 goes on with, so that it does not forget them; none: no replay.

    The loss of a step is stage 2's + replay_weight * InfoNCE of as many batches of these rows.
    """

    _argument_group_name = "replay"

    replay_data: list[str] = _flag(
        "JSONL files of stage 1, of whose loss the model is reminded in stage 2.", []
    )
    # Where the demo's nDCG@20 * alignment is highest (validation split of seed 1).
    replay_weight: float = _flag("Of their loss, beside that of stage 2.", 0.1)
    replay_batch_size: int | None = _flag(
        "Rows of them per batch. [--per_device_train_batch_size]", None
    )
    replay_num_negatives: int = _flag("As --num_negatives in stage 1.", 5)
    replay_temperature: float = _flag("As --temperature in stage 1.", 0.02)

    def __post_init__(self) -> None:
        _check_names(self, "replay_data")
        _check_above(self, 0, "replay_weight", "replay_temperature")
        _check_at_least(self, 1, "replay_batch_size")
        _check_at_least(self, 0, "replay_num_negatives")
        for name, default in ((f.name, f.default) for f in fields(self) if f.name != "replay_data"):
            if not self.replay_data and getattr(self, name) != default:
                raise InputError(f"--{name} needs --replay_data, the JSONL files of stage 1")


NO_REPLAY = ReplayConfig()


@dataclass(frozen=True)
class ContrastiveLossConfig:
    """InfoNCE."""

    _argument_group_name = "loss"

    temperature: float = _flag("Cosine similarities are divided by it.", 0.02)

    def __post_init__(self) -> None:
        _check_above(self, 0, "temperature")


@dataclass(frozen=True)
class RankPOLossConfig:
    """RankPO, or SimRankPO without a reference, or SFT with `--sft_weight 1 --rankpo_weight 0`."""

    _argument_group_name = "loss"

    beta: float = _flag("Sharpness of the preference margin.", 2.0)
    temperature: float = _flag("Cosine similarities are divided by it.", 0.1)
    gamma_beta_ratio: float = _flag("Margin asked for, in units of cosine / temperature.", 0.0)
    loss_type: Literal["sigmoid", "hinge"] = _flag("Shape of the preference loss.", "sigmoid")
    label_smoothing: float = _flag("Share of wrong preferences to assume.", 0.0)
    sft_weight: float = _flag("Of the cross entropy over chosen and rejected.", 0.0)
    rankpo_weight: float = _flag("Of the preference loss.", 1.0)
    reference_free: bool = _flag("False: margins count relative to a frozen model's.", True)
    reference_model_name_or_path: str | None = _flag(
        "The frozen model. [the trained one, as it starts]", None
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_above(self, 0, "beta", "temperature")
        _check_at_least(self, 0, "sft_weight", "rankpo_weight")
        _require(self, "gamma_beta_ratio", "finite", math.isfinite(self.gamma_beta_ratio))
        _require(self, "label_smoothing", "in [0, 0.5)", 0 <= self.label_smoothing < 0.5)
        _check_names(self, "reference_model_name_or_path")
        if self.sft_weight == 0 and self.rankpo_weight == 0:
            raise InputError("--sft_weight and --rankpo_weight are both 0: nothing to train on")
        if self.loss_type == "hinge" and self.label_smoothing > 0:
            raise InputError("--label_smoothing needs --loss_type sigmoid, got hinge")
        if self.reference_free and self.reference_model_name_or_path is not None:
            raise InputError("--reference_model_name_or_path needs --reference_free false")

    @property
    def uses_reference(self) -> bool:
        return not self.reference_free and self.rankpo_weight > 0


@dataclass(frozen=True)
class TrainingConfig:
    """The run: its length, its optimizer, and what it leaves on disk."""

    _argument_group_name = "training"

    output_dir: str = _flag("Where the model, metrics.jsonl and checkpoints go.")
    num_train_epochs: float = _flag("Passes over the rows.", 3.0)
    max_steps: int | None = _flag("Optimizer steps; overrides --num_train_epochs.", None)
    per_device_train_batch_size: int = _flag("Rows per batch, of each process.", 32)
    gradient_accumulation_steps: int = _flag(
        "Batches per optimizer step; unlike a larger batch they add no negatives.", 1
    )
    learning_rate: float = _flag("Peak learning rate.", 1e-5)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = _flag(
        "Course after the warm-up.", "cosine"
    )
    warmup_ratio: float = _flag("Share of the steps in which the learning rate rises.", 0.1)
    weight_decay: float = _flag("Of AdamW; biases and norms are spared.", 0.0)
    adam_beta1: float = _flag("Of AdamW.", 0.9)
    adam_beta2: float = _flag("Of AdamW.", 0.999)
    adam_epsilon: float = _flag("Of AdamW.", 1e-8)
    max_grad_norm: float = _flag("Gradients are scaled down to this norm; 0: never.", 1.0)
    activation_memory_gb: float | None = _flag(
        "To keep what backward needs rather than compute it twice; 0: the least. [what one "
        "micro-batch leaves of what is free, of half of it on the CPU]", None, metavar="GB"
    )  # fmt: skip
    seed: int = _flag("Of row order, sampled negatives, dropout, random weights.", 42)
    logging_steps: int = _flag("Steps between two lines of metrics.jsonl.", 10)
    eval_steps: int | None = _flag("Steps between two evaluations. [only at the end]", None)
    save_steps: int | None = _flag("Steps between two checkpoints. [by time]", None)
    save_minutes: float | None = _flag(
        "Minutes between two checkpoints, besides one at the end of an epoch of a minute or "
        "more; 0: only when stopped. [10, or 0 where --save_steps is given]", None,
        metavar="MINUTES",
    )  # fmt: skip
    save_total_limit: int = _flag("Checkpoints kept, the newest; 0: all.", 2)
    resume: str | None = _flag(
        "Go on from the newest complete checkpoint of --output_dir, or from the one given.",
        None, nargs="?", const="newest", metavar="CHECKPOINT",
    )  # fmt: skip
    overwrite_output_dir: bool = _flag("Delete the earlier run that is there.", False)
    report_to: list[str] = _flag(
        "Also send the metrics there: tensorboard, wandb, trackio, mlflow, several of them, all "
        "that are installed (all), or none.", ["none"]
    )  # fmt: skip
    project: str | None = _flag("Of wandb, trackio, mlflow. [rankpo-fast]", None)
    run_name: str | None = _flag("Of the run in --report_to. [that of --output_dir]", None)
    profile_steps: int = _flag(
        "Say where the time of so many steps goes, after 4 more; their trace is in profile/.", 0
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_names(self, "output_dir", "resume", "project", "run_name")
        self._check_reporters()
        _check_above(self, 0, "num_train_epochs", "learning_rate", "adam_epsilon")
        _check_at_least(
            self, 1, "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"
        )
        _check_at_least(self, 1, "logging_steps", "eval_steps", "save_steps")
        _check_at_least(self, 0, "weight_decay", "max_grad_norm", "profile_steps")
        _check_at_least(self, 0, "activation_memory_gb", "save_minutes", "save_total_limit")
        _check_seed(self)
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2"):
            _require(self, name, "in [0, 1)", 0 <= getattr(self, name) < 1)
        if self.resume is not None and self.overwrite_output_dir:
            raise InputError("--resume and --overwrite_output_dir contradict each other: give one")

    def _check_reporters(self) -> None:
        given = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to)
        object.__setattr__(self, "report_to", given)
        known = len(set(given)) == len(given) > 0 and {*given} <= {*REPORTERS, "none", "all"}
        known = known and (len(given) == 1 or {"none", "all"}.isdisjoint(given))
        _require(self, "report_to", f"none, all, or some of {', '.join(REPORTERS)}", known)
        for name, takers in {"project": REPORTERS[1:], "run_name": REPORTERS}.items():
            if getattr(self, name) is not None and {"all", *takers}.isdisjoint(given):
                raise InputError(f"--{name} needs --report_to, one of {', '.join(takers)}")
        plain = self.run_name is None or Path("x", self.run_name).name == self.run_name != ".."
        _require(self, "run_name", "the name of a folder, without / in it", plain)


@dataclass(frozen=True)
class EvaluationConfig:
    """What an encoder is measured on: retrieval, preference pairs, or both."""

    _argument_group_name = "evaluation"

    query_data: str | None = _flag("JSONL of queries, or a BEIR directory.", None)
    corpus_data: str | None = _flag("JSONL that --query_data refers to by row number.", None)
    preference_data: list[str] | None = _flag(
        "Held-out preference rows (as for stage 2), for the alignment.", None
    )
    cutoffs: list[int] = _flag("Ranks at which to measure.", [1, 5, 10, 20, 100])
    legacy_metrics: bool = _flag(
        "The original code's, without grades; they read as high or higher.", False
    )
    split: str | None = _flag(
        "Which qrels/SPLIT.tsv of a BEIR directory. [test, else dev, else the first; it is said]",
        None,
    )
    keep_same_id: bool = _flag(
        "Rank a BEIR document for the query of the same id too, which BEIR leaves out.", False
    )

    def __post_init__(self) -> None:
        _check_names(self, "query_data", "corpus_data", "split", "preference_data")
        _require(self, "cutoffs", "whole numbers >= 1", min(self.cutoffs, default=0) >= 1)
        object.__setattr__(self, "cutoffs", sorted(set(self.cutoffs)))
        if self.corpus_data is not None and self.query_data is None:
            raise InputError("--corpus_data needs --query_data")
        is_file = self.query_data is not None and not Path(self.query_data).is_dir()
        if is_file and self.corpus_data is None:
            raise InputError("--query_data needs --corpus_data, unless it is a BEIR directory")
        for name, given in (("split", self.split is not None), ("keep_same_id", self.keep_same_id)):
            if given and (self.query_data is None or is_file):
                raise InputError(f"--{name} needs --query_data to be a BEIR directory")

    @property
    def asked(self) -> bool:
        return self.query_data is not None or self.preference_data is not None


@dataclass(frozen=True)
class ComputeConfig:
    """Where to compute, how much at once, where to keep what need not be computed twice."""

    _argument_group_name = "compute"

    device: str = _flag("auto, cpu, cuda or cuda:N.", "auto")
    max_tokens_per_micro_batch: int | None = _flag(
        "Tokens through the model at once, padding included: speed and memory, not the batch. "
        "[found by trying on a card, 4096 on the CPU; the longest text in any case]", None,
        metavar="TOKENS",
    )  # fmt: skip
    cache_dir: str = _flag("Token ids and reference margins are kept here.", "~/.cache/rankpo-fast")
    no_cache: bool = _flag("Keep neither, and read none that was kept.", False)

    def __post_init__(self) -> None:
        _check_names(self, "device", "cache_dir")
        _check_at_least(self, 1, "max_tokens_per_micro_batch")

    @property
    def cache_path(self) -> Path | None:
        """None: nothing is kept, with --no_cache or where ~ is nobody's home."""
        path = os.path.expanduser(self.cache_dir)  # Path's own raises for an unknown ~user
        return None if self.no_cache or path.startswith("~") else Path(path)

    def torch_device(self) -> "torch.device":
        """The device to compute on; InputError where there is no such device."""
        import torch

        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        known = re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]{0,3}))?", name) is not None
        _require(self, "device", "auto, cpu, cuda or cuda:N", known)
        kind, _, number = name.partition(":")
        if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
        return torch.device(name)


@dataclass(frozen=True)
class EvaluateOutputConfig:
    """What `evaluate` leaves on disk."""

    _argument_group_name = "output"

    output: str | None = _flag("Also write the figures to this JSON file.", None)
    output_run: str | None = _flag("Write the rankings there, in TREC's format.", None)

    def __post_init__(self) -> None:
        _check_names(self, "output", "output_run")
        both = self.output is not None and self.output_run is not None
        if both and same_file(self.output, self.output_run):
            raise InputError(f"--output and --output_run are both {self.output}: give two names")


@dataclass(frozen=True)
class EncodeConfig:
    """Texts to vectors."""

    _argument_group_name = "encode"

    input: str = _flag("JSONL file, also .gz, .zst, .parquet, - or owner/name of the hub.")
    output: str = _flag("The vectors [rows, dims], fp32, length 1: a .npy file.")
    text_key: str = _flag('Key of the text in a row; before "text" goes its "title".', "text")
    role: Literal["query", "passage"] = _flag(
        "Decides prefix and limit.", "passage", aliases=["--as"]
    )
    max_length: int | None = _flag("Tokens kept of a text. [the limit of its role]", None)

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_names(self, "input", "output", "text_key")
        _check_at_least(self, 1, "max_length")
        _require(self, "output", "a name that ends in .npy", self.output.endswith(".npy"))


@dataclass(frozen=True)
class MineConfig:
    """Hard negatives: passages the model ranks high that are no known positives of the query."""

    _argument_group_name = "mining"

    train_data: list[str] = _flag("Rows of stage 1; their positives are kept.")
    output_file: str = _flag("The rows with mined negatives, as JSONL.")
    corpus_data: str | None = _flag("JSONL of passages to search. [those of --train_data]", None)
    method: Literal["topk", "sample"] = _flag(
        "The best ranked of the range, or drawn from it.", "sample"
    )
    search_range: str = _flag("Ranks to take from, first and one past the last.", "0-100")
    num_negatives: int = _flag("Negatives per query.", 10)
    max_score: float | None = _flag("Drop candidates whose cosine with the query is higher.", None)
    absolute_margin: float | None = _flag(
        "Drop candidates not this much below the query's lowest positive.", None
    )
    relative_margin: float | None = _flag(
        "Likewise, in shares of that positive's cosine (of its size, where it is below 0).", None
    )
    combine: bool = _flag("Keep the negatives a row has, before the mined ones.", False)
    seed: int = _flag("Of --method sample.", 42)

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_names(self, "train_data", "output_file", "corpus_data")
        _check_at_least(self, 1, "num_negatives")
        _check_at_least(self, 0, "absolute_margin", "relative_margin")
        inside = self.max_score is None or -1 < self.max_score <= 1
        _require(self, "max_score", "a cosine in (-1, 1]", inside)
        _check_seed(self)
        first, last = self.ranks
        _require(self, "search_range", "FIRST-LAST with FIRST < LAST", first < last)
        if last - first < self.num_negatives:
            wanted = f"--num_negatives {self.num_negatives}"
            raise InputError(f"--search_range {self.search_range} is narrower than {wanted}")

    @property
    def ranks(self) -> tuple[int, int]:
        numbers = re.fullmatch(r"([0-9]{1,12})-([0-9]{1,12})", self.search_range)
        _require(self, "search_range", "FIRST-LAST, for instance 0-100", numbers is not None)
        return int(numbers[1]), int(numbers[2])
