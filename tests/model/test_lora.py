"""Adapters in training: what is saved, whole and alone, has the vectors of what was trained."""

import pytest
import torch
from torch import nn

from rankpo_fast.config import EncoderConfig, ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.attention import KERNELS
from rankpo_fast.model.check import check_packing
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.float8 import convert
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.lora import whole_weights
from support.model_families import make_batch, make_encoder

CPU = torch.device("cpu")
TEXTS = ["a nurse in Berlin", "a cook and a baker", "pilot"]


def load(directory, **settings):
    return load_encoder(ModelConfig(str(directory), **{"bf16": False, **settings}), device=CPU)


def trained(encoder):
    """As a training leaves an adapter: B no longer 0, DoRA's lengths no longer the rows'."""
    torch.manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
        if "magnitude" in name:
            parameter.data *= 1.1
    return encoder


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_a_fresh_adapter_changes_no_vector(init, tiny_bert_dir):
    plain = load_encoder(EncoderConfig(str(tiny_bert_dir)), device=CPU).encode(TEXTS)
    fresh = load(tiny_bert_dir, lora_rank=4, lora_init=init).encode(TEXTS)
    # Orthogonal: A and B are not 0, and their product is by rounding alone.
    torch.testing.assert_close(fresh, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", ["tiny_llama_dir", "tiny_bert_dir"])
@pytest.mark.parametrize(
    "kind", [{}, {"lora_dora": True}, {"weights_dtype": "nf4"},
             {"weights_dtype": "nf4", "lora_dora": True}],
    ids=["lora", "dora", "qlora", "qdora"],
)  # fmt: skip
def test_whole_and_alone_it_has_the_vectors_of_the_training(
    base, kind, request, tmp_path, monkeypatch
):
    """In fp32 to 1e-5, loaded by us, and by sentence-transformers through transformers."""
    from sentence_transformers import SentenceTransformer

    # Its form for such CPUs packs 4-bit weights in its own way, with scales in bf16.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    encoder = trained(load(request.getfixturevalue(base), lora_rank=4, **kind))
    state = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    expected = encoder.encode(TEXTS)
    encoder.save(tmp_path)
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, state[name]), name  # saving leaves it as it is, bit by bit
    start = load_encoder(EncoderConfig(str(request.getfixturevalue(base))), device=CPU)
    assert (start.encode(TEXTS) - expected).abs().max() > 1e-3
    for directory in (tmp_path, tmp_path / "adapter"):
        ours = Encoder.from_pretrained(directory).encode(TEXTS)
        theirs = SentenceTransformer(str(directory), device="cpu").encode(TEXTS)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.as_tensor(theirs), expected, rtol=0, atol=1e-5)


def test_weights_of_4_bits_beside_bf16_come_back_as_they_were(tiny_llama_dir, tmp_path):
    """The codes depend on the dtype from which values were rounded: the adapter's files name it."""
    encoder = trained(load(tiny_llama_dir, lora_rank=4, weights_dtype="nf4", bf16=True))
    encoder.save(tmp_path)
    again = load(tmp_path / "adapter", lora_rank=4, weights_dtype="nf4", bf16=True)
    torch.testing.assert_close(again.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=0)
    codes = [p for p in encoder.parameters() if p.dtype == torch.uint8]
    assert len(codes) == 14 and not any(p.requires_grad for p in codes)


def test_only_named_layers_are_adapted(tiny_llama_dir):
    encoder = load(tiny_llama_dir, lora_rank=4, lora_targets=["q_proj", "mlp.up_proj"])
    adapted = {
        n.split(".lora_A")[0] for n, _ in encoder.backbone.named_parameters() if "lora_A" in n
    }
    assert adapted == {
        f"layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.up_proj")
    }


def test_of_a_model_without_adapters_whole_weights_are_its_own():
    backbone = make_encoder("llama").backbone
    whole = whole_weights(backbone)
    assert whole.keys() == backbone.state_dict().keys()
    assert all(torch.equal(whole[n], tensor) for n, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2"])
def test_attention_to_both_sides_is_the_same_packed(family):
    """Packed texts get the states that they get alone, and a first token sees the last one."""
    causal, encoder = make_encoder(family), make_encoder(family, is_causal=False)
    batch = make_batch()
    check_packing(encoder, KERNELS[-1])  # raises where they differ
    packed = encoder.states(batch)
    encoder.use_kernel(None)
    torch.testing.assert_close(packed, encoder.states(batch), rtol=1e-4, atol=1e-4)
    first = batch.offsets[:1].long()
    assert not torch.allclose(packed[first], causal.states(batch)[first], atol=1e-2)


def test_windows_to_both_sides_are_refused_where_transformers_counts_them_otherwise():
    """Its masks reach one token farther than its flash kernels, so packed texts would differ."""
    encoder = make_encoder("mistral", is_causal=False)
    with pytest.raises(InputError, match="--packing false avoids it"):
        check_packing(encoder, KERNELS[-1])


def test_a_model_made_bidirectional_is_so_wherever_it_is_loaded(tiny_llama_dir, tmp_path):
    from sentence_transformers import SentenceTransformer

    encoder = load(tiny_llama_dir, bidirectional=True)
    assert encoder.settings.pooling == "mean"
    encoder.save(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    torch.testing.assert_close(torch.as_tensor(theirs), encoder.encode(TEXTS), rtol=0, atol=1e-5)


def test_the_first_layers_are_those_of_the_whole_model(tiny_llama_dir):
    whole, first = (
        load(tiny_llama_dir, packing=False),
        load(tiny_llama_dir, packing=False, layers=1),
    )
    states = whole.backbone(input_ids=torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    cut = first.backbone(input_ids=torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    assert len(cut.hidden_states) == 2
    torch.testing.assert_close(
        cut.last_hidden_state, whole.backbone.norm(states.hidden_states[1]), rtol=0, atol=1e-6
    )


def test_products_in_8_bits_are_those_of_4_digits():
    """As the instructions round, on the CPU: e4m3 has 3 bits behind the first, so that a product of
    64 terms is off by 2^-4 of the largest operand at most, some percent of the whole."""
    exact, rounded = make_encoder("llama"), make_encoder("llama")
    convert(rounded.backbone, emulate=True)
    assert type(rounded.backbone.layers[0].mlp.up_proj).__name__ == "Float8Linear"
    for encoder in (exact, rounded):
        encoder(make_batch()).sum().backward()
    for of in (lambda e: e(make_batch()), lambda e: e.backbone.layers[0].mlp.up_proj.weight.grad):
        error = (of(rounded) - of(exact)).norm() / of(exact).norm()
        assert 1e-3 < error < 0.25
