"""The encoder gives each text its own vector, whatever it is batched, packed or computed with."""

import json
import shutil

import pytest
import torch

from rankpo_fast.config import ModelConfig
from rankpo_fast.data.packing import pack, plan_packed, plan_padded
from rankpo_fast.model.load import load_encoder

TEXTS = ["a nurse", "a senior data engineer in Berlin builds pipelines", "x", "teacher of maths"]
CPU = torch.device("cpu")


def load(directory, **settings):
    settings = {"bf16": False, "gradient_checkpointing": False} | settings
    return load_encoder(ModelConfig(str(directory), **settings), device=CPU)


@pytest.fixture(scope="module")
def directories(tiny_llama_dir, tiny_bert_dir, tiny_tokenizer, tmp_path_factory):
    """Four ways to count positions: rotary, learned, learned and causal, learned behind padding."""
    from transformers import AutoModel, GPT2Config, RobertaConfig

    sizes = {"vocab_size": len(tiny_tokenizer), "pad_token_id": tiny_tokenizer.pad_token_id}
    others = {
        "gpt2": GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "roberta": RobertaConfig(
            **sizes,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
    }
    directories = {"llama": tiny_llama_dir, "bert": tiny_bert_dir}
    for name, config in others.items():
        directories[name] = tmp_path_factory.mktemp(name)
        AutoModel.from_config(config).save_pretrained(directories[name])
        tiny_tokenizer.save_pretrained(directories[name])
    return directories


def vectors(encoder, table, text_ids=None):
    """All in one micro-batch."""
    text_ids = torch.arange(len(table)) if text_ids is None else torch.tensor(text_ids)
    return encoder(pack(table, text_ids))


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("backbone", ["llama", "bert", "gpt2", "roberta"])
def test_packed_padded_and_alone_give_equal_vectors(directories, backbone, pooling):
    packing, padding = (
        load(directories[backbone], pooling=pooling, packing=packing) for packing in (True, False)
    )
    assert (packing.packed, padding.packed) == (True, False)
    table = packing.tokenize_passages(TEXTS)
    with torch.no_grad():
        packed, padded = vectors(packing, table), vectors(padding, table)
        alone = torch.cat([vectors(padding, table, [i]) for i in range(len(TEXTS))])
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone, padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("backbone", ["llama", "bert", "gpt2", "roberta"])
def test_positions_are_those_the_backbone_counts_by_itself(directories, backbone, packing):
    encoder = load(directories[backbone], pooling="last", packing=packing)
    table = encoder.tokenize_passages(TEXTS)
    with torch.no_grad():
        vector = vectors(encoder, table, [3, 1])[1]
        encoder.use_kernel(None)
        states = encoder.backbone(table[1][None].long()).last_hidden_state  # [1, L, D]
    torch.testing.assert_close(vector, states[0, -1], rtol=0, atol=1e-5)


def test_gradients_of_packed_texts_are_those_of_padded_ones(tiny_llama_dir):
    gradients = []
    for packing in (True, False):
        encoder = load(tiny_llama_dir, packing=packing)
        vectors(encoder, encoder.tokenize_passages(TEXTS)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("packing", "plan"), [(True, plan_packed), (False, plan_padded)])
def test_the_plan_counts_padding_where_there_is_any(tiny_llama_dir, packing, plan):
    lengths = torch.tensor([30, 4, 20, 7, 5])
    groups = load(tiny_llama_dir, packing=packing).plan(lengths, 40)
    assert [group.tolist() for group in groups] == [group.tolist() for group in plan(lengths, 40)]


@pytest.mark.parametrize("packing", [True, False])
def test_embed_returns_the_order_asked_for(tiny_bert_dir, packing):
    encoder = load(tiny_bert_dir, packing=packing)
    table = encoder.tokenize_passages(TEXTS)
    with torch.no_grad():
        at_once = encoder.embed(table, max_tokens=4096)
        in_parts = encoder.embed(table, torch.tensor([3, 0, 1, 0]), max_tokens=64)
    torch.testing.assert_close(in_parts, at_once[[3, 0, 1, 0]], rtol=0, atol=1e-5)
    assert encoder.embed(table, torch.tensor([], dtype=torch.int64), max_tokens=64).shape == (0, 32)


@pytest.mark.parametrize("backbone", ["llama", "bert"])
def test_every_trainable_parameter_gets_a_gradient(directories, backbone):
    encoder = load(directories[backbone]).train()
    encoder.embed(encoder.tokenize_queries(TEXTS), max_tokens=64).square().sum().backward()
    without = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("backbone", ["llama", "bert"])
def test_gradient_checkpointing_computes_twice_and_changes_no_gradient(directories, backbone):
    gradients, passes = [], []
    for checkpointing in (False, True):
        settings = {"gradient_checkpointing": checkpointing, "disable_dropout": True}
        encoder = load(directories[backbone], **settings).train()
        linears = [m for m in encoder.modules() if isinstance(m, torch.nn.Linear)]
        calls = []
        linears[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        encoder.embed(encoder.tokenize_queries(TEXTS), max_tokens=4096).square().sum().backward()
        parameters = [p for p in encoder.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        passes.append(len(calls))
    assert passes == [1, 2]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backbone", ["bert", "llama"])
@pytest.mark.parametrize("disable", [False, True])
def test_disable_dropout_makes_training_deterministic(directories, tmp_path, backbone, disable):
    shutil.copytree(directories[backbone], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"attention_dropout": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = load(tmp_path, disable_dropout=disable).train()
    table = encoder.tokenize_queries(TEXTS)
    first, second = (encoder.embed(table, max_tokens=4096) for _ in range(2))
    assert torch.equal(first, second) == disable


def test_bf16_computes_low_and_returns_fp32_over_fp32_weights(tiny_llama_dir):
    exact, low = load(tiny_llama_dir), load(tiny_llama_dir, bf16=True)
    table = exact.tokenize_queries(TEXTS)
    with torch.no_grad():
        expected, vectors = (encoder.embed(table, max_tokens=4096) for encoder in (exact, low))
    assert vectors.dtype == torch.float32
    assert {parameter.dtype for parameter in low.parameters()} == {torch.float32}
    assert not torch.equal(vectors, expected)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=0.1)
