"""Do settings that save memory cost quality? Stage 1 of `make demo` with each.

    python -m bench.training.levers [--seeds 5] [--only lora qlora]

For each seed the demo's first training, then its second one, with mined negatives, plainly and with
each lever. Prints nDCG@20 on the validation split at the end, and how far it is from the plain one
of the same seed, also in deviations of the seeds.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from rankpo_fast.config import ContrastiveDataConfig, ContrastiveLossConfig, ModelConfig
from rankpo_fast.demo.steps import NEGATIVES, RANDOM, SHORT, STAGE1, Demo

from .seeds import difference

NDCG = "ndcg@20"
BF16: dict[str, Any] = {"weights_dtype": "bf16", "bf16": True}
LORA: dict[str, Any] = {"lora_rank": 16}
LEVERS: dict[str, dict[str, Any]] = {
    "bf16 weights": BF16,
    "bf16 weights, 8-bit states": {**BF16, "optim": "adamw_8bit"},
    "bf16 weights, 4-bit states": {**BF16, "optim": "adamw_4bit"},
    "muon": {"optim": "muon"},
    "embeddings frozen": {"freeze_embeddings": True},
    "lora": LORA,
    "lora, embeddings whole": {**LORA, "lora_modules_to_save": ["embed_tokens"]},
    "dora": {**LORA, "lora_dora": True},
    "qlora": {**LORA, "weights_dtype": "nf4", "optim": "paged_adamw_8bit"},
}


def train(demo: Demo, name: str, settings: dict[str, Any]) -> list[float]:
    """nDCG at each evaluation of the second training, whose model is left in the folder `name`."""
    from rankpo_fast.train.contrastive import train_contrastive

    scale, of_model = demo.scale, {field.name for field in fields(ModelConfig)}
    model = {key: value for key, value in settings.items() if key in of_model}
    others = {key: value for key, value in settings.items() if key not in of_model}
    train_contrastive(
        replace(demo._trained(RANDOM), **model),
        ContrastiveDataConfig([str(demo._data(STAGE1))], num_negatives=NEGATIVES[STAGE1]),
        ContrastiveLossConfig(),
        replace(demo._training(name, scale.mined_steps, scale.mined_rate, scale.queries), **others),
        demo._evaluation("validation", preferences=False),
        demo.compute,
    )
    return [point[NDCG] for point in demo.curve(name)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="two or more")
    parser.add_argument("--only", nargs="+", choices=LEVERS, default=[*LEVERS])
    options = parser.parse_args(argv)
    curves: dict[str, list[list[float]]] = {name: [] for name in ("plain", *options.only)}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as directory:
            demo = Demo(Path(directory), seed, SHORT)
            demo.make_world()
            demo.train_with_random_negatives()
            demo.train_with_mined_negatives()
            curves["plain"].append([point[NDCG] for point in demo.curve(STAGE1)])
            for number, name in enumerate(options.only):
                curves[name].append(train(demo, f"lever-{number}", LEVERS[name]))
    plain = curves["plain"]
    spread = statistics.stdev(curve[-1] for curve in plain)
    print(f"second training of stage 1 of `make demo`, {options.seeds} seeds\n")
    print("| setting | nDCG@20 at the end | from plain, same seeds | in deviations of the seeds |")
    print("|---|---|---|---|")
    for name, of_seeds in curves.items():
        apart = [mine[-1] - other[-1] for mine, other in zip(of_seeds, plain, strict=True)]
        end, share = statistics.fmean(c[-1] for c in of_seeds), statistics.fmean(apart) / spread
        print(f"| {name} | {end:.3f} | {difference(apart)} | {share:+.2f} |")


if __name__ == "__main__":
    main()
