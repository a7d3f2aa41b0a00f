"""The harness proves itself: each fault that it is there to find, in a kernel of a few lines."""

import pytest
import torch
import triton
import triton.language as tl

from support.interpreter import LAST_FIRST, OutOfBounds, Race, grid_order, shadow_memory

pytestmark = [
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled here"),
    pytest.mark.usefixtures("interpreted"),
]


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n < n) if MASKED else (offs_n >= 0)
    x = tl.load(x_ptr + offs_n, mask=mask_n)
    tl.store(y_ptr + offs_n, x, mask=offs_n < n)


@triton.jit
def add_kernel(x_ptr, y_ptr, ATOMIC: tl.constexpr):
    """Every program adds its x to y[0]."""
    x = tl.load(x_ptr + tl.program_id(0))
    if ATOMIC:
        tl.atomic_add(y_ptr, x)
    else:
        tl.store(y_ptr, tl.load(y_ptr) + x)


@triton.jit
def claim_kernel(y_ptr):
    """The program that comes last leaves its number."""
    tl.store(y_ptr, tl.program_id(0))


@triton.jit
def late_kernel(x_ptr, WRITER: tl.constexpr):
    """Programs 0 and 1 read what the writer overwrites."""
    i = tl.program_id(0)
    x = tl.load(x_ptr, mask=i < 2, other=0.0)
    tl.store(x_ptr, x, mask=i == WRITER)


@triton.jit
def mixed_kernel(y_ptr, PLAIN: tl.constexpr):
    """One program stores what the others add to."""
    if tl.program_id(0) == PLAIN:
        tl.store(y_ptr, 1.0)
    else:
        tl.atomic_add(y_ptr, 1.0)


@triton.jit
def halves_kernel(y_ptr, BLOCK_N: tl.constexpr):
    """Lanes 2i and 2i + 1 store to one place."""
    offs_n = tl.arange(0, BLOCK_N)
    tl.store(y_ptr + offs_n // 2, offs_n.to(tl.float32))


@triton.jit
def rows_kernel(x_ptr, y_ptr, stride_x, BLOCK_N: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)
    tl.store(y_ptr + offs_n, tl.load(x_ptr + offs_n * stride_x))


@triton.jit
def inner_load(x_ptr):
    return tl.load(x_ptr + 1000)


@triton.jit
def outer_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, inner_load(x_ptr))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tile = offs[:, None] * BLOCK + offs[None, :]
    c = tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile))
    tl.store(c_ptr + tile, c)


@triton.jit
def cast_kernel(x_ptr, y_ptr, VIA: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + offs_n).to(VIA)
    tl.store(y_ptr + offs_n, x.to(y_ptr.dtype.element_ty))


@triton.jit
def positive_kernel(x_ptr, y_ptr, BLOCK_N: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)
    is_positive = tl.load(x_ptr + offs_n) > 0
    tl.store(y_ptr + offs_n, is_positive.to(tl.int32))


@triton.jit
def bf16_sum_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr) + tl.load(x_ptr + 1))


def test_comparisons_are_stored_in_whole_integers():
    """A comparison's data are bytes, of which a store of int32 would write one of four."""
    x, y = torch.tensor([1, -2, 3, -4], dtype=torch.int32), torch.full((4,), -1, dtype=torch.int32)
    positive_kernel[(1,)](x, y, BLOCK_N=4)
    assert y.tolist() == [1, 0, 1, 0]


def test_clean_kernel_passes():
    x, y = torch.randn(100), torch.empty(100)
    with shadow_memory(x, y):
        copy_kernel[(4,)](x, y, 100, MASKED=True, BLOCK_N=32)
    assert torch.equal(x, y)


def test_load_past_the_end_is_caught_where_values_show_nothing():
    x, y = torch.randn(100), torch.empty(100)
    with shadow_memory(x, y), pytest.raises(OutOfBounds, match=r"28 of them.*program \(3, 0, 0\)"):
        copy_kernel[(4,)](x, y, 100, MASKED=False, BLOCK_N=32)
    copy_kernel[(4,)](x, y, 100, MASKED=False, BLOCK_N=32)
    assert torch.equal(x, y)


def test_tensors_are_the_arguments_of_the_launch_if_none_are_named():
    x, y = torch.randn(100), torch.empty(100)
    with shadow_memory():
        copy_kernel[(4,)](x, y_ptr=y, n=100, MASKED=True, BLOCK_N=32)
        with pytest.raises(OutOfBounds):
            copy_kernel[(1,)](x[:20], y, 100, MASKED=True, BLOCK_N=32)


def test_access_that_is_wider_than_the_elements_is_followed_to_its_end():
    x = torch.zeros(9, dtype=torch.float16)
    pairs, half = x[:8].view(torch.float32), torch.empty(4)
    with shadow_memory(x, half):
        copy_kernel[(1,)](pairs, half, 4, MASKED=True, BLOCK_N=4)
    with shadow_memory(x[:7], half), pytest.raises(OutOfBounds, match="of 4 elements, 1 of them"):
        copy_kernel[(1,)](pairs, half, 4, MASKED=True, BLOCK_N=4)
    with shadow_memory(x, half), pytest.raises(OutOfBounds, match="of 8 elements"):
        copy_kernel[(1,)](pairs, half, 8, MASKED=True, BLOCK_N=8)


def test_part_of_an_element_is_outside():
    x, y = torch.zeros(4), torch.empty(4, dtype=torch.int8)
    with shadow_memory(x, y), pytest.raises(OutOfBounds, match="4 of them"):
        copy_kernel[(1,)](x.view(torch.int8), y, 4, MASKED=True, BLOCK_N=4)


def test_tensor_that_is_not_named_is_outside():
    x, y = torch.randn(100), torch.empty(100)
    with shadow_memory(x), pytest.raises(OutOfBounds, match="store at an address of no tensor"):
        copy_kernel[(1,)](x, y, 100, MASKED=True, BLOCK_N=32)


def test_gaps_of_a_view_are_outside():
    x, y = torch.randn(16, 3), torch.empty(16)
    with shadow_memory(x[:, 1], y):
        rows_kernel[(1,)](x[:, 1], y, 3, BLOCK_N=16)
        with pytest.raises(OutOfBounds, match="10 of them"):
            rows_kernel[(1,)](x[:, 1], y, 1, BLOCK_N=16)
    assert torch.equal(x[:, 1], y)


def test_fault_inside_a_called_function_is_caught():
    with shadow_memory(), pytest.raises(OutOfBounds):
        outer_kernel[(1,)](torch.zeros(4), torch.zeros(1))


def test_read_and_write_of_one_address_by_two_programs_is_caught():
    x, y = torch.ones(8), torch.zeros(1)
    message = r"load of what another .* program \(1, 0, 0\) of add_kernel"
    with shadow_memory(x, y), pytest.raises(Race, match=message):
        add_kernel[(8,)](x, y, ATOMIC=False)


@pytest.mark.parametrize("writer", [1, 2], ids=["by-the-last-reader", "by-another"])
def test_write_after_reads_of_many_programs_is_caught(writer):
    with shadow_memory(), pytest.raises(Race, match="store of what another"):
        late_kernel[(3,)](torch.zeros(1), WRITER=writer)


@pytest.mark.parametrize("plain", [0, 2], ids=["store-first", "store-last"])
def test_store_among_atomics_is_caught(plain):
    with shadow_memory(), pytest.raises(Race, match="of what another"):
        mixed_kernel[(3,)](torch.zeros(1), PLAIN=plain)


def test_atomics_among_themselves_are_no_race():
    x, y = torch.ones(8), torch.zeros(1)
    with shadow_memory(x, y):
        add_kernel[(8,)](x, y, ATOMIC=True)
    assert y.item() == 8


def test_launches_follow_one_another_and_do_not_race():
    x, y, z = torch.randn(64), torch.empty(64), torch.empty(64)
    with shadow_memory(x, y, z):
        copy_kernel[(2,)](x, y, 64, MASKED=True, BLOCK_N=32)
        copy_kernel[(4,)](y, z, 64, MASKED=True, BLOCK_N=16)
    assert torch.equal(x, z)


def test_two_lanes_of_one_store_are_caught():
    y = torch.empty(16)
    with shadow_memory(y), pytest.raises(Race, match="lanes .* 16 times"):
        halves_kernel[(1,)](y, BLOCK_N=32)


@pytest.mark.parametrize("seed", [LAST_FIRST, 0, 1, 2])
def test_order_of_programs_shows_in_a_result_that_depends_on_it(seed):
    usual, y = torch.zeros(2, 1, dtype=torch.int32)
    claim_kernel[(2,)](usual)
    with grid_order(seed):
        claim_kernel[(2,)](y)
    assert usual.item() == 1 and y.item() == 0


def test_order_of_programs_covers_the_grid():
    x, y = torch.ones(12), torch.zeros(1)
    with grid_order(0), shadow_memory():
        add_kernel[(12,)](x, y, ATOMIC=True)
        copied = torch.empty(96)
        copy_kernel[(3,)](torch.arange(96.0), copied, 96, MASKED=True, BLOCK_N=32)
    assert y.item() == 12
    assert torch.equal(copied, torch.arange(96.0))


def test_faults_are_not_looked_for_outside_the_context():
    y = torch.empty(16)
    with shadow_memory(y):
        pass
    halves_kernel[(1,)](y, BLOCK_N=32)


def test_bf16_dot_is_exact():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(-128, 128, (2, 32, 32), generator=generator).bfloat16()
    c = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, c, BLOCK=32)
    assert torch.equal(c.double(), a.double() @ b.double())  # integers below 2**24


@pytest.mark.parametrize("via", [tl.float32, tl.bfloat16], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.int32], ids=str
)
def test_bf16_casts_round_to_the_nearest_even(dtype, via):
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 257.0, 259.0, 1e-40, 3.4e38, -0.0])
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 9e-41, 65504.0, 1e-8, -65519.0])
    odd_nans = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    x = torch.cat([ties, special, odd_nans, torch.randn(1006) * 100])
    x = x.nan_to_num(0, 0, 0).clamp(-1e9, 1e9).to(dtype) if dtype == torch.int32 else x.to(dtype)
    y = torch.empty(1024, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, VIA=via, BLOCK_N=1024)
    torch.testing.assert_close(y, x.float().bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_every_bf16_widens_exactly():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    y = torch.empty(2**16)
    cast_kernel[(1,)](x, y, VIA=tl.float32, BLOCK_N=2**16)
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)


def test_arithmetic_in_bf16_is_refused():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="cast to fp32"):
        bf16_sum_kernel[(1,)](torch.ones(2).bfloat16(), torch.ones(1).bfloat16())
