"""Tables of tiles, and chunks of rows whose tiles fill whole waves; waves.py has the reasons."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankpo_kernels.problem import InfoNCESettings
from rankpo_kernels.relations import Relations
from rankpo_kernels.triton import tiles
from rankpo_kernels.triton.waves import cost, equal_rows, rows_of_chunk, waves

BLOCK, SMS = 128, 132
WORKSPACE = 256 << 20


def held(N: int) -> int:
    """Rows of scores in bf16 beside their statistics."""
    return WORKSPACE // (2 * N + 12 * -(-N // BLOCK))


def plainly(M: int, N: int, D: int, R: int) -> float:
    """Clocks of chunks of R rows by tiles of 128 x 256 alone, one chunk after the other."""
    clocks = 0.0
    for start in range(0, M, R):
        rows = min(R, M - start)
        tiles = [(rows, N, D), (rows, D, N), (N, D, rows)]
        clocks += sum(waves(m, n, (128, 256), SMS) * 128 * 256 * k for m, n, k in tiles) / 1640
        clocks += 8 * N * D / 2350 + 10_000
    return clocks


@pytest.mark.parametrize(
    ("M", "D", "rows"),
    [(16384, 1024, 4224), (65536, 4096, 1024)],
    ids=["33-row-tiles-are-one-wave-of-4-columns", "8-row-tiles-are-one-wave-of-16-columns"],
)
def test_chunks_are_whole_waves_where_equal_ones_are_not(M, D, rows):
    most = held(M)
    assert rows_of_chunk(M, M, D, most, BLOCK, SMS) == rows
    tiles = rows // 128 * (D // 256)
    assert tiles <= SMS and tiles > 0.95 * SMS
    equal = equal_rows(M, most, BLOCK)
    assert equal % BLOCK == 0 and -(-equal // 128) * (D // 256) > SMS


def test_one_chunk_where_all_rows_fit():
    assert rows_of_chunk(4000, 16384, 1024, 4000, BLOCK, SMS) == 4000
    assert rows_of_chunk(1, 16384, 1024, 9999, BLOCK, SMS) == 1


@pytest.mark.parametrize("sms", [0, SMS], ids=["unknown-gpu", "less-than-a-block"])
def test_equal_chunks_where_waves_cannot_be_filled(sms):
    most = 100 if sms else 500
    rows = rows_of_chunk(1010, 16384, 1024, most, BLOCK, sms)
    assert rows == (92 if sms else 384)  # 11 chunks; 3 of whole blocks


SIZES = dict(
    M=st.integers(1, 200_000), N=st.integers(1, 100_000), D=st.integers(1, 8192),
    most=st.integers(1, 40_000), block=st.sampled_from([16, 64, 128, 256]),
    sms=st.sampled_from([0, 78, 108, 132, 148]),
)  # fmt: skip


@given(**SIZES)
@settings(max_examples=300, deadline=None)
def test_chunks_cover_all_rows_and_fit(M, N, D, most, block, sms):
    rows = rows_of_chunk(M, N, D, most, block, sms)
    assert 1 <= rows <= most
    assert rows == M or rows % block == 0 or most < block
    # never many more chunks than there must be
    assert -(-M // rows) <= max(2 * -(-M // (most // block * block or most)) + 2, 1)


@given(**SIZES)
@settings(max_examples=200, deadline=None)
def test_never_costs_more_than_equal_chunks(M, N, D, most, block, sms):
    rows, equal = rows_of_chunk(M, N, D, most, block, sms), equal_rows(M, most, block)
    if sms and most < M:
        assert cost(M, N, D, rows, block, sms) <= cost(M, N, D, equal, block, sms)


@pytest.mark.parametrize("D", [384, 768, 1024, 1536, 2048, 3072, 4096])
@pytest.mark.parametrize("M", [12_000, 16_384, 32_768, 40_000])
def test_beside_all_multiples_of_a_block(M, D):
    """By the same cost hardly any is better; by one of the largest tiles alone, which cuBLAS need
    not take, equal chunks hardly are."""
    most = held(M)
    rows, equal = rows_of_chunk(M, M, D, most, BLOCK, SMS), equal_rows(M, most, BLOCK)
    if most >= M:
        assert rows == M
        return
    best = min(cost(M, M, D, R, BLOCK, SMS) for R in range(BLOCK, most + 1, BLOCK))
    assert cost(M, M, D, rows, BLOCK, SMS) <= 1.005 * best
    assert plainly(M, M, D, rows) <= 1.08 * plainly(M, M, D, equal)


@pytest.mark.parametrize("D", [384, 1024, 2048, 4096])
def test_more_memory_and_fewer_rows_cost_no_more(D):
    chosen = [rows_of_chunk(16384, 16384, D, most, BLOCK, SMS) for most in (2000, 4000, 8000)]
    costs = [cost(16384, 16384, D, rows, BLOCK, SMS) for rows in chosen]
    assert costs == sorted(costs, reverse=True)
    whole = [cost(M, 16384, D, rows_of_chunk(M, 16384, D, 8000, BLOCK, SMS), BLOCK, SMS)
             for M in (4096, 8192, 16384, 32768)]  # fmt: skip
    assert whole == sorted(whole)


def test_each_chunk_reads_and_writes_dp_and_is_launched():
    N, D = 65536, 4096
    dq = 0.75 * N * 128 * 256 / 1640  # a wave, of the smaller tiles in part
    assert cost(128, N, D, 128, BLOCK, SMS) >= dq + 8 * N * D / 2350
    assert cost(1280, 1, 1, 128, BLOCK, SMS) >= 10 * 10_000


def test_the_usual_tile_of_products_is_not_taken_for_the_only_one():
    """384 columns are two of 256, of which a quarter is idle, or three of 128: 44 rows of those are
    a wave, and the 45th costs more than the 44th."""
    one, two, three = (cost(rows * 128, 4096, 384, rows * 128, BLOCK, SMS) for rows in (43, 44, 45))
    assert three - two > 2 * (two - one)


def test_workspace_of_large_gpus_is_larger():
    from rankpo_kernels.workspace import default_workspace

    assert default_workspace("cuda", 85 * 10**9) == 1 << 30  # 80 GB, as it says of itself
    assert default_workspace("cuda", 48 * 10**9) == default_workspace("cuda") == 256 << 20
    assert default_workspace("cpu", 10**12) == 90 << 20


@pytest.mark.parametrize(
    ("version", "earlier"),
    [("3.6.0", True), ("3.7.0", False), ("3.10.1", False), ("3.6.0+git1234", True), ("4.0", False)],
)
def test_versions_of_triton_are_numbers(version, earlier):
    assert tiles.before(version, 3, 7) == earlier


@pytest.mark.parametrize(
    ("arch", "unfenced", "stages"), [(100, True, 1), (100, False, 3), (90, True, 3)]
)
def test_what_no_fence_can_stand_in_is_not_pipelined(monkeypatch, arch, unfenced, stages):
    monkeypatch.setattr(tiles, "_architecture", lambda: arch)
    monkeypatch.setattr(tiles, "UNFENCED", unfenced)
    settings = InfoNCESettings(workspace_bytes=1 << 20)
    scores = tiles.score_tiles(torch.bfloat16, Relations(torch.arange(4)), settings)
    assert scores.num_stages == stages
    assert tiles.product_tiles(torch.bfloat16).num_stages == stages
    assert tiles.product_tiles(torch.float32, "tf32x3").num_stages == stages
