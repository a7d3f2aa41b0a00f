"""Layers that are checkpointed selectively, and feed-forward modules that take few tokens at once:
gradients stay, memory does not."""

import sys
from collections import Counter
from types import FunctionType

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from rankpo_fast.config import ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model import feed_forward, selective
from rankpo_fast.model.attention import KERNELS
from rankpo_fast.model.check import selective_is_exact
from rankpo_fast.model.load import load_encoder
from rankpo_fast.train.meters import Host
from support.model_families import FAMILIES, make_batch, make_encoder

BY_TEXT = KERNELS[-1]
CPU = torch.device("cpu")
CHUNK = 64  # of 214 tokens: the last one is smaller
DROPOUT = {
    "llama": {"attention_dropout": 0.2},
    "bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2},
    "modernbert": {"attention_dropout": 0.2, "mlp_dropout": 0.1, "embedding_dropout": 0.1},
    "gpt2": {"attn_pdrop": 0.1, "resid_pdrop": 0.1},
}


def step(encoder, packed=True):
    """Vectors and gradients of a step in training, and the bytes that a token's graph took."""
    encoder.use_kernel(BY_TEXT if packed else None)
    encoder.train().zero_grad()
    batch, host = make_batch(), Host()
    torch.manual_seed(1)
    with host:
        vectors = encoder(batch)
        held = host.held() / sum(batch.lengths)
    vectors.cos().sum().backward()
    gradients = [p.grad for p in encoder.parameters() if p.grad is not None]
    return [vectors.detach(), *gradients], held


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def error(got, expected):
    """The largest relative error of a tensor; those that are 0 but for rounding do not count."""
    pairs = [pair for pair in zip(got, expected, strict=True) if pair[1].norm() > 1e-3]
    assert len(pairs) > 10
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


# --- selective checkpointing ---


@pytest.mark.parametrize("family", FAMILIES)
def test_selective_checkpointing_changes_no_bit_and_lies_between_none_and_full(family):
    encoder = make_encoder(family, **DROPOUT.get(family, {}))
    for packed, bf16 in ((True, False), (False, True)):
        encoder.bf16, results, sizes = bf16, [], []
        for way in (False, "selective", True):
            encoder.layers.checkpoint(way)
            result, size = step(encoder, packed)
            results.append(result)
            sizes.append(size)
        assert equal(results[0], results[1]) and equal(results[0], results[2])
        assert sizes[2] < 0.6 * sizes[1] and sizes[1] < 0.7 * sizes[0]


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_products_are_computed_once_and_the_rest_twice():
    counts = []
    for way in ("selective", True):
        encoder = make_encoder("llama")
        encoder.layers.checkpoint(way)
        with Counted() as counted:
            step(encoder)
        counts.append((counted.calls["aten::mm"], counted.calls["aten::silu"]))
    # 7 products a layer forward, and two each for the backward pass. Computed again, all but the
    # last, which nothing needs.
    assert counts == [(2 * 7 * 3, 4), (2 * (7 * 3 + 6), 4)]


def test_with_an_adapter_on_weights_of_4_bits_selective_changes_no_bit_either():
    bitsandbytes, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
    encoder = make_encoder("llama").requires_grad_(False)
    for layer in encoder.backbone.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in [*part.named_children()]:
                if isinstance(linear, nn.Linear):
                    sizes = linear.in_features, linear.out_features
                    small = bitsandbytes.nn.Linear4bit(*sizes, bias=False, quant_type="nf4")
                    small.load_state_dict(linear.state_dict())
                    setattr(part, name, small.to("cpu"))
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear",
                             init_lora_weights=False)  # fmt: skip
    peft.inject_adapter_in_model(config, encoder.backbone)
    results = []
    for way in (False, "selective", True):
        encoder.layers.checkpoint(way)
        results.append(step(encoder)[0])
    assert len(results[0]) == 1 + 2 * 7 * 2
    assert equal(results[0], results[1]) and equal(results[0], results[2])


def writes_over_a_product(encoder):
    """Its queries are doubled where they lie: torch does not notice."""
    for layer in encoder.backbone.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, given, states: states.mul_(2))


def test_where_a_product_is_written_over_selective_is_refused(tiny_llama_dir, monkeypatch):
    encoder = make_encoder("llama")
    assert selective_is_exact(encoder) and encoder.layers.checkpointed is False
    writes_over_a_product(encoder)
    assert not selective_is_exact(encoder)
    monkeypatch.setattr("rankpo_fast.model.trainable.selective_is_exact", lambda encoder: False)
    config = ModelConfig(str(tiny_llama_dir), bf16=False, gradient_checkpointing="selective")
    with pytest.raises(InputError, match="selective: layers of llama write .* give .* true"):
        load_encoder(config, device=CPU)


def test_with_rotary_positions_of_liger_selective_is_refused(monkeypatch):
    encoder = make_encoder("llama")
    code = sys.modules[type(encoder.backbone).__module__]
    swapped = FunctionType(code.apply_rotary_pos_emb.__code__, {})
    swapped.__module__ = "liger_kernel.transformers.rope"
    monkeypatch.setattr(code, "apply_rotary_pos_emb", swapped)
    with pytest.raises(ValueError, match="rotary"):
        encoder.layers.checkpoint("selective")


@pytest.mark.parametrize(
    "flags",
    [
        {"gradient_checkpointing": "selective", "mlp_chunk": 64},
        {"gradient_checkpointing": "selective", "torch_compile": True},
        {"mlp_chunk": 64, "torch_compile": True},
    ],
    ids=" and ".join,
)
def test_what_takes_away_what_the_other_is_for_is_refused(flags):
    with pytest.raises(InputError) as refused:
        ModelConfig("m", **flags)
    assert all(f"--{flag}" in str(refused.value) for flag in flags)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        pytest.param(
            "_scaled_dot_product_flash_attention", (None, None, None), id="given in order"
        ),
        pytest.param("_scaled_dot_product_efficient_attention", (None,) * 5, id="after others"),
    ],
)
def test_attention_that_drops_is_drawn_again(op, arguments):
    """Else what is dropped after it would be what was drawn for it."""
    function = getattr(torch.ops.aten, op).default
    keep, again = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
    for dropout, expected in ((0.0, keep), (0.1, again)):
        assert selective._policy(None, function, *arguments, dropout) is expected
        assert selective._policy(None, function, *arguments, dropout_p=dropout) is expected
    assert selective._policy(None, function, *arguments) is keep


# --- feed-forward modules by chunks ---


@pytest.mark.parametrize("family", FAMILIES)
def test_feed_forward_modules_take_chunks_and_gradients_stay(family):
    """In fp32 a weight's gradient is a sum over chunks, rounded by 2^-24 each."""
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        encoder = make_encoder(family, dtype)
        # In fp64 the mask that transformers makes for padded texts and eager attention is NaN.
        for packed in (True,) if family == "gemma2" else (True, False):
            expected, size = step(encoder, packed)
            encoder.layers.chunk(CHUNK)
            got, chunked_size = step(encoder, packed)
            assert error(got, expected) < bound
            assert chunked_size < 0.8 * size  # what lies within a module is not kept
            encoder.layers.checkpoint()
            assert equal(step(encoder, packed)[0], got)
            encoder.layers.checkpoint(False)
            encoder.layers.chunk(None)
            assert equal(step(encoder, packed)[0], expected)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_no_product_within_a_chunked_module_has_more_tokens(family):
    encoder, seen = make_encoder(family), []
    for module in encoder.backbone.modules():
        if isinstance(module, nn.Linear) and 64 in module.weight.shape:  # its intermediate size
            module.register_forward_hook(lambda m, given, _: seen.append(given[0].shape[-2]))
    encoder.layers.chunk(CHUNK)
    step(encoder)
    assert max(seen) == CHUNK and 214 % CHUNK in seen


@pytest.mark.parametrize("bf16", [False, True])
def test_what_a_chunk_dropped_is_dropped_when_it_is_computed_again(bf16, monkeypatch):
    encoder = make_encoder("bert", **DROPOUT["bert"])
    encoder.bf16 = bf16
    encoder.layers.chunk(CHUNK)
    twice = step(encoder)[0]
    monkeypatch.setattr(feed_forward.Chunked, "_again", lambda self, *given: self._method(*given))
    assert equal(step(encoder)[0], twice)


@pytest.mark.parametrize("kind", ["nothing that is known", "a layer with attention"])
def test_a_model_without_a_feed_forward_module_is_refused(kind):
    encoder = make_encoder("llama")
    for layer in encoder.backbone.layers:
        if kind == "a layer with attention":
            layer.fc1, layer.fc2 = layer.mlp.up_proj, layer.mlp.down_proj
        layer.mlp = nn.Linear(32, 32)
    with pytest.raises(InputError, match=r"--mlp_chunk 64: .* llama: .*up_proj and down_proj"):
        encoder.layers.chunk(64)
    assert encoder.layers.mlp_chunk is None
