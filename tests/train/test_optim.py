"""Every --optim: the update it makes, without and with bf16 weights, and its way through a file."""

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from rankpo_fast.config import TrainingConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.precision import ROUND_AT_RANDOM
from rankpo_fast.train.optim import (
    CHOICES,
    Optimizer,
    describe_optimizer,
    make_optimizer,
    on_the_host,
)

BF16 = ROUND_AT_RANDOM


def model(dtype=torch.float32):
    """Matrices of 8,192 values, which states of few bits are for, and vectors, which they leave."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(128, 64), nn.Linear(64, 128), nn.LayerNorm(128)).to(dtype)


def config(name, **settings):
    return TrainingConfig("unused", optim=name, learning_rate=1e-3, **settings)


def trained(name, steps, dtype=torch.float32, sizes=1.0, **settings):
    """A model after so many updates with gradients from a fixed stream, and its optimizer."""
    one = model(dtype)
    optimizer = make_optimizer(one, config(name, **settings))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        update(optimizer, generator, sizes)
    return one, optimizer


def update(optimizer, generator, size=1.0, max_norm=1.0):
    for parameter in optimizer.parameters:
        kind = parameter.grad_dtype or parameter.dtype
        parameter.grad = (size * torch.randn(parameter.shape, generator=generator)).to(kind)
    return optimizer.update([torch.zeros(())], 1e-3, max_norm)


def flat(one):
    return torch.cat([p.detach().float().flatten() for p in one.parameters()])


@pytest.mark.parametrize("name", ["adamw_8bit", "adamw_4bit", "adamw_fp8", "paged_adamw_8bit"])
def test_states_of_few_bits_walk_where_adamw_walks(name):
    """A step's length is the rate whatever the states; which way, they know to some percent."""
    start = flat(model())
    exact, few = (flat(trained(n, 10)[0]) - start for n in ("adamw", name))
    assert torch.cosine_similarity(exact, few, dim=0) > (0.9 if "4bit" in name else 0.97)
    assert 0.9 < few.norm() / exact.norm() < 1.1


def test_muon_turns_matrices_and_leaves_the_rest_to_adamw():
    """Of an orthogonal step all singular values are alike: 0.7 to 1.2 of it, by five iterations."""
    (start, muon), adamw = (trained("muon", steps)[0] for steps in (0, 1)), trained("adamw", 1)[0]
    assert torch.equal(start[0].weight, model()[0].weight)
    for which in (muon[0].weight, muon[1].bias, muon[2].weight):
        name = next(n for n, p in muon.named_parameters() if p is which)
        assert torch.equal(which, adamw.get_parameter(name))
    values = torch.linalg.svdvals(muon[1].weight - start[1].weight)
    assert values.min() / values.max() > 0.5


@pytest.mark.parametrize("name", BF16)
def test_small_updates_of_bf16_weights_are_right_on_average(name):
    """A hundred updates of 1e-3 of 2^-9 of the weights: to nearest, none would change anything."""
    one = nn.ParameterList([nn.Parameter(torch.ones(128, 256, dtype=torch.bfloat16))])
    optimizer = make_optimizer(one, config(name, weight_decay=0.0, adam_beta1=0.0))
    rate = 2**-9 * 1e-3
    for _ in range(100):
        optimizer.parameters[0].grad = torch.ones(128, 256)
        optimizer.update([torch.zeros(())], rate, 0.0)
    moved = 1 - one[0].double().mean().item()
    # 0.1 * 2^-9 are to go, in jumps of 2^-8 with probability 1e-3 / 2 each: of 32,768 weights times
    # 100 updates some 1,638 jump, +- 40; fp8 and 4 bits know the second moment to some percent.
    assert moved == pytest.approx(100 * rate, rel=0.15 if "8bit" not in name else 0.11)


def test_gradients_of_bf16_weights_are_summed_in_fp32():
    one = model(torch.bfloat16)
    make_optimizer(one, config("adamw"))
    ids = torch.tensor([3])
    for factor in (1.0, 2**-10, 2**-10):  # a bf16 sum would lose both
        (one[0](ids).sum() * factor).backward()
    assert one[0].weight.grad.dtype == torch.float32
    assert one[0].weight.grad[3, 0] == 1 + 2**-9


@pytest.mark.parametrize("name", CHOICES)
def test_states_come_back_from_a_file_bit_by_bit(name):
    """Three updates, and three after two that were kept: the same weights, the rounding too."""
    dtype = torch.bfloat16 if name in BF16 else torch.float32
    expected, _ = trained(name, 3, dtype)
    halfway, optimizer = trained(name, 2, dtype)
    states = [load(save(optimizer.state_of(p))) for p in optimizer.parameters]
    fresh, other = model(dtype), None
    other = make_optimizer(fresh, config(name))
    fresh.load_state_dict(halfway.state_dict())
    other.restore(dict(zip(other.parameters, states, strict=True)), updates=2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):  # what the first two drew
        [torch.randn(p.shape, generator=generator) for p in other.parameters]
    torch.manual_seed(99)  # no generator of the run decides
    update(other, generator)
    assert torch.equal(flat(fresh), flat(expected))


@pytest.mark.parametrize("name", CHOICES)
def test_after_a_gradient_that_is_not_finite_nothing_changes(name):
    one, optimizer = trained(name, 1)
    before = flat(one)
    assert update(optimizer, torch.Generator(), float("nan")).isnan()
    update(optimizer, torch.Generator())
    assert torch.equal(flat(one), before)


@pytest.mark.parametrize("name", CHOICES)
def test_long_gradients_are_scaled_to_the_norm(name):
    """AdamW divides by a gradient's size, so a second one tells: 1 / 100 of it, or as long."""
    walks = []
    for max_norm in (0.0, 1.0):
        one = model()
        optimizer = make_optimizer(one, config(name))
        generator = torch.Generator().manual_seed(1)
        norm = update(optimizer, generator, 1.0, max_norm)
        assert norm > 100
        update(optimizer, generator, 1e-2, max_norm)
        walks.append(flat(one) - flat(model()))
    assert (walks[0] - walks[1]).norm() > 0.1 * walks[0].norm()


@pytest.mark.parametrize("name", sorted({*CHOICES} - {*BF16}))
def test_what_rounds_to_nearest_is_refused_for_bf16_weights(name):
    with pytest.raises(InputError, match=f"--optim {name}.*adamw_8bit"):
        make_optimizer(model(torch.bfloat16), config(name))


@pytest.mark.parametrize("name, least, most", [
    ("adamw", 8, 8.1), ("adamw_8bit", 2, 2.6), ("adamw_4bit", 1, 1.6), ("adamw_fp8", 2, 2.6),
    ("paged_adamw_8bit", 2, 2.6), ("muon", 4, 6.1),
])  # fmt: skip
def test_bytes_of_states_are_what_the_help_says(name, least, most):
    _, optimizer = trained(name, 0)
    said = describe_optimizer(optimizer, config(name))
    assert least <= float(said.split(", ")[1].split()[0]) <= most, said
    assert ("waits" in said) == (name not in ("adamw",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_the_host_adamw_walks_in_fp32_and_comes_back(dtype):
    """Weights are those of AdamW in fp32 from the same start, in bf16 rounded once, not each step;
    its own fp32 weights go through a checkpoint."""

    def made():
        one = model().to(dtype)
        groups = [{"params": list(one.parameters())}]
        hosts = on_the_host(groups)
        adam = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.0, fused=True)
        return one, Optimizer([adam], hosts=hosts)

    one, optimizer = made()
    exact = model().to(dtype).float()
    beside = make_optimizer(exact, config("adamw"))
    for step in range(3):
        for mine, theirs in zip(optimizer.parameters, exact.parameters(), strict=True):
            theirs.grad = torch.randn(mine.shape).to(dtype).float()
            mine.grad = theirs.grad.to(dtype)
        for which in (optimizer, beside):
            which.update([torch.zeros(())], 1e-3, 1e9)
        if step < 2:  # a run that goes on after each
            states = [load(save(optimizer.state_of(p))) for p in optimizer.parameters]
            weights = one.state_dict()
            one, optimizer = made()
            one.load_state_dict(weights)
            optimizer.restore(dict(zip(optimizer.parameters, states, strict=True)), step + 1)
    assert torch.equal(flat(one), flat(exact.to(dtype)))


def test_what_is_on_the_host_already_is_not_put_there():
    with pytest.raises(InputError, match="--offload optimizer: .* on the host already"):
        make_optimizer(model(), config("adamw", offload=["optimizer"]))
