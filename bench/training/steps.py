"""What a training step costs. An implementation trains in a process of its own; all take turns, and
a round is a seed.
"""

import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from rankpo_fast.model.attention import KERNELS, Needs

from ..apart import in_a_process
from ..measure import spread, turned
from ..questions import (
    NEEDS_GPU,
    NOT_INSTALLED,
    OURS,
    OUT_OF_MEMORY,
    TOO_LARGE,
    Question,
    Rates,
    Result,
    Row,
    Settings,
    Shape,
)
from .backbones import TINY, config_of, state_bytes, written_bytes
from .corpus import SEED, Batches, batches, corpus_of, model_of, workplace
from .implementations import (
    Implementation,
    Measured,
    Task,
    measure,
    ndcg,
    one_graph,
    rankpo_fast,
    rankpo_fast_adapters,
    sentence_transformers,
)

MOST_ROUNDS = 3
LEARNING_RATE, OF_MANY_WEIGHTS = 3e-3, 1e-4  # of the tiny one, and of all others
GPU_BACKBONE = "Qwen3-0.6B"  # what a GPU is asked about: the tiny one would time its launches
Implementations = dict[str, Implementation | str]  # a str is the note of one that cannot run here
Answers = dict[str, list[Any]]  # of each implementation, in the order of rounds; a str is a note


def answer(
    name: str,
    asks: str,
    implementations: Callable[[Shape, Settings], Implementations],
    shape: Shape,
    settings: Settings,
) -> Result:
    of = batches_of(shape)
    asked = implementations(shape, settings)
    task = task_of(shape, settings.device, ndcg=name == "learning")
    answers = compare(asked, partial(in_a_process, measure), task, settings)

    def figures(implementation: str, given: Sequence[Measured]) -> dict[str, Any]:
        dtype = "bfloat16" if _bf16(asked[implementation], task) else "float32"
        rate = settings.rates.gemm.get(dtype)
        seconds = statistics.median(one.seconds for one in given)
        joules = [one.joules and one.joules / (of.tokens * one.counted / 1e6) for one in given]
        return {
            "queries": task.batch / seconds,
            "tokens": of.tokens / seconds,
            "mfu": of.flops / seconds / rate if rate else None,
            "joules": mean(joules),
        }

    config = config_of(shape["backbone"])
    rows = tuple(_excused(row, config, settings.device) for row in rows_of(answers, figures))
    about = dict(of.about)
    if task.ndcg:
        about["untrained ndcg"] = in_a_process(ndcg, task.model, task)
    return Result(name, "training", asks, shape, rows, flops=of.flops, about=about)


def batches_of(shape: Shape) -> Batches:
    directory, rows = corpus_of(_rows(shape), _repeating(shape))
    model = model_of(shape["backbone"], _rows(shape))
    return batches(rows, model, shape["batch"], shape["negatives"], SEED)


def task_of(shape: Shape, device: str, **more: Any) -> Task:
    """Without a seed and a place of its own, which each round gives it."""
    directory, _ = corpus_of(_rows(shape), _repeating(shape))
    return Task(
        model=model_of(shape["backbone"], _rows(shape)),
        corpus=directory,
        output=Path(),
        cache=workplace() / "cache",
        device=device,
        batch=shape["batch"],
        negatives=shape["negatives"],
        steps=shape["steps"],
        learning_rate=LEARNING_RATE if shape["backbone"] == TINY else OF_MANY_WEIGHTS,
        seed=0,
        repeating=_repeating(shape),
        **more,
    )


def compare(
    implementations: Implementations,
    ask: Callable[[Implementation, Task], Any],
    task: Task,
    settings: Settings,
) -> Answers:
    """What every implementation answers in every round, or the note why not; once stopped, it is
    not asked again."""
    first = next(iter(implementations))
    names = [name for name in implementations if name == first or settings.takes(name)]
    answers: Answers = {name: [] for name in names}
    stop = time.perf_counter() + settings.training_s
    for seed in range(1 if settings.level == "quick" else min(settings.rounds, MOST_ROUNDS)):
        for name in turned(names, seed):
            implementation, said = implementations[name], answers[name]
            if isinstance(implementation, str):
                said.append(implementation)
                continue
            if notes := [one for one in said if isinstance(one, str)]:
                said.append(notes[0])
                continue
            with tempfile.TemporaryDirectory(dir=workplace()) as place:
                own = dataclasses.replace(task, seed=seed, output=Path(place) / "trained")
                said.append(ask(implementation, own))
        if time.perf_counter() > stop:
            break
    return answers


def rows_of(
    answers: Answers, figures: Callable[[str, Sequence[Any]], dict[str, Any]]
) -> tuple[Row, ...]:
    """A row an implementation; a round that failed anywhere fails it.

    figures: more fields of an implementation's row, of what it answered in all rounds.
    """
    first = next(iter(answers.values()))
    rows = []
    for name, given in answers.items():
        if notes := [one for one in given if isinstance(one, str)]:
            rows.append(Row(name, notes[-1]))
            continue
        ratios = []
        if not any(isinstance(one, str) for one in first):
            ratios = [x.seconds / of.seconds for x, of in zip(given, first, strict=True)]
        learnt = [one.ndcg for one in given if one.ndcg is not None]
        fields: dict[str, Any] = {
            **spread([one.seconds for one in given], "seconds", "low", "high")
        }
        if ratios:
            fields |= spread(ratios, "ratio", "ratio_low", "ratio_high")
            fields |= {"ratios": tuple(ratios)}
        if learnt:
            fields |= {"ndcg": mean(learnt), "ndcg_low": min(learnt), "ndcg_high": max(learnt)}
        fields |= {
            "peak_mib": max(one.peak for one in given) / 2**20,
            "watts": mean(one.watts for one in given),
            "throttled": next((one.throttled for one in given if one.throttled), None),
        }
        rows.append(Row(name, **fields | figures(name, given)))
    return tuple(rows)


def mean(values: Any) -> float | None:
    """None of some that are None."""
    values = list(values)
    return None if None in values else statistics.mean(values)


def _rows(shape: Shape) -> int:
    """Of the corpus: no batch comes twice within fifty steps."""
    return max(160, shape["batch"] * min(shape["steps"], 50))


def _repeating(shape: Shape) -> bool:
    return shape.get("texts") == "repeating"


def _bf16(implementation: Implementation | str, task: Task) -> bool:
    return getattr(implementation, "keywords", {}).get("bf16", task.bf16)


def _excused(row: Row, config: Any, device: str) -> Row:
    """Nobody's fault: weights, gradients and AdamW's moments alone are more than there is."""
    if OUT_OF_MEMORY not in row.note or TOO_LARGE in row.note:
        return row
    needed, there = state_bytes(config), _memory_bytes(device)
    if needed < there:
        return row
    gib = f"{needed / 2**30:.1f} GiB before the first text, of {there / 2**30:.1f}"
    return Row(row.implementation, f"{OUT_OF_MEMORY}, {TOO_LARGE}: {gib}")


def _memory_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties().total_memory
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemTotal"].split()[0]) * 1024


# --- who answers ---

ST = {"sentence-transformers": partial(sentence_transformers)}


CACHED = {"sentence-transformers, cached by 32": partial(sentence_transformers, cached=32)}
BUSY = {"sentence-transformers, cached by 256": partial(sentence_transformers, cached=256)}


def _against(shape: Shape, settings: Settings) -> Implementations:
    return {**ST, OURS: partial(rankpo_fast)}


def _gradient_cache(shape: Shape, settings: Settings) -> Implementations:
    return {
        "one graph, autograd": partial(one_graph),
        OURS: partial(rankpo_fast),
        f"{OURS}, no graph kept": partial(rankpo_fast, activation_memory_gb=0.0),
        **ST,
        **CACHED,  # by as many rows as is its default
        **(BUSY if settings.device == "cuda" else {}),
    }


def _padding(shape: Shape, settings: Settings) -> Implementations:
    return {f"{OURS}, padded": partial(rankpo_fast, packing=False), OURS: partial(rankpo_fast)}


NOTHING = {
    "packing": False, "bf16": False, "gradient_checkpointing": False, "use_liger_kernel": False,
    "torch_compile": False,
}  # fmt: skip
KEPT = "+ gradient cache, graphs kept"
BF16_WEIGHTS, EIGHT_BITS = "+ bf16 weights", "+ 8-bit states"
LORA, QLORA = "+ LoRA", "+ 4-bit weights (QLoRA)"
LEVERS: Mapping[str, dict[str, Any]] = {
    "padded fp32, one graph": NOTHING,
    "+ packing": {"packing": True},
    "+ bf16": {"bf16": True},
    KEPT: {},  # the engine, which from here on takes the place of the plain loop
    "+ no graph kept": {"activation_memory_gb": 0.0},
    "+ selective checkpointing": {"gradient_checkpointing": "selective"},
    "+ checkpointing": {"gradient_checkpointing": True},
    "+ Liger": {"use_liger_kernel": True},
    "+ torch.compile": {"torch_compile": True},
    BF16_WEIGHTS: {"weights_dtype": "bf16"},
    EIGHT_BITS: {"optim": "adamw_8bit"},
    LORA: {"lora_rank": 16},
    QLORA: {"weights_dtype": "nf4"},
}
# On a CPU, to start or altogether: they come last there.
SLOW = ["+ torch.compile", "+ bf16", BF16_WEIGHTS, EIGHT_BITS]
BY = {BF16_WEIGHTS: "torchao", EIGHT_BITS: "torchao", LORA: "peft", QLORA: "bitsandbytes"}
ADAPTERS = (LORA, QLORA)  # which come after all others, and want weights in a file
DISK_SHARE = 0.5  # of what is free there, that these may take
IN_BF16 = {"+ bf16"}  # which nobody waits for on a CPU that emulates it


def ladder(shape: Shape, settings: Settings) -> Implementations:
    """Each rung has the levers of all before it, but for those that are not to be had here."""
    rungs: Implementations = {}
    given: dict[str, Any] = {}
    train: Callable[..., None] = one_graph
    on_cpu = settings.device == "cpu"
    names = [name for name in LEVERS if not (name in ADAPTERS or (on_cpu and name in SLOW))]
    if on_cpu and settings.level != "quick":
        names += SLOW
    names += ADAPTERS
    for name in names:
        lever = LEVERS[name]
        if lever.get("use_liger_kernel") and (note := _no_liger(settings.device)):
            rungs[name] = note
            continue
        if name in BY and find_spec(BY[name]) is None:
            rungs[name] = f"{BY[name]} {NOT_INSTALLED}"
            continue
        if name in ADAPTERS and (note := _no_room(shape["backbone"])):
            rungs[name] = note
            continue
        train = {KEPT: rankpo_fast, LORA: rankpo_fast_adapters}.get(name, train)
        given = given | lever
        rungs[name] = partial(train, **given)
    return rungs


def _no_room(backbone: str) -> str | None:
    """Why its random weights cannot be written, from where alone adapters take them."""
    needed, free = written_bytes(backbone), shutil.disk_usage(workplace()).free
    if needed <= DISK_SHARE * free:
        return None
    gib = f"{needed / 2**30:.1f} GiB to be written, of {free / 2**30:.1f} free on the disk"
    return f"{OUT_OF_MEMORY}, {TOO_LARGE}: {gib}"


def _attention(shape: Shape, settings: Settings) -> Implementations:
    config, device = config_of(shape["backbone"]), settings.device
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    needs = Needs(torch.device(device), device == "cuda", head_dim, False, False, False)
    implementations: Implementations = {
        f"{name}, padded": partial(rankpo_fast, attn_implementation=name, packing=False)
        for name in ("eager", "sdpa")
    }
    for kernel in reversed(KERNELS):
        reason = kernel.why_not(needs)
        if reason is None:
            implementations[kernel.name] = partial(rankpo_fast, attn_implementation=kernel.name)
        elif NOT_INSTALLED in reason:
            implementations[kernel.name] = f"{kernel.distribution} {NOT_INSTALLED}"
        else:
            why = f" for it: {reason}" if device == "cuda" else ""
            implementations[kernel.name] = f"{NEEDS_GPU}{why}"
    return implementations


def _liger(shape: Shape, settings: Settings) -> Implementations:
    return {
        "Liger off": partial(rankpo_fast, use_liger_kernel=False),
        "Liger on": _no_liger(settings.device) or partial(rankpo_fast, use_liger_kernel=True),
    }


def _no_liger(device: str) -> str | None:
    """Why there is none here."""
    if device == "cpu":
        return NEEDS_GPU
    try:
        metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return f"liger-kernel {NOT_INSTALLED}"
    return None


def _backbones(shape: Shape, settings: Settings) -> Implementations:
    implementations: Implementations = {**ST, **CACHED, OURS: partial(rankpo_fast)}
    if settings.device == "cpu":
        return implementations
    for name, train in (("sentence-transformers", sentence_transformers), (OURS, rankpo_fast)):
        # where a step does not fit without
        implementations[f"{name}, checkpointing"] = partial(train, gradient_checkpointing=True)
    if is_flash_attn_2_available():  # which ours takes by itself
        implementations["sentence-transformers, flash_attention_2"] = partial(
            sentence_transformers, attn_implementation="flash_attention_2"
        )
    return implementations


# --- what is asked ---


def _shape(batch: int, negatives: int, steps: int, backbone: str = TINY, **more: str) -> Shape:
    return {"batch": batch, "negatives": negatives, "steps": steps, "backbone": backbone, **more}


def _question(
    name: str,
    asks: str,
    implementations: Callable[[Shape, Settings], Implementations],
    cpu: tuple[list[Shape], list[Shape], list[Shape]],
    cuda: tuple[list[Shape], list[Shape], list[Shape]],
) -> Question:
    """cpu, cuda: the shapes of level quick, of default, and those that full has besides."""

    def shapes(device: str, level: str) -> list[Shape]:
        quick, default, more = cuda if device == "cuda" else cpu
        return {"quick": quick, "default": default, "full": [*default, *more]}[level]

    def names(device: str) -> list[str]:
        settings = Settings(device, "full", 1, Rates({}, 1.0))
        asked = (implementations(shape, settings) for shape in shapes(device, "full"))
        return list(dict.fromkeys(name for of_shape in asked for name in of_shape))

    of_shape = partial(answer, name, asks, implementations)
    return Question(name, "training", asks, shapes, of_shape, names)


LEARNING = [_shape(64, 1, 100), _shape(64, 1, 100, texts="repeating")]
SMALL = ["MiniLM-L6", "bge-base", GPU_BACKBONE, "Llama-3.2-1B", "Llama-3.2-3B"]
LARGE = ["Qwen3-4B", "Llama-3.1-8B"]
ON_GPU = (
    [_shape(64, 1, 4, GPU_BACKBONE)],
    [_shape(64, 1, 8, GPU_BACKBONE)],
    [_shape(64, 1, 8, "Llama-3.2-1B")],
)
QUESTIONS = [
    _question(
        "backbones", "What does a step cost, and how large a model fits?", _backbones,
        ([_shape(16, 1, 4)], [_shape(64, 1, 8), _shape(8, 1, 3, "MiniLM-L6")],
         [_shape(8, 1, 3, "bge-base")]),
        ([_shape(64, 1, 4), _shape(64, 1, 4, GPU_BACKBONE)],
         [_shape(256, 1, 8), *(_shape(256, 1, 4, backbone) for backbone in SMALL)],
         [_shape(256, 1, 4, backbone) for backbone in LARGE]),
    ),
    _question(
        "ladder", "What does each lever on memory do, on top of those before it?", ladder,
        ([_shape(32, 1, 4)], [_shape(64, 1, 8)], [_shape(16, 1, 4, "MiniLM-L6")]),
        (*ON_GPU[:2], [*ON_GPU[2], *(_shape(64, 1, 4, b) for b in (*LARGE, "Qwen3-32B"))]),
    ),
    _question(
        "gradient cache", "What does a batch cost with one graph, with kept ones, with none?",
        _gradient_cache,
        ([_shape(64, 0, 3)], [_shape(256, 0, 3)], [_shape(1024, 0, 3)]),
        ([_shape(256, 0, 4, GPU_BACKBONE)], [_shape(1024, 0, 4, GPU_BACKBONE)],
         [_shape(4096, 0, 3, GPU_BACKBONE)]),
    ),
    _question(
        "padding", "What does padding cost?", _padding,
        ([], [_shape(64, 1, 8)], [_shape(16, 1, 4, "MiniLM-L6")]), ON_GPU,
    ),
    _question(
        "attention", "Which attention is the fastest?", _attention,
        ([], [_shape(64, 1, 8)], [_shape(16, 1, 4, "MiniLM-L6")]), ON_GPU,
    ),
    _question(
        "liger", "What do Liger's kernels bring?", _liger,
        ([], [_shape(16, 1, 4)], []), ([], *ON_GPU[1:]),
    ),
    _question(
        "learning", "Does ours train as well in less time?", _against,
        ([], [], LEARNING), ([], LEARNING, []),
    ),
]  # fmt: skip
