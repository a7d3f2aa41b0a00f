"""What can be wrong with the tensors of a batch, and where Triton computes.

What values alone tell is looked at on the CPU; on CUDA that would cost a sync.

M queries, N passages, H own negatives, P positive pairs, D dims, G dims of a guide.
"""

import functools
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rankpo_fast.ops.options import InfoNCECall, ScoreBatch, ScoreCall
from rankpo_kernels.problem import PP, QP, ScoreOptions, compute_dtype
from rankpo_kernels.relations import APART, Relations, expand, positive_pairs
from rankpo_kernels.workspace import DEFAULT_WORKSPACE

FP8 = (8, 9)  # compute capability from which tensor cores multiply fp8
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of embeddings


def known_definition(relations: Relations, N: int) -> Tensor:
    """[M, N]: passage j has the text of a positive or exclusion of a query with the text of i."""
    labels_M, device = relations.labels_M, relations.labels_M.device
    M = len(labels_M)
    query_M = torch.arange(M, device=device)
    query_M = query_M if relations.query_ids_M is None else relations.query_ids_M
    text_N = torch.arange(N, device=device)
    text_N = text_N if relations.passage_ids_N is None else relations.passage_ids_N
    known_MN = torch.zeros(M, N, dtype=torch.bool, device=device)
    i_P, a_P, _ = positive_pairs(relations, torch.float32)
    lists = [(i_P, a_P)]
    if relations.excluded_offsets is not None and relations.excluded_columns is not None:
        columns = relations.excluded_columns
        lists.append((expand(relations.excluded_offsets.diff(), len(columns)), columns))
    for rows, columns in lists:
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
            known_MN |= (query_M == query_M[i])[:, None] & (text_N == text_N[j])
    return known_MN


# --- embeddings ---


def check_embeddings(tensors: Mapping[str, Tensor | None]) -> None:
    """On one device, of a known dtype, not empty; names are for the messages."""
    (first, lead), *_ = ((name, x) for name, x in tensors.items() if x is not None)
    for name, x in tensors.items():
        if x is None:
            continue
        if x.device != lead.device:
            raise ValueError(f"{first} are on {lead.device} but {name} are on {x.device}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be fp64, fp32, bf16 or fp16, got {x.dtype}")
        if x.shape[-1:] == (0,):
            raise ValueError(f"{name} have no dims: {tuple(x.shape)}")


def widest_dtype(tensors: Iterable[Tensor | None]) -> torch.dtype:
    return functools.reduce(torch.promote_types, [x.dtype for x in tensors if x is not None])


def several(group: ProcessGroup | None) -> bool:
    """Whether there is anyone to talk to."""
    if group is None:
        return False
    if not isinstance(group, ProcessGroup):
        raise ValueError(f"process_group must be one that this rank is in, got {group!r}")
    return group.size() > 1


def check_sides(batch: ScoreBatch) -> None:
    """[M, D] and [N, D], where the losses run."""
    queries, passages = batch.queries, batch.passages
    if queries.dim() != 2 or passages.dim() != 2:
        raise ValueError(
            f"queries and passages must be [M, D] and [N, D], got {tuple(queries.shape)} and "
            f"{tuple(passages.shape)}"
        )
    if passages.shape[1] != queries.shape[1]:
        raise ValueError(
            f"queries have D={queries.shape[1]} but passages have D={passages.shape[1]}"
        )
    if queries.device.type not in DEFAULT_WORKSPACE:
        raise ValueError(f"embeddings are on {queries.device}: the losses run on cpu and cuda")


def guide_sides(
    name: str, guide: tuple[Tensor, Tensor] | None, M: int, N: int
) -> dict[str, Tensor]:
    """Both sides of a guide or reference, by names for the messages."""
    if guide is None:
        return {}
    queries, passages = guide
    if [x.dim() for x in guide] != [2, 2] or [len(x) for x in guide] != [M, N]:
        raise ValueError(
            f"{name} must be [{M}, G] and [{N}, G], got {tuple(queries.shape)} and "
            f"{tuple(passages.shape)}"
        )
    if queries.shape[1] != passages.shape[1]:
        raise ValueError(
            f"{name} queries have G={queries.shape[1]} but {name} passages have "
            f"G={passages.shape[1]}"
        )
    return {f"{name} queries": queries, f"{name} passages": passages}


def in_one_dtype(
    guide: tuple[Tensor, Tensor] | None, embeddings: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """Without gradient; above fp32 only where the embeddings are."""
    if guide is None:
        return None
    dtype = widest_dtype(guide)
    if dtype == torch.float64:
        dtype = compute_dtype(embeddings)
    queries, passages = guide
    return queries.detach().to(dtype), passages.detach().to(dtype)


def own_negatives(call: InfoNCECall) -> tuple[Tensor | None, Tensor | None]:
    """(own [H, D], offsets [M + 1])."""
    (M, D), own, offsets = call.queries.shape, call.own_negatives, call.own_offsets
    if own is None:
        if offsets is not None:
            raise ValueError("own_offsets are given without own_negatives")
        return None, None
    if QP not in call.directions:
        raise ValueError(
            f"own_negatives belong to {QP}, which is not among directions={call.directions}"
        )
    shape = tuple(own.shape)
    if own.dim() == 2 and shape[1] == D:
        if offsets is None:
            raise ValueError(f"own_negatives [H, D]={shape} need own_offsets [{M + 1}]")
        return own, offsets
    if own.dim() == 3 and (shape[0], shape[2]) == (M, D):
        if offsets is not None:
            raise ValueError(
                f"own_offsets belong to own_negatives [H, D], not to [M, K, D]={shape}"
            )
        K = own.shape[1]
        return own.reshape(M * K, D), torch.arange(M + 1, device=own.device) * K
    raise ValueError(f"own_negatives must be [{M}, K, {D}] or [H, {D}], got {shape}")


# --- who belongs to whom ---


def relations_of(
    batch: ScoreBatch, labels: Tensor, guide: tuple[Tensor, Tensor] | None, **more: Tensor | None
) -> Relations:
    """`more`: what the batch itself has not, by their names in `Relations`."""
    excluded_offsets, excluded_columns = batch.excluded or (None, None)
    guide_queries, guide_passages = guide or (None, None)
    return Relations(
        labels_M=labels, query_ids_M=batch.query_ids, passage_ids_N=batch.passage_ids,
        excluded_offsets=excluded_offsets, excluded_columns=excluded_columns,
        guide_queries=guide_queries, guide_passages=guide_passages, **more,
    )  # fmt: skip


def group_labels(M: int, N: int, device: torch.device) -> tuple[Tensor, int]:
    """(labels of passages in equal groups per query, positive first; passages a group)."""
    if M and (N < M or N % M):
        raise ValueError(
            f"without labels, passages must come in equal groups per query, positive first: "
            f"{N} passages do not divide by {M} queries"
        )
    group = N // max(M, 1)
    return torch.arange(0, M * group, max(group, 1), device=device), group


def group_owners(call: InfoNCECall, group: int) -> Tensor | None:
    """[N]: the query of a passage's group, where an option asks whom a passage was chosen for."""
    M, N, (chosen, other) = len(call.queries), len(call.passages), call.hardness
    asked = call.false_negative_margin is not None or PP in call.directions or chosen != other
    return torch.arange(N, device=call.queries.device) // group if M and asked else None


def check_relations(relations: Relations, batch: ScoreCall) -> None:
    """Dtypes, shapes and devices; on CUDA the device asserts what it can of the values, which
    several ranks look at before their passages meet."""
    M, N, device = len(batch.queries), len(batch.passages), batch.queries.device
    for name, tensor, length in (
        ("labels", relations.labels_M, M),
        ("query_ids", relations.query_ids_M, M),
        ("passage_ids", relations.passage_ids_N, N),
        ("curated", relations.curated_N, N),
        ("excluded offsets", relations.excluded_offsets, M + 1),
        ("excluded columns", relations.excluded_columns, None),
        ("positives offsets", relations.positive_offsets, M + 1),
        ("positives columns", relations.positive_columns, None),
        ("own_offsets", relations.own_offsets, M + 1),
    ):
        if tensor is None:
            continue
        shape = (tensor.numel() if length is None else length,)
        if tensor.shape != shape or tensor.dtype != torch.int64 or tensor.device != device:
            raise ValueError(
                f"{name} must be int64 {list(shape)} on {device}, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )
    if device.type == "cuda" and not several(batch.process_group):
        assert_values(relations, batch.labels is not None, N)


def assert_values(relations: Relations, labels_given: bool, N: int) -> None:
    columns = [relations.labels_M] if labels_given else []
    for column in (*columns, relations.positive_columns, relations.excluded_columns):
        if column is not None:
            torch._assert_async(((column >= 0) & (column < N)).all(), f"not all columns < {N}")
    if relations.own_offsets is not None:
        torch._assert_async(relations.own_offsets[0] == 0, "own_offsets do not start at 0")
    if relations.positive_offsets is not None:
        rows_P, columns_P, _ = positive_pairs(relations, torch.float32)
        keys = (rows_P * N + columns_P).sort().values
        torch._assert_async((keys[1:] > keys[:-1]).all(), "positives repeat, or hold the label")


def check_values(relations: Relations, N: int, H: int) -> None:
    """What only the values tell, for tensors on the CPU, where looking at them costs no sync."""
    M = len(relations.labels_M)
    _check_range("labels", relations.labels_M, 0, N, "passages")
    if relations.curated_N is not None:
        _check_range("curated", relations.curated_N, APART, M, "queries")
    for name, offsets, columns in (
        ("excluded", relations.excluded_offsets, relations.excluded_columns),
        ("positives", relations.positive_offsets, relations.positive_columns),
    ):
        if offsets is not None and columns is not None:
            _check_range(f"{name} columns", columns, 0, N, "passages")
            _check_offsets(f"{name} offsets", offsets, len(columns), "columns")
    if relations.own_offsets is not None:
        _check_offsets("own_offsets", relations.own_offsets, H, "own_negatives")
    if relations.positive_offsets is not None:
        rows_P, columns_P, _ = positive_pairs(relations, torch.float32)
        keys, counts = (rows_P * N + columns_P).unique(return_counts=True)
        if (counts > 1).any():
            i, a = divmod(int(keys[counts > 1][0]), N)
            raise ValueError(
                f"positives must be distinct and without the label: query {i} has passage {a} twice"
            )


def _check_range(name: str, values: Tensor, low: int, stop: int, what: str) -> None:
    if not values.numel():
        return
    least, most = (int(x) for x in values.aminmax())
    if least < low or most >= stop:
        raise ValueError(f"{name} lie in [{least}, {most}] but there are {stop} {what}")


def _check_offsets(name: str, offsets: Tensor, length: int, what: str) -> None:
    if offsets[0] != 0 or offsets[-1] != length or (offsets.diff() < 0).any():
        raise ValueError(
            f"{name} must rise from 0 to the {length} {what}, got "
            f"{offsets[0].item()} ... {offsets[-1].item()}"
        )


# --- numbers, memory, and the device ---


def one_number(name: str, x: Tensor, device: torch.device) -> Tensor:
    """A number given as a tensor, for its gradient."""
    if x.numel() != 1:
        raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got a tensor of {x.dtype}")
    if x.device.type != "cpu" and x.device != device:
        raise ValueError(
            f"{name} must be on the CPU or with the queries on {device}, got {x.device}"
        )
    return x.reshape(())


def as_scale(
    temperature: float | None, scale: float | Tensor | None, scale_on: torch.device | str,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """The scale as a tensor: the caller's, or a new one on `scale_on`."""
    if temperature is not None and scale is not None:
        raise ValueError(f"give temperature or scale, not both (got {temperature} and {scale})")
    if isinstance(scale, Tensor):
        return one_number("scale", scale, device)
    name, value = ("scale", scale) if scale is not None else ("temperature", temperature)
    value = 0.02 if value is None else value
    if isinstance(value, Tensor):
        raise ValueError(
            "temperature must be a number; a tensor goes in as scale = 1 / temperature"
        )
    if not 0 < value < math.inf or not 0 < 1 / value < math.inf:
        raise ValueError(f"{name} must be > 0 and finite, got {value}")
    # fp64: the ops cast it once, to the dtype they compute in
    value = value if name == "scale" else 1 / value
    return torch.full((), value, dtype=torch.float64, device=scale_on)


def check_workspace(options: ScoreOptions, N: int, embeddings: Tensor) -> None:
    workspace = options.workspace(embeddings.device)
    if workspace < (row_bytes := N * compute_dtype(embeddings.dtype).itemsize):
        raise ValueError(
            f"workspace_bytes={workspace} is too small for one row of {N} passages: "
            f"it takes {row_bytes}"
        )


def check_precision(options: ScoreOptions, embeddings: Tensor) -> None:
    """That no other than exact products are asked for where there are none."""
    if options.precision == "exact":
        return
    if not takes_triton(embeddings, options):
        raise ValueError(
            f"precision={options.precision!r} is of backend 'triton', but on {embeddings.device} "
            "'torch' is taken: leave it out, or take backend='triton' on CUDA"
        )
    of = torch.float32 if options.precision == "tf32x3" else torch.bfloat16
    if embeddings.dtype != of:
        raise ValueError(
            f"precision={options.precision!r} is of embeddings of {of}, but these are "
            f"{embeddings.dtype}: leave it out"
        )
    if options.precision == "fp8" and embeddings.device.type == "cuda":
        has = torch.cuda.get_device_capability(embeddings.device)
        if has < FP8:
            raise ValueError(
                f"precision='fp8' needs a GPU of compute capability {FP8[0]}.{FP8[1]} or later, "
                f"this one's is {has[0]}.{has[1]}: leave it out"
            )


def takes_triton(q: Tensor, options: ScoreOptions) -> bool:
    """On CUDA, except in fp64; chunks of torch GEMMs elsewhere and where asked for."""
    on_gpu, exact = q.device.type == "cuda", q.dtype == torch.float64
    if options.backend == "torch" or (options.backend is None and (exact or not on_gpu)):
        return False
    if exact:
        raise ValueError("backend='triton' computes in fp32: embeddings of fp64 take 'torch'")
    if not on_gpu and not _is_interpreted():
        raise ValueError(
            f"backend='triton' needs CUDA, but the embeddings are on {q.device}: take 'torch', or "
            "set TRITON_INTERPRET=1 before triton is imported to debug its kernels"
        )
    return True


def _is_interpreted() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return triton.knobs.runtime.interpret
