"""Is it right where it is large? Losses and gradients at real sizes against fp64 on the same GPU,
from memory that is NaN where nobody wrote; and runs that must be equal in every bit."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..cases.loss import named
from ..measure import relative_error
from ..questions import OURS, Result, Row, Shape
from .pipelines import PIPELINES, Batch, Pipeline, truth
from .plan import Plan, Size
from .runner import Part
from .state import Found

FAMILY = "correctness"


def parts(plan: Plan) -> list[Part]:
    """All pipelines at their first size, then at the ragged one, then the runs that must agree."""
    sizes = {pipeline.name: sizes_of(pipeline, plan) for pipeline in PIPELINES}
    found = [
        Part(f"{pipeline.name} {described(sizes[pipeline.name][place])}",
             partial(errors, pipeline, sizes[pipeline.name][place], plan))
        for place in (0, 1)
        for pipeline in PIPELINES
    ]  # fmt: skip
    found += [
        Part(f"{plan.again} equal runs of {pipeline.name} {described(sizes[pipeline.name][0])}",
             partial(equal_runs, pipeline, sizes[pipeline.name][0], plan))
        for pipeline in PIPELINES
    ]  # fmt: skip
    return found


def sizes_of(pipeline: Pipeline, plan: Plan) -> Sequence[Size]:
    if pipeline.pairwise:
        return plan.pairs
    return plan.small if pipeline.small else plan.exact


def described(size: Size) -> str:
    return "x".join(map(str, size))


def shape_of(pipeline: Pipeline, size: Size, plan: Plan) -> Shape:
    axes, sizes = ("BD", size[1:]) if pipeline.pairwise else ("MND", size)
    return named(axes, (*sizes, str(plan.dtype).removeprefix("torch.")), plan.device)


def errors(pipeline: Pipeline, size: Size, plan: Plan) -> Found:
    """Of fresh data and of a finished training's, each from memory full of NaN."""
    worst, of_losses = {}, {}
    for state in (False, True):
        batch = drawn(pipeline, size, plan, converged=state)
        with poisoned():
            got = list(pipeline.run(batch))
        exact = truth(pipeline, batch)
        of_losses[state] = relative_error(got[:1], exact[:1])
        grads = zip(got[1:], exact[1:], strict=True)
        worst[state] = max((relative_error([a], [b]) for a, b in grads), default=of_losses[state])
    loss_gate = pipeline.gates[torch.float32]
    gate = pipeline.gates[plan.dtype] if pipeline.backward else loss_gate
    wrong = [
        f"{what} {error:.1e} above {most:.1e}"
        for what, each, most in (("loss", of_losses, loss_gate), ("gradient", worst, gate))
        for error in each.values() if not error <= most
    ]  # fmt: skip
    row = Row(OURS, "; ".join(wrong), error=finite(worst[False]), converged=finite(worst[True]))
    about = {"pipeline": pipeline.name, "loss errors": [finite(x) for x in of_losses.values()]}
    result = Result(
        f"correctness of {pipeline.name}", FAMILY,
        "Are losses and gradients those of fp64, from memory full of NaN?",
        shape_of(pipeline, size, plan), (row,), gate=gate, about=about,
    )  # fmt: skip
    says = f"loss {max(of_losses.values()):.1e}, gradients {max(worst.values()):.1e}"
    return Found([result], says=says)


def finite(error: float) -> float:
    """JSON has no infinity."""
    return error if math.isfinite(error) else 1e9


def equal_runs(pipeline: Pipeline, size: Size, plan: Plan) -> Found:
    batch = drawn(pipeline, size, plan)
    first = [x.clone() for x in pipeline.run(batch)]
    unequal = [
        number
        for number in range(1, plan.again)
        if not all(map(torch.equal, first, pipeline.run(batch)))
    ]
    if unequal:
        return Found(red=f"runs {unequal} of {plan.again} differ from the first")
    return Found(says=f"{plan.again} runs, all bits equal")


def drawn(pipeline: Pipeline, size: Size, plan: Plan, *, converged: bool = False) -> Batch:
    torch.manual_seed(0)
    return pipeline.draw(*size, plan.device, plan.dtype, converged)


def error_of(pipeline: Pipeline, batch: Batch) -> float:
    """The worst of loss and gradients."""
    exact: list[Tensor] = truth(pipeline, batch)
    return relative_error(list(pipeline.run(batch)), exact)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
