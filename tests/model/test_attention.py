"""Packed texts have the states they have alone, in every family, by every kernel."""

import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from rankpo_fast.model import attention
from rankpo_fast.model.attention import (
    KERNELS,
    Needs,
    Unpackable,
    find_kernels,
    packed_arguments,
    packed_attention,
    why_not_packed,
)
from rankpo_fast.model.dropout import DroppedAttention
from rankpo_fast.train.arithmetic import summed_in_order
from support.model_families import FAMILIES, make_batch, make_encoder

BY_NAME = {kernel.name: kernel for kernel in KERNELS}
BY_TEXT = BY_NAME["sdpa"]


def states_alone(encoder, batch):
    """[T, D] of each text given to the backbone as transformers' users do, one at a time."""
    texts = batch.input_ids.split(batch.lengths, dim=1)
    return torch.cat([encoder.backbone(input_ids=ids).last_hidden_state[0] for ids in texts])


def gradients(encoder, states):
    """All parameters' gradients of a weighted sum of the states, flat."""
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    encoder.zero_grad()
    (states * weights.to(states)).sum().backward()
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# --- every family ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_packed_states_and_gradients_are_those_of_each_text_alone(family, dtype):
    encoder, batch = make_encoder(family, dtype), make_batch()
    expected = states_alone(encoder, batch)
    expected_gradients = gradients(encoder, expected)
    encoder.use_kernel(BY_TEXT)
    states = encoder.states(batch)
    # Gemma's norms, and the softmax of eager attention, are computed in fp32 whatever the dtype.
    bound = 1e-5 if dtype == torch.float32 else 1e-6 if "gemma" in family else 1e-10
    assert relative_error(states, expected) < bound
    assert relative_error(gradients(encoder, states), expected_gradients) < bound


@pytest.mark.parametrize("family", FAMILIES)
def test_training_with_gradient_checkpointing_changes_nothing(family):
    encoder, batch = make_encoder(family), make_batch()
    expected = states_alone(encoder, batch)
    expected_gradients = gradients(encoder, expected)
    encoder.layers.checkpoint()
    encoder.use_kernel(BY_TEXT)
    states = encoder.train().states(batch)
    assert relative_error(states, expected) < 1e-5
    assert relative_error(gradients(encoder, states), expected_gradients) < 1e-5


def test_positions_end_at_512_and_a_pack_does_not():
    encoder = make_encoder("bert", max_position_embeddings=512)
    batch = make_batch((512, 300, 7))
    with torch.no_grad():
        expected = states_alone(encoder, batch)
        encoder.use_kernel(BY_TEXT)
        assert relative_error(encoder.states(batch), expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_autocast_computes_attention_in_bf16(family, monkeypatch):
    kinds = set()

    def attend(query, key, value, asked):
        kinds.update({query.dtype, key.dtype, value.dtype})
        return query

    monkeypatch.setattr(attention, "_attend", attend)
    encoder = make_encoder(family)
    encoder.bf16 = True
    encoder.use_kernel(BY_TEXT)
    encoder.states(make_batch())
    assert kinds == {torch.bfloat16}


# --- by text ---


def test_texts_of_equal_length_side_by_side_are_one_call(monkeypatch):
    shapes = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda query, *args, **options: shapes.append(query.shape) or real(query, *args, **options),
    )
    encoder = make_encoder("llama", num_hidden_layers=1)
    encoder.use_kernel(BY_TEXT)
    encoder.states(make_batch((50, 50, 50, 40)))
    assert shapes == [(3, 4, 50, 8), (1, 4, 40, 8)]


@pytest.mark.parametrize("length", [attention.SHORT, attention.SHORT + 1])
def test_attention_drops_weights_in_training_and_only_then(length):
    encoder = make_encoder("bert", attention_probs_dropout_prob=0.5)
    encoder.use_kernel(BY_TEXT)
    batch = make_batch((length,))
    with torch.no_grad():
        assert torch.equal(encoder.states(batch), encoder.states(batch))
        encoder.train()
        assert not torch.allclose(encoder.states(batch), encoder.states(batch))


def attention_by_hand(query, key, value, kept, share, seen):
    scores = (0.3 * query @ key.transpose(2, 3)).masked_fill(~seen, -math.inf)
    return (scores.softmax(dim=-1) * kept / share) @ value


@pytest.mark.long
@pytest.mark.parametrize("dropout", [0.1, 0.9], ids=["few", "most"])
def test_attention_with_dropout_is_that_of_the_weights_it_kept(dropout):
    """What was kept is read off from values that tell the places apart."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64).unbind()
    seen = torch.ones(7, 7, dtype=torch.bool).tril()

    def attend(query, key, value, seen=seen):
        torch.manual_seed(1)  # the same places each time
        return DroppedAttention.apply(query, key, value, seen, 0.3, dropout)

    unit = torch.eye(7, dtype=torch.float64).expand(2, 3, 7, 7)
    kept = attend(query, key, unit, seen=None) > 0
    lost = round(dropout * 2**16) / 2**16
    expected = attention_by_hand(query, key, value, kept, 1 - lost, seen)
    torch.testing.assert_close(attend(query, key, value), expected, rtol=0, atol=1e-12)
    inputs = [states.requires_grad_() for states in (query, key, value)]
    assert torch.autograd.gradcheck(attend, inputs)


def test_attention_drops_the_share_that_is_asked_for():
    """Of a million weights, within five standard deviations."""
    query, value = torch.zeros(1, 4, 512, 8), torch.eye(512).expand(1, 4, 512, 512)
    kept = DroppedAttention.apply(query, query, value, None, 1.0, 0.1) > 0
    assert abs(kept.double().mean() - 0.9) < 5 * math.sqrt(0.09 / kept.numel())


def test_dropped_weights_are_made_up_for():
    query = torch.zeros(1, 1, 4, 8)  # equal weights
    value = torch.ones(1, 1, 4, 8)
    arguments = packed_arguments(make_batch((4,)))
    torch.manual_seed(0)
    means = [
        packed_attention(BY_TEXT.make(), torch.nn.Module(), query, query, value, None, dropout=0.25,
                         is_causal=False, **arguments)[0].mean() for _ in range(500)
    ]  # fmt: skip
    assert abs(torch.stack(means).mean().item() - 1) < 0.02


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param({"attention_mask": torch.zeros(1, 1, 4, 4)}, id="mask"),
        pytest.param({"position_bias": torch.zeros(1, 1, 4, 4)}, id="bias"),
        pytest.param({"s_aux": torch.zeros(1)}, id="sink"),
        pytest.param({"value": torch.zeros(1, 1, 4, 16)}, id="wide-values"),
    ],
)
def test_what_would_be_ignored_is_refused(extra):
    query = torch.zeros(1, 1, 4, 8)
    given = {"query": query, "key": query, "value": query, "attention_mask": None} | extra
    with pytest.raises(Unpackable):
        packed_attention(
            BY_TEXT.make(), torch.nn.Module(), **given, **packed_arguments(make_batch((4,)))
        )


def test_the_length_that_kernels_are_built_for_takes_few_values():
    longest = {packed_arguments(make_batch((n,)))["packed_texts"].longest for n in range(1, 65)}
    assert longest == {1, 2, 4, 8, 16, 32, 64}


# --- kernels of cards, played by a dense reference ---


def reference(query, key, value, offsets, scale, causal, window, softcap=0.0):
    """[T, H, E] by a T x T mask: what the kernels of cards are documented to compute."""
    assert offsets.dtype == torch.int32
    heads, tokens = query.shape[1], torch.arange(len(query))
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    text = torch.searchsorted(offsets[1:].long(), tokens, right=True)
    before, after = (tokens.max() if side in (-1, None) else side for side in window)
    ahead = tokens[None, :] - tokens[:, None]
    seen = (text[:, None] == text) & (ahead <= (0 if causal else after)) & (-ahead <= before)
    scores = torch.einsum("thd,uhd->htu", query, key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.einsum("htu,uhd->thd", weights, value)


def check_ends(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert type(max_seqlen_q) is int and max_seqlen_q == max_seqlen_k
    assert max_seqlen_q >= cu_seqlens_q.diff().max()


def flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
            softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):  # fmt: skip
    check_ends(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return reference(q, k, v, cu_seqlens_q, softmax_scale, causal, window_size, softcap)


def flash_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
            seqused_k=None, softmax_scale=None, causal=False, qv=None, window_size=(-1, -1),
            softcap=0.0):  # fmt: skip
    check_ends(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    output = reference(q, k, v, cu_seqlens_q, softmax_scale, causal, window_size, softcap)
    return output, None


def flash_4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
            softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0):  # fmt: skip
    check_ends(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    output = reference(q, k, v, cu_seqlens_q, softmax_scale, causal, window_size, softcap)
    return output, None


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False,
                return_aux=None):  # fmt: skip
    check_ends(cu_seq_q, cu_seq_k, max_q, max_k)
    assert query.shape == key.shape
    scale = query.shape[-1] ** -0.5
    return reference(query, key, value, cu_seq_q, scale, is_causal, (-1, -1))


def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                scale=None, window_size=(-1, -1)):  # fmt: skip
    check_ends(cu_seq_q, cu_seq_k, max_q, max_k)
    assert query.shape == key.shape
    return reference(query, key, value, cu_seq_q, scale, window_size == (-1, 0), window_size)


def varlen_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None,
                scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None):  # fmt: skip
    check_ends(cu_seq_q, cu_seq_k, max_q, max_k)
    assert enable_gqa or query.shape == key.shape
    return reference(query, key, value, cu_seq_q, scale, window_size == (-1, 0), window_size)


def install(monkeypatch, played):
    """Put the function where the kernel that it stands for is imported from; that kernel."""
    if played in (varlen_2_10, varlen_2_11, varlen_2_13):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", played)
        return BY_NAME["varlen_attn"]
    names = {flash_2: "flash_attn", flash_3: "flash_attn_interface", flash_4: "flash_attn.cute"}
    package = types.ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    module = package if played is flash_2 else types.ModuleType(names[played])
    module.flash_attn_varlen_func = played
    monkeypatch.setitem(sys.modules, names[played], module)
    return BY_NAME[f"flash_attention_{played.__name__[-1]}"]


SCALED = {"query_pre_attn_scalar": 5}  # a scale of its own
PLAYED = [
    *[(played, family) for played in (flash_2, flash_3)
      for family in ("llama", "bert", "mistral", "modernbert", "gemma2", "gemma3")],
    *[(played, family) for played in (varlen_2_11, varlen_2_13)
      for family in ("llama", "bert", "mistral", "modernbert", "gemma3")],
    *[(played, family) for played in (flash_4, varlen_2_10) for family in ("llama", "bert")],
]  # fmt: skip


@pytest.mark.parametrize(("played", "family"), PLAYED, ids=lambda x: getattr(x, "__name__", x))
def test_kernels_of_cards_are_asked_for_the_same_attention(played, family, monkeypatch):
    encoder, batch = make_encoder(family), make_batch()
    with torch.no_grad():
        encoder.use_kernel(BY_TEXT)
        expected = encoder.states(batch)
        encoder.use_kernel(install(monkeypatch, played))
        assert relative_error(encoder.states(batch), expected) < 1e-5


def test_a_scale_of_its_own_reaches_a_kernel_that_takes_none(monkeypatch):
    encoder, batch = make_encoder("gemma", **SCALED), make_batch()
    for layer in encoder.backbone.layers:
        layer.self_attn.scaling = 0.1
    with torch.no_grad():
        encoder.use_kernel(BY_TEXT)
        expected = encoder.states(batch)
        encoder.use_kernel(install(monkeypatch, varlen_2_10))
        assert relative_error(encoder.states(batch), expected) < 1e-5


def test_a_window_is_not_asked_of_a_varlen_attn_without(monkeypatch):
    encoder = make_encoder("mistral")
    encoder.use_kernel(install(monkeypatch, varlen_2_10))
    with pytest.raises(Unpackable, match="sliding window"):
        encoder.states(make_batch())


def test_dropout_is_asked_of_a_kernel_that_has_it(monkeypatch):
    asked = []

    def flash_2_that_notes(*args, dropout_p=0.0, **options):
        asked.append(dropout_p)
        return flash_2(*args, **options)

    encoder = make_encoder("bert", attention_probs_dropout_prob=0.25)
    install(monkeypatch, flash_2)
    sys.modules["flash_attn"].flash_attn_varlen_func = flash_2_that_notes
    encoder.use_kernel(BY_NAME["flash_attention_2"])
    encoder.states(make_batch())
    encoder.train().states(make_batch())
    assert asked == [0.0, 0.0, 0.25, 0.25]


def test_one_order_of_sums_is_asked_of_a_kernel_or_it_is_refused(monkeypatch):
    asked = []

    def flash_2_that_notes(*args, deterministic=False, **options):
        asked.append(deterministic)
        return flash_2(*args, **options)

    encoder = make_encoder("bert")
    install(monkeypatch, flash_2)
    with summed_in_order(True), torch.no_grad():
        encoder.use_kernel(BY_NAME["flash_attention_2"])
        with pytest.raises(Unpackable, match="this version of flash_attn cannot sum in one order"):
            encoder.states(make_batch())
        sys.modules["flash_attn"].flash_attn_varlen_func = flash_2_that_notes
        encoder.use_kernel(BY_NAME["flash_attention_2"])
        encoder.states(make_batch())
    with torch.no_grad():
        encoder.states(make_batch())
    assert asked == [True, True, False, False]


def test_a_compiled_layer_is_compiled_once_for_packs_of_any_shape(monkeypatch):
    from torch._dynamo.utils import counters

    def traceable(q, k, v, *, cu_seqlens_q, max_seqlen_q, softmax_scale, **_):
        return q + softmax_scale * max_seqlen_q * cu_seqlens_q.sum()

    encoder = make_encoder("llama")
    install(monkeypatch, flash_2)
    sys.modules["flash_attn"].flash_attn_varlen_func = traceable
    encoder.use_kernel(BY_NAME["flash_attention_2"])
    torch._dynamo.reset()
    counters.clear()
    for layer in encoder.backbone.layers:
        layer.compile(dynamic=True, fullgraph=True, backend="eager")
    with torch.no_grad():
        for lengths in [(50, 41, 9), (60, 9, 9, 3, 1), (61, 2), (17, 3)]:
            encoder.states(make_batch(lengths))
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


# --- which one ---

PLAIN = {"half": True, "head_dim": 64, "window": False, "softcap": False, "dropout": False}


@pytest.mark.parametrize(
    ("change", "capability", "expected"),
    [
        pytest.param({}, (9, 0), "4 3 2 varlen sdpa", id="hopper"),
        pytest.param({}, (10, 0), "4 3 2 varlen sdpa", id="blackwell"),
        pytest.param({}, (8, 0), "2 varlen sdpa", id="ampere"),
        pytest.param({}, (7, 5), "sdpa", id="turing"),
        pytest.param({"half": False}, (9, 0), "sdpa", id="fp32"),
        pytest.param({"head_dim": 256}, (9, 0), "3 2 varlen sdpa", id="wide-heads"),
        pytest.param({"head_dim": 288}, (9, 0), "sdpa", id="heads-too-wide"),
        pytest.param({"head_dim": 20}, (9, 0), "sdpa", id="odd-heads"),
        pytest.param({"window": True}, (9, 0), "3 2 varlen sdpa", id="window"),
        pytest.param({"softcap": True}, (9, 0), "3 2 sdpa", id="softcap"),
        pytest.param({"dropout": True}, (9, 0), "2 sdpa", id="dropout"),
        pytest.param({"dropout": True, "softcap": True}, (9, 0), "sdpa", id="both"),
        pytest.param({"device": torch.device("cpu")}, None, "sdpa", id="cpu"),
    ],
)
def test_only_kernels_that_can_do_what_is_needed_are_chosen(
    change, capability, expected, monkeypatch
):
    monkeypatch.setattr(attention, "_installed", lambda distribution: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    needs = Needs(**{"device": torch.device("cuda"), **PLAIN, **change})
    names = [kernel.name for kernel in find_kernels(needs)]
    assert [n.removeprefix("flash_attention_").removesuffix("_attn") for n in names] == (
        expected.split()
    )


def test_flash_attention_4_alone_is_not_taken_for_2(monkeypatch):
    monkeypatch.setattr(attention, "_installed", lambda name: name in ("flash-attn-4", "torch"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    needs = Needs(device=torch.device("cuda"), **PLAIN)
    assert [k.name for k in find_kernels(needs)] == ["flash_attention_4", "varlen_attn", "sdpa"]


@pytest.mark.parametrize(
    ("kind", "sizes", "reason"),
    [
        pytest.param("Bloom", {"n_head": 4}, "counts the positions", id="alibi"),
        pytest.param("DebertaV2", {"num_attention_heads": 4}, "cannot be replaced", id="relative"),
        pytest.param("Lfm2", {"num_attention_heads": 4, "num_key_value_heads": 2,
                              "layer_types": ["conv", "full_attention"]}, "kind conv", id="conv"),
        pytest.param("Llama", {"num_attention_heads": 4}, None, id="llama"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_known_from_its_build(kind, sizes, reason):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, intermediate_size=64, **sizes
    )
    with torch.device("meta"):
        backbone = transformers.AutoModel.from_config(config)
    found = why_not_packed(backbone)
    assert found is None if reason is None else reason in found
