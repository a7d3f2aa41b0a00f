"""Compiled layers train as eager ones do, keep their names, and are not built for each length."""

import pytest
import torch
from torch import nn

from rankpo_fast.config import ModelConfig
from rankpo_fast.data.packing import pack
from rankpo_fast.model.load import load_encoder
from rankpo_fast.train.cache import CachedVectors

CPU = torch.device("cpu")


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are built: traced as ever, but not made into code, which takes a minute."""
    torch._dynamo.reset()
    built = []

    def backend(graph, inputs):
        built.append(graph)
        return graph.forward

    original = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **flags: original(self, backend=backend, **flags)
    )
    yield built
    torch._dynamo.reset()


def trained(directory, steps, **flags):
    """The encoder after steps of SGD through the gradient cache on batches of all sizes."""
    config = ModelConfig(str(directory), bf16=False, disable_dropout=True, **flags)
    encoder = load_encoder(config, device=CPU).train()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for step in range(steps):
        texts = [" ".join(["nurse"] * (1 + 3 * i + step)) for i in range(5 + 2 * step)]
        table = encoder.tokenize_passages(texts)
        groups = [pack(table, group) for group in encoder.plan(table.lengths, 64 + 8 * step)]
        cached = CachedVectors(encoder, groups, kept=1)
        cached.backward(torch.cos(cached.vectors))
        optimizer.step()
        optimizer.zero_grad()
    return encoder


@pytest.mark.parametrize(
    "model, checkpointing",
    [
        pytest.param("tiny_llama_dir", False, id="causal"),
        pytest.param("tiny_llama_dir", True, id="layers computed twice"),
        pytest.param("tiny_bert_dir", False, id="layers further down"),
    ],
)
def test_compiled_layers_train_as_eager_ones_do(model, checkpointing, request, graphs, tmp_path):
    directory = request.getfixturevalue(model)
    flags = {"gradient_checkpointing": checkpointing}
    eager = trained(directory, 2, **flags)
    assert not graphs
    compiled = trained(directory, 2, torch_compile=True, **flags)
    assert graphs
    expected, got = eager.state_dict(), compiled.state_dict()
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)
    compiled.save(tmp_path)
    assert load_encoder(ModelConfig(str(tmp_path)), device=CPU).state_dict().keys() == got.keys()


def test_layers_and_lengths_share_a_build(tiny_llama_dir, graphs):
    flags = {"torch_compile": True, "gradient_checkpointing": False}
    trained(tiny_llama_dir, 1, **flags)
    few = len(graphs)
    torch._dynamo.reset()
    graphs.clear()
    trained(tiny_llama_dir, 6, **flags)
    assert len(graphs) <= few + 2
