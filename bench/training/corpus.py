"""Jobs and talents of mixed lengths, from the demo's world, and an untrained encoder to learn them.

A text of the world is cut after a sentence, or goes on in further ones, to a length that is
log-normal; jobs and talents have distributions of their own. A row is a job, a talent who fits it
by the world's three rules, and one who meets two of them.
"""

import dataclasses
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig

from rankpo_fast.config import EncoderConfig, ModelConfig
from rankpo_fast.data.rows import write_jsonl
from rankpo_fast.demo import lexicon, world
from rankpo_fast.demo.steps import learn_tokenizer
from rankpo_fast.demo.world import FIELDS, Job, Split, SplitSize, Talent
from rankpo_fast.model.load import load_encoder

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


@dataclass(frozen=True)
class Size:
    """Of the training rows, the held-out jobs and talents, and the model."""

    rows: int
    held_out: SplitSize
    layers: int
    hidden_size: int


def write_corpus(directory: Path, size: Size, pool: SplitSize | None, seed: int) -> list[dict]:
    """train.jsonl, whose rows are also returned; queries.jsonl and corpus.jsonl to evaluate on.

    pool: how many jobs and talents the rows are drawn from again and again; None: no text stands in
    two rows.
    """
    rng = random.Random(seed)
    # Without a pool, more than enough for nearly every job to find two talents of its own.
    split = _split(rng, pool or SplitSize(2 * size.rows, 4 * size.rows + 400))
    rows = list(islice(_rows(rng, split, once=pool is None), size.rows))
    assert len(rows) == size.rows, f"{len(rows)} of {size.rows} rows found"
    queries, corpus = world.retrieval_rows(_split(rng, size.held_out))
    for name, lines in (("train", rows), ("queries", queries), ("corpus", corpus)):
        write_jsonl(directory / f"{name}.jsonl", lines)
    return rows


def write_model(directory: Path, rows: Sequence[dict], size: Size) -> None:
    """A BERT with random weights and a tokenizer learnt from the rows, which both sides load."""
    tokenizer = learn_tokenizer([text for row in rows for text in texts_of(row)], MAX_LENGTH)
    config = directory.with_name(f"{directory.name}_config")
    tokenizer.save_pretrained(config)
    BertConfig(
        architectures=["BertModel"],
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=4 * size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden_size // 32,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(config)
    model = ModelConfig(
        str(config), from_scratch=True, pooling="mean", bf16=False, gradient_checkpointing=False
    )
    load_encoder(model, device=torch.device("cpu")).save(directory)


def texts_of(row: dict) -> list[str]:
    return [row["query"], *row["positives"], *row["negatives"]]


def shape(rows: Sequence[dict], model: Path, batch_size: int, negatives: int, seed: int) -> dict:
    """Of random batches: lengths in tokens; which share of them is padding where queries are padded
    to the longest query and passages to the longest passage; which share of texts came before."""
    encoder = load_encoder(EncoderConfig(str(model)), device=torch.device("cpu"))
    queries = [row["query"] for row in rows]
    passages = [[*row["positives"], *row["negatives"][:negatives]] for row in rows]
    flat = [text for texts in passages for text in texts]
    query_lengths = encoder.tokenize_queries(queries).lengths.numpy()  # [rows]
    passage_lengths = encoder.tokenize_passages(flat).lengths.numpy().reshape(len(rows), -1)
    random = np.random.default_rng(seed)
    batches = [random.permutation(len(rows))[:batch_size] for _ in range(20)]
    padded = [b.size * (query_lengths[b].max() + passage_lengths[b].max() * (1 + negatives))
              for b in batches]  # fmt: skip
    repeated = []
    for batch in batches:
        texts = [[queries[row] for row in batch], [text for row in batch for text in passages[row]]]
        distinct = sum(len(set(part)) for part in texts)
        repeated.append(1 - distinct / sum(map(len, texts)))
    tokens = query_lengths.mean() + passage_lengths.mean() * (1 + negatives)
    return {
        "batch": batch_size,
        "query tokens": np.quantile(query_lengths, QUANTILES).round().tolist(),
        "passage tokens": np.quantile(passage_lengths, QUANTILES).round().tolist(),
        "tokens of a row": float(tokens),
        "padding": float(1 - batch_size * tokens / np.mean(padded)),
        "repeated texts": float(np.mean(repeated)),
    }


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
            if talent.text not in taken and world.rules_met(job, talent) == rules
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
    jobs = (_stretched(rng, job, JOB_WORDS, JOB_MORE) for job in made.jobs)
    talents = (_stretched(rng, talent, TALENT_WORDS, TALENT_MORE) for talent in made.talents)
    distinct = ({item.text: item for item in items}.values() for items in (jobs, talents))
    return Split(*map(tuple, distinct))


def _stretched(
    rng: random.Random, item: Job | Talent, words: tuple[float, float], more: Sequence[str]
) -> Job | Talent:
    """The first sentence, which says who and where, always stays."""
    median, deviation = words
    target = median * math.exp(rng.gauss(0, deviation))
    target = min(max(target, FEWEST), MOST)
    sentences = item.text.replace(". ", ".\n").split("\n")
    kept, count = [], 0
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
