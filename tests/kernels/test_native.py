"""The native library and its face: found, of the right version, and missed once, loudly."""

import math
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

import rankpo_kernels
from rankpo_kernels.chunked import native, norms


@pytest.fixture
def fresh_search(monkeypatch):
    """Let `library()` search again in this test, and forget what it found there."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_library_is_built_and_uses_the_machine():
    assert native.library() is not None
    name = native.library().rankpo_instruction_set().decode()
    assert name in ("baseline", "avx2", "avx512")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512bw" in flags and "RANKPO_INSTRUCTION_SET" not in os.environ:
        assert name == "avx512"


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same(name):
    """In a process of its own: the set is chosen once."""
    script = """
        import torch
        from rankpo_kernels.chunked import native, norms, rankpo
        from rankpo_kernels.problem import RankPOProblem, RankPOSettings
        print(native.library().rankpo_instruction_set().decode())
        q, c, r = torch.randn(3, 9, 700, generator=torch.Generator().manual_seed(0))
        for dtype, close in ((torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-6)):
            tensors = [x.to(dtype) for x in (q, c, r)]
            rest, how = (None, None, RankPOSettings(temperature=0.5)), (torch.ones(9), [True] * 3)
            ours = rankpo.rankpo(RankPOProblem(tensors[0], tensors[1:], *rest), *how)
            wide = [x.double() for x in tensors]
            exact = rankpo.rankpo(RankPOProblem(wide[0], wide[1:], *rest), *how)
            for got, want in zip((*ours[:2], *ours.grads), (*exact[:2], *exact.grads)):
                assert (got - want).norm() < close * want.norm(), (dtype, got, want)
        wide = torch.randn(16, 16384).bfloat16().float()
        got = norms.inverse_norms(wide, torch.float32)
        off = (got.double() * wide.double().norm(dim=1) - 1).abs().max()
        assert off < 4 * 2**-24, off
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "RANKPO_INSTRUCTION_SET": name}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != name:
        pytest.skip(f"this machine has no {name}")


def test_without_the_library_torch_takes_over_and_says_so_once(fresh_search, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    x = torch.randn(4, 8)
    with pytest.warns(UserWarning, match="not built"):
        norms.inverse_norms(x, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = norms.inverse_norms(x, torch.float32)
    torch.testing.assert_close(got, 1 / x.norm(dim=1))


def test_library_of_another_version_is_not_used(fresh_search, monkeypatch):
    monkeypatch.setattr(native, "ABI_VERSION", -1)
    with pytest.warns(UserWarning, match="ABI version"):
        assert native.library() is None


def test_nothing_is_importable_as_kernels():
    root = Path(rankpo_kernels.__file__).parent.parent
    assert root.name == "kernels" and not (root / "__init__.py").exists()


@pytest.mark.parametrize("usable", [True, False], ids=["native", "torch"])
def test_inverse_norms_over_the_whole_range_of_fp32(usable, monkeypatch):
    if not usable:
        monkeypatch.setattr(native, "usable", lambda *tensors: False)
    sizes = torch.tensor([1.0, 1e30, 1e-30, 3e37, 1e-37, 0.0, math.nan])
    x = sizes[:, None] * torch.tensor([[0.6, 0.0, -0.8]])
    got = norms.inverse_norms(x, torch.float32)
    want = torch.where(sizes == 0, 0, 1 / sizes.double()).float()
    torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize("usable", [True, False], ids=["native", "torch"])
def test_norms_of_long_rows_are_rounded_as_those_of_short_ones(usable, monkeypatch):
    """Four roundings: of a square, its sums, the root and the quotient. In one running sum those of
    bf16's squares do not cancel, and make 36 of D=16384."""
    if not usable:
        monkeypatch.setattr(native, "usable", lambda *tensors: False)
    for D in (24, 1000, 16384):
        x = torch.randn(256, D).bfloat16().float()
        off = norms.inverse_norms(x, torch.float32).double() * x.double().norm(dim=1) - 1
        assert off.abs().max() < 4 * 2**-24, D


@pytest.mark.parametrize("usable", [True, False], ids=["native", "torch"])
def test_tangent_is_across_the_unit_vector(usable, monkeypatch):
    if not usable:
        monkeypatch.setattr(native, "usable", lambda *tensors: False)
    x, grad = torch.randn(2, 5000, 7, dtype=torch.float32)
    inverse = norms.inverse_norms(x, torch.float32)
    unit = x * inverse[:, None]
    want = (grad - (grad * unit).sum(1, keepdim=True) * unit) * inverse[:, None]
    norms.tangent_(grad, x, inverse, inverse)
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)
    assert ((grad * unit).sum(1) * x.norm(dim=1)).abs().max() < 1e-4


def test_threads_do_not_change_a_bit_of_the_row_pass():
    rows, columns = 901, 2200  # enough work for three threads, and not the same for each
    scores = torch.randn(rows, columns)
    labels = torch.randint(columns, (rows,))
    limit = torch.full((rows,), 2.5)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        grads, outputs = scores.clone(), [torch.empty(rows) for _ in range(4)]
        native.info_nce_rows(
            grads, None, labels, None, limit, None, None, torch.ones(rows), *outputs, 0, 20.0
        )
        results.append([grads, *outputs])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
