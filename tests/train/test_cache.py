"""The gradient cache gives the gradient of one big step, whatever it keeps or computes twice."""

import pytest
import torch
import torch.nn.functional as F

from rankpo_fast.config import ModelConfig
from rankpo_fast.data.packing import pack
from rankpo_fast.model.load import load_encoder
from rankpo_fast.train.cache import CachedVectors
from rankpo_fast.train.memory import Memory

WORDS = ["a nurse in Lyon", "x", "a senior data engineer in Berlin builds pipelines", "teacher"]
TEXTS = [f"{word} {number}" for number, word in enumerate(WORDS * 3)]
CPU = torch.device("cpu")


@pytest.fixture
def encoder(request, tiny_llama_dir, tiny_bert_dir):
    """Of `request.param`: backbone, and what ModelConfig says of it; in training mode."""
    name, flags = request.param
    directory = {"llama": tiny_llama_dir, "bert": tiny_bert_dir}[name]
    flags = {"bf16": False, "gradient_checkpointing": False} | flags
    encoder = load_encoder(ModelConfig(str(directory), **flags), device=CPU).train()
    assert any(m.p > 0 for m in encoder.modules() if isinstance(m, torch.nn.Dropout)) == (
        name == "bert"
    )
    return encoder


def groups_of(encoder, max_tokens=40):
    table = encoder.tokenize_passages(TEXTS)
    plan = encoder.plan(table.lengths, max_tokens)
    return [pack(table, group) for group in plan]


def loss_of(vectors):
    """Of every vector with every other one: no part of it comes from one group alone."""
    unit = F.normalize(vectors, dim=1)
    return torch.logsumexp(unit @ unit.T / 0.1, dim=1).mean()


def gradients(encoder):
    result = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad(set_to_none=True)
    return result


def cached_gradients(encoder, groups, kept, seed=3):
    torch.manual_seed(seed)
    cached = CachedVectors(encoder, groups, kept=kept)
    leaf = cached.vectors.requires_grad_()
    [gradient] = torch.autograd.grad(loss_of(leaf), leaf)
    cached.backward(gradient)
    return gradients(encoder)


ENCODERS = [
    pytest.param(("llama", {}), id="plain"),
    pytest.param(("bert", {}), id="dropout"),
    pytest.param(("bert", {"gradient_checkpointing": True}), id="dropout in checkpointed layers"),
    pytest.param(("llama", {"bf16": True}), id="bf16"),
]


@pytest.mark.parametrize("encoder", ENCODERS, indirect=True)
def test_what_is_kept_changes_no_bit(encoder):
    groups = groups_of(encoder)
    assert len(groups) >= 4
    all_kept, *others = (cached_gradients(encoder, groups, kept) for kept in (len(groups), 3, 1, 0))
    for other in others:
        assert other.keys() == all_kept.keys()
        assert all(torch.equal(other[name], all_kept[name]) for name in all_kept)


@pytest.mark.parametrize("encoder", ENCODERS[:3], indirect=True)
def test_the_gradient_is_that_of_one_big_step(encoder):
    groups = groups_of(encoder)
    torch.manual_seed(3)
    loss_of(torch.cat([encoder(group) for group in groups])).backward()
    expected, got = gradients(encoder), cached_gradients(encoder, groups, kept=1)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.norm().clamp(min=1e-4 * max(g.norm() for g in expected.values()))
        assert (got[name] - gradient).norm() <= 1e-6 * scale, name


@pytest.mark.parametrize("encoder", ENCODERS[1:2], indirect=True)
def test_random_numbers_go_on_as_if_nothing_were_done_twice(encoder):
    groups = groups_of(encoder)
    after = []
    for kept in (0, len(groups)):
        cached_gradients(encoder, groups, kept)
        after.append(torch.rand(3))
    assert torch.equal(*after)


@pytest.mark.parametrize("encoder", ENCODERS[:1], indirect=True)
def test_adapters_alone_get_gradients_when_they_alone_are_trained(encoder):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    encoder.backbone = peft.get_peft_model(encoder.backbone, config)
    groups = groups_of(encoder)
    loss_of(torch.cat([encoder(group) for group in groups])).backward()
    expected, got = gradients(encoder), cached_gradients(encoder, groups, kept=1)
    assert got.keys() == expected.keys() and all("lora" in name for name in got)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("encoder", ENCODERS[:1], indirect=True)
def test_memory_counts_what_a_graph_holds(encoder):
    """Against the storages that autograd says it has saved."""
    table = encoder.tokenize_passages(TEXTS)
    own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    saved = {}

    def see(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    groups = groups_of(encoder, 200)
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        encoder(groups[0])
    memory = Memory.measure(encoder, table, 200, None)
    assert memory.graph_bytes * sum(groups[0].lengths) == pytest.approx(
        sum(saved.values()), rel=0.1
    )
    assert all(p.grad is None for p in encoder.parameters())


def test_graphs_are_kept_from_the_last_while_there_is_room():
    groups = [type("Group", (), {"lengths": (tokens,)}) for tokens in (40, 30, 20, 10)]
    kept = [Memory(40, room, graph_bytes=1.0).kept(groups) for room in (0, 10, 30, 59, 60, 100)]
    assert kept == [1, 1, 2, 2, 3, 4]
