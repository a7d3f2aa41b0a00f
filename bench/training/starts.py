"""Does it matter what stage 1 and stage 2 start from? Starts of several kinds, in the demo's world.

    python -m bench.training.starts [--seeds 5] [--model DIR] [--starts random base]

random      the demo's own start, untrained
base        trained to say the next token of texts of the world
instruct    that, tuned to answer: a talent for a job, the field and the rank of a text
embedding   base, tuned to know a text again by other words of it, without labels
DIR         an encoder of others, as --model; at lower learning rates, for half the steps

All but the last have the same backbone and tokenizer. Of each seed all have one world and one set
of preferences, those of the candidates of random's stage 1; stage 1 mines for itself. Stage 2 is
RankPO with replay. Test split; differences are from the first start, seed by seed.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rankpo_fast.config import (
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    EvaluationConfig,
    ModelConfig,
)
from rankpo_fast.data.rows import write_jsonl
from rankpo_fast.demo.steps import MAX_LENGTH, REPLAY, SHORT, STAGE1, UNTRAINED, Demo
from rankpo_fast.train.contrastive import train_contrastive

from . import language
from .seeds import difference

NDCG, ALIGNMENT = "ndcg@20", "alignment"
RANDOM, BASE, INSTRUCT, EMBEDDING = STARTS = ("random", "base", "instruct", "embedding")
BASE_STEPS, INSTRUCT_STEPS, EMBEDDING_STEPS = 300, 200, 150
EMBEDDING_RATE = 1e-3  # of 1e-3 and 3e-3, as language.RATE was
# For an encoder that others trained, a hundred times as large: lower rates, not tuned, and half the
# steps of the demo.
LARGER = replace(
    SHORT, random_steps=60, mined_steps=30, alignment_steps=100,
    random_rate=1e-4, mined_rate=5e-5, alignment_rate=5e-5,
)  # fmt: skip
STAGES = {UNTRAINED: "before", STAGE1: "stage 1", REPLAY: "stage 2"}
COLUMNS = ((UNTRAINED, NDCG), (STAGE1, NDCG), (REPLAY, NDCG), (STAGE1, ALIGNMENT),
           (REPLAY, ALIGNMENT))  # fmt: skip
Figures = dict[str, dict[str, float]]  # by stage and axis


class Begun(Demo):
    """The demo's steps on the data of another one, from a start of its own."""

    def __init__(self, demo: Demo, start: Path, *, larger: bool = False):
        scale = LARGER if larger else SHORT
        super().__init__(demo.path / "begun" / start.name, demo.seed, scale)
        self.start, self.larger = start, larger
        self.world, self.labels = demo.world, demo.labels
        shutil.copytree(demo.path / "data", self.path / "data")

    def _untrained(self) -> ModelConfig:
        model = _start(self, self.start)
        return replace(model, pooling="auto") if self.larger else model

    def _trained(self, name: str) -> ModelConfig:
        model = super()._trained(name)
        return replace(model, bf16="auto") if self.larger else model


def _start(demo: Demo, path: Path) -> ModelConfig:
    return replace(demo._trained(""), model_name_or_path=str(path), pooling="mean",
                   max_query_length=MAX_LENGTH, max_passage_length=MAX_LENGTH)  # fmt: skip


def make_starts(demo: Demo, names: Sequence[str]) -> dict[str, Path]:
    """Directories of models, by start; says on stderr what each has learnt."""
    found = {name: demo.path / "starts" / name for name in STARTS if name in names}
    if found.keys() <= {RANDOM}:
        return {}
    base = demo.path / "starts" / BASE
    pool = language.pool_of(demo.seed)
    for name, start, examples, steps in (
        (BASE, demo.path / UNTRAINED, language.texts(pool), BASE_STEPS),
        (INSTRUCT, base, language.instructions(pool, demo.seed), INSTRUCT_STEPS),
    ):
        if name in (BASE, *names):  # base is what the others start from
            output = demo.path / "starts" / name
            losses = language.train(start, output, examples, steps, demo.seed)
            _say(demo, name, f"{losses.before:.2f} to {losses.after:.2f} nats a token, held out")
    if EMBEDDING in names:
        rows = demo.path / "data" / "views.jsonl"
        write_jsonl(rows, language.views(pool, demo.seed))
        train_contrastive(
            _start(demo, base),
            ContrastiveDataConfig([str(rows)], num_negatives=0),
            ContrastiveLossConfig(),
            replace(demo._training("", EMBEDDING_STEPS, EMBEDDING_RATE, demo.scale.queries),
                    output_dir=str(found[EMBEDDING]), eval_steps=None),
            EvaluationConfig(),
            demo.compute,
        )  # fmt: skip
    return {name: path for name, path in found.items() if name != RANDOM}


def figures(demo: Demo) -> Figures:
    """Of all stages, of which the first two are trained already."""
    demo.align(REPLAY)
    return {stage: demo.evaluate(stage, "test") for stage in STAGES}


def of_seed(directory: Path, seed: int, names: Sequence[str], model: Path | None) -> dict:
    """Figures of each start."""
    demo = Demo(directory, seed, SHORT)
    demo.make_world()
    demo.train_with_random_negatives()
    demo.train_with_mined_negatives()
    demo.judge_candidates()
    starts = make_starts(demo, names)
    begun = {name: Begun(demo, path) for name, path in starts.items()}
    if model is not None:
        begun[model.name] = Begun(demo, model, larger=True)
    found = {}
    if RANDOM in names:
        found[RANDOM] = figures(demo)
        _say(demo, RANDOM, str(found[RANDOM]))
    for name, one in begun.items():
        one.train_with_random_negatives()
        one.train_with_mined_negatives()
        found[name] = figures(one)
        _say(demo, name, str(found[name]))
    return found


def _say(demo: Demo, name: str, text: str) -> None:
    print(f"seed {demo.seed}, {name}: {text}", file=sys.stderr, flush=True)


def table(found: Sequence[dict[str, Figures]]) -> str:
    """A line a start: means over seeds, and from the first start with their standard errors."""
    first, *_ = found[0]
    heads = [f"{axis}, {STAGES[stage]}" for stage, axis in COLUMNS]
    lines = [f"| start | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in found[0]:
        cells = []
        for stage, axis in COLUMNS:
            values = [seed[name][stage][axis] for seed in found]
            apart = [v - seed[first][stage][axis] for v, seed in zip(values, found, strict=True)]
            mean = f"{statistics.fmean(values):.3f}"
            cells.append(mean if name == first else f"{mean} ({difference(apart)})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="errors need two or more")
    parser.add_argument("--model", type=Path, help="directory of an encoder, a row of its own")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    options = parser.parse_args(argv)
    if options.model and not options.model.is_dir():
        parser.error(f"--model {options.model}: no such directory")
    found = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as directory:
            found.append(of_seed(Path(directory), seed, options.starts, options.model))
    print(f"the demo's two stages from several starts, seeds: {options.seeds}\n\n{table(found)}")


if __name__ == "__main__":
    main()
