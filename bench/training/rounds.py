"""Are negatives of all rounds better than the newest round's? Three rounds in the demo's world.

    python -m bench.training.rounds [--seeds 5] [--rounds 3] [--method sample] [--picture FILE]

For each seed the demo's first training, with random negatives, then `rankpo-fast rounds` from
there in both modes, and as many trainings without mining. A round has the steps and the rate of the
demo's second training. Prints nDCG@20 on the test split after each round, the mean over seeds, and
how far combined is from each of the others with the same seed.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankpo_fast.config import ContrastiveDataConfig, ContrastiveLossConfig, RoundsConfig
from rankpo_fast.demo.steps import MINING_RANGE, NEGATIVES, RANDOM, SHORT, STAGE1, Demo
from rankpo_fast.rounds.report import LOOKS

from .seeds import difference

NDCG = "ndcg@20"
MODES = ("combined", "incremental")
UNMINED = "without mining"
Curve = list[float]  # nDCG@20 at the start, then after each round


def mined(demo: Demo, mode: str, rounds: int, method: str) -> Curve:
    from rankpo_fast.data.rows import write_jsonl
    from rankpo_fast.rounds.report import columns
    from rankpo_fast.rounds.run import Settings, run_rounds

    corpus = demo.path / "talents.jsonl"
    write_jsonl(corpus, ({"text": talent.text} for talent in demo.world["train"].talents))
    first, last = MINING_RANGE
    ways: dict[str, Any] = {"mode": mode, "method": method}
    settings = Settings(
        demo._trained(RANDOM),
        ContrastiveDataConfig([str(demo._data(RANDOM))], num_negatives=NEGATIVES[STAGE1]),
        ContrastiveLossConfig(),
        replace(
            demo._training(f"rounds-{mode}", *_steps_and_rate(demo), demo.scale.queries),
            eval_steps=None,
        ),
        demo._evaluation("test", preferences=False),
        demo.compute,
        RoundsConfig(**ways, rounds=rounds, mine_first=True, mining_corpus=str(corpus),
                     search_range=f"{first}-{last}", mined_negatives=5),
    )  # fmt: skip
    return [column[NDCG] for column in columns(*run_rounds(settings)).values()]


def unmined(demo: Demo, rounds: int) -> Curve:
    """Trainings on the random negatives, with the seeds that rounds have."""
    from rankpo_fast.train.contrastive import train_contrastive

    curve, start = [], RANDOM
    for number in range(1, rounds + 1):
        training = demo._training(f"unmined-{number}", *_steps_and_rate(demo), demo.scale.queries)
        result = train_contrastive(
            demo._trained(start),
            ContrastiveDataConfig([str(demo._data(RANDOM))], num_negatives=NEGATIVES[STAGE1]),
            ContrastiveLossConfig(),
            replace(training, eval_steps=None, seed=demo.seed + number),
            demo._evaluation("test", preferences=False),
            demo.compute,
        )
        curve.append(result.figures[NDCG])
        start = f"unmined-{number}"
    return curve


def _steps_and_rate(demo: Demo) -> tuple[int, float]:
    return demo.scale.mined_steps, demo.scale.mined_rate


def table(curves: dict[str, list[Curve]]) -> str:
    """A line a round: the mean of each way over seeds, and differences with their errors."""
    ours, *others = curves
    head = [*curves, *(f"{ours} - {other}" for other in others)]
    lines = [f"| round | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for number in range(len(curves[ours][0])):
        at = {name: [curve[number] for curve in of_seeds] for name, of_seeds in curves.items()}
        cells = [f"{statistics.fmean(values):.3f}" for values in at.values()]
        for other in others:
            cells.append(difference([a - b for a, b in zip(at[ours], at[other], strict=True)]))
        lines.append(f"| {number or 'start'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(curves: dict[str, list[Curve]], path: str) -> None:
    """Each seed's curve, and the mean of each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, of_seeds), (colour, mark) in zip(curves.items(), LOOKS, strict=False):
        for curve in of_seeds:
            axes.plot(curve, color=colour, linewidth=0.5, alpha=0.5)
        means = [statistics.fmean(at) for at in zip(*of_seeds, strict=True)]
        axes.plot(means, color=colour, marker=mark, label=name)
    axes.set_xticks(range(len(means)), ["start", *map(str, range(1, len(means)))])
    axes.set(xlabel="round", ylabel=f"{NDCG}, test split")
    axes.grid(color="#E8E8E8")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="errors need two or more")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", choices=("topk", "sample", "cluster"), default="sample")
    parser.add_argument("--picture", help="a PNG file of the curves")
    options = parser.parse_args(argv)
    if options.picture is not None:  # before the hours that it is of
        Path(options.picture).touch()
    curves: dict[str, list[Curve]] = {name: [] for name in (*MODES, UNMINED)}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as directory:
            demo = Demo(Path(directory), seed, SHORT)
            demo.make_world()
            demo.train_with_random_negatives()
            for mode in MODES:
                curves[mode].append(mined(demo, mode, options.rounds, options.method))
            after = unmined(demo, options.rounds)
            curves[UNMINED].append([curves[MODES[0]][-1][0], *after])
            print({name: of_seeds[-1] for name, of_seeds in curves.items()}, file=sys.stderr)
    print(f"nDCG@20, test split of the demo's world, seeds: {options.seeds}, --method "
          f"{options.method}\n")  # fmt: skip
    print(table(curves))
    if options.picture is not None:
        draw(curves, options.picture)


if __name__ == "__main__":
    main()
