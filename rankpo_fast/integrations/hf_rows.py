"""The rows of stage 2 for transformers' Trainer: texts to tokens, tokens to padded batches.

B rows of a query, the passage to rank first and the other; L tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rankpo_fast.integrations import require

if TYPE_CHECKING:
    from datasets import Dataset

    from rankpo_fast.integrations.hf_trainer import RankPOArguments


@dataclass
class RankPODataCollatorWithPadding:
    """Rows of token ids -> query [B, L] and passage [2 B, L], chosen before rejected, padded on the
    right."""

    pad_token_id: int = 0

    def __call__(self, rows: list[dict[str, dict]]) -> dict[str, dict[str, Tensor]]:
        return {
            "query": self._padded([row["query"] for row in rows]),
            "passage": self._padded([row[k] for row in rows for k in ("chosen", "rejected")]),
        }

    def _padded(self, texts: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0}
        return {
            key: pad_sequence([torch.tensor(text[key]) for text in texts], True, value)
            for key, value in fill.items()
        }


@dataclass
class WithReference:
    """A collator that knows no such column, and the column."""

    collate: Callable

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        reference_B2 = torch.tensor([row["reference"] for row in rows], dtype=torch.float32)
        # as integers: under DeepSpeed the Trainer rounds a batch's floats to the model's dtype
        return {**self.collate(rows), "reference": reference_B2.view(torch.int32)}


def each(change: Callable, datasets: Any) -> Any:
    """Of one dataset, of a dict of them, or of None."""
    if isinstance(datasets, dict):
        return {name: change(rows) for name, rows in datasets.items()}
    return None if datasets is None else change(datasets)


def tokenized(tokenizer: Any, args: "RankPOArguments", rows: Any) -> "Dataset":
    """Rows {"query", "chosen", "rejected"} of token ids and masks."""
    require("datasets", "2.20", tried="4.4.1 and 5.2.0")
    from datasets import Dataset

    if not isinstance(rows, Dataset):
        rows = Dataset.from_list(list(rows))
    limits = (args.max_query_length, *[args.max_passage_length] * 2)
    with args.main_process_first(desc="tokenising"):
        return rows.map(
            _tokens,
            with_indices=True,
            fn_kwargs={"tokenizer": tokenizer, "limits": limits},
            remove_columns=rows.column_names,
            num_proc=args.dataset_num_proc,
            desc="Tokenizing",
        )


def _tokens(row: dict, number: int, tokenizer: Any, limits: tuple[int, ...]) -> dict[str, dict]:
    for key in ("query", "passage1", "passage2"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"row {number}: {key!r} must be a text, got {row.get(key)!r}")
    preferred, passages = row.get("preferred"), ("passage1", "passage2")
    if preferred not in ("A", "B"):
        raise ValueError(f"row {number}: 'preferred' must be 'A' or 'B', got {preferred!r}")
    keys = ("query", *(passages if preferred == "A" else passages[::-1]))
    names = ("query", "chosen", "rejected")
    return {
        name: dict(tokenizer(row[key], max_length=limit, truncation=True))
        for name, key, limit in zip(names, keys, limits, strict=True)
    }
