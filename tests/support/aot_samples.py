"""Launches for `python -m bench.aot --launches support.aot_samples`: a kernel that may be shipped,
and one for each reason why not. SAMPLES of the environment names those to launch."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Launch:
    name: str
    dtype: str
    options: str
    run: Callable[[], None]
    matrix: bool
    pipeline: str | None = None
    dims: tuple[int, ...] = (384, 1024, 2048, 4096)
    everywhere: bool = True


@triton.jit
def gemm_kernel(
    a_ptr, b_ptr, c_ptr,
    K, stride_a, stride_b, stride_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c = a b', tiles that divide the sizes."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + offs_m[:, None] * stride_a + start_k + offs_k[None, :])
        b = tl.load(b_ptr + offs_n[None, :] * stride_b + start_k + offs_k[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + offs_m[:, None] * stride_c + offs_n[None, :], acc)


@triton.jit
def specialized_kernel(
    a_ptr, b_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """out [tiles of N, M] = row sums of exp2(a b'), by warps with roles that walk over tiles."""
    a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, warp_specialize=True):
        start_m, start_n = tile % tiles_m * BLOCK_M, tile // tiles_m * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start_k in range(0, K, BLOCK_K):
            acc = tl.dot(a.load([start_m, start_k]), b.load([start_n, start_k]).T, acc)
        to = out_ptr + tile // tiles_m * M + start_m + tl.arange(0, BLOCK_M)
        tl.store(to, tl.sum(tl.exp2(acc), 1))


@triton.jit
def copy_kernel(x_ptr, y_ptr, BLOCK_N: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)
    tl.store(y_ptr + offs_n, tl.load(x_ptr + offs_n))


@triton.jit
def centred_kernel(x_ptr, y_ptr, BLOCK_N: tl.constexpr):
    """Holds a whole row while its sum is not known."""
    offs_n = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + offs_n).to(tl.float32)
    tl.store(y_ptr + offs_n, x - tl.sum(x) / BLOCK_N)


@triton.jit
def broken_kernel(x_ptr, BLOCK_N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK_N), no_such_name)  # noqa: F821


def gemm(
    dtype: torch.dtype, M: int, N: int, K: int, warps: int, stages: int, stride: int = 256
) -> None:
    a, b = torch.empty(2, 256, 256, dtype=dtype)
    gemm_kernel[(1, 1)](
        a, b, torch.empty(256, 256), 256, stride, 256, 256,
        BLOCK_M=M, BLOCK_N=N, BLOCK_K=K, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def specialized() -> None:
    a, b = torch.empty(2, 512, 512, dtype=torch.bfloat16)
    specialized_kernel[(132,)](
        a, b, torch.empty(2, 512), 512, 512, 512,
        BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, PROGRAMS=132, num_warps=4, num_stages=3,
    )  # fmt: skip


def spill() -> None:
    x = torch.empty(16384, dtype=torch.bfloat16)
    centred_kernel[(1,)](x, x, BLOCK_N=16384, num_warps=1)  # 512 numbers a thread


def copy() -> None:
    x = torch.empty(256, dtype=torch.bfloat16)
    copy_kernel[(1,)](x, x, BLOCK_N=256)


def good() -> None:
    copy()
    gemm(torch.bfloat16, 64, 64, 64, warps=4, stages=3)


RUNS = {
    "good": good,
    "specialized": specialized,
    "spill": spill,
    "shared": lambda: gemm(torch.bfloat16, 128, 128, 128, warps=4, stages=5),
    "matrix": lambda: gemm(torch.bfloat16, 16, 16, 32, warps=1, stages=2),
    "narrow": lambda: gemm(torch.bfloat16, 64, 64, 64, warps=4, stages=3, stride=255),
    "no-dot": copy,
    "error": lambda: broken_kernel[(1,)](torch.empty(16), BLOCK_N=16),
}


def launches() -> Iterator[Launch]:
    for name in os.environ["SAMPLES"].split():
        pipeline = "forward" if name == "specialized" else None
        yield Launch(name, "bf16", "", RUNS[name], name not in ("spill", "error"), pipeline)
