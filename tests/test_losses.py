"""The modules give what the functions give."""

import pytest
import torch

from rankpo_fast import InfoNCELoss, RankPOLoss, info_nce_loss, rankpo_loss


def test_info_nce_module_equals_the_function():
    q, p = torch.randn(4, 8), torch.randn(12, 8)
    ids = torch.tensor([0, 1, 0, 2])
    want = info_nce_loss(q, p, temperature=0.05, query_ids=ids, reduction="sum")
    assert InfoNCELoss(0.05, reduction="sum")(q, p, query_ids=ids) == want


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


def test_bad_temperature_is_named_when_the_module_is_made():
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        InfoNCELoss(0)
