"""Every launch the losses make, as small calls: what `python -m bench.aot` compiles for cards that
are not here. Tensors lie on the CPU and hold nothing; shapes only choose the specialisation.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from rankpo_kernels.gpu import pairs
from rankpo_kernels.gpu.info_nce import info_nce
from rankpo_kernels.gpu.pointwise import pair_losses
from rankpo_kernels.objective import (
    DIRECTIONS,
    IN_BATCH,
    PairSettings,
    Relations,
    Settings,
    known,
)
from rankpo_kernels.pairs import Rule


class Launch(NamedTuple):
    name: str
    dtype: str
    options: str
    run: Callable[[], object]
    matrix: bool  # holds a tl.dot


M, N, D = 256, 512, 1024  # whole tiles, as most batches have
DIMS = (64, 256, 1024)


def launches() -> Iterator[Launch]:
    """Plain and general forms, with the options that change what a kernel holds: all of them in
    bf16, what differs by dtype in the others."""
    integers = torch.zeros(N, dtype=torch.int64)
    ids = {"query_ids_M": integers[:M], "passage_ids_N": integers}
    every = ids | {
        "positive_offsets": torch.arange(M + 1), "positive_columns": integers[:M],
        "own_offsets": torch.arange(M + 1), "curated_N": integers,
    }  # fmt: skip
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        q, p = torch.empty(M, D, dtype=dtype), torch.empty(N, D, dtype=dtype)
        guide = {"guide_queries": q[:, :512], "guide_passages": p[:, :512]}

        def loss(
            relations=None, own=None, needs=(True, True, True, False), D=D, N=N, q=q, p=p,
            stored=False, few=False, normalize=True, **options,
        ):  # fmt: skip
            arguments = (
                q[:, :D], p[:N, :D], own, torch.tensor(50.0, dtype=torch.float64),
                Relations(integers[:M], **(relations or {})),
                Settings(normalize, 1 << 30, **options),
                torch.empty(M) if any(needs) else None, needs,
            )  # fmt: skip
            return lambda: info_nce(*arguments, stored=stored, few=few)

        matryoshka = {"dims": DIMS, "dim_weights": (1.0,) * len(DIMS)}
        symmetric, learnt = {"directions": DIRECTIONS[:2]}, {"needs": (True,) * 4}
        hardness = {"hardness_mode": IN_BATCH, "hardness_strength": 9.0}
        cases = {
            "plain": loss(),
            "symmetric": loss(joint=False, **symmetric),
            "everything": loss(
                every, own=p[:M], margin=0.1, directions=DIRECTIONS, label_smoothing=0.1, **learnt
            ),
            "matryoshka, symmetric": loss(**matryoshka, **symmetric),
        }
        if dtype == torch.bfloat16:
            cases |= {
                "plain, learnt scale": loss(**learnt),
                "plain, stored": loss(stored=True),
                "plain, stored, learnt scale": loss(stored=True, **learnt),
                "plain, forward": loss(needs=(False,) * 4),
                "few launches": loss(few=True),
                "few launches, odd N": loss(few=True, N=N - 1),
                "plain, stored, odd N": loss(stored=True, N=N - 1),
                "few launches, learnt scale, unnormalised": loss(
                    few=True, normalize=False, **learnt
                ),
                "few launches, symmetric": loss(few=True, joint=False, **symmetric),
                "few launches, ids, margin, smoothing": loss(
                    ids, few=True, margin=0.1, label_smoothing=0.1
                ),
                "few launches, guide": loss(guide, few=True, margin=0.1),
                "plain, odd D": loss(D=1000),
                "plain, unnormalised": loss(normalize=False),
                "plain, ids": loss(ids, stored=True),
                "plain, ids, margin": loss(ids | {"curated_N": integers}, margin=0.1, stored=True),
                "plain, guide": loss(ids | guide, margin=0.1, stored=True),
                "plain, hardness": loss({"curated_N": integers}, **hardness, **learnt),
                "plain, hardness, stored": loss(
                    {"curated_N": integers}, stored=True, **hardness, **learnt
                ),
                "plain, filter": loss(gradient_filter=1e-3),
                "matryoshka, everything": loss(every, own=p[:M], **matryoshka, **learnt),
            }
        for options, run in cases.items():
            yield Launch("info_nce", str(dtype).removeprefix("torch."), options, run, True)

        def of_batch(
            relations=None, needs=(True, True, False, False), D=D, q=q, p=p, normalize=True,
            **options,
        ):  # fmt: skip
            relations = Relations(integers[:M], **(relations or {}))
            arguments = (
                q[:, :D], p[:, :D], torch.tensor(20.0), torch.tensor(0.0), relations,
                None if relations.query_ids_M is None else known(relations, N),
                PairSettings(normalize, 1 << 30, **options),
                torch.empty(M) if any(needs) else None, needs,
            )  # fmt: skip
            return lambda: pair_losses(*arguments)

        sft = {"sft_weight": 0.5, "sft_scale": 10.0}
        cases = {
            "rankpo": of_batch(),
            "rankpo, everything": of_batch(ids | guide, label_smoothing=0.1, **sft),
            "siglip, learnt, ids": of_batch(ids, kind="siglip", **learnt),
        }
        if dtype == torch.bfloat16:
            cases |= {
                "rankpo, forward": of_batch(needs=(False,) * 4),
                "rankpo, odd D": of_batch(D=1000),
                "rankpo, unnormalised": of_batch(normalize=False),
                "rankpo, ids": of_batch(ids),
                "rankpo, reference": of_batch(guide),
                "rankpo, sft": of_batch(**sft),
                "hinge": of_batch(kind="hinge"),
                "hinge, everything": of_batch(ids | guide, kind="hinge", **sft),
                "siglip, ids": of_batch(ids, kind="siglip"),
            }
        for options, run in cases.items():
            yield Launch("pair_losses", str(dtype).removeprefix("torch."), options, run, True)
    yield from ranked_launches()


def ranked_launches() -> Iterator[Launch]:
    """Pairs and groups: each width of rows that changes the tile, and both ends of a group's size
    with every loss in bf16, some in the others."""
    rows = torch.zeros(4)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        made = lambda *shape, dtype=dtype: torch.empty(4, *shape, dtype=dtype)  # noqa: E731

        def loss(passages, grades=None, reference=None, grads=True, made=made, **options):
            q, rule = made(passages[0].shape[-1]), Rule(2.0, 0.1, **options)
            needs = (True,) * (1 + len(passages)) if grads else ()
            weights = rows if grads else None
            return lambda: pairs.ranked(q, passages, grades, reference, rule, weights, needs)

        pair = lambda D, made=made: [made(D), made(D)]  # noqa: E731
        graded = lambda K, D, made=made: ([made(K, D)], torch.zeros(4, K), torch.zeros(4, K))  # noqa: E731,E501
        cases = {
            "pair, D=1024": loss(pair(1024)),
            "group of 8": loss(*graded(8, 1024)),
            "group of 64, listwise": loss(*graded(64, 1024), listwise=True),
        }
        if dtype == torch.bfloat16:
            widths = (384, 2048, 4096, 8192, 16384)
            cases |= {f"pair, D={D}": loss(pair(D)) for D in widths}
            cases |= {
                "pair, forward": loss(pair(1024), grads=False),
                "pair, hinge, reference, odd D": loss(pair(1000), None, rows[:, None], hinge=True),
                "pair, unnormalised": loss(pair(1024), normalize=False),
                "group of 3": loss(*graded(3, 384)),
                "group of 8, listwise": loss(*graded(8, 4096), listwise=True),
                "group of 64": loss(*graded(64, 1024)),
                "group of 64, hinge, wide": loss(*graded(64, 4096), hinge=True),
            }
        for options, run in cases.items():
            yield Launch("ranked", str(dtype).removeprefix("torch."), options, run, False)
