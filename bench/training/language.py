"""Small language models of the demo's world: trained on texts, then tuned to follow instructions.

loss = -mean log P(token | those before it), of a whole text, or of the answer to an instruction.
The texts are of a pool of their own, of which the demo trains and measures on nothing.
"""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel

from rankpo_fast.demo import lexicon, world
from rankpo_fast.demo.world import FIELDS, Split, SplitSize

from .corpus import rules_met

POOL = SplitSize(2000, 4000)
POOL_SEED = 1_000_000  # from here on: no world of the demo has such a seed
BATCH, WARM_UP = 64, 0.1
# Chosen on the validation split of seed 7: at 3e-3 the model learns more of its texts (1.15 nats a
# token and not 2.27), and stage 1 from there less (nDCG@20 0.80 and not 0.87).
RATE = 1e-3
HELD_OUT = 256  # examples that the loss is measured on
DROPPED = 0.3  # of the words of a view
IGNORED = -100  # as a label: no loss of this token


class Example(NamedTuple):
    """Of `answer` the loss is taken; with no prompt it is a text like any other."""

    prompt: str
    answer: str


def pool_of(seed: int) -> Split:
    return world.make_world(POOL_SEED + seed, {"": POOL})[""]


def texts(pool: Split) -> list[Example]:
    found = [job.text for job in pool.jobs] + [talent.text for talent in pool.talents]
    return [Example("", text) for text in found]


def instructions(pool: Split, seed: int) -> list[Example]:
    """For each job a talent who fits, the field, and the rank; of each talent the field."""
    rng = random.Random(seed)
    of_field = defaultdict(list)
    for talent in pool.talents:
        for number in {talent.field, talent.second_field} - {None}:
            of_field[number].append(talent)
    found = []
    for job in pool.jobs:
        fits = [one for one in of_field[job.field] if rules_met(job, one) == world.NUM_RULES]
        if fits:
            ask = "Describe a talent for this job: "
            found.append(Example(f"{ask}{job.text} Answer: ", rng.choice(fits).text))
        field, post = FIELDS[job.field].names[0], lexicon.RANKS[job.rank].posts[0]
        found.append(Example(f"Name the field of this job: {job.text} Answer: ", field))
        found.append(Example(f"Name the rank of this job: {job.text} Answer: ", post))
    for talent in pool.talents:
        ask = f"Name the field of this talent: {talent.text} Answer: "
        found.append(Example(ask, FIELDS[talent.field].names[0]))
    return found


def views(pool: Split, seed: int) -> Iterator[dict]:
    """Rows of stage 1 without labels: a text twice, each time without other words."""
    rng = random.Random(seed)

    def view(text: str) -> str:
        return " ".join(word for word in text.split() if rng.random() >= DROPPED)

    for _, text in texts(pool):
        yield {"query": view(text), "positives": [view(text)], "negatives": []}


class Losses(NamedTuple):
    """Nats a token, on held-out examples."""

    before: float
    after: float


def train(start: Path, output: Path, examples: Sequence[Example], steps: int, seed: int) -> Losses:
    """The backbone, with a tokenizer, in `output`; from the weights in `start`, if it has some.

    Embeddings are tied to the head, so that the backbone alone is the whole model.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(start, tie_word_embeddings=True))
    if (start / "model.safetensors").exists():
        model.model.load_state_dict(LlamaModel.from_pretrained(start).state_dict())
    tokenizer = AutoTokenizer.from_pretrained(start)
    examples = random.Random(seed).sample(list(examples), len(examples))
    held_out, examples = examples[:HELD_OUT], examples[HELD_OUT:]
    before = _held_out_loss(model, tokenizer, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=WARM_UP)
    for batch in islice(_batches(examples, seed), steps):
        loss = _loss(model, tokenizer, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    after = _held_out_loss(model, tokenizer, held_out)
    model.model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return Losses(before, after)


def _batches(examples: Sequence[Example], seed: int) -> Iterator[list[Example]]:
    rng = random.Random(seed)
    while True:
        drawn = rng.sample(range(len(examples)), len(examples))
        for first in range(0, len(drawn) - BATCH + 1, BATCH):
            yield [examples[i] for i in drawn[first : first + BATCH]]


def _loss(model: LlamaForCausalLM, tokenizer: Any, batch: Sequence[Example]) -> Tensor:
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    texts = [text for example in batch for text in example]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    rows, targets = [], []
    for prompt, answer in zip(ids, ids, strict=True):
        rows.append(torch.tensor([first, *prompt, *answer, last]))
        targets.append(torch.tensor([*[IGNORED] * len(prompt), *answer, last]))
    tokens = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    hidden = model.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    # Most of the work is the vocabulary's: only where a token has a label.
    asked = labels != IGNORED
    return F.cross_entropy(model.lm_head(hidden[:, :-1][asked]), labels[asked])


@torch.no_grad()
def _held_out_loss(model: LlamaForCausalLM, tokenizer: Any, examples: Sequence[Example]) -> float:
    return _loss(model, tokenizer, examples).item()
