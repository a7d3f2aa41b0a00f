"""A cross-encoder, which reads query and passage together: transformers' sequence classification.

    score = logit                   of a head with one label
            logit_1 - logit_0       of a head with two, the second of which means relevant

Pairs of like length go through it together, padded. S pairs of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rankpo_fast.data.packing import default_budget, plan_padded
from rankpo_fast.errors import InputError
from rankpo_fast.model.directories import (
    blaming,
    check_config,
    check_no_code,
    check_weights,
    find_directory,
)
from rankpo_fast.model.reading import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FLAG, LENGTH_FLAG = "--reranker", "--max_length"
LABELS = (1, 2)
Pair = tuple[str, str]  # query, passage


@dataclass(frozen=True, eq=False)
class Reranker:
    """In eval mode, on a device."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int  # tokens of query and passage together, special ones included

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: torch.device,
        max_length: int | None = None,
        bf16: bool = False,
        length_flag: str = LENGTH_FLAG,
    ) -> "Reranker":
        """From a directory, or the hub's repository of that name: safetensors, and none of its
        code.

        Args:
            max_length: None: what the model and its tokenizer take.
            bf16: weights and activations in bf16, else in fp32.
            length_flag: through which the user gives max_length, for messages.

        Raises:
            InputError: there is none, it is no cross-encoder, or has a head that gives no score.
        """
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        folder = find_directory(name, FLAG, weights=True)
        check_config(folder, FLAG)
        check_no_code(folder / "config.json", "AutoModelForSequenceClassification", FLAG)
        check_no_code(folder / "tokenizer_config.json", "AutoTokenizer", FLAG)
        check_weights(folder, FLAG)
        with blaming(f"{FLAG} {folder}"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if config.num_labels not in LABELS:
            raise InputError(f"{FLAG} {folder}: its head has {config.num_labels} labels, but a "
                             f"score takes a head with 1, or 2")  # fmt: skip
        if tokenizer.pad_token_id is None:
            raise InputError(f"{FLAG} {folder}: its tokenizer has no token to pad with")
        with blaming(f"{FLAG} {folder}"):
            model, report = AutoModelForSequenceClassification.from_pretrained(
                folder,
                config=config,
                dtype=torch.bfloat16 if bf16 else torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        unfit = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
        if unfit:  # transformers leaves them random
            raise InputError(f"{FLAG} {folder}: no cross-encoder: {len(unfit)} tensors that one "
                             f"has are not there in that shape: {min(unfit)} ...")  # fmt: skip
        tokenizer.padding_side = "right"
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        most = min(positions_of(model), tokenizer.model_max_length)
        return cls(name, model.to(device).eval(), tokenizer, _length(folder, max_length, tokenizer,
                   positions_of(model), most, length_flag))  # fmt: skip

    def check_budget(self, max_tokens: int | None, length_flag: str = LENGTH_FLAG) -> None:
        """InputError where a pair may have more tokens than may go through the model at once."""
        if max_tokens is not None and max_tokens < self.max_length:
            raise InputError(
                f"--max_tokens_per_micro_batch {max_tokens} is less than a pair may have: give "
                f"{self.max_length} or more, or a smaller {length_flag}"
            )

    def scores(
        self,
        pairs: Sequence[Pair],
        *,
        max_tokens: int | None = None,
        advance: Callable[[int], object] = lambda count: None,
    ) -> tuple[list[float], int]:
        """Of each pair, in order; and how many pairs were cut.

        Args:
            max_tokens: tokens, padding included, that go through the model at once; None: what
                suits the device.
            advance: takes the number of pairs done since it was called last.

        Raises:
            InputError: a score is not finite.
        """
        texts, truncated = self._tokenized(pairs)
        lengths = torch.tensor([len(text["input_ids"]) for text in texts])
        budget = max_tokens or default_budget(lengths, self.model.device.type)
        scores = torch.empty(len(pairs), dtype=torch.float32)
        for batch in plan_padded(lengths, budget):
            scores[batch] = self._forward([texts[i] for i in batch.tolist()]).float().cpu()
            advance(len(batch))
        if (bad := (~scores.isfinite()).nonzero().flatten()).numel():
            query, passage = pairs[int(bad[0])]
            raise InputError(f"{FLAG} {self.name}: {len(bad):,} scores are not finite, the first "
                             f"of query {query!r:.60} with passage {passage!r:.60}")  # fmt: skip
        return scores.tolist(), truncated

    def _tokenized(self, pairs: Sequence[Pair]) -> tuple[list[dict[str, list[int]]], int]:
        """The inputs of each pair, and how many were cut: the longer of both texts first."""
        given = {"return_attention_mask": False, "verbose": False}
        both = [[*side] for side in zip(*pairs, strict=True)]
        encoded = self.tokenizer(*both, truncation=True, max_length=self.max_length, **given)
        keys = list(encoded.keys())
        texts = [
            dict(zip(keys, of_pair, strict=True))
            for of_pair in zip(*(encoded[key] for key in keys), strict=True)
        ]
        if encoded.encodings is not None:
            return texts, sum(bool(encoding.overflowing) for encoding in encoded.encodings)
        # A tokenizer written in Python keeps nothing of what it cut: ask it for the full ones.
        full = [i for i, text in enumerate(texts) if len(text["input_ids"]) == self.max_length]
        whole = [self.tokenizer(*pairs[i], truncation=False, **given)["input_ids"] for i in full]
        return texts, sum(len(ids) > self.max_length for ids in whole)

    @torch.inference_mode()
    def _forward(self, texts: list[dict[str, list[int]]]) -> Tensor:
        """Scores [S]; in two halves where memory does not suffice."""
        device, fill = self.model.device, {"input_ids": self.tokenizer.pad_token_id}
        inputs = {
            key: pad_sequence(
                [torch.tensor(text[key]) for text in texts], True, fill.get(key, 0)
            ).to(device)
            for key in texts[0]
        }
        lengths = torch.tensor([len(text["input_ids"]) for text in texts])[:, None]
        mask = torch.arange(int(lengths.max())) < lengths  # [S, L]
        try:
            logits = self.model(**inputs, attention_mask=mask.long().to(device)).logits
            return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        except torch.OutOfMemoryError:
            if len(texts) == 1:
                raise
        torch.cuda.empty_cache()  # of blocks cut for the larger one
        half = len(texts) // 2
        return torch.cat([self._forward(texts[:half]), self._forward(texts[half:])])


def _length(
    folder: object, asked: int | None, tokenizer: "PreTrainedTokenizerBase", positions: float,
    most: float, flag: str,
) -> int:  # fmt: skip
    """Tokens of a pair; InputError where they do not fit, or leave no room for text."""
    if asked is None and most > 1e9:  # as transformers says that nobody knows
        raise InputError(f"{FLAG} {folder}: its files do not say how long a text may be: give "
                         f"{flag}")  # fmt: skip
    length = int(most) if asked is None else asked
    if length > positions:
        raise InputError(f"{flag} {length} is more than the {positions:g} positions of "
                         f"{FLAG} {folder}")  # fmt: skip
    if length <= (special := tokenizer.num_special_tokens_to_add(pair=True)):
        raise InputError(f"{flag} {length} leaves no room for text: the tokenizer adds "
                         f"{special} special tokens")  # fmt: skip
    return length
