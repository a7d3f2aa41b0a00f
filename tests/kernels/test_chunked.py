"""InfoNCE on chunks, every option: losses and gradients are those of the dense definition."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rankpo_fast.ops.info_nce import info_nce_definition
from rankpo_kernels.chunked import chunks, info_nce_general, native
from rankpo_kernels.chunked import info_nce as chunked
from rankpo_kernels.objective import limits
from rankpo_kernels.problem import HARDNESS_MODES, PQ, QP, InfoNCEProblem, InfoNCESettings
from rankpo_kernels.relations import Relations
from support.gates import error, gates, longest_product
from support.info_nce_problems import (
    EVERYTHING,
    GRID,
    M,
    N,
    NoMatrix,
    exact,
    label_and_hardest,
    problem,
)

SCALE = 20.0
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_"}
PLAIN = InfoNCESettings(normalize=True, workspace_bytes=8 * 5 * N * 3)  # a few rows of a chunk


def compare(q, p, own, relations, settings, dtype=torch.float64, scale=SCALE):
    """Largest errors (of the loss, of the gradients) against autograd through the definition."""
    weights = torch.linspace(0.5, 2, len(q), dtype=torch.float64)
    q, p, own = (x if x is None else x.to(dtype) for x in (q, p, own))
    loss_M, truth = exact(q, p, own, relations, settings, weights, scale=scale)
    result = chunked.info_nce(
        InfoNCEProblem(q, p, own, torch.tensor(scale, dtype=torch.float64), relations, settings),
        weights, (True,) * 4,
    )  # fmt: skip
    grads = [x for x in result[3:7] if x is not None]
    forward = chunked.info_nce(InfoNCEProblem(q, p, own, torch.tensor(scale), relations, settings))
    assert forward[3:] == (None,) * 5
    of_loss = max(error(x.loss_M, loss_M) for x in (forward, result))
    return of_loss, max(map(error, grads, truth))


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "usable", lambda *tensors: False)


@pytest.mark.parametrize("workspace", [PLAIN.workspace_bytes, 2**24], ids=["chunks", "kept"])
@pytest.mark.parametrize("name", GRID)
def test_options_in_fp64(name, workspace):
    names, options = GRID[name]
    settings = replace(PLAIN, **options, workspace_bytes=workspace)
    loss, grads = compare(*problem(*names), settings)
    assert loss < 1e-12 and grads < 1e-12


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op.overloadpacket._qualified_op_name in PRODUCTS
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kept_bytes", "rows", "grads", "products"),
    [
        (256 * 192 * 4, 256, True, 3),
        (256 * 192 * 4, 255, True, 3),
        (256 * 192 * 4 - 1, 256, True, 4),
        (256 * 192 * 4, 256, False, 1),
    ],
    ids=["kept", "more-rows-than-a-chunk", "too-large", "loss-alone"],
)
def test_both_directions_make_small_scores_once(monkeypatch, kept_bytes, rows, grads, products):
    monkeypatch.setattr(info_nce_general, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(chunks, "CPU_ROWS", rows)
    q, p, relations = torch.randn(256, 8), torch.randn(192, 8), Relations(torch.arange(256) % 192)
    settings = replace(PLAIN, workspace_bytes=2**24, directions=(QP, PQ), label_smoothing=0.1)
    with Products() as made:
        weights = torch.ones(256) if grads else None
        case = InfoNCEProblem(q, p, None, torch.tensor(9.0), relations, settings)
        chunked.info_nce(case, weights, (grads,) * 4)
    assert made.count == products


@pytest.mark.parametrize("name", GRID)
def test_options_in_fp32(name, path):
    names, options = GRID[name]
    loss, grads = compare(*problem(*names), replace(PLAIN, **options), torch.float32)
    loss_gate, grad_gate = gates(torch.float32, 1 / SCALE)
    assert loss < loss_gate and grads < grad_gate


@pytest.mark.parametrize("hardness", ["", *HARDNESS_MODES])
@pytest.mark.parametrize("names", [["ids"], ["ids", "own", "positives"]], ids=["plain", "own"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_similarities_of_the_label_and_of_the_hardest_negative_are_told(names, hardness, dtype):
    case, settings = problem(*names, "curated", dtype=dtype), PLAIN
    if hardness:
        settings = replace(PLAIN, hardness_mode=hardness, hardness_strength=9.0)
    result = chunked.info_nce(InfoNCEProblem(*case[:3], torch.tensor(SCALE), case[3], settings))
    of_label_M, hardest_M = label_and_hardest(*case)
    bound = gates(dtype, 1.0)[0]  # a cosine is a logit of scale 1
    assert error(result.hardest_M, hardest_M) < bound
    assert error(result.positive_M, of_label_M) < bound


@pytest.mark.parametrize(
    "name", [name for name, (_, options) in GRID.items() if "false_negative_margin" in options]
)
def test_no_similarity_is_so_near_a_threshold_that_rounding_decides(name):
    names, options = GRID[name]
    q, p, _, relations = problem(*names)
    judge, settings = (q, p), replace(PLAIN, **options)
    if relations.guide_queries is not None:
        judge, settings = (
            (relations.guide_queries, relations.guide_passages),
            PLAIN,
        )
    for prefix, _ in settings.levels(judge[0].shape[1]):
        a, b = (x[:, :prefix] for x in judge)
        if options.get("normalize", True):
            a, b = (torch.nn.functional.normalize(x) for x in (a, b))
        positive_M = (a * b[relations.labels_M]).sum(1)
        limit_M1 = limits(positive_M, replace(PLAIN, **options))[:, None]
        for sims in (a @ b.T, a @ a.T, (b @ b.T)[relations.labels_M]):
            assert (sims - limit_M1).abs().min() > 1e-5


@pytest.mark.parametrize("name", ["ids", "not-cosine", "own", "dims", "symmetric"])
def test_only_what_is_needed_is_given(name, path):
    names, options = GRID[name]
    q, p, own, relations = problem(*names)
    q, p, own = (x if x is None else x.float() for x in (q, p, own))
    settings, scale = replace(PLAIN, **options), torch.tensor(SCALE)
    _, (dq, dp, *d_own, d_scale) = exact(q, p, own, relations, settings, torch.ones(M), scale=SCALE)
    truth = dq, dp, *(d_own or [None]), d_scale
    largest = 1.0 if settings.normalize else longest_product(q, p)
    gate = gates(torch.float32, 1 / (SCALE * largest))[1]
    for place in range(4):
        needs = tuple(i == place for i in range(4))
        some = chunked.info_nce(
            InfoNCEProblem(q, p, own, scale, relations, settings), torch.ones(M), needs
        )
        for i, (got, want) in enumerate(zip(some[3:7], truth, strict=True)):
            assert (got is None) if i != place or want is None else error(got, want) < gate


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["ids", "everything-joint"])
def test_low_precision_has_fp32_scores(name, dtype, path):
    names, options = GRID[name]
    q, p, own, relations = problem(*names)
    q, p, own = (x if x is None else x.to(dtype).double() for x in (q, p, own))
    loss, grads = compare(q, p, own, relations, replace(PLAIN, **options), dtype)
    loss_gate, grad_gate = gates(dtype, 1 / SCALE)
    assert loss < loss_gate and grads < grad_gate


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("sizes", "ids"),
    [
        pytest.param((0, 3, 0), None, id="no-queries"),
        pytest.param((0, 0, 0), None, id="nothing"),
        pytest.param((1, 1, 0), None, id="one-pair"),
        pytest.param((3, 5, 0), 7, id="all-masked"),
        pytest.param((3, 5, 2), 7, id="all-masked-but-own"),
    ],
)
def test_edges(sizes, ids, dtype, options, path):
    queries, passages, H = sizes
    q, p, own = (torch.randn(n, 4, dtype=dtype) for n in sizes)
    empty = torch.zeros(queries + 1, dtype=torch.int64)
    of_last = empty.clone()
    of_last[-1] = H
    relations = Relations(
        torch.arange(queries), empty, empty[:0],
        query_ids_M=None if ids is None else empty[:-1] + ids,
        passage_ids_N=None if ids is None else torch.full((passages,), ids),
        excluded_offsets=empty, excluded_columns=empty[:0],
    )  # fmt: skip
    if options or H:
        relations = relations._replace(own_offsets=of_last)
    else:
        own, relations = None, relations._replace(positive_offsets=None, positive_columns=None)
    settings = replace(PLAIN, **options)
    case = InfoNCEProblem(q, p, own, torch.tensor(SCALE), relations, settings)
    result = chunked.info_nce(case, torch.ones(queries), (True,) * 4)
    assert result.dq_MD.shape == q.shape and result.dp_ND.shape == p.shape
    others = result.loss_M[:-1] if H else result.loss_M
    extra = math.log(2) * 3 if options.get("directions") else 0.0  # the positive is listed twice
    torch.testing.assert_close(others, torch.full_like(others, extra))
    if not H:
        assert not result.dq_MD.any() and not result.dp_ND.any() and result.d_scale == 0
        assert (result.hardest_M == -torch.inf).all()
    else:
        assert result.hardest_M[-1].isfinite() and result.d_own_HD.any()


@pytest.mark.parametrize("name", ["ids", "everything-one-way", "everything-joint"])
def test_a_zero_vector_has_gradient_zero(name, path):
    names, options = GRID[name]
    q, p, own, relations = problem(*names)
    q[1], p[2], p[relations.labels_M[3]] = 0, 0, 0
    q, p, own = (x if x is None else x.float() for x in (q, p, own))
    if own is not None:
        own[3] = 0
    result = chunked.info_nce(
        InfoNCEProblem(q, p, own, torch.tensor(SCALE), relations, replace(PLAIN, **options)),
        torch.ones(M), (True,) * 4,
    )  # fmt: skip
    assert all(x is None or x.isfinite().all() for x in result[3:]) and result[0].isfinite().all()
    assert not result.dq_MD[1].any() and not result.dp_ND[2].any()
    assert own is None or not result.d_own_HD[3].any()


@pytest.mark.parametrize("name", ["margin", "everything-one-way"])
def test_nan_in_one_query_stays_in_its_row(name, path):
    names, options = GRID[name]
    q, p, own, relations = problem(*names)
    q, p, own = (x if x is None else x.float() for x in (q, p, own))
    rest = (p, own, torch.tensor(SCALE), relations, replace(PLAIN, **options))
    clean = chunked.info_nce(InfoNCEProblem(q, *rest)).loss_M
    q[2, 3] = torch.nan
    loss_M = chunked.info_nce(InfoNCEProblem(q, *rest)).loss_M
    assert loss_M[2].isnan()
    assert torch.equal(loss_M[torch.arange(M) != 2], clean[torch.arange(M) != 2])


def test_workspace_of_less_than_a_row_is_refused():
    with pytest.raises(ValueError, match="too small for one row"):
        q, p, own, relations = problem("ids")
        settings = replace(PLAIN, workspace_bytes=99)
        chunked.info_nce(InfoNCEProblem(q, p, own, torch.tensor(1.0), relations, settings))


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("excluded", "ids", "curated"), {"false_negative_margin": 0.3}),
        (
            ("excluded", "ids", "curated", "guide"),
            {"false_negative_margin": 0.3, "gradient_filter": 0.1},
        ),
        (("excluded", "ids", "curated", "own", "positives"), EVERYTHING),
    ],
    ids=["fused", "guide-and-filter", "general"],
)
def test_score_matrix_is_never_stored(names, options, path, monkeypatch):
    monkeypatch.setitem(chunks.SLAB, "cpu", 4096)
    size, H, rows = 512, 1024, 32
    q, p, own = (torch.randn(n, 4) for n in (size, size, H))
    offsets, each = torch.arange(size + 1), torch.arange(size)
    lists = {"own_offsets": 2 * offsets} if "own" in names else {}
    for name in ("positive", "excluded"):
        if name in " ".join(names):
            lists |= {f"{name}_offsets": offsets, f"{name}_columns": each.flip(0)}
    if "guide" in names:
        lists |= {"guide_queries": q[:, :2], "guide_passages": p[:, :2]}
    relations = Relations(each, query_ids_M=each, passage_ids_N=each // 2, curated_N=each, **lists)
    settings = replace(PLAIN, workspace_bytes=rows * size * 4, **options)
    own = own if "own" in names else None
    with NoMatrix() as mode:
        case = InfoNCEProblem(q, p, own, torch.tensor(9.0), relations, settings)
        chunked.info_nce(case, torch.ones(size), (True,) * 4)
    assert mode.largest <= rows * size
    with NoMatrix() as mode:
        info_nce_definition(q, p, 9.0, Relations(each), PLAIN)
    assert mode.largest >= size * size
