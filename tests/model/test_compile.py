"""Compiled layers train as eager ones do, keep their names, and are not built for each length."""

import pytest
import torch
from torch import nn

from rankpo_fast.config import ModelConfig
from rankpo_fast.data.packing import pack
from rankpo_fast.model.load import load_encoder
from rankpo_fast.train.cache import CachedVectors
from rankpo_fast.train.memory import Memory

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


def trained(directory, graphs, **flags):
    """The encoder after SGD through the gradient cache on batches of all sizes, and how many
    `graphs` there were after each."""
    config = ModelConfig(str(directory), bf16=False, disable_dropout=True, **flags)
    encoder = load_encoder(config, device=CPU).train()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    counts = []
    for step in range(3):
        texts = [" ".join(["nurse"] * (1 + 2 * i + step)) for i in range(4 + 2 * step)]
        table = encoder.tokenize_passages(texts)
        groups = [pack(table, g) for g in encoder.plan(table.lengths, 50 + 40 * step)]
        assert len(groups) > 1  # one without a graph, one with it
        cached = CachedVectors(encoder, groups, kept=1)
        cached.backward(torch.cos(cached.vectors))
        optimizer.step()
        optimizer.zero_grad()
        counts.append(len(graphs))
    return encoder, counts


@pytest.mark.long
@pytest.mark.parametrize(
    "model, flags",
    [
        pytest.param("tiny_llama_dir", {}, id="causal"),
        pytest.param("tiny_llama_dir", {"gradient_checkpointing": True}, id="computed twice"),
        pytest.param("tiny_llama_dir", {"lora_rank": 4}, id="adapters"),
        pytest.param("tiny_bert_dir", {}, id="layers further down"),
    ],
)
def test_compiled_layers_train_as_eager_ones_do(model, flags, request, graphs, tmp_path):
    directory = request.getfixturevalue(model)
    flags = {"gradient_checkpointing": False} | flags
    eager, counts = trained(directory, graphs, **flags)
    assert counts[-1] == 0
    compiled, counts = trained(directory, graphs, torch_compile=True, **flags)
    assert 0 < counts[0] == counts[-1]  # none for other lengths
    expected, got = eager.state_dict(), compiled.state_dict()
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)
    for encoder, name in ((eager, "eager"), (compiled, "compiled")):
        encoder.save(tmp_path / name)
    saved = [
        load_encoder(ModelConfig(str(tmp_path / name)), device=CPU).state_dict().keys()
        for name in ("eager", "compiled")
    ]
    assert saved[0] == saved[1]


@pytest.mark.long
def test_what_is_computed_twice_is_compiled_where_there_are_gradients_too(tiny_bert_dir, graphs):
    """Else the pass with a graph, which is not, would draw other dropout than the one without."""
    flags = {"bf16": False, "torch_compile": True, "gradient_checkpointing": True}
    encoder = load_encoder(ModelConfig(str(tiny_bert_dir), **flags), device=CPU).train()
    table = encoder.tokenize_passages(["a nurse", "a teacher"])
    encoder(pack(table, torch.arange(2))).sum().backward()
    assert len(graphs) > 0


def test_compiled_layers_that_are_checkpointed_later_are_compiled_in_parts(tiny_bert_dir, graphs):
    """As where --gradient_checkpointing auto finds that it must."""
    flags = {"bf16": False, "torch_compile": True}
    encoders = []
    for now in (True, False):
        config = ModelConfig(str(tiny_bert_dir), gradient_checkpointing=now, **flags)
        encoders.append(load_encoder(config, device=CPU).train())
    encoders[1].layers.checkpoint()
    compiled = [
        [name for name, m in e.named_modules() if m._compiled_call_impl is not None]
        for e in encoders
    ]
    assert compiled[0] == compiled[1] and any("layer.0." in name for name in compiled[0])


@pytest.mark.long
def test_measuring_memory_keeps_no_layer_from_being_compiled(tiny_llama_dir, graphs):
    flags = {"bf16": False, "torch_compile": True, "gradient_checkpointing": False}
    encoder = load_encoder(ModelConfig(str(tiny_llama_dir), **flags), device=CPU).train()
    table = encoder.tokenize_passages(["a nurse", "a teacher"])
    Memory.measure(encoder, table, 4096, None)
    encoder(pack(table, torch.arange(2))).sum().backward()
    assert len(graphs) > 0
