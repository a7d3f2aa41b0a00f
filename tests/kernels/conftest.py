import pytest
import torch


@pytest.fixture
def nothing_is_zero_by_luck():
    """Memory that nobody wrote is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
