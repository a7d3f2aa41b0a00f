"""Settings of a training, a frozen dataclass a room, each the flags of that room.

Field names are the flags (`learning_rate` is `--learning_rate` and `--learning-rate`), defaults are
those of the paper's scripts, and help texts say in brackets what holds where a default is None.
Every class checks its own values: what cannot be used is an InputError naming flag and value. Other
commands read these too, and have some of their own in commands/config.py.
"""

import math
import os
import re
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rankpo_fast.errors import InputError
from rankpo_fast.fields import (
    AutoOrBool,
    check_above,
    check_at_least,
    check_choices,
    check_names,
    check_seed,
    flag,
    require,
)

if TYPE_CHECKING:
    import torch

REPORTERS = ("tensorboard", "wandb", "trackio", "mlflow")
PAPER_SPECIAL_TOKENS = [
    "<keyword>", "</keyword>", "<title>", "</title>", "<abstract>", "</abstract>", "<sep>",
]  # fmt: skip
PAPER_MAX_QUERY_LENGTH = 1280  # tokens
PAPER_MAX_PASSAGE_LENGTH = 4096


def _check_weights(config: Any) -> None:
    weights, files = config.train_data_weights, len(config.train_data)
    if weights is None:
        return
    fine = all(math.isfinite(weight) and weight > 0 for weight in weights)
    require(config, "train_data_weights", "finite numbers > 0", fine)
    rule = f"one number for each of the {files} files of --train_data"
    require(config, "train_data_weights", rule, len(weights) == files)


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

    model_name_or_path: str = flag("Hub name or directory of the model.")
    tokenizer_name: str | None = flag("Tokenizer, if not the model's.", None)
    pooling: Literal["auto", "last", "mean", "cls"] = flag(
        "auto: as the model directory says, else last (causal models) or mean.", "auto"
    )
    attn_implementation: Literal[
        "auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen_attn",
        "sdpa", "eager",
    ] = flag("auto: the fastest here, which the start names; eager pads.", "auto")  # fmt: skip
    packing: bool = flag("Texts end to end, none padded; false: padded to similar lengths.", True)
    query_prefix: str | None = flag("Goes before every query. [as the model says]", None)
    passage_prefix: str | None = flag("Goes before every passage. [as the model says]", None)
    max_query_length: int | None = flag(
        "Tokens kept of a query. [as the model says, else 1280]", None
    )
    max_passage_length: int | None = flag(
        "Tokens kept of a passage. [as the model says, else 4096]", None
    )
    append_eos: bool | None = flag(
        "Texts end with the tokenizer's end of text. [as the model says]", None,
        nargs="?", const=True,
    )  # fmt: skip
    bf16: AutoOrBool = flag(
        "Autocast: vectors good to two digits; auto: where it is faster than fp32.", False
    )

    def __post_init__(self) -> None:
        check_names(self, "model_name_or_path", "tokenizer_name")
        for name in ("query_prefix", "passage_prefix"):
            _read_newlines(self, name)
        check_choices(self)
        check_at_least(self, 1, "max_query_length", "max_passage_length")


@dataclass(frozen=True)
class ModelConfig(EncoderConfig):
    """The encoder to train. `special_tokens=["paper"]` becomes the paper's list."""

    bf16: AutoOrBool = flag(
        "Autocast, weights and losses stay fp32; auto: where it is faster, on a CPU as measured.",
        "auto",
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "Of the saved weights; checkpoints stay fp32. auto: as the model had them.", "auto"
    )
    from_scratch: bool = flag("Random weights: only config and tokenizer are read.", False)
    special_tokens: list[str] = flag("Added to the tokenizer; paper: the paper's own.", [])
    gradient_checkpointing: AutoOrBool = flag(
        "Less memory for a third more compute; auto: where a micro-batch does not fit without.",
        "auto",
    )
    disable_dropout: bool = flag("Every dropout at 0.", False)
    torch_compile: bool = flag("Compile the layers: a slow start, then faster steps.", False)
    use_liger_kernel: bool | None = flag(
        "Liger's kernels in the model. [where installed, on a GPU]", None, nargs="?", const=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self, "special_tokens")
        given = self.special_tokens
        tokens = [t for g in given for t in (PAPER_SPECIAL_TOKENS if g == "paper" else [g])]
        object.__setattr__(self, "special_tokens", list(dict.fromkeys(tokens)))


@dataclass(frozen=True)
class ContrastiveDataConfig:
    """Rows of stage 1."""

    _argument_group_name = "data"

    train_data: list[str] = flag(
        'JSONL files of {"query": str, "positives": [str], "negatives": [str]}, or as other tools '
        "write them; also .gz, .zst, .parquet, - for standard input, owner/name of the hub."
    )
    train_data_weights: list[float] | None = flag(
        "How often a row of each file comes in an epoch, 0.5: every other time. [1 each]", None
    )
    num_negatives: int = flag("Sampled per query and epoch, besides the batch's other passages.", 5)

    def __post_init__(self) -> None:
        check_names(self, "train_data")
        _check_weights(self)
        check_at_least(self, 0, "num_negatives")


@dataclass(frozen=True)
class RankPODataConfig:
    """Rows of stage 2."""

    _argument_group_name = "data"

    train_data: list[str] = flag(
        'JSONL files of {"query", "passage1", "passage2", "preferred": "A" or "B"}, or of '
        '{"prompt", "chosen", "rejected"}; also .gz, .zst, .parquet, -, owner/name of the hub.'
    )
    train_data_weights: list[float] | None = flag(
        "How often a row of each file comes in an epoch, 0.5: every other time. [1 each]", None
    )
    use_confidence: bool = flag("Weight pairs by confidence_score / 100.", False)

    def __post_init__(self) -> None:
        check_names(self, "train_data")
        _check_weights(self)


@dataclass(frozen=True)
class ReplayConfig:
    """Rows of stage 1 that stage 2 goes on with, so that it does not forget them; none: no replay.

    The loss of a step is stage 2's + replay_weight * InfoNCE of as many batches of these rows.
    """

    _argument_group_name = "replay"

    replay_data: list[str] = flag(
        "JSONL files of stage 1, of whose loss the model is reminded in stage 2.", []
    )
    # Where the demo's nDCG@20 * alignment is highest (validation split of seed 1).
    replay_weight: float = flag("Of their loss, beside that of stage 2.", 0.1)
    replay_batch_size: int | None = flag(
        "Rows of them per batch. [--per_device_train_batch_size]", None
    )
    replay_num_negatives: int = flag("As --num_negatives in stage 1.", 5)
    replay_temperature: float = flag("As --temperature in stage 1.", 0.02)

    def __post_init__(self) -> None:
        check_names(self, "replay_data")
        check_above(self, 0, "replay_weight", "replay_temperature")
        check_at_least(self, 1, "replay_batch_size")
        check_at_least(self, 0, "replay_num_negatives")
        for name, default in ((f.name, f.default) for f in fields(self) if f.name != "replay_data"):
            if not self.replay_data and getattr(self, name) != default:
                raise InputError(f"--{name} needs --replay_data, the JSONL files of stage 1")


NO_REPLAY = ReplayConfig()


@dataclass(frozen=True)
class ContrastiveLossConfig:
    """InfoNCE."""

    _argument_group_name = "loss"

    temperature: float = flag("Cosine similarities are divided by it.", 0.02)

    def __post_init__(self) -> None:
        check_above(self, 0, "temperature")


@dataclass(frozen=True)
class RankPOLossConfig:
    """RankPO, or SimRankPO without a reference, or SFT with `--sft_weight 1 --rankpo_weight 0`."""

    _argument_group_name = "loss"

    beta: float = flag("Sharpness of the preference margin.", 2.0)
    temperature: float = flag("Cosine similarities are divided by it.", 0.1)
    gamma_beta_ratio: float = flag("Margin asked for, in units of cosine / temperature.", 0.0)
    loss_type: Literal["sigmoid", "hinge"] = flag("Shape of the preference loss.", "sigmoid")
    label_smoothing: float = flag("Share of wrong preferences to assume.", 0.0)
    sft_weight: float = flag("Of the cross entropy over chosen and rejected.", 0.0)
    rankpo_weight: float = flag("Of the preference loss.", 1.0)
    reference_free: bool = flag("False: margins count relative to a frozen model's.", True)
    reference_model_name_or_path: str | None = flag(
        "The frozen model. [the trained one, as it starts]", None
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_above(self, 0, "beta", "temperature")
        check_at_least(self, 0, "sft_weight", "rankpo_weight")
        require(self, "gamma_beta_ratio", "finite", math.isfinite(self.gamma_beta_ratio))
        require(self, "label_smoothing", "in [0, 0.5)", 0 <= self.label_smoothing < 0.5)
        check_names(self, "reference_model_name_or_path")
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

    output_dir: str = flag("Where the model, metrics.jsonl and checkpoints go.")
    num_train_epochs: float = flag("Passes over the rows.", 3.0)
    max_steps: int | None = flag("Optimizer steps; overrides --num_train_epochs.", None)
    per_device_train_batch_size: int = flag("Rows per batch, of each process.", 32)
    gradient_accumulation_steps: int = flag(
        "Batches per optimizer step; unlike a larger batch they add no negatives.", 1
    )
    learning_rate: float = flag("Peak learning rate.", 1e-5)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = flag(
        "Course after the warm-up.", "cosine"
    )
    warmup_ratio: float = flag("Share of the steps in which the learning rate rises.", 0.1)
    weight_decay: float = flag("Of AdamW; biases and norms are spared.", 0.0)
    adam_beta1: float = flag("Of AdamW.", 0.9)
    adam_beta2: float = flag("Of AdamW.", 0.999)
    adam_epsilon: float = flag("Of AdamW.", 1e-8)
    max_grad_norm: float = flag("Gradients are scaled down to this norm; 0: never.", 1.0)
    activation_memory_gb: float | None = flag(
        "To keep what backward needs rather than compute it twice; 0: the least. [what one "
        "micro-batch leaves of what is free, of half of it on the CPU]", None, metavar="GB"
    )  # fmt: skip
    seed: int = flag("Of row order, sampled negatives, dropout, random weights.", 42)
    logging_steps: int = flag("Steps between two lines of metrics.jsonl.", 10)
    eval_steps: int | None = flag("Steps between two evaluations. [only at the end]", None)
    save_steps: int | None = flag("Steps between two checkpoints. [by time]", None)
    save_minutes: float | None = flag(
        "Minutes between two checkpoints, besides one at the end of an epoch of a minute or "
        "more; 0: only when stopped. [10, or 0 where --save_steps is given]", None,
        metavar="MINUTES",
    )  # fmt: skip
    save_total_limit: int = flag("Checkpoints kept, the newest; 0: all.", 2)
    resume: str | None = flag(
        "Go on from the newest complete checkpoint of --output_dir, or from the one given.",
        None, nargs="?", const="newest", metavar="CHECKPOINT",
    )  # fmt: skip
    overwrite_output_dir: bool = flag("Delete the earlier run that is there.", False)
    report_to: list[str] = flag(
        "Also send the metrics there: tensorboard, wandb, trackio, mlflow, several of them, all "
        "that are installed (all), or none.", ["none"]
    )  # fmt: skip
    project: str | None = flag("Of wandb, trackio, mlflow. [rankpo-fast]", None)
    run_name: str | None = flag("Of the run in --report_to. [that of --output_dir]", None)
    profile_steps: int = flag(
        "Say where the time of so many steps goes, after 4 more; their trace is in profile/.", 0
    )

    def __post_init__(self) -> None:
        check_choices(self)
        check_names(self, "output_dir", "resume", "project", "run_name")
        self._check_reporters()
        check_above(self, 0, "num_train_epochs", "learning_rate", "adam_epsilon")
        check_at_least(
            self, 1, "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"
        )
        check_at_least(self, 1, "logging_steps", "eval_steps", "save_steps")
        check_at_least(self, 0, "weight_decay", "max_grad_norm", "profile_steps")
        check_at_least(self, 0, "activation_memory_gb", "save_minutes", "save_total_limit")
        check_seed(self)
        for name in ("warmup_ratio", "adam_beta1", "adam_beta2"):
            require(self, name, "in [0, 1)", 0 <= getattr(self, name) < 1)
        if self.resume is not None and self.overwrite_output_dir:
            raise InputError("--resume and --overwrite_output_dir contradict each other: give one")

    def _check_reporters(self) -> None:
        given = [self.report_to] if isinstance(self.report_to, str) else list(self.report_to)
        object.__setattr__(self, "report_to", given)
        known = len(set(given)) == len(given) > 0 and {*given} <= {*REPORTERS, "none", "all"}
        known = known and (len(given) == 1 or {"none", "all"}.isdisjoint(given))
        require(self, "report_to", f"none, all, or some of {', '.join(REPORTERS)}", known)
        with_projects = [name for name in REPORTERS if name != "tensorboard"]
        for name, takers in {"project": with_projects, "run_name": REPORTERS}.items():
            if getattr(self, name) is not None and {"all", *takers}.isdisjoint(given):
                raise InputError(f"--{name} needs --report_to, one of {', '.join(takers)}")
        plain = self.run_name is None or Path("x", self.run_name).name == self.run_name != ".."
        require(self, "run_name", "the name of a folder, without / in it", plain)


@dataclass(frozen=True)
class EvaluationConfig:
    """What an encoder is measured on: retrieval, preference pairs, or both."""

    _argument_group_name = "evaluation"

    query_data: str | None = flag("JSONL of queries, or a BEIR directory.", None)
    corpus_data: str | None = flag("JSONL that --query_data refers to by row number.", None)
    preference_data: list[str] | None = flag(
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

    def __post_init__(self) -> None:
        check_names(self, "query_data", "corpus_data", "split", "preference_data")
        require(self, "cutoffs", "whole numbers >= 1", min(self.cutoffs, default=0) >= 1)
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

    device: str = flag("auto, cpu, cuda or cuda:N.", "auto")
    max_tokens_per_micro_batch: int | None = flag(
        "Tokens through the model at once, padding included: speed and memory, not the batch. "
        "[found by trying on a card, 4096 on the CPU; the longest text in any case]", None,
        metavar="TOKENS",
    )  # fmt: skip
    cache_dir: str = flag("Token ids and reference margins are kept here.", "~/.cache/rankpo-fast")
    no_cache: bool = flag("Keep neither, and read none that was kept.", False)

    def __post_init__(self) -> None:
        check_names(self, "device", "cache_dir")
        check_at_least(self, 1, "max_tokens_per_micro_batch")

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
        require(self, "device", "auto, cpu, cuda or cuda:N", known)
        kind, _, number = name.partition(":")
        if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
        return torch.device(name)
