"""The engine on a GPU: packed attention in bf16, the gradient cache, and a step that never waits;
skipped where there is no GPU."""

import pytest
import torch
from safetensors.torch import load_file

from rankpo_fast.config import ModelConfig
from rankpo_fast.data.moving import pinned, to_device
from rankpo_fast.model.attention import Needs, find_kernels
from rankpo_fast.model.load import load_encoder
from rankpo_fast.train.arithmetic import summed_in_order
from rankpo_fast.train.cache import CachedVectors
from support.model_families import FAMILIES, make_batch, make_encoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CARD = torch.device("cuda")


def kernels(**needs):
    """Those of this machine for bf16, the slow one of last resort included."""
    device = (
        torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else CARD
    )
    return find_kernels(Needs(device, True, 8, **needs))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kernel_of_this_machine_gives_each_text_what_it_gets_alone(family):
    encoder = make_encoder(family).to(CARD)
    encoder.bf16 = True
    batch = to_device(make_batch(), CARD)
    softcap, window = family == "gemma2", "sliding_window" in FAMILIES[family][1]
    with torch.no_grad():
        encoder.bf16 = False
        exact = encoder.states(batch)
        encoder.bf16 = True
        bound = 4 * (encoder.states(batch) - exact).norm()  # what bf16 costs the ordinary way
        for kernel in kernels(window=window, softcap=softcap, dropout=False):
            encoder.use_kernel(kernel)
            assert (encoder.states(batch) - exact).norm() <= bound, kernel.name


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_the_gradient_cache_keeps_changes_no_bit(family):
    encoder = make_encoder(family).to(CARD).train()
    encoder.bf16 = True
    encoder.use_kernel(kernels(window=False, softcap=False, dropout=False)[0])
    groups = [to_device(pinned(make_batch(seed=seed)), CARD) for seed in range(4)]
    results = []
    for kept in (4, 1):
        cached = CachedVectors(encoder, groups, kept=kept)
        cached.backward(cached.vectors.sin())
        results.append([p.grad for p in encoder.parameters() if p.grad is not None])
        encoder.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_long_texts_have_equal_bits_where_sums_are_in_one_order(family):
    """Of several blocks of flash attention each, whose parts of a gradient come as they are ready;
    by each kernel of this machine that the training may take."""
    encoder = make_encoder(family, max_position_embeddings=1024).to(CARD).train()
    encoder.bf16 = True
    batch = to_device(make_batch((900, 700, 500)), CARD)
    for kernel in kernels(window=False, softcap=False, dropout=False):
        encoder.use_kernel(kernel)
        results = []
        with summed_in_order(True):
            for _ in range(4):
                encoder(batch).sin().sum().backward()
                results.append([p.grad for p in encoder.parameters() if p.grad is not None])
                encoder.zero_grad(set_to_none=True)
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other)), kernel.name


@pytest.mark.parametrize("way", [True, "selective"])
def test_offloaded_activations_come_back_bit_by_bit(way, monkeypatch):
    """Of two micro-batches whose graphs are kept: tensors of one leave after the other's."""
    monkeypatch.setattr("rankpo_fast.model.offload.LEAST", 1)
    encoder = make_encoder("llama", num_hidden_layers=8).to(CARD).train()
    encoder.bf16 = True
    encoder.use_kernel(kernels(window=False, softcap=False, dropout=False)[0])
    encoder.layers.checkpoint(way)
    groups = [to_device(pinned(make_batch(seed=seed)), CARD) for seed in range(2)]
    results, host_bytes = [], []
    for device in (None, CARD):
        encoder.layers.offload(device)
        cached = CachedVectors(encoder, groups, kept=2)
        host_bytes.append(encoder.layers.host_bytes)
        cached.backward(cached.vectors.sin())
        results.append([p.grad for p in encoder.parameters() if p.grad is not None])
        encoder.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert host_bytes[0] == 0 and host_bytes[1] > 0


def test_random_weights_come_from_the_seed_on_the_card_too(tiny_llama_dir):
    state = torch.cuda.get_rng_state()
    config = ModelConfig(str(tiny_llama_dir), from_scratch=True)
    first, same, other = (
        load_encoder(config, device=CARD, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert torch.equal(state, torch.cuda.get_rng_state())
    assert all(tensor.is_cuda and torch.equal(tensor, same[key]) for key, tensor in first.items())
    assert not torch.equal(*(x["backbone.embed_tokens.weight"] for x in (first, other)))


@pytest.mark.parametrize("stage", ["contrastive", "rankpo"])
def test_runs_end_alike_and_a_step_never_waits(
    stage, tiny_llama_dir, run_stage, read_metrics, monkeypatch
):
    from rankpo_fast.train import loop

    step = loop.train_step

    def never_waits(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "train_step", never_waits)
    flags = {"device": "cuda", "bf16": True, "max_steps": 6}
    outputs = [run_stage(stage, tiny_llama_dir, name, **flags) for name in ("one", "two")]
    first, second = (load_file(output / "model.safetensors") for output in outputs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = read_metrics(outputs[0])
    assert lines[-1]["loss"] < lines[0]["loss"]
