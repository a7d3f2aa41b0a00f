"""Packing that is not exact is refused at load, and looking leaves no trace."""

import dataclasses

import pytest
import torch

from rankpo_fast.config import ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model import attention, check
from rankpo_fast.model.attention import KERNELS, Unpackable
from rankpo_fast.model.check import check_packing
from rankpo_fast.model.load import load_encoder
from support.model_families import FAMILIES, make_encoder

BY_TEXT = KERNELS[-1]


def faulty(fault):
    """The kernel that attends by text, with a fault: `fault(right, query, key, value, asked)`."""

    def attend(query, key, value, asked):
        return fault(BY_TEXT.make(), query, key, value, asked)

    return dataclasses.replace(BY_TEXT, alias="packed_faulty", make=lambda: attend)


def as_one_text(right, query, key, value, asked):
    texts = dataclasses.replace(asked.texts, lengths=(len(query),))
    return right(query, key, value, dataclasses.replace(asked, texts=texts))


def window_wider_by_one(right, query, key, value, asked):
    window = asked.window and asked.window + 1
    return right(query, key, value, dataclasses.replace(asked, window=window))


def causality_forgotten(right, query, key, value, asked):
    return right(query, key, value, dataclasses.replace(asked, causal=not asked.causal))


def a_trace_of_all(right, query, key, value, asked):
    second = slice(*asked.texts.offsets[1:3].tolist())
    return right(query, key, value, asked) + 3e-6 * query[second].mean(dim=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes(family):
    encoder = make_encoder(family)
    check_packing(encoder, BY_TEXT)
    assert (encoder.packed, encoder.attention) == (True, "sdpa")


@pytest.mark.parametrize(
    ("family", "fault", "said"),
    [
        pytest.param("llama", as_one_text, "alone", id="causal-leak"),
        pytest.param("bert", as_one_text, "alone", id="leak"),
        pytest.param("bert", a_trace_of_all, "see each other", id="leak-below-rounding"),
        pytest.param("mistral", window_wider_by_one, "alone", id="window"),
        pytest.param("modernbert", window_wider_by_one, "alone", id="window-of-both-sides"),
        pytest.param("llama", causality_forgotten, "alone", id="causality"),
    ],
)
def test_a_fault_is_an_error_that_says_how_to_go_on(family, fault, said):
    with pytest.raises(InputError, match=f"--packing true: .*{said}.*--packing false avoids it"):
        check_packing(make_encoder(family), faulty(fault))


@pytest.mark.parametrize("fault", [as_one_text, causality_forgotten])
def test_a_fault_shows_in_bf16_too(fault):
    encoder = make_encoder("llama")
    encoder.bf16 = True
    in_bf16 = (8, 0)
    check_packing(encoder, dataclasses.replace(BY_TEXT, capability=in_bf16))
    with pytest.raises(InputError, match="--packing false"):
        check_packing(encoder, dataclasses.replace(faulty(fault), capability=in_bf16))


def test_nan_is_no_agreement():
    def nothing(right, query, key, value, asked):
        return torch.full_like(query, torch.nan)

    with pytest.raises(InputError, match="relative error nan"):
        check_packing(make_encoder("llama"), faulty(nothing))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_packing_is_not_blamed(value):
    encoder = make_encoder("llama")
    with torch.no_grad():
        encoder.backbone.norm.weight[0] = value
    with pytest.raises(InputError, match=r"not finite: 1 of \d+ tensors .*: norm\.weight$"):
        check_packing(encoder, BY_TEXT)
    with torch.no_grad():
        encoder.backbone.norm.weight.fill_(3e38)
    with pytest.raises(InputError, match="not finite: every weight is finite, so numbers overflow"):
        check_packing(encoder, BY_TEXT)


@pytest.mark.parametrize("training", [True, False])
def test_checking_leaves_no_trace(training):
    encoder = make_encoder("bert", attention_probs_dropout_prob=0.5).train(training)
    encoder.bf16 = True
    state = torch.get_rng_state()
    check_packing(encoder, BY_TEXT)
    assert torch.equal(state, torch.get_rng_state())
    assert (encoder.training, encoder.backbone.training, encoder.bf16) == (training, training, True)
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_the_sample_crosses_small_windows_and_keeps_to_the_positions():
    windowed = make_encoder("mistral", sliding_window=100)
    windowed.settings = dataclasses.replace(windowed.settings, max_passage_length=500)
    assert max(check._samples(windowed)[0].lengths) > 100
    short = make_encoder("bert", max_position_embeddings=12)
    short.settings = dataclasses.replace(short.settings, max_query_length=7, max_passage_length=12)
    assert max(check._samples(short)[0].lengths) == 12
    check_packing(short, BY_TEXT)


def test_the_sample_holds_no_padding_token():
    encoder = make_encoder("roberta", vocab_size=6)  # which is one id for every five
    for batch in check._samples(encoder):
        assert sorted(set(batch.input_ids[0].tolist())) == [1, 2, 3, 4, 5]
    check_packing(encoder, BY_TEXT)


# --- as part of loading ---


def load(directory, **settings):
    settings = {"bf16": False} | settings
    return load_encoder(ModelConfig(str(directory), **settings), device=torch.device("cpu"))


def test_a_leak_is_an_error_of_loading(tiny_llama_dir, monkeypatch):
    monkeypatch.setattr(attention, "KERNELS", [faulty(as_one_text)])
    with pytest.raises(InputError, match="--packing false avoids it"):
        load(tiny_llama_dir)
    assert not load(tiny_llama_dir, packing=False).packed


def test_what_packed_texts_cannot_have_falls_back_to_padding_and_says_so(
    tiny_llama_dir, monkeypatch
):
    def refuse(right, query, key, value, asked):
        raise Unpackable("its attention has sinks")

    monkeypatch.setattr(attention, "KERNELS", [faulty(refuse)])
    with pytest.warns(UserWarning, match=f"{tiny_llama_dir}: texts are padded .* has sinks"):
        encoder = load(tiny_llama_dir)
    assert (encoder.packed, encoder.attention) == (False, "sdpa")
    assert len(encoder.embed(encoder.tokenize_queries(["a", "b c"]), max_tokens=512)) == 2


def test_a_kernel_that_does_not_load_gives_way_unless_it_was_asked_for(tiny_llama_dir, monkeypatch):
    def broken():
        raise ImportError("undefined symbol")

    kernel = dataclasses.replace(BY_TEXT, name="varlen_attn", make=broken)
    for module in ("attention", "load"):
        monkeypatch.setattr(f"rankpo_fast.model.{module}.KERNELS", [kernel, BY_TEXT])
    with pytest.warns(UserWarning, match="varlen_attn: torch does not load .undefined symbol"):
        assert load(tiny_llama_dir).attention == "sdpa"
    with pytest.raises(InputError, match="--attn_implementation varlen_attn.*sdpa works here"):
        load(tiny_llama_dir, attn_implementation="varlen_attn")
