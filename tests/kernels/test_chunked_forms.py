"""The CPU's native forms of InfoNCE with own negatives and with prefixes."""

from dataclasses import replace

import pytest
import torch

from rankpo_kernels.chunked import chunks, native
from rankpo_kernels.chunked import info_nce as chunked
from rankpo_kernels.chunked.info_nce_plain import takes_plain
from rankpo_kernels.chunked.info_nce_prefixes import takes_prefixes
from rankpo_kernels.problem import PQ, QP, InfoNCEProblem, InfoNCESettings
from rankpo_kernels.relations import Relations
from support.gates import draw, error, gates
from support.info_nce_problems import exact, problem

PLAIN = InfoNCESettings(normalize=True)
ALL = (True,) * 4
temperatures = pytest.mark.parametrize("temperature", [0.1, 0.02, 0.01])
states = pytest.mark.parametrize("converged", [False, True], ids=["fresh", "converged"])


@pytest.fixture(autouse=True)
def in_chunks(monkeypatch):
    """Of two groups of rows and a part of one."""
    monkeypatch.setattr(chunks, "CPU_ROWS", 2 * native.GROUP + 10)


@pytest.fixture
def never_general(monkeypatch):
    monkeypatch.setattr(chunked, "general", None)


def run(q, p, own, relations, settings, weights, scale, needs=ALL):
    case = InfoNCEProblem(q, p, own, torch.tensor(scale), relations, settings)
    return chunked.info_nce(case, weights, needs)


def check(q, p, own, relations, settings, temperature):
    """Against fp64, with upstream gradients of any sign."""
    weights, scale = torch.linspace(-1, 2, len(q)), 1 / temperature
    loss_M, truth = exact(q, p, own, relations, settings, weights, scale=scale)
    result = run(q, p, own, relations, settings, weights, scale)
    loss_gate, grad_gate = gates(torch.float32, temperature)
    assert error(result.loss_M, loss_M) < loss_gate
    forward = run(q, p, own, relations, settings, None, scale)
    assert torch.equal(forward.loss_M, result.loss_M)
    grads = [x for x in result[3:7] if x is not None]
    for got, want in zip(grads, truth, strict=True):
        assert error(got, want) < grad_gate


# --- own negatives ---


@states
@temperatures
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
def test_own_negatives(even, temperature, converged, never_general):
    """300 queries are three chunks; of uneven ones some have none, the last among them."""
    M, N, D = 300, 130, 48
    q, p, labels = draw(M, N, D, torch.float32, converged)
    count_M = torch.full((M,), 3) if even else torch.arange(M).flip(0) * 7 % 5
    own = torch.randn(int(count_M.sum()), D, generator=torch.Generator().manual_seed(1))
    offsets = torch.cat([count_M.new_zeros(1), count_M.cumsum(0)])
    check(q, p, own, Relations(labels, own_offsets=offsets), PLAIN, temperature)


@pytest.mark.parametrize("options", [{}, {"normalize": False}], ids=["cosines", "dots"])
@pytest.mark.parametrize("needs", [(True, False, False, False), (False, False, True, False)])
def test_gradients_of_own_negatives_alone_or_not_at_all(needs, options, never_general):
    q, p, own, relations = problem("own", "ids", "excluded")
    settings, weights = replace(PLAIN, **options), torch.ones(len(q))
    whole = run(q, p, own, relations, settings, weights, 3.0)
    result = run(q, p, own, relations, settings, weights, 3.0, needs)
    for got, want, need in zip(result[3:7], whole[3:7], needs, strict=True):
        assert (got is not None) == need and (got is None or torch.equal(got, want))


@pytest.mark.parametrize("length", [1e-18, 1e18])
def test_own_negatives_of_any_length(length, never_general):
    """Whose squares fp32 cannot hold."""
    q, p, own, relations = problem("own")
    usual, other = (
        run(q, p, x, relations, PLAIN, torch.ones(len(q)), 3.0) for x in (own, own * length)
    )
    assert error(other.loss_M, usual.loss_M) < 1e-6
    assert error(other.d_own_HD * length, usual.d_own_HD) < 1e-5


def test_a_query_without_any_negative_stands_beside_others(never_general):
    """All passages are known to all; the second query has own negatives, the others none."""
    q, p, labels = draw(3, 4, 8, torch.float32, False)
    ids = torch.zeros(3, dtype=torch.int64)
    own, offsets = torch.randn(2, 8), torch.tensor([0, 0, 2, 2])
    relations = Relations(
        labels, own_offsets=offsets, query_ids_M=ids, passage_ids_N=torch.zeros(4).long()
    )
    result = run(q, p, own, relations, PLAIN, torch.ones(3), 20.0)
    assert (result.hardest_M > -torch.inf).tolist() == [False, True, False]
    assert (result.loss_M > 0).tolist() == [False, True, False]
    assert result.dq_MD.any(1).tolist() == [False, True, False]
    assert result.d_own_HD.any() and result.d_scale.isfinite()


def test_no_own_negatives_at_all(never_general):
    q, p, labels = draw(5, 7, 8, torch.float32, False)
    relations = Relations(labels, own_offsets=torch.zeros(6, dtype=torch.int64))
    result = run(q, p, q.new_empty(0, 8), relations, PLAIN, torch.ones(5), 3.0)
    alone = run(q, p, None, Relations(labels), PLAIN, torch.ones(5), 3.0)
    assert torch.equal(result.dq_MD, alone.dq_MD) and result.d_own_HD.shape == (0, 8)


def test_options_that_tell_own_negatives_from_others_are_left_to_the_general_form():
    q, p, own, relations = problem("own")

    def takes(**options):
        settings = replace(PLAIN, **options)
        return takes_plain(InfoNCEProblem(q, p, own, torch.tensor(1.0), relations, settings))

    hard = {"hardness_strength": 1.0}
    assert takes() and takes(hardness_mode="all_negatives", **hard)
    assert not takes(false_negative_margin=0.1)
    assert not takes(hardness_mode="hard_negatives", **hard)


# --- prefixes ---


@states
@temperatures
@pytest.mark.parametrize(
    ("dims", "weights"),
    [((16, 48), (0.5, 2.0)), ((40,), None), ((8, 16, 24, 48), None)],
    ids=["two", "one-that-is-short", "four"],
)
def test_prefixes(dims, weights, temperature, converged, never_general):
    """300 queries are three chunks, each of two whole groups of rows and a part of one."""
    q, p, labels = draw(300, 130, 48, torch.float32, converged)
    settings = replace(PLAIN, matryoshka_dims=dims, matryoshka_weights=weights)
    check(q, p, None, Relations(labels), settings, temperature)


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("ids", "excluded"), {}),
        ((), {"normalize": False}),
        (("curated",), {"hardness_mode": "hard_negatives", "hardness_strength": 2.0}),
    ],
    ids=["known", "dots", "hardness"],
)
def test_prefixes_with_options(names, options, never_general):
    q, p, _, relations = problem(*names)
    check(q, p, None, relations, replace(PLAIN, matryoshka_dims=(5, 24), **options), 0.2)


def test_a_zero_prefix_has_no_gradient(never_general):
    q, p, labels = draw(9, 12, 16, torch.float32, False)
    q[2, :4], p[3] = 0, 0
    result = run(
        q, p, None, Relations(labels), replace(PLAIN, matryoshka_dims=(4, 16)), torch.ones(9), 20.0
    )
    assert not result.dp_ND[3].any() and all(x.isfinite().all() for x in result[3:5])


def test_threads_change_no_bit(never_general):
    q, p, labels = draw(138, 4000, 32, torch.float32, False)
    settings = replace(PLAIN, matryoshka_dims=(16, 32))
    dots, before, along = torch.randn(2, 138, 4000), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            blocks, rows = dots.clone(), torch.empty(4, 2, 138)
            ones = torch.ones(138)
            levels = [
                native.rows(
                    block, None, labels, None, None, None, None, ones, *rows[:, level], 0, 1.0
                )
                for level, block in enumerate(blocks)
            ]
            along.append(torch.cat([native.info_nce_prefixes(levels, q), *blocks]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*along)
    assert takes_prefixes(
        InfoNCEProblem(q, p, None, torch.tensor(1.0), Relations(labels), settings)
    )


def test_what_prefixes_cannot_is_left_to_the_general_form():
    q, p, own, relations = problem("own", "positives")

    def takes(of, **options):
        settings = replace(PLAIN, **{"matryoshka_dims": (4, 8)} | options)
        return takes_prefixes(InfoNCEProblem(q, p, own, torch.tensor(1.0), of, settings))

    labels = Relations(relations.labels_M)
    assert takes(labels)
    assert not takes(relations)
    for options in (
        {"matryoshka_dims": None}, {"directions": (QP, PQ)}, {"label_smoothing": 0.1},
        {"false_negative_margin": 0.1},
    ):  # fmt: skip
        assert not takes(labels, **options), options
