"""Jobs and talents of mixed lengths, from the demo's world, and an untrained encoder to learn them.

A text of the world is cut after a sentence, or goes on in further ones, to a length that is
log-normal; jobs and talents have distributions of their own. A row is a job, a talent who fits it
by the world's three rules, and one who meets two of them.
"""

import atexit
import dataclasses
import functools
import math
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from rankpo_fast.config import ModelConfig
from rankpo_fast.data.rows import write_jsonl
from rankpo_fast.data.tokens import tokenize
from rankpo_fast.demo import lexicon, world
from rankpo_fast.demo.steps import learn_tokenizer
from rankpo_fast.demo.world import FIELDS, Job, Split, SplitSize, Talent
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.settings import EncoderSettings, write_settings

from .backbones import TINY, config_of, training_flops

Item = TypeVar("Item", Job, Talent)
SEED = 0
MAX_LENGTH = 512  # tokens, which no text reaches
QUANTILES = (0, 0.1, 0.5, 0.9, 0.99, 1)
FEWEST, MOST = 8, 280  # words
JOB_WORDS, TALENT_WORDS = (20, 0.45), (40, 0.6)  # the median, and the deviation of the logarithm
JOB_MORE = (
    "The group shares its laboratory for {term} with partners abroad.",
    "Seminars cover {term} and {term}.",
    "Applicants may send a statement on {term}.",
    "A budget for travel and for {term} comes with the post.",
)
TALENT_MORE = (
    "{term} and {term}: a comparison, in {venue}.",
    "On the limits of {term}, with two co-authors.",
    "A survey of {term}, in {venue}.",
    "Notes on {term}.",
    "Towards better {term}: methods, data and open questions.",
)


def write_corpus(directory: Path, rows: int, *, repeating: bool, seed: int) -> list[dict]:
    """train.jsonl, whose rows are also returned; queries.jsonl and corpus.jsonl to evaluate on.

    repeating: the rows are drawn again and again from few texts; else none stands in two rows.
    """
    rng = random.Random(seed)
    pool = SplitSize(max(60, rows // 4), max(120, rows // 5))
    held_out = SplitSize(max(30, rows // 10), max(60, rows // 4))
    if not repeating:  # more than enough for nearly every job to find two talents of its own
        pool = SplitSize(2 * rows, 4 * rows + 400)
    found = list(islice(_rows(rng, _split(rng, pool), once=not repeating), rows))
    assert len(found) == rows, f"{len(found)} of {rows} rows found"
    split = _split(rng, held_out)
    labels = [{i: rules_met(job, t) for i, t in enumerate(split.talents)} for job in split.jobs]
    queries, corpus = world.retrieval_rows(split, labels)
    for name, lines in (("train", found), ("queries", queries), ("corpus", corpus)):
        write_jsonl(directory / f"{name}.jsonl", lines)
    return found


def write_model(directory: Path, rows: Sequence[dict], backbone: str) -> None:
    """A backbone and a tokenizer learnt from the rows, which all sides load. Only the tiny one's
    weights are there: of the others there is the config, for random weights on the device."""
    tokenizer = learn_tokenizer([text for row in rows for text in texts_of(row)], MAX_LENGTH)
    more = {"vocab_size": len(tokenizer)} if backbone == TINY else {}
    config = config_of(backbone, pad_token_id=tokenizer.pad_token_id, **more)
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    pooling = "mean" if config.model_type == "bert" else "last"
    settings = EncoderSettings(pooling, "", "", MAX_LENGTH, MAX_LENGTH)
    write_settings(directory, settings, config.hidden_size)
    if backbone == TINY:
        model = ModelConfig(
            str(directory), from_scratch=True, bf16=False, gradient_checkpointing=False
        )
        load_encoder(model, device=torch.device("cpu")).save(directory)


def texts_of(row: dict) -> list[str]:
    return [row["query"], *row["positives"], *row["negatives"]]


@dataclass(frozen=True)
class Batches:
    """Of random batches, on average."""

    tokens: float  # of texts, not of padding, equal ones counted each
    flops: float  # useful ones of the model, equal texts counted once
    about: dict[str, Any]


def batches(
    rows: Sequence[dict],
    model: Path,
    batch: int,
    negatives: int,
    seed: int,
    max_length: int = MAX_LENGTH,
) -> Batches:
    """`about` says lengths in tokens; which share of them is padding where queries are padded to
    the longest query and passages to the longest passage; which share of texts came before."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    queries = [row["query"] for row in rows]
    passages = [[*row["positives"], *row["negatives"][:negatives]] for row in rows]
    flat = [text for texts in passages for text in texts]
    query_lengths = tokenize(queries, tokenizer, max_length).lengths.numpy()  # [rows]
    passage_lengths = tokenize(flat, tokenizer, max_length).lengths.numpy().reshape(len(rows), -1)
    random = np.random.default_rng(seed)
    drawn = [random.permutation(len(rows))[:batch] for _ in range(20)]
    padded = [b.size * (query_lengths[b].max() + passage_lengths[b].max() * (1 + negatives))
              for b in drawn]  # fmt: skip
    repeated, distinct = [], []  # of each batch; lengths of the distinct texts of all
    for b in drawn:
        sides = [
            dict(zip((queries[row] for row in b), query_lengths[b], strict=True)),
            {text: length for row in b
             for text, length in zip(passages[row], passage_lengths[row], strict=True)},
        ]  # fmt: skip
        repeated.append(1 - sum(map(len, sides)) / (b.size * (2 + negatives)))
        distinct += [length for side in sides for length in side.values()]
    of_a_row = query_lengths.mean() + passage_lengths.mean() * (1 + negatives)
    flops = training_flops(AutoConfig.from_pretrained(model), torch.tensor(distinct)) / len(drawn)
    about = {
        "query tokens": np.quantile(query_lengths, QUANTILES).round().tolist(),
        "passage tokens": np.quantile(passage_lengths, QUANTILES).round().tolist(),
        "quantiles": QUANTILES,
        "tokens of a row": float(of_a_row),
        "padding": float(1 - batch * of_a_row / np.mean(padded)),
        "repeated texts": float(np.mean(repeated)),
    }
    return Batches(float(batch * of_a_row), flops, about)


def rules_met(job: Job, talent: Talent) -> int:
    """How many of `world.RULES` hold, in plain Python: a rented machine has no engine for joins.

    tests/demo holds it against what `rankpo-fast label` finds.
    """
    return (
        (job.region == talent.region)
        + (talent.rank in (job.rank, job.rank - 1))
        + (job.field in (talent.field, talent.second_field))
    )


def _rows(rng: random.Random, split: Split, *, once: bool) -> Iterator[dict]:
    """`once`: who stands in a row stands in no other."""
    free = defaultdict(list)  # talents by field, region and rank
    for talent in split.talents:
        for field in {talent.field, talent.second_field} - {None}:
            free[field, talent.region, talent.rank].append(talent)
    taken = set()

    def draw(job: Job, rules: int) -> Talent | None:
        ranks = range(len(lexicon.RANKS)) if rules < world.NUM_RULES else (job.rank, job.rank - 1)
        found = [
            talent
            for rank in ranks
            for talent in free[job.field, job.region, rank]
            if talent.text not in taken and rules_met(job, talent) == rules
        ]
        return rng.choice(found) if found else None

    jobs = iter(split.jobs) if once else iter(lambda: rng.choice(split.jobs), None)
    for job in jobs:
        fits, misses = draw(job, world.NUM_RULES), draw(job, world.NUM_RULES - 1)
        if fits and misses:
            taken |= {fits.text, misses.text} if once else set()
            yield {"query": job.text, "positives": [fits.text], "negatives": [misses.text]}


def _split(rng: random.Random, size: SplitSize) -> Split:
    """As the world makes it, each text at a length of its own; what then is equal is left out."""
    made = world.make_world(rng.randrange(2**32), {"": size})[""]
    jobs = [_stretched(rng, job, JOB_WORDS, JOB_MORE) for job in made.jobs]
    talents = [_stretched(rng, talent, TALENT_WORDS, TALENT_MORE) for talent in made.talents]
    return Split(_distinct(jobs), _distinct(talents))


def _distinct(items: Sequence[Item]) -> tuple[Item, ...]:
    return tuple({item.text: item for item in items}.values())


def _stretched(
    rng: random.Random, item: Item, words: tuple[float, float], more: Sequence[str]
) -> Item:
    """The first sentence, which says who and where, always stays."""
    median, deviation = words
    target = median * math.exp(rng.gauss(0, deviation))
    target = min(max(target, FEWEST), MOST)
    sentences = item.text.replace(". ", ".\n").split("\n")
    kept: list[str] = []
    count = 0
    while count < target:
        kept.append(
            sentences[len(kept)] if len(kept) < len(sentences) else _sentence(rng, item, more)
        )
        count += len(kept[-1].split())
    return dataclasses.replace(item, text=" ".join(kept))


def _sentence(rng: random.Random, item: Job | Talent, templates: Sequence[str]) -> str:
    """Three of four are about the item's own field."""
    field = item.field if rng.random() < 0.75 else rng.randrange(len(FIELDS))
    first, second = rng.sample(FIELDS[field].terms, 2)
    template = rng.choice(templates).replace("{term}", first, 1).replace("{term}", second)
    return template.replace("{venue}", rng.choice(lexicon.VENUES))


# --- made once a run, and deleted at its end ---


@functools.cache
def workplace() -> Path:
    directory = tempfile.TemporaryDirectory()
    atexit.register(directory.cleanup)
    return Path(directory.name)


@functools.cache
def corpus_of(rows: int, repeating: bool) -> tuple[Path, list[dict]]:
    """Where it is, and its rows."""
    directory = workplace() / f"{rows}{'-repeating' if repeating else ''}"
    return directory, write_corpus(directory, rows, repeating=repeating, seed=SEED)


@functools.cache
def model_of(backbone: str, rows: int) -> Path:
    """With a tokenizer learnt from that corpus."""
    directory = workplace() / f"{backbone}-{rows}"
    _, texts = corpus_of(rows, False)
    write_model(directory, texts, backbone)
    return directory
