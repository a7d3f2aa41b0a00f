"""Negatives across ranks: what each rank gets is what one process with all rows gives."""

import os
import re

import pytest
import torch

from bench.processes import answered, processes
from bench.ranks import count
from rankpo_fast import (
    InBatchRankPOLoss,
    SigLIPLoss,
    in_batch_rankpo_loss,
    in_batch_rankpo_loss_and_grads,
    info_nce_loss,
    info_nce_loss_and_grads,
    siglip_loss,
)
from rankpo_fast.ops.ranks import TERMS
from rankpo_kernels.problem import PQ, QP, QQ
from support import in_batch_problems
from support.gates import gates
from support.info_nce_problems import GRID
from support.rank_cases import (
    BAD,
    BAD_PAIRS,
    SCALE,
    compare,
    compare_compiled,
    compare_ddp,
    compare_halves,
    compare_pairs,
    compare_pairs_without_autograd,
    compare_without_autograd,
    err,
    err_of_pairs,
    pair_gates,
    take,
    talk_alone,
)

OF_SCALE = 2e-5  # in fp32: a difference of two sums, as in tests/support/launcher.py
OF_LOSS, OF_GRADIENTS = gates(torch.float32, 1 / SCALE)  # of InfoNCE
REDUCTIONS = ["mean", "sum", "none"]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """A function that the ranks call; `sizes` by which rows are uneven there."""
    with processes(request.param, tmp_path_factory.mktemp("ranks")) as ask:
        ask.sizes = {2: "even", 4: "uneven"}[request.param]
        yield ask


def worst(answers) -> float:
    return max(max(errors) for errors in answered(answers))


@pytest.mark.parametrize("name", GRID)
def test_every_option_equals_one_process(ranks, name):
    assert worst(ranks(compare, name, ranks.sizes, torch.float64, "mean")) < 1e-12


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["ids", "everything-joint"])
def test_every_reduction_equals_one_process_in_fp32(ranks, name, reduction):
    for errors in answered(ranks(compare, name, ranks.sizes, torch.float32, reduction)):
        loss, dq, dp, d_scale, *d_own = errors
        assert loss < OF_LOSS and max(dq, dp, *d_own) < OF_GRADIENTS and d_scale < OF_SCALE


@pytest.mark.parametrize(
    "name",
    ["plain", "ids", "symmetric", "query-to-query", "passage-to-passage", "everything-guided"],
)
def test_a_rank_without_rows_takes_part(ranks, name):
    assert worst(ranks(compare, name, "empty", torch.float64, "sum")) < 1e-12


PAIRS = ["rankpo", "everything", "everything-hinge", "siglip-everything"]


@pytest.mark.parametrize("name", in_batch_problems.GRID)
def test_every_option_of_pair_losses_equals_one_process(ranks, name):
    assert worst(ranks(compare_pairs, name, ranks.sizes, torch.float64, "mean")) < 1e-12


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", PAIRS[1:])
def test_every_reduction_of_pair_losses_in_fp32(ranks, name, reduction):
    answers = ranks(compare_pairs, name, ranks.sizes, torch.float32, reduction)
    of_loss, of_gradients = pair_gates(name, ranks.sizes, ranks.size, torch.float32)
    for loss, dq, dp, *d_numbers in answered(answers):
        assert loss < of_loss and max(dq, dp) < of_gradients
        assert max(d_numbers, default=0) < OF_SCALE


@pytest.mark.parametrize("name", PAIRS)
def test_a_rank_without_rows_takes_part_in_pair_losses(ranks, name):
    assert worst(ranks(compare_pairs, name, "empty", torch.float64, "sum")) < 1e-12


def test_pair_losses_of_bf16_under_autocast(ranks):
    more = {"autocast": True}
    answers = ranks(compare_pairs, "everything", ranks.sizes, torch.bfloat16, "mean", **more)
    of_loss, of_gradients = pair_gates("everything", ranks.sizes, ranks.size, torch.bfloat16)
    for loss, *grads in answered(answers):
        assert loss < of_loss and max(grads) < of_gradients


@pytest.mark.parametrize("name", PAIRS[:2])
def test_gradients_of_pair_losses_without_autograd_are_the_same(ranks, name):
    assert worst(ranks(compare_pairs_without_autograd, name)) < 1e-12


RINGS = ["plain", "not-cosine", "ids", "excluded", "smoothing", "dims", "one-short-prefix"]


@pytest.mark.parametrize("name", RINGS)
def test_a_ring_gives_the_same(ranks, name):
    sizes = {2: "uneven", 4: "empty"}[ranks.size]
    assert worst(ranks(compare, name, sizes, torch.float64, "mean", exchange="ring")) < 1e-12


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_ring_gives_the_same_in_fp32(ranks, reduction):
    answers = ranks(compare, "ids", ranks.sizes, torch.float32, reduction, exchange="ring")
    for loss, dq, dp, d_scale in answered(answers):
        assert loss < OF_LOSS and max(dq, dp) < OF_GRADIENTS and d_scale < OF_SCALE


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_bf16_under_autocast(ranks, exchange):
    answers = ranks(
        compare, "ids", ranks.sizes, torch.bfloat16, "mean", autocast=True, exchange=exchange
    )
    of_gradients = gates(torch.bfloat16, 1 / SCALE)[1]
    for loss, *grads in answered(answers):
        assert loss < OF_LOSS and max(grads) < of_gradients


@pytest.mark.parametrize(
    ("name", "exchange"),
    [("ids", "gather"), ("everything-joint", "gather"), ("ids", "ring")],
)
def test_gradients_without_autograd_are_the_same(ranks, name, exchange):
    assert worst(ranks(compare_without_autograd, name, exchange)) < 1e-12


def test_one_rank_may_have_all_queries(ranks):
    """Whose gradients the others still have to send."""
    assert worst(ranks(compare_without_autograd, "everything-joint", "gather", "one")) < 1e-12


@pytest.mark.parametrize(
    "options", [{"directions": (QP, QQ)}, {"directions": (QP, PQ)}, {"exchange": "ring"}], ids=str
)
def test_ddp_of_an_encoder_equals_one_process(ranks, options):
    assert worst(ranks(compare_ddp, **options)) < 1e-12


@pytest.mark.parametrize("loss", [InBatchRankPOLoss, SigLIPLoss], ids=["rankpo", "siglip"])
def test_ddp_of_pair_losses_equals_one_process(ranks, loss):
    """SigLIP's scale and bias are parameters, too."""
    assert worst(ranks(compare_ddp, loss)) < 1e-12


@pytest.mark.parametrize("name", ["symmetric", "both-ways"])
def test_triton_sums_columns_over_ranks(ranks, name):
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("gloo tests are on the CPU, where Triton needs its interpreter")
    answers = ranks(compare, name, "empty", torch.float32, "mean", backend="triton")
    for loss, dq, dp, d_scale in answered(answers):
        assert loss < OF_LOSS and max(dq, dp) < OF_GRADIENTS and d_scale < OF_SCALE


@pytest.mark.parametrize("name", ["everything", "siglip-everything"])
def test_triton_takes_the_pairs_of_all_ranks(ranks, name):
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("gloo tests are on the CPU, where Triton needs its interpreter")
    answers = ranks(compare_pairs, name, "empty", torch.float32, "mean", backend="triton")
    of_loss, of_gradients = pair_gates(name, "empty", ranks.size, torch.float32)
    for loss, dq, dp, *d_numbers in answered(answers):
        assert loss < of_loss and max(dq, dp) < of_gradients
        assert max(d_numbers, default=0) < OF_SCALE


def test_a_rank_alone_talks_to_nobody(ranks):
    for error, messages in answered(ranks(talk_alone)):
        assert error < 1e-12 and messages == 0


@pytest.mark.parametrize("options", [{}, {"exchange": "ring"}], ids=str)
def test_groups_of_some_ranks_do_not_meet(ranks, options):
    name = "ids" if options else "everything-joint"
    assert worst(ranks(compare_halves, name, **options)) < 1e-12


def test_the_filter_keeps_small_gradients_small(ranks):
    answers = ranks(compare, "plain", "uneven", torch.float32, "mean", gradient_filter=1e-7)
    for loss, dq, dp, _ in answered(answers):
        assert loss < OF_LOSS and max(dq, dp) < OF_GRADIENTS + 1e-7


@pytest.mark.long
def test_compiles_around_the_collectives(ranks):
    if ranks.size > 2:
        pytest.skip("seconds for each process")
    assert worst(ranks(compare_compiled, directions=(QP, PQ, QQ))) < 1e-6
    assert worst(ranks(compare_compiled, exchange="ring")) < 1e-6
    assert worst(ranks(compare_compiled, in_batch_rankpo_loss)) < 1e-6


@pytest.mark.parametrize("name", BAD)
def test_what_one_rank_does_wrong_is_an_error_on_all(ranks, name):
    answers = ranks(err, name)
    for rank, answer in enumerate(answers):
        assert isinstance(answer, Exception) and re.search(BAD[name][1], str(answer)), answer
        assert isinstance(answer, ValueError) or rank == 1
    if "refused" in BAD[name][1]:
        assert "refused" not in str(answers[1]) and "refused" in str(answers[0])


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_what_one_rank_does_wrong_to_pair_losses_is_an_error_on_all(ranks, name):
    for answer in ranks(err_of_pairs, name):
        assert isinstance(answer, ValueError) and re.search(BAD_PAIRS[name][1], str(answer)), answer


@pytest.mark.parametrize("loss", [info_nce_loss_and_grads, in_batch_rankpo_loss_and_grads])
def test_gradients_of_no_one_loss_on_one_rank_are_an_error_on_all(ranks, loss):
    for answer in ranks(err, "reduction", loss):
        assert isinstance(answer, ValueError) and re.search(BAD["reduction"][1], str(answer))


REFUSED = {
    "directions": dict(directions=(QP, PQ)),
    "positives": dict(positives=(torch.tensor([0, 1, 1, 1]), torch.tensor([1]))),
    "own": dict(own_negatives=torch.ones(3, 1, 4)),
    "margin": dict(false_negative_margin=0.1),
    "filter": dict(gradient_filter=1e-3),
    "hardness": dict(hardness_mode="all_negatives", hardness_strength=9.0),
    "backend": dict(backend="triton"),
    "precision": dict(precision="tf32x3", backend="triton"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_ring_cannot_do_is_refused(ranks, name):
    for answer in ranks(take, exchange="ring", **REFUSED[name]):
        assert isinstance(answer, ValueError) and "exchange='ring' goes with" in str(answer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(backend="triton", directions=(QP, QQ)),
            "query_to_query across ranks is computed in torch",
        ),
        (dict(workspace_bytes=4 * 7), "too small for one row of (12|24) passages"),
        (dict(loss=siglip_loss, workspace_bytes=4 * 7), "for one row of (12|24) passages"),
    ],
    ids=["direction", "workspace", "workspace-of-pairs"],
)
def test_what_no_rank_can_do_is_refused(ranks, options, message):
    for answer in ranks(take, **options):
        assert isinstance(answer, ValueError) and re.search(message, str(answer))


def test_arguments_that_need_a_group_or_none():
    q, p = torch.ones(3, 4), torch.ones(6, 4)
    with pytest.raises(ValueError, match="exchange='ring' is given without process_group"):
        info_nce_loss(q, p, exchange="ring")
    with pytest.raises(ValueError, match="exchange must be one of 'gather', 'ring', got 'tree'"):
        info_nce_loss(q, p, exchange="tree")
    with pytest.raises(ValueError, match="process_group must be one that this rank is in, got"):
        info_nce_loss(q, p, process_group=object())


@pytest.mark.parametrize(
    ("case", "flops", "sums", "gradients"),
    [
        ("gather", 6, 0, 0),
        ("ring", 8, 0, 1),
        ("symmetric", 6, 7, 0),  # so few scores are kept
        ("in-batch RankPO", 6, 0, 0),
    ],
)
def test_bytes_and_flops_are_those_of_the_design(ranks, case, flops, sums, gradients):
    """Passages go to every other rank, and so do their gradients; in a ring both go round once
    more. An all-reduce of numbers per column (six statistics, one slope) sends each of them twice.
    """
    M, N, D, others = 16, 32, 8, ranks.size - 1
    header, of_passages = 8 * (5 + TERMS), 4 * N * D
    for forward, backward in answered(ranks(count, M, N, D, case)):
        assert forward[0] + backward[0] == flops * M * N * ranks.size * D
        assert forward[2] == others * (header + of_passages + 2 * sums * 4 * N)
        assert backward[2] == of_passages * (others + gradients * ranks.size)
