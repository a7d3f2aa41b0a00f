"""What a rented GPU's answers are held against is right, and what is red there is seen."""

import pytest
import torch

from bench.launch import SYMMETRIC
from bench.peers import SCALE
from bench.questions import OURS
from bench.rented import correctness, pipelines
from bench.rented.pipelines import PIPELINES, truth
from bench.rented.plan import rehearsed
from rankpo_fast import in_batch_rankpo_loss, info_nce_loss, rankpo_loss
from support.gates import error

M, N, D = 7, 14, 5
BY_NAME = {pipeline.name: pipeline for pipeline in PIPELINES}
PUBLIC = {
    "exact": lambda q, p, y, **how: info_nce_loss(q, p, y, scale=SCALE, **how),
    "both directions": lambda q, p, y, **how: info_nce_loss(
        q, p, y, scale=SCALE, **SYMMETRIC, **how
    ),
    "in-batch RankPO": in_batch_rankpo_loss,
    "pairwise RankPO": rankpo_loss,
}  # fmt: skip


@pytest.mark.parametrize("converged", [False, True], ids=["fresh", "converged"])
@pytest.mark.parametrize("name", PUBLIC)
def test_the_truth_is_the_loss_in_fp64_chunk_by_chunk(name, converged, monkeypatch):
    monkeypatch.setattr(pipelines, "ROWS", 3)
    pipeline = BY_NAME[name]
    torch.manual_seed(0)
    batch = pipeline.draw(M, N, D, "cpu", torch.float64, converged)
    leaves = [x.clone().requires_grad_() for x in batch.leaves]
    labels = [] if pipeline.pairwise else [batch.labels]
    losses = PUBLIC[name](*leaves, *labels, reduction="none")
    exact = [losses.detach(), *torch.autograd.grad(losses.mean(), leaves)]
    found = truth(pipeline, batch)
    assert len(found) == len(exact)
    assert max(error(a, b) for a, b in zip(found, exact, strict=True)) < 1e-12


def played(*wrong):
    """A pipeline that gives the truth, but for what is multiplied by some number."""

    def run(batch):
        right = truth(BY_NAME["exact"], batch)
        return [x * by for x, by in zip(right, wrong or (1, 1, 1), strict=True)]

    return pipelines.Pipeline("played", run, pipelines.info_nce_rows, 3, BY_NAME["exact"].gates)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        pytest.param((1, 1, 1), "", id="right"),
        pytest.param((1.001, 1, 1), "loss 1.0e-03 above", id="loss"),
        pytest.param((1, 1, 1.02), "gradient 2.0e-02 above", id="gradient"),
        pytest.param((1, float("nan"), 1), "gradient inf above", id="memory-nobody-wrote"),
    ],
)
def test_what_is_wrong_is_red(wrong, says):
    found = correctness.errors(played(*wrong), (M, N, D), rehearsed())
    assert bool(found.reason) == bool(says) and says in found.reason
    assert found.results[0].rows[0].implementation == OURS


def test_runs_that_differ_in_a_bit_are_red():
    runs = iter(range(9))
    pipeline = BY_NAME["exact"]

    def run(batch):
        return [x + 1e-7 * (next(runs) == 1) for x in truth(pipeline, batch)]

    other = pipelines.Pipeline("played", run, pipelines.info_nce_rows, 3, pipeline.gates)
    assert "differ from the first" in correctness.equal_runs(other, (M, N, D), rehearsed()).red
    assert not correctness.equal_runs(played(), (M, N, D), rehearsed()).red


def test_memory_is_poisoned_while_a_pipeline_runs():
    with correctness.poisoned():
        assert torch.empty(9).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
