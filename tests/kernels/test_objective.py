"""The arithmetic of InfoNCE between its passes: which rows `gradient_filter` leaves out."""

import hypothesis
import torch
from hypothesis import strategies as st

from rankpo_kernels.objective import by_pull


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    pulls=st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), min_size=1, max_size=40),
    share=st.floats(2**-24, 0.99),
)
def test_rows_that_are_left_out_pull_no_more_than_their_share(pulls, share):
    """As many as may be, whose order and sizes are any."""
    pull_R = torch.tensor(pulls, dtype=torch.float64)
    rows_R, count = by_pull(torch.full_like(pull_R, torch.inf), -pull_R, share)
    assert torch.equal(rows_R.sort().values, torch.arange(len(pulls)))
    kept, out = pull_R[rows_R[:count]], pull_R[rows_R[count:]]
    budget = share * pull_R.sum()
    assert out.sum() <= budget * (1 + 1e-12)
    if len(kept):  # the least of which would be too much
        assert out.sum() + kept.min() >= budget * (1 - 2**-30)
        assert not (out > kept.min()).any()


def test_a_row_of_nan_is_not_left_out():
    loss_R = torch.tensor([1.0, torch.nan, 1e-9, torch.inf])
    _, count = by_pull(loss_R, 1.0, 0.9)
    assert count == 4
    rows_R, count = by_pull(loss_R.nan_to_num(0.0), 1.0, 0.9)
    assert rows_R[0] == 3 and count == 1
