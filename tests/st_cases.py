"""Models, texts and comparisons for the adapter of sentence-transformers, and what its ranks do.

B texts a column, D dims.
"""

import random

import torch
from torch import Tensor, nn

SENTENCES = [
    "a senior data engineer builds pipelines", "the nurse cares for patients at night", "teacher",
    "software developer with ten years of experience in Python", "we look for a welder in Lyon",
    "marine biology", "an accountant who likes trains", "night shift in the port of Bergen",
    "translator of old letters", "a cook", "she tunes pianos and violins", "forester, half time",
]  # fmt: skip


class Rows(nn.Sequential):
    """Stands for a model: the embedding of a text is the row of a table that its first token names.

    So the gradient of the table is that of the embeddings.
    """

    max_seq_length = 8
    device = torch.device("cpu")

    def __init__(self, dims: int, tokenizer, seed: int = 0, rows: int = 40):
        super().__init__(nn.Embedding(rows, dims))
        generator = torch.Generator().manual_seed(seed)
        self[0].weight.data = torch.randn(rows, dims, generator=generator)
        self.tokenizer = tokenizer

    def forward(self, features: dict) -> dict:
        return features | {"sentence_embedding": self[0](features["input_ids"][:, 0])}

    def get_embedding_dimension(self) -> int:
        return self[0].embedding_dim


def rows_of(columns: int, B: int = 7) -> list[dict[str, Tensor]]:
    """Features of `Rows`, every text a row of its own."""
    ids = torch.arange(columns * B).reshape(columns, B, 1)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]


def bert(directory, dropout: float = 0.0, seed: int = 0, **config):
    """A BERT of tests/conftest.py that pools the mean, with weights that spread its embeddings."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    backbone = Transformer(str(directory), config_kwargs=dropouts | config, max_seq_length=32)
    generator = torch.Generator().manual_seed(seed)
    for parameter in backbone.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    pooling = Pooling(backbone.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[backbone, pooling], device="cpu")


def texts(columns: int, B: int = 6, seed: int = 0) -> list[list[str]]:
    """Columns of texts of unequal lengths; no two begin alike."""
    generator = random.Random(seed)
    numbers = generator.sample(range(10, 10 + columns * B), columns * B)
    made = [
        f"{number} {' '.join(generator.sample(SENTENCES, generator.choice([1, 1, 2])))}"
        for number in numbers
    ]
    return [made[i * B : (i + 1) * B] for i in range(columns)]


def result(loss: nn.Module, features: list[dict], *of: nn.Module | nn.Parameter, factor=1.0):
    """(loss, gradients of modules and parameters), from one seed for whatever draws."""
    of = [list(x.parameters()) if isinstance(x, nn.Module) else [x] for x in of]
    parameters = sum(of, [])
    for parameter in parameters:
        parameter.grad = None
    random.seed(1)
    torch.manual_seed(1)
    value = loss([dict(column) for column in features], None)
    (value * factor).backward()
    return value.detach(), [x.grad.clone() for x in parameters if x.grad is not None]


def error(ours, theirs) -> float:
    """The largest of the relative errors of (loss, gradients)."""
    (value, grads), (true_value, true_grads) = ours, theirs
    assert len(grads) == len(true_grads) > 0
    whole, true_whole = (torch.cat([x.flatten() for x in each]) for each in (grads, true_grads))
    of_loss = (value - true_value).abs() / true_value.abs().clamp(min=1e-3)
    return max(of_loss.item(), ((whole - true_whole).norm() / true_whole.norm()).item())


def flatten(model) -> None:
    """Inputs of the model come flattened, as for flash-attn: a row of tokens, and their ends."""
    from transformers import AttentionInterface, DataCollatorWithFlattening

    def attend(module, query, key, value, mask, *, cu_seq_lens_q, **_):
        ends = cu_seq_lens_q.tolist()
        each = [
            nn.functional.scaled_dot_product_attention(*[x[:, :, a:b] for x in (query, key, value)])
            for a, b in zip(ends, ends[1:], strict=False)
        ]
        return torch.cat(each, 2).transpose(1, 2), None

    AttentionInterface.register("st_cases_flattened", attend)
    model[0].model.set_attn_implementation("st_cases_flattened")
    model[0].data_collator = DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    model[0].can_flatten_inputs, model[0]._flatten_position_offset = True, 0
    if model[0].model_forward_params is not None:
        model[0].model_forward_params |= {"cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"}
        model[0].model_forward_params |= {"max_length_q", "max_length_k"}
