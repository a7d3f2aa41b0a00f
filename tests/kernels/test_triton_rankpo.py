"""The Triton kernel of ranked passages: pairs and groups are those of the definitions.

Without a GPU it runs in Triton's interpreter, where a program costs tens of milliseconds: tiles are
small, so that a few dims take several of them.
"""

from collections.abc import Iterator

import hypothesis
import pytest
import torch
import triton
from hypothesis import strategies as st

from rankpo_fast.ops.rankpo import margin_loss, pair_similarities_definition
from rankpo_fast.ops.rankpo_group import rankpo_group_definition
from rankpo_kernels.problem import RankPOProblem, RankPOResult, RankPOSettings
from rankpo_kernels.triton.rankpo import Tile, rankpo
from support.gates import error, gates
from support.info_nce_problems import LAYOUTS
from support.interpreter import LAST_FIRST, grid_order, shadow_memory
from support.launcher import DEVICE, Work, launches

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("interpreted")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
interpreted_alone = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="looks into the interpreter"
)
# Options as the definitions take them; what is here of groups has no sft.
RULES = {
    "plain": {},
    "smoothed": {"gamma_beta_ratio": 0.3, "label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge", "gamma_beta_ratio": -0.2},
    "sft": {"sft_weight": 0.7, "rankpo_weight": 0.4},
    "sft-alone": {"sft_weight": 0.7, "rankpo_weight": 0.0},
    "dots": {"normalize": False},
    "plackett-luce": {"form": "plackett_luce"},
}
OF_PAIRS, OF_GROUPS = list(RULES)[:-1], ["plain", "smoothed", "hinge", "dots", "plackett-luce"]
SEVERAL = {"pair": Tile(2, 16, 1), "group": Tile(4, 16, 1)}  # tiles for the dims of a row
KINDS = list(SEVERAL)


@pytest.fixture(autouse=True)
def nothing_is_zero_by_luck():
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(kind, dtype=torch.float32, B=3, K=3, D=37, seed=0):
    """queries, passages, grades, reference, weights; in a group a tie, a gap and, in the last
    query, nothing to compare."""
    generator = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    q, weights = new(B, D), torch.linspace(-0.5, 2, B)
    if kind == "pair":
        passages = [(q + new(B, D)).to(dtype) for _ in range(2)]
        return q.to(dtype), passages, None, 0.3 * new(B, 1).float(), weights
    grades = torch.randint(0, 3, (B, K), generator=generator).float()
    grades[:1, :2] = torch.tensor([torch.nan, 2.0])[:K]
    grades[-1:] = 1.0
    passages = [(q[:, None] + new(B, K, D)).to(dtype)]
    return q.to(dtype), passages, grades, 0.3 * new(B, K).float(), weights


def launch(case, rule="plain", *, temperature=1.0, needs=None, **options) -> RankPOResult:
    """Results on the CPU."""
    q, passages, grades, reference, weights = case
    of = {"temperature": temperature, "beta": 2.0, **RULES[rule]}
    listwise = of.pop("form", None) is not None
    to = lambda x: None if x is None else x.to(DEVICE)  # noqa: E731
    ranking = RankPOProblem(
        to(q), [to(x) for x in passages], to(grades), to(reference),
        RankPOSettings(**of, listwise=listwise),
    )  # fmt: skip
    needs = (True,) * (1 + len(passages)) if needs is None else needs
    loss, similarity, grads = rankpo(ranking, to(weights), needs, **options)
    return RankPOResult(loss.cpu(), similarity.cpu(), [x if x is None else x.cpu() for x in grads])


def exact(case, rule="plain", *, temperature=1.0):
    """Losses and gradients in fp64."""
    q, passages, grades, reference, weights = case
    leaves = [x.double().requires_grad_() for x in (q, *passages)]
    options = {"temperature": temperature, **RULES[rule]}
    reference = None if reference is None else reference.double()
    if grades is None:
        sims = pair_similarities_definition(*leaves, options.pop("normalize", True))
        margins = None if reference is None else reference[:, 0]
        loss_B = margin_loss(sims[0] - sims[1], reference_margins=margins, **options)
    else:
        loss_B = rankpo_group_definition(*leaves, grades, reference, **options)
    return loss_B.detach(), torch.autograd.grad((weights * loss_B).sum(), leaves)


def assert_exact(case, rule="plain", *, temperature=1.0, **options) -> RankPOResult:
    dtype = case[0].dtype
    loss_B, grads = exact(case, rule, temperature=temperature)
    result = launch(case, rule, temperature=temperature, **options)
    loss_gate, grad_gate = gates(dtype, temperature)
    assert error(result.loss_B, loss_B) < loss_gate
    grad_gate = {torch.float16: gates(torch.float32, temperature)[1]}.get(dtype, grad_gate)
    for got, want in zip(result.grads, grads, strict=True):
        assert got.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert error(got, want) < grad_gate
    return result


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("pair", rule) for rule in OF_PAIRS] + [("group", rule) for rule in OF_GROUPS],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("several", [False, True], ids=["in-registers", "read-again"])
def test_loss_and_gradients_pass_the_gates(kind, rule, dtype, several):
    case = draw(kind, dtype)
    temperature = 37.0 if rule == "dots" else 1.0
    assert_exact(case, rule, temperature=temperature, shape=SEVERAL[kind] if several else None)


@pytest.mark.parametrize(
    ("kind", "K", "D"),
    [
        pytest.param("pair", 2, 1030, id="minilm-and-more"),
        pytest.param("group", 1, 20, id="nothing-to-compare"),
        pytest.param("group", 17, 300, id="tile-of-32"),
        pytest.param("group", 64, 70, id="largest"),
    ],
)
def test_shipped_tiles(kind, K, D):
    assert_exact(draw(kind, torch.bfloat16, B=2, K=K, D=D))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.1, 0.02])
def test_low_temperatures_without_reference(kind, temperature):
    q, passages, grades, _, weights = draw(kind)
    result = assert_exact((q, passages, grades, None, weights), temperature=temperature)
    each = [x if x.dim() == 3 else x[:, None] for x in passages]
    sims = torch.cosine_similarity(q[:, None].double(), torch.cat(each, 1).double(), dim=2)
    if grades is not None:
        sims[grades.isnan()] = 0
    assert error(result.similarity_BK, sims) < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("several", [False, True], ids=["in-registers", "read-again"])
@pytest.mark.parametrize("size", [1e20, 1e-20, 1e30, 1e-30, 0.0], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_norms_neither_overflow_nor_underflow(kind, size, several):
    """Among the dims of a row, too, and with the largest ones last."""
    q, passages, grades, reference, weights = case = draw(kind)
    weights[:] = 1
    q[0] *= size
    first, last = passages[0], passages[-1]
    (first[1] if kind == "pair" else first[1, 0])[:] *= size
    if size:
        (last[1] if kind == "pair" else last[1, 2])[:20] *= 1e-25
    loss_B, grads = exact(case)
    result = launch(case, shape=SEVERAL[kind] if several else None)
    assert error(result.loss_B, loss_B) < 3e-6
    for got, want in zip(result.grads, grads, strict=True):
        rows = zip(got.view(-1, 37), want.view(-1, 37), strict=True)
        assert all(error(a, b) < 1e-5 for a, b in rows)
    if not size:
        assert not result.grads[0][0].any() and not result.grads[1][1].view(-1, 37)[0].any()


@pytest.mark.parametrize("rule", ["plain", "hinge", "plackett-luce"])
@pytest.mark.parametrize("where", ["query", "passage", "padding"])
def test_nan_stays_with_its_query(where, rule):
    q, (p,), grades, reference, weights = draw("group", B=4)
    grades[:3] = torch.tensor([2.0, 0.0, 1.0])
    grades[1, 2] = torch.nan
    case = (q, [p], grades, None, weights)
    clean = launch(case, rule)
    {"query": q, "passage": p[:, 1], "padding": p[:, 2]}[where][1, 3] = torch.nan
    result = launch(case, rule)
    told = [where != "padding" and row == 1 for row in range(4)]
    assert result.loss_B.isnan().tolist() == told
    for got, want in zip(result.grads, clean.grads, strict=True):
        assert got.isnan().flatten(1).any(1).tolist() == told
        assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])


def test_padding_has_gradient_zero():
    case = draw("group")
    result = launch(case)
    padded = case[2].isnan()
    assert padded.any() and not result.grads[1][padded].any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_asked_for_is_not_done(kind):
    case = draw(kind)
    whole = launch(case)
    q, passages, grades, reference, _ = case
    with launches() as names, Work() as work:
        forward = launch((q, passages, grades, reference, None), needs=())
    assert names == ["rankpo_kernel"] and not [op for op in work.ops if "copy" not in op]
    assert torch.equal(forward.loss_B, whole.loss_B) and not any(
        x is not None for x in forward.grads
    )
    for asked in range(len(whole.grads)):
        needs = [asked == k for k in range(len(whole.grads))]
        with launches() as names:
            some = launch(case, needs=needs)
        assert names == ["rankpo_kernel"]
        for need, got, want in zip(needs, some.grads, whole.grads, strict=True):
            assert (got is not None) == need and (not need or torch.equal(got, want))


@pytest.mark.parametrize("kind", KINDS)
def test_without_queries_nothing_is_launched(kind):
    with launches() as names:
        result = launch(draw(kind, B=0))
    assert not names and result.loss_B.shape == (0,) and result.grads[0].shape == (0, 37)


def forms() -> Iterator[RankPOResult]:
    for kind, rule in (("pair", "smoothed"), ("group", "hinge"), ("group", "plackett-luce")):
        for shape in (None, SEVERAL[kind]):
            yield launch(draw(kind, torch.bfloat16), rule, shape=shape)


@interpreted_alone
def test_no_address_lies_outside_and_no_program_races():
    with shadow_memory():
        list(forms())


@pytest.mark.long
@interpreted_alone
def test_the_order_of_programs_changes_no_bit():
    usual = list(forms())
    for seed in (LAST_FIRST, 1):
        with grid_order(seed):
            for got, want in zip(forms(), usual, strict=True):
                assert torch.equal(got.loss_B, want.loss_B)
                assert all(map(torch.equal, got.grads, want.grads))


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    kind=st.sampled_from(KINDS), B=st.integers(1, 4), K=st.integers(1, 6), D=st.integers(2, 50),
    layout=st.sampled_from(list(LAYOUTS)), several=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_stride(kind, B, K, D, layout, several, seed):
    q, passages, *rows = draw(kind, B=B, K=K, D=D, seed=seed)
    q, *passages = map(LAYOUTS[layout], (q, *passages))
    case = (q, passages, *rows)
    block_k = triton.next_power_of_2(K if kind == "group" else 2)
    loss_B, grads = exact(case)
    result = launch(case, shape=Tile(block_k, 8, 1) if several else None)
    for got, want in zip((result.loss_B, *result.grads), (loss_B, *grads), strict=True):
        assert (got.double() - want).norm() < 1e-5 * max(1.0, want.norm())
