"""Which tile, and which pipeline, is fastest on this card? The tables of `gpu/tiles.py` rest on it.

Floor: three GEMMs. A row is a tile under one pipeline: exact (8MND) or stored (6MND). From 2k x 2k
on they stand side by side with the tiles as shipped, and with exact in few launches, for the size
from which to store.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

from bench.cases.info_nce import DIMS, PLAIN, draw, gemms
from bench.launch import SYMMETRIC, launch
from bench.measure import Case
from rankpo_kernels.gpu.tiles import SLIM, WIDE, Tiles

CANDIDATES = {
    "wide": WIDE,
    "slim": SLIM,
    "wide, 4 stages": replace(WIDE, num_stages=4),
    "wide, 4 warps": replace(WIDE, num_warps=4),
    "wide, groups of 16": replace(WIDE, GROUP=16),
    "128 x 256": Tiles(128, 256, 64, num_warps=8, num_stages=3),
}
SIZE = 16384
THRESHOLD = [(size, D) for size in (2048, 4096, 8192) for D in DIMS]
PIPELINES = {"exact": {"stored": False, "few": False}, "stored": {"stored": True}}
SMALLER = PIPELINES | {"exact in few launches": {"stored": False, "few": True}}


def contenders(
    q, p, labels, tiles: dict[str, Tiles | None], pipelines: dict[str, dict[str, bool]]
) -> dict[str, Callable]:
    return {
        f"{pipeline}, {name}": functools.partial(launch, q, p, labels, tiles=tile, **how)
        for name, tile in tiles.items()
        for pipeline, how in pipelines.items()
    }


def cases(device: str, quick: bool) -> Iterator[Case]:
    swept = [(SIZE, D, CANDIDATES, PIPELINES) for D in DIMS]
    shipped = [(size, D, {"as shipped": None}, SMALLER) for size, D in THRESHOLD]
    for size, D, *how in [*swept, *shipped][: 1 if quick else None]:
        q, p, labels = (x.detach() for x in draw(size, size, D, device))
        runs = contenders(q, p, labels, *how)
        yield Case(
            name=f"tiles {size}x{size}x{D}",
            question=__doc__.splitlines()[0],
            shape={"M": size, "N": size, "D": D},
            device=device,
            contenders={PLAIN.floor: gemms(PLAIN, q, p)} | runs,
            floor=PLAIN.floor,
            keep_bytes=(q.numel() + p.numel()) * q.element_size(),
            peers=frozenset(runs),  # a tile that does not compile is a row
        )


def compile_all(D: int) -> None:
    """Leave the kernels that the bench takes at these dims in Triton's cache: short runs."""
    q, p, labels = (x.detach() for x in draw(512, 4096, D, "cuda"))
    runs = contenders(q, p, labels, CANDIDATES | {"as shipped": None}, SMALLER)
    for options in ({}, SYMMETRIC):
        for how in ({"few": False}, {"few": True}, {"grads": False}):
            how = how | {"options": options}
            runs[f"{how}"] = functools.partial(launch, q, p, labels, **how)
    for name, run in runs.items():
        try:
            run()
        except Exception as error:  # as in the bench, where it is a row
            print(f"D={D}, {name}: {type(error).__name__}: {error}"[:200])
