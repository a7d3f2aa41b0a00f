"""Every launch the losses make, as small calls: what `python -m bench.aot` compiles for cards that
are not here. Tensors lie on the CPU and hold nothing; shapes only choose the specialisation.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from rankpo_kernels.gpu.info_nce import info_nce
from rankpo_kernels.objective import DIRECTIONS, Relations, Settings


class Launch(NamedTuple):
    name: str
    dtype: str
    options: str
    run: Callable[[], object]
    matrix: bool  # holds a tl.dot


M, N, D = 256, 512, 1024  # whole tiles, as most batches have
DIMS = (64, 256, 1024)


def launches() -> Iterator[Launch]:
    """Plain and general forms in each dtype, with the options that change what a kernel holds."""
    integers = torch.zeros(N, dtype=torch.int64)
    ids = {"query_ids_M": integers[:M], "passage_ids_N": integers}
    every = ids | {
        "positive_offsets": torch.arange(M + 1), "positive_columns": integers[:M],
        "own_offsets": torch.arange(M + 1), "curated_N": integers,
    }  # fmt: skip
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q, p = torch.empty(M, D, dtype=dtype), torch.empty(N, D, dtype=dtype)
        guide = {"guide_queries": q[:, :512], "guide_passages": p[:, :512]}

        def loss(relations=None, own=None, forward=False, D=D, q=q, p=p, **options):
            stored = options.pop("stored", None)
            relations = Relations(integers[:M], **(relations or {}))
            settings = Settings(options.pop("normalize", True), 1 << 30, **options)
            weights = None if forward else torch.empty(M)
            needs = (not forward, not forward, own is not None, True)
            scale = torch.tensor(50.0, dtype=torch.float64)
            return lambda: info_nce(
                q[:, :D], p[:, :D], own, scale, relations, settings, weights, needs, stored=stored
            )

        matryoshka = {"dims": DIMS, "dim_weights": (1.0,) * len(DIMS)}
        cases = {
            "plain": loss(stored=False),
            "plain, stored": loss(stored=True),
            "plain, forward": loss(forward=True),
            "plain, odd D": loss(stored=False, D=1000),
            "plain, unnormalised": loss(stored=False, normalize=False),
            "plain, ids, margin": loss(ids | {"curated_N": integers}, margin=0.1, stored=True),
            "plain, guide": loss(ids | guide, margin=0.1, stored=True),
            "plain, filter": loss(gradient_filter=1e-3),
            "all directions": loss(every, own=p[:M], directions=DIRECTIONS, label_smoothing=0.1),
            "symmetric": loss(directions=DIRECTIONS[:2], joint=False),
            "matryoshka": loss(every, own=p[:M], **matryoshka),
            "matryoshka, symmetric": loss(directions=DIRECTIONS[:2], **matryoshka),
        }
        for options, run in cases.items():
            yield Launch("info_nce", str(dtype).removeprefix("torch."), options, run, True)
