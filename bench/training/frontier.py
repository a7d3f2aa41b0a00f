"""What does stage 2 gain in alignment, and at what cost in retrieval? `examples/frontier.yaml`.

    python -m bench.training.frontier [--parallel 2]

For each seed of the sweep a world of the demo and a stage 1 that is trained until it hardly gains,
in outputs/frontier/worlds; then the sweep, in outputs/frontier/sweep, with its report. What is
there already is not made again.

Methods are compared as far as all of them reach. One reaches less than the others: without-
retention.md is the report without it. The figure leaves out the methods that are parts of others.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rankpo_fast.cli import main as rankpo_fast
from rankpo_fast.demo.steps import SHORT, STAGE1, Demo
from rankpo_fast.sweep.figure import png
from rankpo_fast.sweep.report import Results, as_markdown
from rankpo_fast.sweep.run import Runner
from rankpo_fast.sweep.spec import read_sweep

FILE = Path("examples/frontier.yaml")
FOLDER = Path("outputs/frontier")
REACHES_LESS, PART = "RankPO + retention", "replay 0.3"
# The demo's second training has 60 steps, and nDCG@20 still rises by 0.03 with as many more.
CONVERGED = replace(SHORT, mined_steps=600)


def make(seed: int) -> None:
    """The world, stage 1 and the judge's verdicts of one seed."""
    path = FOLDER / "worlds" / str(seed)
    done = path / "data" / "test_preferences.jsonl"
    if done.exists():
        return
    demo = Demo(path, seed, CONVERGED)
    demo.make_world()
    demo.train_with_random_negatives()
    demo.train_with_mined_negatives()
    demo.judge_candidates()  # the test split's last
    curve = [f"{point['ndcg@20']:.3f}" for point in demo.curve(STAGE1)]
    print(f"seed {seed}: nDCG@20 on validation while stage 1 ends: {', '.join(curve)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parallel", type=int, default=1, help="trainings at once")
    options = parser.parse_args(argv)
    for seed in read_sweep(FILE).seeds:
        make(seed)
    code = rankpo_fast(["sweep", f"--sweep={FILE}", f"--output_dir={FOLDER / 'sweep'}",
                        f"--parallel={options.parallel}"])  # fmt: skip
    if code == 0:
        results = Results(Runner(read_sweep(FILE), FOLDER / "sweep", 1, print))
        every = results.methods
        results.methods = [name for name in every if not name.endswith(PART)]
        (FOLDER / "frontier.png").write_bytes(png(results))
        results.methods = [name for name in every if name != REACHES_LESS]
        (FOLDER / "without-retention.md").write_text(as_markdown(results, figure=None))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
