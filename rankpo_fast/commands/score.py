"""`rankpo-fast score`: what a cross-encoder thinks of the passages of rows, as a teacher's rows."""

import json
from collections.abc import Iterator

from rankpo_fast.config import DeviceConfig, ScoreConfig
from rankpo_fast.data.files import whole_file
from rankpo_fast.data.groups import read_candidates
from rankpo_fast.model.reranker import Reranker
from rankpo_fast.progress import progress

PAIRS_AT_ONCE = 8192  # sorted by length among themselves; what is held in memory of rows and ids


def run(config: ScoreConfig, compute: DeviceConfig) -> None:
    """Raises InputError for what the user can put right, most of it before the model is loaded."""
    rows = pairs = 0
    for _, passages in _rows(config):  # every fault of the data is found now
        rows, pairs = rows + 1, pairs + len(passages)
    reranker = Reranker.load(
        config.reranker, device=compute.torch_device(), max_length=config.max_length,
        bf16=config.bf16,
    )  # fmt: skip
    budget = compute.max_tokens_per_micro_batch
    reranker.check_budget(budget)
    truncated = 0
    with (
        whole_file(config.output_file) as temporary,
        open(temporary, "w", encoding="utf-8") as file,
        progress("scoring", pairs, "pair") as advance,
    ):
        for part in _parts(_rows(config)):
            both = [(query, passage) for query, passages in part for passage in passages]
            scores, cut = reranker.scores(both, max_tokens=budget, advance=advance)
            truncated += cut
            own = iter(scores)
            for query, passages in part:
                given = [next(own) for _ in passages]
                row = {"query": query, "passages": passages, "scores": given}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(
        f"{rows:,} rows with {pairs:,} scores in {config.output_file}; {truncated:,} pairs cut to "
        f"{reranker.max_length:,} tokens"
    )


def _rows(config: ScoreConfig) -> Iterator[tuple[str, list[str]]]:
    """Query and its distinct passages, of all files."""
    for source in config.train_data:
        for query, passages in read_candidates(source, config.split):
            yield query, list(dict.fromkeys(passages))


def _parts(rows: Iterator[tuple[str, list[str]]]) -> Iterator[list[tuple[str, list[str]]]]:
    """Rows of about PAIRS_AT_ONCE pairs."""
    part: list[tuple[str, list[str]]] = []
    pairs = 0
    for row in rows:
        part.append(row)
        pairs += len(row[1])
        if pairs >= PAIRS_AT_ONCE:
            yield part
            part, pairs = [], 0
    if part:
        yield part
