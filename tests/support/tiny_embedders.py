"""Embedders of FlagEmbedding and Tevatron, tiny; and what two ranks are asked about them."""

import importlib
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import util
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertModel, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from rankpo_fast.integrations import flag_embedding, tevatron
from support.gates import error, in_fp64

D, VOCABULARY = 16, 320


def backbone(dropout: float = 0.1) -> BertModel:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=D,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return BertModel(config, add_pooling_layer=False)


def batch(M: int, group: int, seed: int = 0) -> tuple[dict, dict]:
    """Tokens of M queries and M * group passages, some padded."""
    generator = torch.Generator().manual_seed(seed)

    def texts(rows: int, most: int) -> dict:
        lengths = torch.randint(2, most + 1, (rows, 1), generator=generator)
        mask = (torch.arange(most) < lengths).long()
        return {
            "input_ids": torch.randint(3, VOCABULARY, (rows, most), generator=generator),
            "attention_mask": mask,
        }

    return texts(M, 5), texts(M * group, 7)


def loss_and_gradients(model: nn.Module, texts: tuple, **more) -> tuple[Tensor, Tensor]:
    """The loss of a training step whose dropout is the same each time, and [parameters] its
    gradient."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(*texts, **more).loss
    loss.backward()
    return loss.detach(), gradient(model)


def exact_loss_and_gradients(model: nn.Module, texts: tuple, **more) -> tuple[Tensor, Tensor]:
    """The same, all that follows the backbone in fp64."""
    with in_fp64(*backbones(model)):
        return loss_and_gradients(model, texts, **more)


def backbones(model: nn.Module) -> set[nn.Module]:
    return {x for x in model.modules() if isinstance(x, PreTrainedModel)}


def run_example(name: str, world, monkeypatch) -> None:
    """Call its `main`, and take back the patch that a script leaves."""
    example = importlib.import_module(f"train_{name}")
    monkeypatch.setattr(example, "small_world", lambda: world)
    with ExitStack() as patches:
        apply_to = example.apply_to
        monkeypatch.setattr(example, "apply_to", lambda x: patches.enter_context(apply_to(x)))
        example.main()


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([x.grad.flatten() for x in model.parameters() if x.grad is not None])


# --- FlagEmbedding ---


def embedders(room: str) -> ModuleType:
    """FlagEmbedding.finetune.embedder.<room>, without what FlagEmbedding/__init__ imports: its
    rerankers, which transformers 5.24 breaks."""
    if "FlagEmbedding" not in sys.modules:
        sys.modules["FlagEmbedding"] = util.module_from_spec(util.find_spec("FlagEmbedding"))
    return importlib.import_module(f"FlagEmbedding.finetune.embedder.{room}")


def bi_encoder(dropout: float = 0.1, **settings) -> nn.Module:
    model = embedders("encoder_only.base").BiEncoderOnlyEmbedderModel
    return model(
        backbone(dropout), **{"temperature": 0.02, "normalize_embeddings": True} | settings
    )


# --- Tevatron ---


@dataclass
class EncoderOutput(ModelOutput):
    q_reps: Tensor | None = None
    p_reps: Tensor | None = None
    loss: Tensor | None = None
    scores: Tensor | None = None


class Encoder(nn.Module):
    """Stands in for tevatron.retriever's EncoderModel, which is not on PyPI: what it computes, and
    under which names."""

    def __init__(self, encoder: nn.Module, normalize: bool = False, temperature: float = 1.0):
        super().__init__()
        self.encoder, self.normalize, self.temperature = encoder, normalize, temperature
        self.cross_entropy = nn.CrossEntropyLoss()
        self.is_ddp = dist.is_initialized()
        if self.is_ddp:
            self.process_rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def encode_query(self, texts: dict) -> Tensor:
        first = self.encoder(**texts).last_hidden_state[:, 0]
        return F.normalize(first, dim=-1) if self.normalize else first

    encode_passage = encode_query

    def compute_similarity(self, q_reps: Tensor, p_reps: Tensor) -> Tensor:
        return q_reps @ p_reps.T

    def compute_loss(self, scores: Tensor, target: Tensor) -> Tensor:
        return self.cross_entropy(scores, target)

    def forward(self, query: dict | None = None, passage: dict | None = None) -> EncoderOutput:
        q_reps = self.encode_query(query) if query else None
        p_reps = self.encode_passage(passage) if passage else None
        loss = scores = None
        if q_reps is not None and p_reps is not None:
            if self.training and self.is_ddp:
                q_reps, p_reps = self.of_all_ranks(q_reps), self.of_all_ranks(p_reps)
            scores = self.compute_similarity(q_reps, p_reps)
            if self.training:
                positives = torch.arange(len(q_reps)) * (len(p_reps) // len(q_reps))
                loss = self.compute_loss(scores / self.temperature, positives)
                loss = loss * (self.world_size if self.is_ddp else 1)
        return EncoderOutput(loss=loss, scores=scores, q_reps=q_reps, p_reps=p_reps)

    def of_all_ranks(self, reps: Tensor) -> Tensor:
        parts = [torch.empty_like(reps) for _ in range(self.world_size)]
        dist.all_gather(parts, reps.contiguous())
        parts[self.process_rank] = reps
        return torch.cat(parts)


def encoder(dropout: float = 0.1, **settings) -> Encoder:
    return Encoder(backbone(dropout), **{"normalize": True, "temperature": 0.02} | settings)


def dense_model(dropout: float = 0.1, M: int = 6, group: int = 1) -> nn.Module:
    """Tevatron 0.1.0's, whose settings say how large a batch is."""
    from tevatron.modeling import DenseModel

    shared = backbone(dropout)
    across = dist.is_initialized()
    train_args = SimpleNamespace(negatives_x_device=across, per_device_train_batch_size=M)
    data_args = SimpleNamespace(train_n_passages=group)
    return DenseModel(shared, shared, None, None, data_args, train_args)


def grad_cache() -> type:
    """luyug's GradCache. PyPI's archive installs itself as `gradcache` but imports `grad_cache`."""
    if "grad_cache" not in sys.modules and util.find_spec("grad_cache") is None:
        sys.modules["grad_cache"] = importlib.import_module("gradcache")
        importlib.reload(sys.modules["grad_cache"])
    return importlib.import_module("grad_cache").GradCache


def reps_of(output) -> Tensor:
    return output.p_reps if output.q_reps is None else output.q_reps


def cached_step(model: nn.Module, texts: tuple, loss_fn, **more) -> tuple[Tensor, Tensor]:
    """As `loss_and_gradients`, by GradCache in chunks of 2 texts."""
    cache = grad_cache()(
        models=[model, model],
        chunk_sizes=2,
        loss_fn=loss_fn,
        split_input_fn=split,
        get_rep_fn=reps_of,
    )
    model.train()
    model.zero_grad()
    queries, passages = texts
    loss = cache({"query": queries}, {"passage": passages}, **more)
    return loss, gradient(model)


def split(side: dict, rows: int) -> list[dict]:
    """A function of this module's; each chunk under its own side's name."""
    ((name, texts),) = side.items()
    starts = range(0, len(texts["input_ids"]), rows)
    return [{name: {key: x[i : i + rows] for key, x in texts.items()}} for i in starts]


# --- ranks ---


ADAPTERS = {bi_encoder: flag_embedding, encoder: tevatron, dense_model: tevatron}
ACROSS = {bi_encoder: {"negatives_cross_device": True}}


def reference(model: nn.Module, texts: tuple, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient of one process with these rows, as the formula has them, in fp64."""
    model.zero_grad()
    with in_fp64(*backbones(model)):
        if hasattr(model, "encode"):
            q, p = (model.encode(side) for side in texts)
        else:
            q, p = model(query=texts[0]).q_reps, model(passage=texts[1]).p_reps
    loss = F.cross_entropy(q @ p.T / temperature, torch.arange(len(q)) * (len(p) // len(q)))
    loss.backward()
    return loss.detach(), gradient(model)


def across_ranks(build, group: int, temperature: float, M: int = 3) -> dict[str, float]:
    """Ours, and theirs in fp64, under DDP, each with its own rows, beside one process with all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = batch(M * size, group)
    own = tuple({k: x.chunk(size)[rank] for k, x in side.items()} for side in whole)
    sizes = {"M": M, "group": group} if build is dense_model else {}
    model = build(dropout=0.0, **ACROSS.get(build, {}), **sizes)
    one_loss, one = reference(model, whole, temperature)
    wrapped = DistributedDataParallel(model)
    their_loss, theirs = exact_loss_and_gradients(wrapped, own)
    with ADAPTERS[build].apply_to(type(model)):
        our_loss, ours = loss_and_gradients(wrapped, own)
    return {
        "loss": error(our_loss, their_loss),
        "gradient": error(ours, theirs),
        "their loss": (their_loss / one_loss).item(),
        "scale": (theirs.norm() / one.norm()).item(),
        "direction": error(ours / ours.norm(), one / one.norm()),
    }


def cached_across_ranks(temperature: float, M: int = 4, group: int = 2) -> dict[str, float]:
    """GradCache under DDP with our loss and Tevatron's, beside one process with all rows."""
    from tevatron.loss import DistributedContrastiveLoss

    rank, size = dist.get_rank(), dist.get_world_size()
    whole = batch(M * size, group)
    own = tuple({k: x.chunk(size)[rank] for k, x in side.items()} for side in whole)
    model = encoder(dropout=0.0)
    one_loss, one = reference(model, whole, temperature)
    wrapped = DistributedDataParallel(model)
    more = {"no_sync_except_last": True}
    with in_fp64(*backbones(model)):
        their_loss, theirs = cached_step(wrapped, own, DistributedContrastiveLoss(group), **more)
    loss_fn = tevatron.GradCacheLoss(temperature, dist.group.WORLD)
    our_loss, ours = cached_step(wrapped, own, loss_fn, **more)
    return {
        "loss": error(our_loss, their_loss),
        "gradient": error(ours, theirs),
        "loss of one": (our_loss / one_loss).item(),
        "gradient of one": error(ours, one),
    }
