"""InfoNCE of both directions from exponentials that are kept: as the dense definition, whatever has
a place, or by the general form where fp32 cannot hold them."""

from dataclasses import replace

import pytest
import torch

from rankpo_kernels.chunked import chunks, info_nce_both, native
from rankpo_kernels.chunked import info_nce as chunked
from rankpo_kernels.problem import PQ, QP, InfoNCEProblem, InfoNCESettings, Needs
from rankpo_kernels.relations import Relations
from support.gates import draw, error, gates
from support.info_nce_problems import exact, problem

BOTH = InfoNCESettings(normalize=True, directions=(QP, PQ), partition="per_direction")
ALL = (True, True, False, True)
partitions = pytest.mark.parametrize("partition", ["joint", "per_direction"])


@pytest.fixture
def forms(monkeypatch):
    """Which form ran, of `both` and `general`."""
    ran = []
    for name in ("both", "general"):
        inner = getattr(chunked, name)

        def spy(*args, inner=inner, name=name):
            result = inner(*args)
            ran.append(name if result is not None else f"{name} could not")
            return result

        monkeypatch.setattr(chunked, name, spy)
    return ran


@pytest.fixture(params=[0, 2, 9], ids=["none-kept", "some-kept", "all-kept"])
def workspace(request, monkeypatch):
    """Bytes for so many chunks of 13 rows of N columns, by N; of two of scores where there is a
    guide."""
    monkeypatch.setattr(chunks, "CPU_ROWS", 13)
    return lambda N: 13 * N * 4 * max(2, request.param)


def run(q, p, relations, settings, weights, scale, needs=ALL):
    case = InfoNCEProblem(q, p, None, torch.tensor(scale), relations, settings)
    return chunked.info_nce(case, weights, needs)


@partitions
@pytest.mark.parametrize(
    ("names", "options"),
    [
        ((), {}),
        ((), {"normalize": False}),
        (("ids", "excluded"), {}),
        (("curated",), {"false_negative_margin": 0.3}),
        (("guide", "curated", "excluded"), {"false_negative_margin": 0.4}),
    ],
    ids=["plain", "not-cosine", "known", "margin", "guide"],
)
def test_options(names, options, partition, workspace, forms):
    """19 queries are two chunks, 37 passages no whole vector of any instruction set."""
    q, p, _, relations = problem(*names)
    settings = replace(BOTH, partition=partition, workspace_bytes=workspace(len(p)), **options)
    weights = torch.linspace(-1, 2, len(q))  # upstream gradients have any sign
    loss_M, truth = exact(q, p, None, relations, settings, weights, scale=5.0)
    result = run(q, p, relations, settings, weights, 5.0)
    assert forms == ["both"]
    loss_gate, grad_gate = gates(torch.float32, 1 / 5)
    assert error(result.loss_M, loss_M) < loss_gate
    for got, want in zip((result.dq_MD, result.dp_ND, result.d_scale), truth, strict=True):
        assert error(got, want) < 2 * grad_gate


@partitions
@pytest.mark.parametrize("converged", [False, True], ids=["fresh", "converged"])
@pytest.mark.parametrize("temperature", [0.1, 0.02, 0.01])
@pytest.mark.parametrize(("M", "N", "D"), [(33, 70, 64), (40, 40, 384), (30, 20, 8)])
def test_gates(M, N, D, temperature, converged, partition, forms):
    """More passages than queries; as many; fewer, so that some have several."""
    q, p, labels = draw(M, N, D, torch.float32, converged)
    settings = replace(BOTH, partition=partition)
    weights, scale = torch.full((M,), 1 / M), 1 / temperature
    loss_M, truth = exact(q, p, None, Relations(labels), settings, weights, scale=scale)
    result = run(q, p, Relations(labels), settings, weights, scale)
    loss_gate, grad_gate = gates(torch.float32, temperature)
    assert error(result.loss_M, loss_M) < loss_gate
    for got, want in zip((result.dq_MD, result.dp_ND, result.d_scale), truth, strict=True):
        assert error(got, want) < grad_gate
    assert set(forms) <= {"both", "both could not", "general"}


def isolated(apart):
    """Queries and passages in two dims whose last passage, of the last query, is so far from all
    others that its logits are `apart` below theirs at a scale of 100."""
    angle = torch.tensor(1 - apart / 100, dtype=torch.float64).acos()
    q = torch.tensor([[1.0, 0.0]]).repeat(6, 1)
    p = q + torch.tensor([[0.0, 0.01]]) * torch.arange(6)[:, None]
    p[-1] = torch.stack([angle.cos(), angle.sin()])
    q[-1] = torch.stack([(angle + 1.2).cos(), (angle + 1.2).sin()])  # as far from its positive
    return q, p, Relations(torch.arange(6))


@pytest.mark.parametrize(("apart", "form"), [(60, "both"), (75, "general"), (120, "general")])
def test_columns_far_below_the_others_take_the_exact_form(apart, form, forms):
    q, p, relations = isolated(apart)
    loss_M, truth = exact(q, p, None, relations, BOTH, torch.ones(6), scale=100.0)
    result = run(q, p, relations, BOTH, torch.ones(6), 100.0)
    assert forms[-1] == form
    loss_gate, grad_gate = gates(torch.float32, 0.01)
    assert error(result.loss_M[-1:], loss_M[-1:]) < loss_gate
    assert error(result.dp_ND[-1:], truth[1][-1:]) < grad_gate


@pytest.mark.parametrize(
    ("nothing", "others"), [("one query", "general"), ("all known to all", "general")]
)
def test_columns_without_a_negative_take_the_exact_form(nothing, others, forms):
    q, p, labels = draw(1 if nothing == "one query" else 5, 7, 8, torch.float32, False)
    ids = {} if len(q) == 1 else {"query_ids_M": torch.zeros(5, dtype=torch.int64)}
    result = run(q, p, Relations(labels, **ids), BOTH, torch.ones(len(q)), 20.0)
    truth = exact(q, p, None, Relations(labels, **ids), BOTH, torch.ones(len(q)), scale=20.0)
    assert forms[-1] == others and error(result.loss_M, truth[0]) < 1e-5


@pytest.mark.parametrize(
    ("places", "gradients", "products"),
    [(4, True, 12), (3, True, 13), (2, True, 14), (1, True, 15), (4, False, 4)],
    ids=["all", "all-but-one", "half", "one", "loss-alone"],
)
def test_scores_are_made_again_for_chunks_that_had_no_place(
    places, gradients, products, monkeypatch
):
    """Three products a chunk; the last chunk is there when gradients begin."""
    monkeypatch.setattr(chunks, "CPU_ROWS", 10)
    made = []
    for name in ("mm", "addmm_"):
        owner = torch if name == "mm" else torch.Tensor
        inner = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, inner=inner, **how: made.append(1) or inner(*args, **how)
        )
    q, p, labels = draw(40, 50, 8, torch.float32, False)
    settings = replace(BOTH, workspace_bytes=places * 10 * 50 * 4)
    run(q, p, Relations(labels), settings, torch.ones(40) if gradients else None, 20.0)
    assert len(made) == products


def test_threads_change_no_bit():
    q, p, labels = draw(300, 4000, 16, torch.float32, False)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            e = torch.rand(300, 4000, generator=torch.Generator().manual_seed(0))
            results.append(native.column_sums(e, e[:, 0].contiguous()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    assert error(results[0], (e.double() * e[:, :1].double()).sum(0)) < 1e-7


@pytest.mark.parametrize("needs", [(True, False, False, False), (False, True, False, False)])
def test_only_what_is_needed_is_given(needs, forms):
    q, p, labels = draw(20, 30, 8, torch.float32, False)
    whole = run(q, p, Relations(labels), BOTH, torch.ones(20), 20.0)
    result = run(q, p, Relations(labels), BOTH, torch.ones(20), 20.0, needs)
    assert forms == ["both", "both"]
    for got, want, need in zip(result[3:7], whole[3:7], needs, strict=True):
        assert (got is not None) == need and (got is None or torch.equal(got, want))


def test_what_the_form_cannot_is_left_to_the_general_one():
    q, p, labels = draw(4, 6, 8, torch.float32, False)

    def takes(needs=ALL, relations=None, **options):
        related, settings = relations or Relations(labels), replace(BOTH, **options)
        case = InfoNCEProblem(q, p, None, torch.tensor(1.0), related, settings)
        return info_nce_both.takes_both(case, Needs(*needs))

    assert takes() and takes(directions=(PQ, QP))
    offsets = torch.arange(5)
    assert not takes(relations=Relations(labels, own_offsets=offsets))
    assert not takes(relations=Relations(labels, positive_offsets=offsets, positive_columns=labels))
    assert not takes(needs=(False, True, False, True))  # the scale's is read off the queries'
    for options in (
        {"directions": (QP,)}, {"label_smoothing": 0.1}, {"matryoshka_dims": (4,)},
        {"hardness_mode": "all_negatives", "hardness_strength": 1.0}, {"window": (0, 2)},
        {"group": "0"},
    ):  # fmt: skip
        assert not takes(**options), options
