"""The command line: `rankpo-fast COMMAND --flag value ...`, or the flags in `--config FILE.yaml`.

Exit codes: 0; 1 for a run that failed; 2 for what the user can put right (bad flags, bad data, with
a message that names it); in training, 143 after SIGTERM and 130 after Ctrl-C, once the step is
finished and saved.

Training on N cards is `torchrun --nproc_per_node N -m rankpo_fast.cli COMMAND --flag value ...`.
"""

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rankpo_fast import config as configs
from rankpo_fast.errors import InputError
from rankpo_fast.flags import closest, parse
from rankpo_fast.paths import check_writable, lies_in

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
IN_RANKS = ("contrastive", "rankpo")  # the commands for torchrun


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _run(argv)
        except InputError as error:
            return _fail(error, BAD_INPUT)
        except FloatingPointError as error:  # which all ranks raise
            return _fail(error, FAILED) if _is_first_rank() else FAILED
        except OSError as error:
            return _fail(error, FAILED)
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
    if name not in IN_RANKS and os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(f"{name} runs in one process, but WORLD_SIZE is > 1: leave out torchrun")
    if name == "demo":
        from rankpo_fast.demo import run

        return run.main(flags) or 0
    if name == "bench":  # a package of its own, which looks at this one
        from rankpo_bench.__main__ import main as bench

        return bench(flags)
    if name not in COMMANDS:
        known = [*COMMANDS, "demo", "bench"]
        raise InputError(
            f"unknown command {name}{closest(name, known)}; there are {', '.join(known)}"
        )
    command = COMMANDS[name]
    try:
        settings = parse(name, command.summary, command.settings, flags)
    except InputError:  # which all ranks raise
        if _is_first_rank():
            raise
        return BAD_INPUT
    command.run(*settings)
    return 0


def _fail(error: object, code: int) -> int:
    print(f"rankpo-fast: error: {error}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    if _is_first_rank():
        print(f"rankpo-fast: warning: {message}", file=sys.stderr)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


# --- the commands: heavy imports inside, so that --help is quick ---


def _contrastive(*settings: Any) -> None:
    from rankpo_fast.train.contrastive import train_contrastive

    train_contrastive(*settings)


def _rankpo(*settings: Any) -> None:
    from rankpo_fast.train.rankpo import train_rankpo

    train_rankpo(*settings)


def _evaluate(
    model: configs.EncoderConfig,
    evaluation: configs.EvaluationConfig,
    output: configs.EvaluateOutputConfig,
    compute: configs.ComputeConfig,
) -> None:
    if not evaluation.asked:
        raise InputError("nothing to measure: give --query_data, --preference_data, or both")
    from rankpo_fast.data.files import whole_file
    from rankpo_fast.model.load import load_encoder
    from rankpo_fast.retrieval.evaluate import evaluate
    from rankpo_fast.train.run import read_evaluation_data
    from rankpo_fast.train.texts import check_lengths

    device = compute.torch_device()
    _check_cache(compute)
    if output.output is not None:
        inputs = (
            evaluation.query_data,
            evaluation.corpus_data,
            *(evaluation.preference_data or []),
        )
        _check_output("--output", output.output, *inputs)
    retrieval, preferences = read_evaluation_data(evaluation)
    encoder = load_encoder(model, device=device)
    check_lengths(encoder)
    figures = evaluate(
        encoder,
        retrieval=retrieval,
        preferences=preferences,
        cutoffs=evaluation.cutoffs,
        max_tokens=compute.max_tokens_per_micro_batch,
        legacy=evaluation.legacy_metrics,
        cache_dir=compute.cache_path,
        progress=True,
    )
    print(_table(figures, evaluation.cutoffs))
    if output.output is not None:
        import json

        with whole_file(output.output) as temporary:
            temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _encode(
    model: configs.EncoderConfig, config: configs.EncodeConfig, compute: configs.ComputeConfig
) -> None:
    import numpy as np

    from rankpo_fast.data.files import whole_file
    from rankpo_fast.data.rows import read_texts
    from rankpo_fast.model.load import load_encoder
    from rankpo_fast.retrieval.encode import encode_texts
    from rankpo_fast.train.texts import check_length

    device = compute.torch_device()
    _check_cache(compute)
    _check_output("--output", config.output, config.input)
    texts = read_texts(config.input, config.text_key)
    if config.max_length is not None:
        model = dataclasses.replace(model, **{f"max_{config.role}_length": config.max_length})
    encoder = load_encoder(model, device=device)
    check_length(encoder, config.role, None if config.max_length is None else "--max_length")
    as_role = {"query": encoder.tokenize_queries, "passage": encoder.tokenize_passages}
    table = as_role[config.role](texts, compute.cache_path)
    vectors = encode_texts(
        encoder, table, max_tokens=compute.max_tokens_per_micro_batch, progress="encoding"
    )
    with whole_file(config.output) as temporary, temporary.open("wb") as file:
        np.save(file, vectors.numpy())
    count, dims = vectors.shape
    print(
        f"{count:,} vectors of {dims} dims in {config.output}; {table.truncated:,} texts truncated"
    )


def _mine(
    model: configs.EncoderConfig, config: configs.MineConfig, compute: configs.ComputeConfig
) -> None:
    from rankpo_fast.data.rows import read_contrastive, read_texts, write_jsonl
    from rankpo_fast.model.load import load_encoder
    from rankpo_fast.retrieval.mining import Limits, mine_hard_negatives
    from rankpo_fast.train.texts import check_lengths

    device = compute.torch_device()
    _check_cache(compute)
    _check_output("--output_file", config.output_file, *config.train_data, config.corpus_data)
    rows = read_contrastive(config.train_data)
    if config.corpus_data is not None:
        read = read_texts(config.corpus_data, "text", keep_empty=True)
        corpus = [text for text in read if text]
        if not corpus:
            raise InputError(f"{config.corpus_data}: all its texts are empty")
        if len(corpus) < len(read):
            empty = f"{len(read) - len(corpus):,} empty texts are no negatives: left out"
            warnings.warn(f"{config.corpus_data}: {empty}", stacklevel=2)
    else:
        corpus = [text for row in rows for text in (*row.positives, *row.negatives)]
    encoder = load_encoder(model, device=device)
    check_lengths(encoder)
    mined = mine_hard_negatives(
        encoder,
        rows,
        corpus,
        search_range=config.ranks,
        num_negatives=config.num_negatives,
        method=config.method,
        limits=Limits(config.max_score, config.absolute_margin, config.relative_margin),
        seed=config.seed,
        keep=config.combine,
        max_tokens=compute.max_tokens_per_micro_batch,
        cache_dir=compute.cache_path,
        progress=True,
    )
    write_jsonl(config.output_file, map(dataclasses.asdict, mined.rows))
    negatives = sum(len(row.negatives) for row in mined.rows)
    print(mined.summary())
    print(f"{len(mined.rows):,} rows with {negatives:,} negatives in {config.output_file}")


def _check_output(flag: str, path: str, *inputs: str | None) -> None:
    """Refuse what cannot be written, and what is one of the inputs or lies in a directory of it."""
    check_writable(flag, path)
    if any(name is not None and lies_in(path, name) for name in inputs):
        raise InputError(f"{flag} {path} is also read: choose another name")


def _check_cache(compute: configs.ComputeConfig) -> None:
    check_writable("--cache_dir", compute.cache_path, directory=True)


@dataclass(frozen=True)
class Command:
    summary: str
    settings: list[type]
    run: Callable[..., None]


_TRAINING = [configs.TrainingConfig, configs.EvaluationConfig, configs.ComputeConfig]
COMMANDS = {
    "contrastive": Command(
        "stage 1: train an encoder on queries with positive and negative passages (InfoNCE)",
        [
            configs.ModelConfig,
            configs.ContrastiveDataConfig,
            configs.ContrastiveLossConfig,
            *_TRAINING,
        ],
        _contrastive,
    ),
    "rankpo": Command(
        "stage 2: align it with pairs of passages, one of them preferred (RankPO, SimRankPO, SFT)",
        [
            configs.ModelConfig,
            configs.RankPODataConfig,
            configs.RankPOLossConfig,
            *_TRAINING,
            configs.ReplayConfig,
        ],
        _rankpo,
    ),
    "evaluate": Command(
        "measure an encoder: nDCG, MRR and recall, and its agreement with preferences",
        [
            configs.EncoderConfig,
            configs.EvaluationConfig,
            configs.EvaluateOutputConfig,
            configs.ComputeConfig,
        ],
        _evaluate,
    ),
    "mine": Command(
        "find hard negatives for stage 1",
        [configs.EncoderConfig, configs.MineConfig, configs.ComputeConfig],
        _mine,
    ),
    "encode": Command(
        "turn the texts of a JSONL file into vectors",
        [configs.EncoderConfig, configs.EncodeConfig, configs.ComputeConfig],
        _encode,
    ),
}


# --- what is printed ---


def _overview() -> str:
    commands = {name: command.summary for name, command in COMMANDS.items()}
    commands["demo"] = "watch both stages train on a synthetic world, in minutes on a CPU"
    commands["bench"] = "what losses and training cost here, beside their peers and the floor"
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
            "torchrun --nproc_per_node N -m rankpo_fast.cli COMMAND ... trains on N cards.",
        ]
    )


def _table(figures: dict[str, float], cutoffs: Sequence[int]) -> str:
    lines = []
    rows = {"nDCG": "ndcg", "MRR": "mrr", "recall": "recall"}
    if f"ndcg@{cutoffs[0]}" in figures:
        lines.append(" " * 9 + "".join(f"{f'@{cutoff}':>9}" for cutoff in cutoffs))
        for title, key in rows.items():
            values = "".join(f"{figures[f'{key}@{cutoff}']:>9.4f}" for cutoff in cutoffs)
            lines.append(f"{title:9}{values}")
    if "alignment" in figures:
        lines.append(f"alignment{figures['alignment']:>9.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
