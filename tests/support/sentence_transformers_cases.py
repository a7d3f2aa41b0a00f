"""Models, texts and comparisons for the adapter of sentence-transformers, and what its ranks do.

B texts a column, D dims.
"""

import random
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support import gates

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
        features["sentence_embedding"] = self[0](features["input_ids"][:, 0])
        return features

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
    """(loss, the gradient of modules and parameters in one vector), from one seed for whatever
    draws. Some parts of it are 0 but for rounding, the whole is not."""
    of = [list(x.parameters()) if isinstance(x, nn.Module) else [x] for x in of]
    parameters = sum(of, [])
    for parameter in parameters:
        parameter.grad = None
    random.seed(1)
    torch.manual_seed(1)
    value = loss([dict(column) for column in features], None)
    (value * factor).backward()
    return value.detach(), torch.cat([x.grad.flatten() for x in parameters if x.grad is not None])


def largest_logit(loss: nn.Module, features: list[dict]) -> float:
    """Of theirs: nothing is more similar than the longest embedding to itself."""
    model = loss.model
    while hasattr(loss, "loss"):
        loss = loss.loss
    with torch.no_grad():
        x_ND = torch.cat([model(dict(column))["sentence_embedding"] for column in features])
        similarity = getattr(loss, "similarity_fct", None)
        largest = similarity(x_ND, x_ND).abs().max().item() if similarity else 1.0
    scale = loss.scale if hasattr(loss, "scale") else 1 / loss.temperature
    return largest * (float(scale) + getattr(loss, "hardness_strength", 0.0))


def compared(make: Callable, ours, theirs, features: list[dict], *of, **how) -> tuple:
    """(result of ours, of theirs in fp64 from the same embeddings, the largest logit).

    make: of a library to its loss. of, how: as `result` has them.
    """
    got, loss = result(make(ours), features, *of, **how), make(theirs)
    models = [loss.model] + [x.guide for x in loss.modules() if hasattr(x, "guide")]
    with gates.in_fp64(*set(models)):
        exact = result(loss, features, *of, **how)
    return got, exact, largest_logit(loss, features)


def error(ours, theirs) -> float:
    """The larger of the relative errors of (loss, gradient)."""
    return max(gates.error(x, y) for x, y in zip(ours, theirs, strict=True))


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


# --- what two ranks do ---

GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
RANKS = {
    "plain": ("MultipleNegativesRankingLoss", {"directions": GTE}, None),
    "hard": (
        "CachedMultipleNegativesRankingLoss",
        {"hardness_mode": "all_negatives", "hardness_strength": 5.0, "mini_batch_size": 3}, None,
    ),
    "matryoshka": (
        "MultipleNegativesRankingLoss",
        {"directions": GTE[::2], "partition_mode": "per_direction"}, [16, 6],
    ),
    "guided": ("GISTEmbedLoss", {"temperature": 0.1}, None),
    "guided-cached": ("CachedGISTEmbedLoss", {"temperature": 0.1, "mini_batch_size": 3}, [16, 6]),
}  # fmt: skip


def in_ddp(loss: nn.Module, model: nn.Module) -> nn.Module:
    """The loss, its model in DDP; as the trainer does, wherever a loss inside has it."""
    wrapped = nn.parallel.DistributedDataParallel(model)
    for module in list(loss.modules()):
        if getattr(module, "model", None) is model:
            module.model = wrapped
    return loss


def of_rank(columns: int, B: int) -> list[dict[str, Tensor]]:
    """Every rank has rows of its own."""
    whole = rows_of(columns, B * dist.get_world_size())
    start = dist.get_rank() * B
    return [{key: x[start : start + B] for key, x in column.items()} for column in whole]


def gathered(name: str, tokenizer) -> list[float]:
    """Errors of loss and averaged gradients within the gates, beside theirs."""
    from sentence_transformers.sentence_transformer import losses as theirs

    from rankpo_fast.integrations import sentence_transformers as ours

    kind, options, dims = RANKS[name]
    model, guide = Rows(16, tokenizer), Rows(6, tokenizer, seed=5)

    def make(library):
        arguments = [guide] * ("GIST" in kind)
        loss = getattr(library, kind)(model, *arguments, gather_across_devices=True, **options)
        loss = library.MatryoshkaLoss(model, loss, dims) if dims else loss
        return in_ddp(loss, model)

    return gates.pass_the_gates(*compared(make, ours, theirs, of_rank(3, 5), model))


def masked(kind: str, tokenizer) -> list[float]:
    """Errors within the gates beside one process with all rows, of which ranks have unequal
    many."""
    from rankpo_fast.integrations import sentence_transformers as ours

    model = Rows(16, tokenizer)
    whole = rows_of(2, 9)
    whole[1]["input_ids"][7] = whole[1]["input_ids"][2]  # a positive of the other rank
    whole[0]["input_ids"][8] = whole[0]["input_ids"][0]  # a query of the other rank
    mine = slice(0, 6) if dist.get_rank() == 0 else slice(6, 9)
    part = [{key: x[mine] for key, x in column.items()} for column in whole]
    options = {"mask_duplicates": True, "directions": GTE}
    one, two = (
        getattr(ours, kind)(model, gather_across_devices=gather, **options)
        for gather in (False, True)
    )
    with gates.in_fp64(model):
        true = result(one, whole, model)
    loss, gradient = result(in_ddp(two, model), part, model)
    dist.all_reduce(loss)
    both = loss / dist.get_world_size(), gradient
    return gates.pass_the_gates(both, true, logits=largest_logit(one, whole))


def learnt_scales(kind: str, tokenizer, gather: bool, alone: bool = False) -> list[float]:
    """After each of three steps on rows of the rank's own; or by their loss alone on all rows."""
    from sentence_transformers.sentence_transformer import losses as theirs

    from rankpo_fast.integrations import sentence_transformers as ours

    model = Rows(16, tokenizer)
    scale = nn.Parameter(torch.tensor(7.0))
    if alone:
        loss = theirs.MultipleNegativesRankingLoss(model, scale)
        features = rows_of(2, 5 * dist.get_world_size())
    else:
        loss = in_ddp(getattr(ours, kind)(model, scale, gather_across_devices=gather), model)
        features = of_rank(2, 5)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.5)
    scales = []
    for _ in range(3):
        optimizer.zero_grad()
        loss(features, None).backward()
        optimizer.step()
        scales.append(scale.item())
    return scales


def trained_by_ranks(kind: str, directory, output: str) -> tuple[list[float], list[float], float]:
    """(curve with theirs, with ours, the learnt scale of a third run), by their trainer."""
    import os

    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses as theirs

    from rankpo_fast.integrations import sentence_transformers as ours

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group is there already
    rows = Dataset.from_dict(dict(zip(["anchor", "positive"], texts(2, 22), strict=True)))
    curves, scale = [], nn.Parameter(torch.tensor(20.0))
    for library, by in ((theirs, 20.0), (ours, 20.0), (ours, scale)):
        model = bert(directory, num_hidden_layers=1)
        loss = getattr(library, kind)(model, by, gather_across_devices=True)
        args = SentenceTransformerTrainingArguments(
            output, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, seed=0,
            logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
            ddp_backend="gloo",
        )  # fmt: skip
        trainer = SentenceTransformerTrainer(model, args, rows, loss=loss)
        trainer.train()
        assert isinstance(loss.model, nn.parallel.DistributedDataParallel)
        curves.append([x["loss"] for x in trainer.state.log_history if "loss" in x])
    return curves[0], curves[1], scale.item()
