"""What do a judge's habits cost, and what helps against them? On the world of `make demo`.

    python -m bench.training.judges [--seeds 5] [--habit bias]

For each seed the demo's stage 1, pairs of the candidates that it finds (`pairs`), the verdicts of a
simulated judge on a server of this machine (`annotate`; examples/simulated_judge.py), and stage 2
on them, RankPO with replay. Alignment is measured on held-out pairs judged without any habit, nDCG
on the test split. A judge with bias takes what it is shown first, one with noise guesses, in that
share of its answers.
"""

import argparse
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankpo_fast.cli import main as rankpo_fast
from rankpo_fast.config import RankPODataConfig, RankPOLossConfig
from rankpo_fast.data.rows import write_jsonl
from rankpo_fast.demo import world
from rankpo_fast.demo.steps import RANKPO, SHORT, STAGE1, Demo

from .seeds import difference

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from simulated_judge import MODEL, Judge, serve  # noqa: E402

PAIRS, CANDIDATES = 4, 20  # of a job
NDCG, ALIGNMENT = "ndcg@20", "alignment"
BOTH, ONE = ("--orders=both", "--flips=drop"), ("--orders=one",)


@dataclass(frozen=True)
class Row:
    """A judge, how it is asked, and how stage 2 takes the answers."""

    name: str
    bias: float = 0.0
    noise: float = 0.0
    asked: tuple[str, ...] = ONE
    pairs: int = PAIRS
    loss: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def verdicts(self) -> tuple[float, float, tuple[str, ...], int]:
        """What decides them; rows in which that is equal are trained on the same ones."""
        return self.bias, self.noise, self.asked, self.pairs


ROWS = [
    Row("no habit, one order"),
    Row("bias 0.3, one order", bias=0.3),
    Row("bias 0.3, one order, twice the pairs", bias=0.3, pairs=2 * PAIRS),
    Row("bias 0.3, both orders, flips dropped", bias=0.3, asked=BOTH),
    *(
        row
        for noise in (0.1, 0.2, 0.3)
        for row in (
            Row(f"noise {noise}, one order", noise=noise),
            Row(f"noise {noise}, weighted by confidence", noise=noise,
                data={"use_confidence": True}),
            Row(f"noise {noise}, both orders, flips dropped", noise=noise, asked=BOTH),
            Row(f"noise {noise}, sigmoid", noise=noise, loss={"loss_type": "sigmoid"}),
            Row(f"noise {noise}, sigmoid, label smoothing {noise / 2:g}", noise=noise,
                loss={"loss_type": "sigmoid", "label_smoothing": noise / 2}),
        )
    ),
]  # fmt: skip


@contextmanager
def served(judge: Judge) -> Iterator[str]:
    """Inside, the judge answers at this address."""
    server = serve(judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def annotated(demo: Demo, row: Row, number: int) -> Path:
    """The verdicts of the row's judge on pairs of the training split, in files of that number."""
    pairs, output = (demo.path / "data" / f"{kind}-{number}.jsonl" for kind in ("pairs", "prefs"))
    talents = demo.world["train"].talents
    corpus, jobs = demo.path / "data" / "train_corpus.jsonl", demo.path / "data" / "jobs.jsonl"
    write_jsonl(corpus, ({"text": talent.text} for talent in talents))
    write_jsonl(jobs, ({"query": job.text} for job in demo.world["train"].jobs))
    _done([
        "pairs", f"--model_name_or_path={demo.path / STAGE1}", f"--query_data={jobs}",
        f"--corpus_data={corpus}", f"--output_file={pairs}", f"--top_k={CANDIDATES}",
        f"--pairs_per_query={row.pairs}", f"--seed={demo.seed}", "--device=cpu",
    ])  # fmt: skip
    judge = Judge(
        {talent.text: talent.quality for talent in talents}, sharpness=world.JUDGE_SHARPNESS,
        bias=row.bias, noise=row.noise, seed=demo.seed,
    )  # fmt: skip
    with served(judge) as url:
        _done(["annotate", f"--pairs={pairs}", f"--output={output}", f"--base_url={url}",
               f"--model={MODEL}", "--concurrency=4", *row.asked])  # fmt: skip
    return output


def figures(demo: Demo, row: Row, number: int, verdicts: Path) -> dict[str, float]:
    """Of stage 2 on the verdicts, in a directory of that number."""
    from rankpo_fast.train.rankpo import train_rankpo

    name, scale = f"row-{number}", demo.scale
    train_rankpo(
        demo._trained(STAGE1),
        RankPODataConfig([str(verdicts)], **row.data),
        RankPOLossConfig(**{**RANKPO, **row.loss}),
        demo._training(name, scale.alignment_steps, scale.alignment_rate, scale.pairs),
        demo._evaluation("validation", preferences=True),
        demo.compute,
        demo._replay(),
    )
    return demo.evaluate(name, "test")


def _done(command: list[str]) -> None:
    if rankpo_fast(command) != 0:
        raise SystemExit(f"rankpo-fast {command[0]} failed")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="two or more")
    parser.add_argument("--habit", choices=["bias", "noise"], help="of the judge; without it both")
    options = parser.parse_args(argv)
    rows = [ROWS[0], *(row for row in ROWS[1:] if (options.habit or row.name) in row.name)]
    found: dict[str, list[dict[str, float]]] = {row.name: [] for row in rows}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as directory:
            demo = Demo(Path(directory), seed, SHORT)
            demo.make_world()
            demo.train_with_random_negatives()
            demo.train_with_mined_negatives()
            demo.judge_candidates()
            verdicts: dict[Any, Path] = {}
            for number, row in enumerate(rows):
                if row.verdicts not in verdicts:
                    verdicts[row.verdicts] = annotated(demo, row, number)
                found[row.name].append(figures(demo, row, number, verdicts[row.verdicts]))
                print(f"seed {seed}: {row.name}: {found[row.name][-1]}", file=sys.stderr)
    print(f"stage 2 of `make demo` on verdicts of a simulated judge, {options.seeds} seeds\n")
    print("| judge and treatment | alignment | from no habit, same seeds | nDCG@20 |")
    print("|---|---|---|---|")
    best = [one[ALIGNMENT] for one in found[ROWS[0].name]]
    for name, of_seeds in found.items():
        alignments = [one[ALIGNMENT] for one in of_seeds]
        apart = [one - other for one, other in zip(alignments, best, strict=True)]
        ndcg = statistics.fmean(one[NDCG] for one in of_seeds)
        print(f"| {name} | {statistics.fmean(alignments):.3f} | {difference(apart)} | {ndcg:.3f} |")


if __name__ == "__main__":
    main()
