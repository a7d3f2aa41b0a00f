"""How many rows of scores a chunk holds, so that tiles fill whole waves of the GPU.

Every chunk of R rows multiplies three times: scores [R, N], dq [R, D] = G P and dp [N, D] += G' Q.
All multiprocessors work on a tile each, one wave after the other; what the last wave leaves idle is
lost. dq has the fewest tiles: 43 rows of them and 4 columns are 1.3 waves of 132 multiprocessors
and take two, 33 rows are one whole wave. More chunks cost, too: each reads and writes dp in fp32
and is launched. `rows_of_chunk` weighs both by `cost`, a count of clocks, and not of a measurement.

M queries, N passages, D dims, R rows of a chunk.
"""

import functools

# Tiles of the products that cuBLAS chooses among (rows, columns), and how well each runs beside the
# first: what a smaller one loads for a multiplication is more. Assumed, no GPU has been asked;
# rarer shapes (192 rows, say) are left out, lest a chunk is cut for a tile that is not taken.
PRODUCT_TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.88}
SCORE_COLUMNS = 256  # of scores, that a multiprocessor works on at a time
# Of Hopper, relative to each other: multiplications of a multiprocessor a clock (80 % of 2048, as
# large products reach), bytes of all memory a clock, clocks that the launches of a chunk take.
MULTIPLY, BYTES, LAUNCHES = 1640, 2350, 10_000


def rows_of_chunk(M: int, N: int, D: int, most: int, block: int, sms: int) -> int:
    """Rows of all chunks but the last: at most `most`, and multiples of `block` where that is at
    least a block. Of `sms` multiprocessors; 0 where they are not known: then about equal chunks."""
    assert M > 0 and most > 0
    if most >= M:
        return M
    if sms < 1 or most < block or min(N, D) < 1:
        return equal_rows(M, most, block)
    return _best_rows(M, N, D, most // block, block, sms)


def equal_rows(M: int, most: int, block: int) -> int:
    """Of chunks of about equal size, as few as there can be; whole blocks where `most` is one."""
    each = -(-M // -(-M // most))
    return min(-(-each // block) * block, most // block * block) if most >= block else each


@functools.lru_cache(maxsize=256)
def _best_rows(M: int, N: int, D: int, most_blocks: int, block: int, sms: int) -> int:
    sizes = _candidates(M, D, most_blocks, block, sms)
    # of equals the largest: fewer chunks, and the order of candidates does not matter
    return min(sizes, key=lambda R: (cost(M, N, D, R, block, sms), -R))


def _candidates(M: int, D: int, most_blocks: int, block: int, sms: int) -> set[int]:
    """Equal chunks of each number, and those of which dq ends with its wave: a larger chunk has a
    wave more, so that of each number of waves only the last multiple of a block matters. Chunks
    twice as many as there must be are worth no wave."""
    most = most_blocks * block
    fewest = -(-M // most)
    numbers = range(fewest, min(2 * fewest, fewest + 8))
    sizes = {-(-M // chunks // block) * block for chunks in numbers}
    sizes |= {most, equal_rows(M, most, block)}
    for rows, columns in PRODUCT_TILES:
        across = -(-D // columns)
        last = most // rows * across // sms  # whole waves of the largest chunk
        for waves in range(max(1, last // 2), last + 1):
            sizes.add(waves * sms // across * rows // block * block)
    return {R for R in sizes if 0 < R <= most}


def cost(M: int, N: int, D: int, R: int, block: int, sms: int) -> float:
    """Clocks of all chunks of R rows, the last of which may be ragged."""
    whole, rest = divmod(M, R)
    clocks = whole * _chunk_clocks(R, N, D, block, sms)
    return clocks + (_chunk_clocks(rest, N, D, block, sms) if rest else 0)


def _chunk_clocks(R: int, N: int, D: int, block: int, sms: int) -> float:
    scores = waves(R, N, (block, SCORE_COLUMNS), sms) * block * SCORE_COLUMNS * D / MULTIPLY
    dq = N * _product_clocks(R, D, sms)
    dp = max(R * _product_clocks(N, D, sms), (2 * R * N + 8 * N * D) / BYTES)
    return scores + dq + dp + LAUNCHES


@functools.lru_cache(maxsize=1024)
def _product_clocks(rows: int, columns: int, sms: int) -> float:
    """Of each element of the sums that a product of this size is made of: halfway between the tile
    that does best and the usual one, since cuBLAS chooses by a rule of its own."""
    usual, *others = (
        waves(rows, columns, tile, sms) * tile[0] * tile[1] / (MULTIPLY * rate)
        for tile, rate in PRODUCT_TILES.items()
    )
    return (usual + min(usual, *others)) / 2


def waves(rows: int, columns: int, tile: tuple[int, int], sms: int) -> int:
    """Of tiles over the multiprocessors, the last of them perhaps not full."""
    tiles = -(-rows // tile[0]) * -(-columns // tile[1])
    return -(-tiles // sms)
