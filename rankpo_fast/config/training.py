"""The run: its length, its optimizer, and what it leaves on disk."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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

REPORTERS = ("tensorboard", "wandb", "trackio", "mlflow")


@dataclass(frozen=True)
class TrainingConfig(Config):
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
    optim: Literal[
        "adamw", "adamw_8bit", "adamw_4bit", "adamw_fp8", "paged_adamw_8bit", "muon"
    ] = flag(
        "States of 8 bytes a parameter; of 2, 1 and 2 (torchao); of 2 that a GPU may put on the "
        "host (bitsandbytes); of 4 for matrices (torch).", "adamw",
    )  # fmt: skip
    weight_decay: float = flag("Of AdamW; biases and norms are spared.", 0.0)
    adam_beta1: float = flag("Of AdamW.", 0.9)
    adam_beta2: float = flag("Of AdamW.", 0.999)
    adam_epsilon: float = flag("Of AdamW.", 1e-8)
    max_grad_norm: float = flag("Gradients are scaled down to this norm; 0: never.", 1.0)
    activation_memory_gb: float | None = flag(
        "To keep what backward needs rather than compute it twice; 0: the least. [what one "
        "micro-batch leaves of what is free, of half of it on the CPU]", None, metavar="GB"
    )  # fmt: skip
    offload: list[Literal["activations", "optimizer"]] = flag(
        "What of a GPU's memory lies on the host until it is needed: activations, optimizer.", []
    )
    shard: Literal["none", "grad", "full"] = flag(
        "Of several GPUs each holds all; its part of gradients and optimizer; of weights too.",
        "none",
    )
    auto: bool = flag("Settings of memory as `rankpo-fast plan` finds them for this GPU.", False)
    seed: int = flag("Of row order, sampled negatives, dropout, random weights.", 42)
    deterministic: bool = flag(
        "Sum in one order on a GPU too: equal runs have equal bits with texts of more than 64 "
        "tokens as well, and attention's backward pass is slower.", False,
    )  # fmt: skip
    logging_steps: int = flag("Steps between two lines of metrics.jsonl.", 10)
    eval_steps: int | None = flag("Steps between two evaluations. [only at the end]", None)
    metric_for_best_model: list[str] = flag(
        "Figures whose sum decides which evaluated step's model is the result, as ndcg@20 "
        "alignment; its checkpoint is kept. [the last step's]", []
    )  # fmt: skip
    metric_weights: list[float] = flag("Of them in that sum. [1 each]", [])
    patience: int | None = flag(
        "Evaluations in a row without a higher sum after which the run ends. [all steps are done]",
        None,
    )
    save_steps: int | None = flag("Steps between two checkpoints. [by time]", None)
    save_minutes: float | None = flag(
        "Minutes between two checkpoints, besides one at the end of an epoch of a minute or "
        "more; 0: only when stopped. [10, or 0 where --save_steps is given]", None,
        metavar="MINUTES",
    )  # fmt: skip
    background_saves: bool = flag(
        "Write checkpoints while the training goes on, of a copy in the host's memory, where there "
        "is room; false: a step waits for its checkpoint.", True,
    )  # fmt: skip
    save_total_limit: int = flag("Checkpoints kept, the newest; 0: all.", 2)
    resume: str | None = flag(
        "Go on from the newest complete checkpoint of --output_dir, or from the one given.",
        None, nargs="?", const="newest", metavar="CHECKPOINT",
    )  # fmt: skip
    auto_resume: bool = flag(
        "--resume where a run of this program is in --output_dir, else start one: for schedulers, "
        "which run a command again.", False,
    )  # fmt: skip
    after_save: str | None = flag(
        "Run by the shell after each complete checkpoint, whose path is in RANKPO_CHECKPOINT.",
        None, metavar="COMMAND",
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

    def check(self) -> None:
        check_names(self, "output_dir", "resume", "project", "run_name")
        self._check_reporters()
        self._check_choice()
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
        if self.auto_resume and (self.resume is not None or self.overwrite_output_dir):
            raise InputError("--auto_resume decides whether there is a run to go on with: leave "
                             "out --resume and --overwrite_output_dir")  # fmt: skip
        if self.resume is not None and self.overwrite_output_dir:
            raise InputError("--resume and --overwrite_output_dir contradict each other: give one")

    def _check_choice(self) -> None:
        metrics, weights = self.metric_for_best_model, self.metric_weights
        check_names(self, "metric_for_best_model")
        check_at_least(self, 1, "patience")
        for name in ("metric_weights", "patience"):
            if getattr(self, name) and not metrics:
                raise InputError(f"--{name} needs --metric_for_best_model", name)
        twice = len(set(metrics)) < len(metrics)
        require(self, "metric_for_best_model", "names, each once", not twice)
        fine = all(math.isfinite(weight) and weight > 0 for weight in weights)
        rule = f"{len(metrics)} finite numbers > 0, one for each of --metric_for_best_model"
        require(self, "metric_weights", rule, fine and len(weights) in (0, len(metrics)))

    def _check_reporters(self) -> None:
        given = self.report_to
        known = len(set(given)) == len(given) > 0 and {*given} <= {*REPORTERS, "none", "all"}
        known = known and (len(given) == 1 or {"none", "all"}.isdisjoint(given))
        require(self, "report_to", f"none, all, or some of {', '.join(REPORTERS)}", known)
        with_projects = [name for name in REPORTERS if name != "tensorboard"]
        for name, takers in {"project": with_projects, "run_name": REPORTERS}.items():
            if getattr(self, name) is not None and {"all", *takers}.isdisjoint(given):
                raise InputError(f"--{name} needs --report_to, one of {', '.join(takers)}")
        plain = self.run_name is None or Path("x", self.run_name).name == self.run_name != ".."
        require(self, "run_name", "the name of a folder, without / in it", plain)
