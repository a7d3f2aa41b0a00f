"""Ours beside a library's own loss in fp64: the gates of all losses, and a table of what was found.

pytest tests/integrations --equality
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bench.processes import answered, processes
from support.gates import pass_the_gates

ERRORS = pytest.StashKey[dict[tuple[str, str], tuple[int, float, float]]]()


def pytest_addoption(parser):
    parser.addoption("--equality", action="store_true", help="list errors by adapter and option")


def pytest_configure(config):
    config.stash[ERRORS] = {}


@pytest.fixture
def equal(request):
    """equal(adapter, option, ours, exact, logits): (loss, gradients) pass the gates for logits of
    that size, and errors are listed."""

    def check(
        adapter: str, option: str, ours: Sequence[Tensor], exact: Sequence[Tensor], logits: float
    ) -> None:
        loss, *grads = pass_the_gates(ours, exact, logits)
        rows = request.config.stash[ERRORS]
        count, most_loss, most_grad = rows.get((adapter, option), (0, 0.0, 0.0))
        worst = max(loss, most_loss), max(*grads, most_grad)
        rows[adapter, option] = count + 1, *worst

    return check


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """What the examples train on."""
    from small_world import small_world

    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def llama(tiny_llama_dir):
    """A causal backbone of its own for every test."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(tiny_llama_dir)


@pytest.fixture
def other(tiny_llama_dir):
    """The reference: other weights."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(1.1)
    return model


@pytest.fixture(scope="session")
def start_method():
    """Of ranks. Forked they have imported all; but autograd's threads, which a GPU has, outlive no
    fork."""
    return "spawn" if torch.cuda.is_available() else "fork"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, start_method):
    """two_ranks(function, ...): what it returns on each, or raises on one."""
    with processes(2, tmp_path_factory.mktemp("ranks"), start_method) as ask:
        yield lambda *what: answered(ask(*what))


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--equality"):
        return
    write = terminalreporter.write_line
    write("\n| adapter | option | cases | loss | gradients |\n|---|---|---|---|---|")
    for (adapter, option), (count, loss, grads) in sorted(config.stash[ERRORS].items()):
        write(f"| {adapter} | {option} | {count} | {loss:.0e} | {grads:.0e} |")
