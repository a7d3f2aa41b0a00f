"""Every launch the losses make, as small calls: what `python -m bench.aot` compiles for GPUs that
are not here. Tensors lie on the CPU and hold nothing; shapes only choose the specialisation.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from rankpo_kernels.problem import (
    DIRECTIONS,
    IN_BATCH,
    InBatchProblem,
    InBatchSettings,
    InfoNCEProblem,
    InfoNCESettings,
    RankPOProblem,
    RankPOSettings,
)
from rankpo_kernels.relations import Relations, known
from rankpo_kernels.triton.in_batch import in_batch
from rankpo_kernels.triton.info_nce import info_nce
from rankpo_kernels.triton.rankpo import rankpo


class Launch(NamedTuple):
    name: str
    dtype: str
    options: str
    run: Callable[[], object]
    matrix: bool  # holds a tl.dot
    pipeline: str | None = None  # of `python -m bench.cost`, whose kernels these are
    dims: tuple[int, ...] = ()  # for which its tiles are taken
    everywhere: bool = True  # or for sm_90 alone


M, N, D = 256, 512, 1024  # whole tiles, as most batches have
DIMS = (64, 256, 1024)
NARROW = 384  # dims, of which Hopper takes other tiles than of 1024
WIDE = (1024, 2048, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = torch.zeros(N, dtype=torch.int64)
IDS = {"query_ids_M": INTEGERS[:M], "passage_ids_N": INTEGERS}


def launches() -> Iterator[Launch]:
    """All options that change what a kernel holds in bf16, what differs by dtype in the others."""
    yield from info_nce_launches()
    yield from in_batch_launches()
    yield from rankpo_launches()


def _launch(
    name: str, dtype: torch.dtype, options: str, run: Callable[[], object],
    pipelines: dict[str, str],
) -> Launch:  # fmt: skip
    narrow = options.removesuffix(", D=384")
    pipeline = pipelines.get(narrow) if dtype == torch.bfloat16 else None
    dims = WIDE if narrow == options else (NARROW,)
    # tiles of few dims are Hopper's; it stands for the others where dtypes add no form of their own
    plain = options.removesuffix(", tf32x3") in ("plain", "rankpo")
    everywhere = narrow == options and (dtype == torch.bfloat16 or plain)
    # ends within a tile are masks alone, and sm_80 has no fp8
    everywhere = everywhere and not any(word in options for word in ("odd", "unnorm", "fp8"))
    dtype_name = str(dtype).removeprefix("torch.")
    return Launch(name, dtype_name, options, run, True, pipeline, dims, everywhere)


def _batch(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(queries, passages, what makes another model's vectors the guide)."""
    q, p = torch.empty(M, D, dtype=dtype), torch.empty(N, D, dtype=dtype)
    return q, p, {"guide_queries": q[:, :512], "guide_passages": p[:, :512]}


def info_nce_launches() -> Iterator[Launch]:
    """Plain and general forms."""
    integers, ids = INTEGERS, IDS
    every = ids | {
        "positive_offsets": torch.arange(M + 1), "positive_columns": integers[:M],
        "own_offsets": torch.arange(M + 1), "curated_N": integers,
    }  # fmt: skip
    for dtype in DTYPES:
        q, p, guide = _batch(dtype)

        def loss(
            relations=None, own=None, needs=(True, True, True, False), D=D, N=N, q=q, p=p,
            stored=False, few=False, kept=False, normalize=True, **options,
        ):  # fmt: skip
            problem = InfoNCEProblem(
                q[:, :D], p[:N, :D], own, torch.tensor(50.0, dtype=torch.float64),
                Relations(integers[:M], **(relations or {})),
                InfoNCESettings(normalize=normalize, workspace_bytes=1 << 30, **options),
            )  # fmt: skip
            weights = torch.empty(M) if any(needs) else None
            return lambda: info_nce(problem, weights, needs, stored=stored, few=few, kept=kept)

        matryoshka, margin = {"matryoshka_dims": DIMS}, {"false_negative_margin": 0.1}
        symmetric, learnt = {"directions": DIRECTIONS[:2]}, {"needs": (True,) * 4}
        apart = symmetric | {"partition": "per_direction"}
        hardness = {"hardness_mode": IN_BATCH, "hardness_strength": 9.0}
        cases = {
            "plain": loss(),
            "symmetric": loss(**apart),
            "everything": loss(
                every, own=p[:M], directions=DIRECTIONS, label_smoothing=0.1, **margin, **learnt
            ),
            "matryoshka, symmetric": loss(**matryoshka, **symmetric),
        }
        if dtype == torch.float32:
            cases |= {
                "plain, tf32x3": loss(precision="tf32x3"),
                "symmetric, learnt scale, tf32x3": loss(precision="tf32x3", **apart, **learnt),
                "everything, tf32x3": loss(
                    every,
                    own=p[:M],
                    directions=DIRECTIONS,
                    label_smoothing=0.1,
                    precision="tf32x3",
                    **margin,
                    **learnt,
                ),
            }
        if dtype == torch.bfloat16:
            cases |= {
                "plain, learnt scale": loss(**learnt),
                "plain, stored": loss(stored=True),
                "plain, stored, learnt scale": loss(stored=True, **learnt),
                "plain, forward": loss(needs=(False,) * 4),
                "symmetric, kept": loss(kept=True, **apart),
                "symmetric, kept, odd N, learnt scale": loss(kept=True, N=N - 1, **apart, **learnt),
                "plain, stored, fp8": loss(stored=True, precision="fp8"),
                "symmetric, fp8": loss(precision="fp8", **apart),
                "ids, smoothing, fp8": loss(ids, label_smoothing=0.1, precision="fp8"),
                "few launches": loss(few=True),
                "few launches, odd N": loss(few=True, N=N - 1),
                "plain, stored, odd N": loss(stored=True, N=N - 1),
                "few launches, learnt scale, unnormalised": loss(
                    few=True, normalize=False, **learnt
                ),
                "few launches, symmetric": loss(few=True, **apart),
                "few launches, ids, margin, smoothing": loss(
                    ids, few=True, label_smoothing=0.1, **margin
                ),
                "few launches, guide": loss(guide, few=True, **margin),
                "plain, odd D": loss(D=1000),
                "plain, unnormalised": loss(normalize=False),
                "plain, ids": loss(ids, stored=True),
                "plain, ids, margin": loss(ids | {"curated_N": integers}, stored=True, **margin),
                "plain, guide": loss(ids | guide, stored=True, **margin),
                "plain, hardness": loss({"curated_N": integers}, **hardness, **learnt),
                "plain, hardness, stored": loss(
                    {"curated_N": integers}, stored=True, **hardness, **learnt
                ),
                "plain, filter": loss(gradient_filter=1e-3),
                "matryoshka, everything": loss(every, own=p[:M], **matryoshka, **learnt),
            }
        pipelines = {"plain, forward": "forward", "plain, stored": "stored",
                     "symmetric": "both directions",
                     "symmetric, kept": "both directions, kept"}  # fmt: skip
        narrow: dict[str, dict[str, Any]] = {
            "plain, forward": {"needs": (False,) * 4},
            "plain, stored": {"stored": True},
            "plain, stored, learnt scale": {"stored": True, **learnt},
            "plain": {},
            "symmetric": apart,
        }
        if dtype == torch.bfloat16:
            cases |= {f"{name}, D=384": loss(D=NARROW, **how) for name, how in narrow.items()}
        for options, run in cases.items():
            yield _launch("info_nce", dtype, options, run, pipelines)


def in_batch_launches() -> Iterator[Launch]:
    for dtype in DTYPES:
        q, p, guide = _batch(dtype)
        ids, learnt = IDS, {"needs": (True,) * 4}

        def loss(
            relations=None, needs=(True, True, False, False), D=D, q=q, p=p, normalize=True,
            **options,
        ):  # fmt: skip
            related = Relations(INTEGERS[:M], **(relations or {}))
            problem = InBatchProblem(
                q[:, :D], p[:, :D], torch.tensor(20.0), torch.tensor(0.0), related,
                InBatchSettings(normalize=normalize, workspace_bytes=1 << 30, **options),
            )  # fmt: skip
            keys = None if related.labels_alone else known(related, N)
            weights = torch.empty(M) if any(needs) else None
            return lambda: in_batch(problem, keys, weights, needs)

        sft = {"sft_weight": 0.5, "sft_scale": 10.0}
        cases = {
            "rankpo": loss(),
            "rankpo, everything": loss(ids | guide, label_smoothing=0.1, **sft),
            "siglip, learnt, ids": loss(ids, kind="siglip", **learnt),
        }
        if dtype == torch.float32:
            cases |= {
                "rankpo, tf32x3": loss(precision="tf32x3"),
                "rankpo, everything, tf32x3": loss(
                    ids | guide, label_smoothing=0.1, precision="tf32x3", **sft
                ),
            }
        if dtype == torch.bfloat16:
            cases |= {
                "rankpo, forward": loss(needs=(False,) * 4),
                "rankpo, odd D": loss(D=1000),
                "rankpo, unnormalised": loss(normalize=False),
                "rankpo, ids": loss(ids),
                "rankpo, reference": loss(guide),
                "rankpo, sft": loss(**sft),
                "hinge": loss(kind="hinge"),
                "hinge, everything": loss(ids | guide, kind="hinge", **sft),
                "siglip, ids": loss(ids, kind="siglip"),
            }
        if dtype == torch.bfloat16:
            cases |= {"rankpo, D=384": loss(D=NARROW), "hinge, D=384": loss(D=NARROW, kind="hinge")}
        for options, run in cases.items():
            yield _launch("in_batch", dtype, options, run, {"rankpo": "in-batch RankPO"})


def rankpo_launches() -> Iterator[Launch]:
    """Pairs and groups: each width of rows that changes the tile, and both ends of a group's size
    with every loss in bf16, some in the others."""
    rows = torch.zeros(4)
    for dtype in DTYPES:
        made = lambda *shape, dtype=dtype: torch.empty(4, *shape, dtype=dtype)  # noqa: E731

        def loss(passages, grades=None, reference=None, grads=True, made=made, **options):
            q, settings = made(passages[0].shape[-1]), RankPOSettings(**options)
            problem = RankPOProblem(q, passages, grades, reference, settings)
            needs = (True,) * (1 + len(passages)) if grads else ()
            weights = rows if grads else None
            return lambda: rankpo(problem, weights, needs)

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
                "pair, hinge, reference, odd D": loss(
                    pair(1000), None, rows[:, None], loss_type="hinge"
                ),
                "pair, unnormalised": loss(pair(1024), normalize=False),
                "group of 3": loss(*graded(3, 384)),
                "group of 8, listwise": loss(*graded(8, 4096), listwise=True),
                "group of 64": loss(*graded(64, 1024)),
                "group of 64, hinge, wide": loss(*graded(64, 4096), loss_type="hinge"),
            }
        for options, run in cases.items():
            yield Launch("rankpo", str(dtype).removeprefix("torch."), options, run, False)
