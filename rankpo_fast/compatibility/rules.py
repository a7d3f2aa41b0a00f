"""Rules: from the values of another trainer's flag to flags of ours, or to an error."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rankpo_fast.errors import InputError


@dataclass(frozen=True)
class Reading:
    """What a flag of another trainer is read as: flags of ours with values, or none, and why."""

    flags: dict[str, list[str]]
    why: str = ""


@dataclass(frozen=True)
class Line:
    """The command line a flag stands in."""

    command: str
    known: frozenset[str]  # our flags that the command has
    given: dict[str, list[str]]  # of these the ones it is given, with their values

    @property
    def sends(self) -> bool:
        """Whether metrics go to a logger."""
        return self.given.get("report_to", ["none"]) != ["none"]

    def first(self, name: str, default: str) -> str:
        return (self.given.get(name) or [default])[0]


Rule = Callable[[list[str], Line], Reading | None]  # None: as it stands


def unneeded(why: str) -> Rule:
    """Taken with any value, and without effect."""
    return lambda values, line: Reading({}, f"not needed: {why}")


def only(taken: str, why: str, instead: str) -> Rule:
    """Taken with one of the values `taken`, and without effect; other values are refused."""

    def rule(values: list[str], line: Line) -> Reading:
        if truth(values) in taken.split():
            return Reading({}, f"not needed: {why}")
        raise InputError(f"not taken: {instead}")

    return rule


def refused(instead: str) -> Rule:
    """Taken only where it says that something is off."""
    return only(OFF, "it is off here", instead)


def renamed(flag: str, values: dict[str, str]) -> Rule:
    """Other names of values of our `flag`, and its own, in any case of the letters."""

    def rule(given: list[str], line: Line) -> Reading | None:
        [value] = given if len(given) == 1 else [""]
        word = value.lower()
        ours = word if word in values.values() else values.get(word)
        return None if ours in (None, value) else Reading({flag: [ours]})

    return rule


OFF = "false none null no 0 0.0 -1"  # and an empty value


def truth(values: list[str]) -> str:
    """The value as one word; the many ways to say true and false as those words."""
    word = " ".join(values).strip().lower() or ("false" if values else "true")
    ways = {"true": ("yes", "1", "t", "y", "on"), "false": ("no", "f", "n", "off", "[]", "{}")}
    return next((truth for truth, others in ways.items() if word in others), word)


def _number(values: list[str]) -> float | None:
    try:
        return float(values[0])
    except (ValueError, IndexError):
        return None


def warmup_steps(values: list[str], line: Line) -> Reading:
    number = _number(values)
    if number == 0 and "warmup_ratio" in line.given:  # transformers: 0 steps leave it to the ratio
        return Reading({}, "0 leaves --warmup_ratio")
    if number is not None and 0 <= number < 1:  # transformers: below 1 it is a share
        return Reading({"warmup_ratio": values})
    steps = _number([line.first("max_steps", "")])
    if number is not None and steps and number < steps:
        ratio = number / steps
        while math.ceil(steps * ratio) > number:  # as the schedule counts
            ratio = math.nextafter(ratio, 0)
        return Reading({"warmup_ratio": [repr(ratio)]})
    raise InputError("not taken: --warmup_ratio is the share of the steps that warm up")


def save_strategy(values: list[str], line: Line) -> Reading:
    word, by_time = truth(values), "save_minutes" in line.known
    if word == "steps":  # transformers: every 500
        steps = {} if "save_steps" in line.given else {"save_steps": ["500"]}
        return Reading(steps, "--save_steps says when")
    if word == "epoch":
        when = "at the end of an epoch and by time" if by_time else "by --save_steps"
        return Reading({}, f"not needed: checkpoints come {when}, the model at the end")
    if word == "false" and "save_steps" not in line.given:
        off = {"save_minutes": ["0"]} if by_time else {}
        return Reading(off, "no --save_steps: checkpoints only when stopped")
    raise InputError("not taken: --save_steps says when checkpoints are written")


def wandb_project(values: list[str], line: Line) -> Reading:
    if line.sends and "project" in line.known:
        return Reading({"project": values})
    return Reading({}, "has no effect: metrics go to wandb with --report_to wandb")


def run_name(values: list[str], line: Line) -> Reading | None:
    """Beside `wandb_project` the authors' own; else it is ours."""
    if line.sends or ("run_name" in line.known and "wandb_project" not in line.given):
        return None
    return Reading({}, "has no effect: metrics go to wandb with --report_to wandb")


def eval_strategy(values: list[str], line: Line) -> Reading:
    word = truth(values)
    if word == "steps":  # transformers: every --logging_steps
        every = line.given.get("logging_steps")
        if "eval_steps" not in line.given and every is None:
            raise InputError("not taken: give --eval_steps")
        sends = {} if "eval_steps" in line.given or every is None else {"eval_steps": every}
        return Reading(sends, "--eval_steps says when")
    if word == "false" and not {"query_data", "preference_data"} & line.given.keys():
        return Reading({}, "no data to evaluate on is given")
    raise InputError("not taken: --eval_steps says when; without it, once at the end")


def deepspeed(values: list[str], line: Line) -> Reading:
    """A file whose settings are "auto" changes nothing; one that sets what flags set is refused."""
    if truth(values) in OFF.split():
        return Reading({}, "it is off here")
    path = Path(values[0] if values else "")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = {}  # it would not be read anyway
    flags = {
        "optimizer": "--learning_rate, --adam_beta1, --weight_decay",
        "scheduler": "--lr_scheduler_type, --warmup_ratio",
        "gradient_clipping": "--max_grad_norm",
        "gradient_accumulation_steps": "--gradient_accumulation_steps",
        "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
    }
    for key, instead in flags.items():
        if isinstance(content, dict) and content.get(key, "auto") != "auto":
            raise InputError(f"its {key} would not be read: use {instead}, and leave the file out")
    return Reading({}, "not needed: each process holds the model, and the batch is cut to fit")


def resume(values: list[str], line: Line) -> Reading:
    word = truth(values)
    if word in OFF.split():
        return Reading({}, "it is off here")
    return Reading({"resume": [] if word == "true" else values})


def cpu(values: list[str], line: Line) -> Reading:
    return Reading({"device": ["cpu"]} if truth(values) == "true" else {}, "it is off here")


def device(values: list[str], line: Line) -> Reading | None:
    return Reading({"device": [f"cuda:{values[0]}"]}) if values and values[0].isdecimal() else None


OPTIMIZERS = {  # transformers' names -> those of --optim
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf"), "adamw"),
    "adamw_torch_8bit": "adamw_8bit",
    "adamw_torch_4bit": "adamw_4bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}


def optimizer(values: list[str], line: Line) -> Reading | None:
    """None: one of ours, or argparse says which there are."""
    name = OPTIMIZERS.get(truth(values), truth(values))
    return None if [name] == values else Reading({"optim": [name]})


def lora(values: list[str], line: Line) -> Reading:
    """A switch where here a rank is one."""
    on, given = truth(values) == "true", "lora_rank" in line.given
    if on and not given:
        raise InputError("give --lora_rank, 16 for instance, which switches LoRA on")
    if given and not on:
        raise InputError("contradicts --lora_rank, which switches LoRA on: leave one of them out")
    return Reading({}, "--lora_rank says so" if on else "it is off here")


def lora_targets(values: list[str], line: Line) -> Reading | None:
    """Names between commas become several."""
    split = [name for value in values for name in value.split(",") if name]
    return None if split == values else Reading({"lora_targets": split})


def precision(values: list[str], line: Line) -> Reading:
    word = truth(values)
    if word in ("bf16", "bfloat16"):
        return Reading({"bf16": ["true"]})
    if word in ("false", "fp32", "float32"):
        return Reading({"bf16": ["false"]})
    raise InputError("not taken: --bf16 computes in half precision; fp16 is not offered")


def group_size(values: list[str], line: Line) -> Reading:
    """FlagEmbedding's and Tevatron's: a positive and its negatives."""
    number = _number(values)
    if number is None or number < 1 or number != int(number):
        raise InputError("not taken: --num_negatives counts a query's negatives, without its one "
                         "positive")  # fmt: skip
    return Reading({"num_negatives": [str(int(number) - 1)]})


def instruction_format(flag: str) -> Rule:
    """FlagEmbedding's "Instruct: {}\\nQuery: {}", of what `flag` of ours gives and of the text."""

    def rule(values: list[str], line: Line) -> Reading:
        instruction = line.first(flag, "")
        parts = " ".join(values).split("{}")
        if not instruction or parts == ["", "", ""]:
            return Reading({}, f"not needed: what --{flag} gives goes before texts as it is")
        if len(parts) != 3 or parts[2]:
            raise InputError(f"not taken: --{flag} goes before texts, and nothing behind them")
        whole = (parts[0] + instruction + parts[1]).replace("\n", "\\n")
        raise InputError(f"not taken: give the whole of it, --{flag} '{whole}'")

    return rule


def same_dataset(values: list[str], line: Line) -> Reading:
    """FlagEmbedding's: each batch has rows of one file."""
    if truth(values) in OFF.split():
        return Reading({}, "it is off here")
    files = line.given.get("train_data", [])
    if len(files) > 1 or any(Path(file).is_dir() for file in files):
        raise InputError("not taken: rows of all files share batches; run the files one by one to "
                         "keep them apart")  # fmt: skip
    return Reading({}, "not needed: there is one file")


def dataset_name(values: list[str], line: Line) -> Reading:
    """Tevatron's: a dataset, or beside `dataset_path` the kind of file."""
    if "train_data" in line.given and truth(values) in ("json", "jsonl", "parquet"):
        return Reading({}, "not needed: the kind of a file is known from it")
    return Reading({"train_data": values})


def scale(values: list[str], line: Line) -> Reading:
    number = _number(values)
    if not number or number < 0:
        raise InputError("not taken: --temperature is 1 / scale")
    return Reading({"temperature": [repr(1 / number)]})


def dropout(values: list[str], line: Line) -> Reading:
    if _number(values) != 0:
        raise InputError("not taken: dropout is as the model's config says, or --disable_dropout")
    return Reading({"disable_dropout": ["true"]})


def max_steps(values: list[str], line: Line) -> Reading | None:
    return Reading({}, "it stands for unset") if _number(values) == -1 else None


def steps(values: list[str], line: Line) -> None:
    number = _number(values)
    if number is not None and 0 < number < 1:
        raise InputError("must be a number of steps; a share of the run is not taken")


def cutoffs(values: list[str], line: Line) -> Reading | None:
    ranks = [rank for value in values for rank in value.replace(",", " ").split()]
    return Reading({"cutoffs": ranks}) if ranks != values else None


def k(values: list[str], line: Line) -> Reading:
    """The depth of the authors' search."""
    depth = _number(values)
    cutoffs = [_number([cutoff]) or 0 for cutoff in line.given.get("cutoffs", ["100"])]
    if depth is None or depth < max(cutoffs):
        raise InputError("not taken: the search goes as deep as --cutoffs, so end these there")
    return Reading({}, "not needed: the search goes as deep as --cutoffs")


def evaluate_output(values: list[str], line: Line) -> Reading:
    """The authors' DIR/MODEL/main.json, or DIR/MODEL/checkpoint-N.json."""
    if line.command != "evaluate":
        raise InputError("not taken: a file is written, see --output or --output_file")
    path = Path(line.first("model_name_or_path", "model"))
    parts = (path.parent.name, f"{path.name}.json")
    if not (path.name.startswith("checkpoint-") and path.parent.name):
        parts = (path.name, "main.json")
    return Reading({"output": [str(Path(values[0] if values else ".", *parts))]})


def output_prefix(values: list[str], line: Line) -> Reading:
    """The authors' DIR/METHOD.jsonl."""
    name = f"{line.first('method', 'sample')}.jsonl"
    return Reading({"output_file": [str(Path(values[0] if values else ".", name))]})


def method(values: list[str], line: Line) -> None:
    if any("," in value for value in values):
        raise InputError("must be topk, sample or cluster, one of them")


def num_clusters(values: list[str], line: Line) -> Reading:
    if line.first("method", "sample") == "cluster":
        return Reading({"clusters": values})
    return Reading({}, "not needed: acts only with --method cluster")


def encode_is_query(values: list[str], line: Line) -> Reading:
    return Reading({"role": ["query" if truth(values) == "true" else "passage"]})
