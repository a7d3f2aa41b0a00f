"""Products of fp32 as tensor cores have them, in place of the interpreter's, which are exact.

    tl.dot(..., input_precision="tf32x3")    small B + A small + A B, from zero; then added in fp32
    A = tf32(a) to the nearest, small = a - A, of which the cores read tf32, the rest cut off

So Triton compiles it (`lib/Dialect/TritonGPU/Transforms/F32DotTC.cpp`). Inside, 8 products and the
sum before are aligned to the largest and cut off there (Fasi et al. 2021, "Numerical behavior of
NVIDIA tensor cores"; V100 cuts at the last of 24 bits, A100 one later, H100 two).
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
from triton._C.libtriton import ir
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder
DEPTH = 8  # products of tf32 in one instruction
CUT = np.uint32(0xFFFFE000)  # the bits of fp32 that tf32 has


@contextlib.contextmanager
def tensor_cores(extra_bits: int) -> Iterator[None]:
    """Around what the interpreter runs; `extra_bits`: of sums, beyond fp32's 24, before the cut."""
    plain = BUILDER.create_dot

    def create_dot(self, a, b, d, precision, *rest):
        products = {
            ir.INPUT_PRECISION.TF32: lambda x, y: [(nearest(x), nearest(y))],
            ir.INPUT_PRECISION.TF32x3: three,
        }
        if precision not in products or a.data.dtype != np.float32:
            return plain(self, a, b, d, precision, *rest)
        total = np.zeros(d.data.shape)
        for x, y in products[precision](a.data, b.data):
            for k in range(0, x.shape[1], DEPTH):
                total = instruction(total, x[:, k : k + DEPTH], y[k : k + DEPTH], extra_bits)
        return interpreter.TensorHandle(total.astype(np.float32) + d.data, d.dtype.scalar)

    with mock.patch.object(BUILDER, "create_dot", create_dot):
        yield


def nearest(x: np.ndarray) -> np.ndarray:
    """tf32, ties away from zero."""
    return ((x.view(np.uint32) + np.uint32(0x1000)) & CUT).view(np.float32)


def three(a: np.ndarray, b: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    large_a, large_b = nearest(a), nearest(b)
    small_a, small_b = (
        (x.view(np.uint32) & CUT).view(np.float32) for x in (a - large_a, b - large_b)
    )
    return [(small_a, large_b), (large_a, small_b), (large_a, large_b)]


def instruction(total: np.ndarray, a: np.ndarray, b: np.ndarray, extra_bits: int) -> np.ndarray:
    """total + a b: all aligned to the largest of them, and cut off."""
    products = a[:, :, None].astype(np.float64) * b[None].astype(np.float64)
    _, exponent = np.frexp(np.maximum(np.abs(products).max(1), np.abs(total)))
    last = np.ldexp(1.0, exponent - 24 - extra_bits)
    total = (np.trunc(products / last[:, None]).sum(1) + np.trunc(total / last)) * last
    mantissa, exponent = np.frexp(total)
    return np.ldexp(np.trunc(np.ldexp(mantissa, 24)), exponent - 24)
