"""`rankpo-fast pairs`: pairs of passages that a model finds for a query, to be judged."""

from rankpo_fast.config import ComputeConfig, EncoderConfig, PairsConfig
from rankpo_fast.data.rows import write_jsonl
from rankpo_fast.judge.pairs import find_pairs, read_texts_and_ids
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.texts import check_lengths


def run(model: EncoderConfig, config: PairsConfig, compute: ComputeConfig) -> None:
    """Raises InputError for what the user can put right, most of it before the model is loaded."""
    texts = read_texts_and_ids(config)
    encoder = load_encoder(model, device=compute.torch_device())
    check_lengths(encoder)
    rows = find_pairs(encoder, texts, config, compute, progress=True)
    write_jsonl(config.output_file, rows)
    queries = len({row["query"] for row in rows})
    print(f"{len(rows):,} pairs of {queries:,} queries among {len(texts.corpus):,} passages in "
          f"{config.output_file}")  # fmt: skip
