"""`rankpo-fast mine`: rows of stage 1 with the hard negatives that a model finds for them."""

import dataclasses
import warnings
from collections.abc import Sequence

from rankpo_fast.commands.config import MineConfig
from rankpo_fast.config import ComputeConfig, EncoderConfig
from rankpo_fast.data.rows import ContrastiveRow, read_contrastive, read_texts, write_jsonl
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.texts import check_lengths
from rankpo_fast.retrieval.mining import Limits, mine_hard_negatives


def run(model: EncoderConfig, config: MineConfig, compute: ComputeConfig) -> None:
    """Raises InputError for what the user can put right, most of it before the model is loaded."""
    device = compute.torch_device()
    rows = read_contrastive(config.train_data)
    corpus = _passages(rows, config.corpus_data)
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


def _passages(rows: Sequence[ContrastiveRow], corpus_data: str | None) -> list[str]:
    """What is searched: a corpus, or all passages of the rows."""
    if corpus_data is None:
        return [text for row in rows for text in (*row.positives, *row.negatives)]
    read = read_texts(corpus_data, "text")
    corpus = [text for text in read if text]
    if empty := len(read) - len(corpus):
        warnings.warn(
            f"{corpus_data}: {empty:,} empty texts are no negatives: left out", stacklevel=3
        )
    return corpus
