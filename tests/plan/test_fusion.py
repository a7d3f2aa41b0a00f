"""What compiled layers would read and write, on modules that are counted by hand."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rankpo_fast.plan.counter import Costs, Meter

T, D = 6, 8
STATE = T * D * 4  # bytes of a state
WEIGHT = D * D * 4


class Between(nn.Module):
    """Elementwise ops before and after a product."""

    def __init__(self):
        super().__init__()
        self.product = nn.Linear(D, D, bias=False)

    def forward(self, x):
        gate = torch.sin(2 * x) + x
        return torch.cos(self.product(gate)).exp() * gate


def moved(costs: Costs) -> float:
    return sum(count * op.bytes for op, count in costs.items())


def test_what_lies_between_two_products_reads_and_writes_once():
    module, x = Between(), torch.randn(T, D)
    meter = Meter()
    with torch.no_grad(), meter, meter.fusion.of([module]):
        y = module(x)
    plain, fused = meter.take_costs()
    assert y.shape == x.shape
    product = 2 * STATE + WEIGHT
    # x is read and gate written before it; after it the product and gate are read, one is written
    assert moved(fused) == product + 2 * STATE + 3 * STATE
    assert moved(plain) == product + (2 + 2 + 3) * STATE + (2 + 2 + 3) * STATE


def test_ops_outside_of_a_compiled_module_are_not_fused():
    module, x = Between(), torch.randn(T, D)
    meter = Meter()
    with torch.no_grad(), meter, meter.fusion.of([module.product]):
        module(x)
    plain, fused = meter.take_costs()
    assert moved(plain) == moved(fused)


def test_what_the_backward_pass_needs_is_written_and_read_in_it():
    class Twice(nn.Module):
        def forward(self, x):
            return x.sin().cos()  # keeps x and its sine

    x, module = torch.randn(T, D, requires_grad=True), Twice()
    meter = Meter()
    with meter, meter.fusion.of([module]):
        y = module(x)
        _, forward = meter.take_costs()
        gradient = torch.ones_like(y)
        meter.take_costs()
        y.backward(gradient)
    _, backward = meter.take_costs()
    assert moved(forward) == 3 * STATE  # x, its sine, the cosine of that
    # The gradient, the sine, x; what is returned is x's own gradient.
    assert moved(backward) == 4 * STATE


def test_two_modules_are_no_kernel_together_in_either_pass():
    class Sine(nn.Module):
        def forward(self, x):
            return x.sin()

    for modules in ([Sine(), Sine()],):
        x = torch.randn(T, D, requires_grad=True)
        meter = Meter()
        with meter, meter.fusion.of(modules):
            y = modules[1](modules[0](x))
            _, forward = meter.take_costs()
            gradient = torch.ones_like(y)
            meter.take_costs()
            y.backward(gradient)
        _, backward = meter.take_costs()
        assert moved(forward) == 4 * STATE  # each reads one and writes one
        assert moved(backward) == 2 * 3 * STATE  # each reads a gradient and what it kept


def test_a_checkpointed_module_is_fused_when_it_is_computed_again():
    module, x = Between(), torch.randn(T, D, requires_grad=True)
    meter = Meter()
    with meter, meter.fusion.of([module]):
        y = checkpoint(module, x, use_reentrant=False)
        meter.take_costs()
        y.backward(torch.ones_like(y))
    plain, fused = meter.take_costs()
    products = sum(count for op, count in fused.items() if op.flops)
    assert products == sum(count for op, count in plain.items() if op.flops) == 3
    assert moved(fused) < 0.8 * moved(plain)
    assert meter.fusion.region is None


def test_gradients_that_are_added_to_a_parameter_s_are_not_fused():
    module, x = Between(), torch.randn(T, D)
    module.product.weight.grad = torch.zeros(D, D)
    meter = Meter()
    with meter, meter.fusion.of([module]):
        y = module(x)
        meter.take_costs()
        y.backward(torch.ones_like(y))
    _, fused = meter.take_costs()
    assert fused[(0.0, 3 * WEIGHT, 0.0)] == 1  # read both, write one
