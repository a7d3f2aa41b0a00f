"""The command line: `rankpo-fast COMMAND --flag value ...`, or the flags in `--config FILE.yaml`.

Flags are read here, what a command does stands in commands/. Exit codes: 0; 1 for a run that
failed; 2 for what the user can put right (bad flags, bad data, with a message that names it); 143
after SIGTERM, 130 after Ctrl-C, 129 after SIGHUP, 138 after SIGUSR1: in training once the step is
finished and saved, in `annotate` with all answers on the disk, elsewhere with nothing half written.

On N GPUs: `torchrun --nproc_per_node N -m rankpo_fast.cli COMMAND --flag value ...`, to train, to
evaluate, to encode and to mine.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import entry_points

from rankpo_fast import config as configs
from rankpo_fast.commands import refusals
from rankpo_fast.compatibility.checkpoints import command_lines
from rankpo_fast.compatibility.names import meant_command
from rankpo_fast.errors import (
    InputError,
    NotFiniteVectors,
    NotSaved,
    QuestionsLeft,
    RankLost,
    TrainingStopped,
    out_of_memory,
    without_secrets,
)
from rankpo_fast.extras import require_extra
from rankpo_fast.flags import closest, parse
from rankpo_fast.paths import texts_located
from rankpo_fast.signals import EndsCommand, Interrupted, ask
from rankpo_fast.streams import log_may_be_lost, results_written

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
IN_RANKS = ("contrastive", "rankpo", "evaluate", "encode", "mine")  # the commands for torchrun
ENTRY_POINTS = "rankpo_fast.commands"  # group in pyproject.toml: name = "module:main"


@dataclass(frozen=True)
class Command:
    """Its body is `run` of the module commands/NAME, imported late: --help is quick."""

    summary: str
    settings: list[type]
    check: Callable[..., None] | None = None  # refuses by the settings alone, before the body


COMMANDS = {
    "label": Command(
        "make rows of stage 1 and evaluation sets of records, by rules that say what fits what",
        [configs.LabelConfig],
        refusals.check_label,
    ),
    "pairs": Command(
        "pairs of passages that a model finds for a query, to be judged",
        [configs.EncoderConfig, configs.PairsConfig, configs.ComputeConfig],
        refusals.check_pairs,
    ),
    "annotate": Command(
        "preferences, grades or rankings of language models, or of people on a page",
        [configs.JudgeConfig, configs.PeopleConfig, configs.AnnotateConfig],
        refusals.check_annotate,
    ),
    "clicks": Command(
        "turn logs of clicks into preferences, debiased by position",
        [configs.ClicksConfig],
        refusals.check_clicks,
    ),
    "score": Command(
        "let a cross-encoder score the passages of rows, for stage 2 to learn from",
        [configs.ScoreConfig, configs.DeviceConfig],
        refusals.check_score,
    ),
    "contrastive": Command(
        "stage 1: train an encoder on queries with positive and negative passages (InfoNCE)",
        configs.STAGES["contrastive"],
    ),
    "mine": Command(
        "find hard negatives for stage 1",
        [
            configs.EncoderConfig,
            configs.MineConfig,
            configs.MineOutputConfig,
            configs.ComputeConfig,
        ],
        refusals.check_mine,
    ),
    "rounds": Command(
        "stage 1 in rounds: mine hard negatives, train on them, mine again",
        [*configs.STAGES["contrastive"], configs.RoundsConfig],
        refusals.check_rounds,
    ),
    "rankpo": Command(
        "stage 2: align it with preferred passages (RankPO, SimRankPO, SFT), grades, a teacher",
        configs.STAGES["rankpo"],
    ),
    "evaluate": Command(
        "measure an encoder, or compare two: nDCG, MRR and recall, agreement with preferences",
        [
            configs.EvaluatedConfig,
            configs.EvaluationConfig,
            configs.EvaluateOutputConfig,
            configs.ComputeConfig,
        ],
        refusals.check_evaluate,
    ),
    "encode": Command(
        "turn the texts of a JSONL file into vectors",
        [configs.EncoderConfig, configs.EncodeConfig, configs.ComputeConfig],
        refusals.check_encode,
    ),
    "merge": Command(
        "weights between a base and what was tuned from it, or the mean of several models",
        [configs.MergeConfig],
        refusals.check_merge,
    ),
    "sweep": Command(
        "train a grid of settings from one file; choose on validation, compare on both axes",
        [configs.SweepConfig],
    ),
    "plan": Command(
        "what a training takes of a GPU's memory and time, and which settings fit it best",
        [configs.ModelConfig, configs.PlanConfig],
        refusals.check_plan,
    ),
}
# Those that read their flags themselves.
PROGRAMS = {
    "demo": "watch both stages train on a synthetic world, in minutes on a CPU",
    "bench": "what losses and training cost here, beside their peers and the floor",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with log_may_be_lost(), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            with results_written():
                return _run(argv)
        except InputError as error:
            return BAD_INPUT if error.copied else _fail(error, BAD_INPUT)
        except TrainingStopped as stop:  # which has been said
            return stop.exit_code
        except QuestionsLeft as left:
            return _fail(left, left.exit_code)
        except (FloatingPointError, NotSaved) as error:  # which all ranks raise
            return _fail(error, FAILED) if _is_first_rank() else FAILED
        except (OSError, RankLost) as error:
            return _fail(error, FAILED)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return _fail(f"out of memory: {str(error).partition('. Error code')[0]}", FAILED)
        except Interrupted as stop:
            return _fail(stop, stop.exit_code) if _is_first_rank() else stop.exit_code
        except KeyboardInterrupt:
            return _fail("interrupted", INTERRUPTED)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        from rankpo_fast import __version__

        print(f"rankpo-fast {__version__}")
        return 0
    name, *flags = argv
    known = [*COMMANDS, *PROGRAMS]
    if name not in known:
        name = _meant(name, known)
    if name not in IN_RANKS and os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"{name} runs in one process, but WORLD_SIZE is > 1: leave out torchrun")
    if name in PROGRAMS:
        return _program(name)(flags)
    return _run_command(name, flags)


def _run_command(name: str, flags: list[str]) -> int:
    """Parse the flags and run the body, for `evaluate` maybe several times."""
    with EndsCommand():
        return _run_body(name, COMMANDS[name], flags)


def _run_body(name: str, command: Command, flags: list[str]) -> int:
    require_extra(name, "train")
    try:
        lines = command_lines(flags) if name == "evaluate" else [flags]
        runs = [parse(name, command.summary, command.settings, line) for line in lines]
    except InputError:  # which all ranks raise
        if _is_first_rank():
            raise
        return BAD_INPUT
    if not sys.stderr.isatty():  # a log takes lines, no bars
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    for first, *settings in runs:
        if len(runs) > 1:
            print(f"{first.model_name_or_path}:")
        if command.check is not None:
            command.check(first, *settings)
        body = importlib.import_module(f"rankpo_fast.commands.{name}")
        ask()
        try:
            with texts_located(first, *settings) if _is_first_rank() else nullcontext():
                body.run(first, *settings)
        except NotFiniteVectors:  # which all ranks raise
            if _is_first_rank():
                raise
            return BAD_INPUT
    return 0


def _program(name: str) -> Callable[[list[str]], int]:
    """What takes the flags; InputError where its package is not installed."""
    if name == "demo":
        require_extra(name, "train", "plots", "label")
        from rankpo_fast.demo.run import main as demo

        return demo
    for program in entry_points(group=ENTRY_POINTS, name=name):
        if importlib.util.find_spec(program.module.partition(".")[0]) is not None:
            return program.load()
    raise InputError(
        f"{name} is not installed: `pip install 'rankpo-fast[bench]'`, or in a checkout of it "
        f"`pip install -e . -e ./bench`"
    )


def _meant(name: str, known: list[str]) -> str:
    """The command that others call `name`; InputError where there is none, or several."""
    meant = meant_command(name)
    if meant is None:
        there_are = f"there are {', '.join(known)}"
        raise InputError(f"unknown command {name}{closest(name, known)}; {there_are}")
    warnings.warn(f"read {name} as {meant}", stacklevel=2)
    return meant


def _fail(error: object, code: int) -> int:
    print(f"rankpo-fast: error: {without_secrets(str(error))}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if _is_first_rank():
        print(f"rankpo-fast: warning: {without_secrets(str(message))}", file=sys.stderr)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _overview() -> str:
    commands = {name: command.summary for name, command in COMMANDS.items()} | PROGRAMS
    lines = [f"  {name:12} {summary}" for name, summary in commands.items()]
    return "\n".join(
        [
            "rankpo-fast trains embedding models to rank, in the two stages of RankPO.",
            "",
            "usage: rankpo-fast COMMAND --flag value ...",
            "",
            *lines,
            "",
            "rankpo-fast COMMAND --help lists the flags of a command.",
            "torchrun --nproc_per_node N -m rankpo_fast.cli COMMAND ... trains on N GPUs.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
