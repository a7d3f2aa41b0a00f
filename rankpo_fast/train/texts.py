"""The distinct texts of a run, tokenised once, and the embeddings of those a batch needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from rankpo_fast.config import ComputeConfig
from rankpo_fast.data.batches import ContrastiveBatch, PreferenceBatch
from rankpo_fast.data.tokens import TokenTable
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder

Batch = ContrastiveBatch | PreferenceBatch


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


@dataclass(frozen=True, eq=False)
class Texts:
    """Queries and passages as token ids; U and N of them are in a batch, D dims."""

    queries: TokenTable
    passages: TokenTable
    max_tokens: int  # of a micro-batch, padding included

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
        texts = cls(
            encoder.tokenize_queries(queries, config.cache_path),
            encoder.tokenize_passages(passages, config.cache_path),
            config.max_tokens_per_micro_batch,
        )
        for lengths in texts.lengths:
            encoder.plan(lengths, texts.max_tokens)
        return texts

    def embed(self, encoder: Encoder, batch: Batch) -> tuple[Tensor, Tensor]:
        """Queries [U, D] and passages [N, D] of the batch, each distinct text once, fp32."""
        queries = encoder.embed(self.queries, batch.query_texts, max_tokens=self.max_tokens)
        passages = encoder.embed(self.passages, batch.passage_texts, max_tokens=self.max_tokens)
        return queries, passages

    @cached_property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Tokens of each query and of each passage."""
        return self.queries.lengths, self.passages.lengths

    def tokens(self, batch: Batch) -> int:
        queries, passages = self.lengths
        return int(queries[batch.query_texts].sum() + passages[batch.passage_texts].sum())

    def summary(self) -> str:
        queries, passages = self.lengths
        cut = self.queries.truncated + self.passages.truncated
        mean_query, mean_passage = queries.double().mean(), passages.double().mean()
        return (
            f"{len(queries):,} queries of {mean_query:.0f} tokens on average and "
            f"{len(passages):,} passages of {mean_passage:.0f}; {cut:,} were truncated"
        )
