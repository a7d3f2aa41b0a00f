"""The modules give what the functions give."""

import pytest
import torch

from rankpo_fast import (
    InBatchRankPOLoss,
    InfoNCELoss,
    RankPOLoss,
    SigLIPLoss,
    in_batch_rankpo_loss,
    info_nce_loss,
    rankpo_loss,
    siglip_loss,
)


def test_info_nce_module_equals_the_function():
    q, p = torch.randn(4, 8), torch.randn(12, 8)
    ids = torch.tensor([0, 1, 0, 2])
    want = info_nce_loss(q, p, temperature=0.05, query_ids=ids, reduction="sum")
    assert InfoNCELoss(0.05, reduction="sum")(q, p, query_ids=ids) == want


def test_info_nce_module_hands_on_options_and_tensors_of_the_batch():
    q, p, own = torch.randn(4, 8), torch.randn(12, 8), torch.randn(4, 2, 8)
    options = {
        "directions": ("query_to_passage", "passage_to_query"), "partition": "per_direction",
        "matryoshka_dims": (8, 4), "matryoshka_weights": (1.0, 0.5), "label_smoothing": 0.1,
        "false_negative_margin": 0.2, "margin_type": "relative", "normalize": False,
    }  # fmt: skip
    batch = {
        "own_negatives": own, "positives": (torch.arange(5), torch.arange(4) * 3 + 1),
        "guide": (torch.randn(4, 3), torch.randn(12, 3)), "curated": torch.arange(12) // 3,
    }  # fmt: skip
    want = info_nce_loss(q, p, temperature=0.5, **options, **batch)
    assert InfoNCELoss(0.5, **options)(q, p, **batch) == want
    learnt = InfoNCELoss(0.5, learn_temperature=True, **options)
    torch.testing.assert_close(learnt(q, p, **batch), want)


def test_learnt_temperature_starts_at_the_given_one_and_gets_a_gradient():
    loss = InfoNCELoss(0.05, learn_temperature=True)
    q, p = torch.randn(4, 8), torch.randn(12, 8)
    value = loss(q, p)
    torch.testing.assert_close(value, info_nce_loss(q, p, temperature=0.05))
    value.backward()
    assert loss.log_scale.grad != 0


def test_rankpo_module_equals_the_function():
    q, c, r = torch.randn(3, 4, 8)
    options = {"beta": 1.5, "loss_type": "hinge", "sft_weight": 0.5}
    reference, weights = torch.randn(4), torch.rand(4)
    want = rankpo_loss(q, c, r, reference_margins=reference, weights=weights, **options)
    assert RankPOLoss(**options)(q, c, r, reference_margins=reference, weights=weights) == want


def test_in_batch_rankpo_module_equals_the_function():
    q, p, rq, rp = (torch.randn(n, 8) for n in (4, 12, 4, 12))
    options = {"beta": 1.5, "loss_type": "hinge", "sft_weight": 0.5, "reduction": "sum"}
    batch = {"reference_queries": rq, "reference_passages": rp, "weights": torch.rand(4)}
    want = in_batch_rankpo_loss(q, p, **options, **batch)
    assert InBatchRankPOLoss(**options)(q, p, **batch) == want


def test_siglip_module_learns_its_scale_and_bias_from_the_given_ones():
    q, p, ids = torch.randn(4, 8), torch.randn(12, 8), torch.tensor([0, 1, 0, 2])
    loss = SigLIPLoss(5.0, -2.0, reduction="sum")
    value = loss(q, p, query_ids=ids)
    want = siglip_loss(q, p, scale=5.0, bias=-2.0, query_ids=ids, reduction="sum")
    torch.testing.assert_close(value, want)
    value.backward()
    assert loss.log_scale.grad != 0 and loss.bias.grad != 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"directions": ("query_to_doc",)}, "directions must be distinct and of"),
        ({"label_smoothing": -0.1}, "label_smoothing must lie in"),
        ({"reduction": "median"}, "reduction must be one of"),
    ],
    ids=str,
)
def test_bad_options_are_named_when_the_module_is_made(option, message):
    with pytest.raises(ValueError, match=message):
        InfoNCELoss(**option)
    with pytest.raises(TypeError, match="query_ids"):
        InfoNCELoss(query_ids=torch.arange(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InBatchRankPOLoss(beta=0), "beta must be > 0 and finite, got 0"),
        (lambda: InBatchRankPOLoss(reduction="median"), "reduction must be one of"),
        (lambda: SigLIPLoss(0.0), "scale must be > 0 and finite, got 0.0"),
        (lambda: SigLIPLoss(backend="cuda"), "backend must be one of"),
        (lambda: RankPOLoss(beta=-1), "beta must be > 0 and finite, got -1"),
        (lambda: RankPOLoss(loss_type="x"), "loss_type must be 'sigmoid' or 'hinge', got 'x'"),
        (lambda: RankPOLoss(reduction="median"), "reduction must be 'mean', 'sum' or 'none'"),
    ],
    ids=["margin", "reduction", "scale", "backend", "pairs", "pairs-type", "pairs-reduction"],
)
def test_bad_options_of_pair_losses_are_named_when_the_module_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("module", "option"),
    [
        (SigLIPLoss, {"label_smoothing": 0.1}),
        (SigLIPLoss, {"beta": 2.0}),
        (InBatchRankPOLoss, {"matryoshka_dims": [4]}),
        (InBatchRankPOLoss, {"exchange": "ring"}),
    ],
    ids=str,
)
def test_options_of_other_losses_are_named_when_the_module_is_made(module, option):
    with pytest.raises(TypeError, match=f"_loss has no option {next(iter(option))}"):
        module(**option)


def test_bad_temperature_is_named_when_the_module_is_made():
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        InfoNCELoss(0)
