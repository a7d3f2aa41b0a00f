"""Both ways through the CPU kernels."""

import pytest

from rankpo_kernels.chunked import native


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    """What takes this holds with the native library and without it."""
    if request.param == "torch":
        monkeypatch.setattr(native, "usable", lambda *tensors: False)
    elif native.library() is None:
        pytest.fail("the native library is not built: see the output of pip install")
