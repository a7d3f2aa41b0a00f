"""The rows and the untrained model that the scripts beside this one train on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class SmallWorld(NamedTuple):
    model: str  # directory of an untrained encoder that transformers and sentence-transformers load
    triplets: list[dict[str, str]]  # query, positive, negative
    preferences: list[dict[str, str]]  # query, passage1, passage2, preferred ("A" or "B")


def small_world(directory: str | Path = "outputs/examples") -> SmallWorld:
    """Some hundred rows of the demo's world, and a one-layer encoder written to `directory`."""
    from rankpo_fast.demo import world
    from rankpo_fast.demo.steps import QUICK, Demo

    demo = Demo(Path(directory), seed=0, scale=QUICK)
    demo.make_world()
    model = demo.path / "model"
    demo.load("untrained").save(model)
    train, labels = demo.world["train"], demo.labels["train"]
    rows = world.contrastive_rows(train, labels, num_negatives=1, seed=0)
    triplets = [
        {"query": row["query"], "positive": positive, "negative": row["negatives"][0]}
        for row in rows
        for positive in row["positives"]
    ]
    everyone = [range(len(train.talents))] * len(train.jobs)
    preferences = world.preference_rows(train, labels, everyone, pairs_per_job=4, seed=0)
    return SmallWorld(str(model), triplets, list(preferences))


def collator(model: str) -> Callable[[list[dict[str, str]]], dict[str, Any]]:
    """Triplets -> {"query": tokens, "passage": tokens}, each positive before its negative."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def collate(rows):
        passages = [row[key] for row in rows for key in ("positive", "negative")]
        texts = {"query": [row["query"] for row in rows], "passage": passages}
        return {k: tokenizer(x, padding=True, return_tensors="pt") for k, x in texts.items()}

    return collate
