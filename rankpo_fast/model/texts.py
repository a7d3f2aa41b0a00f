"""The distinct texts of a run, tokenised once, and which of them a batch needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rankpo_fast.config import ComputeConfig
from rankpo_fast.data.batches import ContrastiveBatch, PreferenceBatch
from rankpo_fast.data.group_batches import GroupBatch
from rankpo_fast.data.packing import check_budget
from rankpo_fast.data.retained import RetainedBatch
from rankpo_fast.data.tokens import TokenTable, joined
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder

Batch = ContrastiveBatch | PreferenceBatch | GroupBatch | RetainedBatch


def check_length(encoder: Encoder, role: str, flag: str | None = None) -> None:
    """InputError if the limit of a role, "query" or "passage", leaves no room for text."""
    by_role = {"query": encoder.tokenize_queries, "passage": encoder.tokenize_passages}
    try:
        by_role[role]([])
    except InputError as error:
        raise InputError(f"{flag or f'--max_{role}_length'}: {error}") from error


def check_lengths(encoder: Encoder) -> None:
    """`check_length` of both roles."""
    check_length(encoder, "query")
    check_length(encoder, "passage")


class BatchTexts(NamedTuple):
    """The n distinct texts of a batch, and where among them each of its texts is."""

    rows: Tensor  # [n] of the table
    query_places: Tensor  # [U] places in `rows`
    passage_places: Tensor  # [N]


@dataclass(frozen=True, eq=False)
class Texts:
    """Queries and passages as token ids, those that are equal once."""

    table: TokenTable
    query_rows: Tensor  # [queries] the table's row of each query text
    passage_rows: Tensor  # [passages] and of each passage text
    query_tokens: float  # of a query on average
    passage_tokens: float

    @classmethod
    def tokenize(
        cls,
        encoder: Encoder,
        queries: Sequence[str],
        passages: Sequence[str],
        config: ComputeConfig,
    ) -> "Texts":
        """InputError if a text alone does not fit into a micro-batch: now, not in mid-training."""
        check_lengths(encoder)
        of_queries = encoder.tokenize_queries(queries, config.cache_path)
        of_passages = encoder.tokenize_passages(passages, config.cache_path)
        table, [query_rows, passage_rows] = joined(of_queries, of_passages)
        check_budget(table.lengths, config.max_tokens_per_micro_batch)
        return cls(
            table, query_rows, passage_rows, _mean_length(of_queries), _mean_length(of_passages)
        )

    def queries_as_passages(
        self, encoder: Encoder, queries: Sequence[str], config: ComputeConfig
    ) -> Tensor:
        """The table's row [queries] of each query text as a passage, beyond its end for none.

        Prefix and limit of a passage may be others, and then so are the ids.
        """
        settings = encoder.settings
        rows = self.query_rows.clone()
        if settings.query_prefix == settings.passage_prefix:  # what no limit cuts has the same ids
            limit = min(settings.max_query_length, settings.max_passage_length)
            other = (self.table.lengths[rows] >= limit).nonzero().flatten()
        else:
            other = torch.arange(len(rows))
        if len(other) == 0:
            return rows
        texts = [queries[i] for i in other.tolist()]
        table = encoder.tokenize_passages(texts, config.cache_path)
        _, [_, as_passages] = joined(self.table, table)
        rows[other] = as_passages
        return rows

    def strings(self, queries: Sequence[str], passages: Sequence[str]) -> list[str]:
        """A text of each row of the table, of those that were tokenised."""
        by_row = [""] * len(self.table)
        for rows, own in [(self.query_rows, queries), (self.passage_rows, passages)]:
            for row, text in zip(rows.tolist(), own, strict=True):
                by_row[row] = text
        return by_row

    def of(self, batch: Batch) -> BatchTexts:
        """The texts of a batch, each once."""
        queries = self.query_rows[batch.query_texts]
        passages = self.passage_rows[batch.passage_texts]
        rows, places = torch.cat([queries, passages]).unique(return_inverse=True)
        return BatchTexts(rows, *places.split([len(queries), len(passages)]))

    def summary(self) -> str:
        queries, passages = len(self.query_rows), len(self.passage_rows)
        return (
            f"{queries:,} queries of {self.query_tokens:.0f} tokens on average and {passages:,} "
            f"passages of {self.passage_tokens:.0f}; {self.table.truncated:,} were truncated"
            f"{self._twins}"
        )

    @property
    def _twins(self) -> str:
        """How many texts count as one with an earlier text, if any do."""
        kinds = {"queries": self.query_rows, "passages": self.passage_rows}
        twins = {kind: len(rows) - len(rows.unique()) for kind, rows in kinds.items()}
        said = " and ".join(f"{count:,} {kind}" for kind, count in twins.items() if count)
        return f"; {said} have the tokens of an earlier one and count as it" if said else ""


def _mean_length(table: TokenTable) -> float:
    return table.lengths.double().mean().item()
