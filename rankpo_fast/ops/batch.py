"""What the losses over a batch are given: its tensors and options, and what can be wrong with them.

M queries, N passages, H own negatives, P positive pairs, D dims, G dims of a guide.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rankpo_fast.ops import ranks
from rankpo_fast.ops.common import Reduction, check_embeddings, row_weights, uniform_weight
from rankpo_kernels.norms import compute_dtype
from rankpo_kernels.objective import (
    APART,
    DEFAULT_WORKSPACE,
    DIRECTIONS,
    HARD,
    HARDNESS_MODES,
    PP,
    QP,
    Relations,
    Settings,
    expand,
    is_plain,
    positive_pairs,
)

Direction = Literal["query_to_passage", "passage_to_query", "query_to_query", "passage_to_passage"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]


class Batch(NamedTuple):
    """The tensors of one batch, as `info_nce_loss` takes them."""

    queries: Tensor
    passages: Tensor
    labels: Tensor | None = None
    weights: Tensor | None = None
    query_ids: Tensor | None = None
    passage_ids: Tensor | None = None
    excluded: tuple[Tensor, Tensor] | None = None
    positives: tuple[Tensor, Tensor] | None = None
    own_negatives: Tensor | None = None
    own_offsets: Tensor | None = None
    curated: Tensor | None = None
    guide: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class InfoNCEOptions:
    """What stays from batch to batch, as `info_nce_loss` takes it; wrong values are named when it
    is made."""

    normalize: bool = True
    reduction: Reduction = "mean"
    label_smoothing: float = 0.0
    directions: Sequence[Direction] = (QP,)
    partition: str = "joint"
    false_negative_margin: float | None = None
    margin_type: str = "absolute"
    matryoshka_dims: Sequence[int] | None = None
    matryoshka_weights: Sequence[float] | None = None
    hardness_mode: str | None = None
    hardness_strength: float = 0.0
    gradient_filter: float = 0.0
    workspace_bytes: int | None = None
    backend: str | None = None
    process_group: ProcessGroup | None = None
    exchange: str = "gather"

    def __post_init__(self):
        one_of = {
            "reduction": ("mean", "sum", "none"),
            "partition": ("joint", "per_direction"),
            "margin_type": ("absolute", "relative"),
            "hardness_mode": (None, *HARDNESS_MODES),
            "backend": (None, "torch", "triton"),
            "exchange": ("gather", "ring"),
        }
        for name, allowed in one_of.items():
            if getattr(self, name) not in allowed:
                names = ", ".join([repr(value) for value in allowed])
                raise ValueError(f"{name} must be one of {names}, got {getattr(self, name)!r}")
        if self.workspace_bytes is not None and not isinstance(self.workspace_bytes, int):
            raise ValueError(f"workspace_bytes must be an integer, got {self.workspace_bytes!r}")
        if self.exchange == "ring" and self.process_group is None:
            raise ValueError("exchange='ring' is given without process_group")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        for name in ("false_negative_margin", "gradient_filter", "hardness_strength"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {value}")
        directions = list(self.directions)
        known = all(direction in DIRECTIONS for direction in directions)
        if not directions or not known or len(set(directions)) < len(directions):
            raise ValueError(
                f"directions must be distinct and of {', '.join(DIRECTIONS)}, got {self.directions}"
            )
        if bool(self.hardness_mode) != bool(self.hardness_strength):
            raise ValueError(
                "hardness_mode and a hardness_strength > 0 go together, got "
                f"{self.hardness_mode!r} and {self.hardness_strength}"
            )
        if self.hardness_mode and QP not in directions:
            raise ValueError(f"hardness_mode is of {QP}, which is not among {directions}")
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if dims is None and weights is not None:
            raise ValueError(f"matryoshka_weights {weights} are given without matryoshka_dims")
        if dims is None:
            return
        if not len(dims) or len(set(dims)) < len(dims) or min(dims) < 1:
            raise ValueError(f"matryoshka_dims must be distinct and of 1 to D, got {dims}")
        if weights is None:
            return
        if len(weights) != len(dims):
            raise ValueError(
                f"matryoshka_weights must be one for each of the {len(dims)} matryoshka_dims, got "
                f"{len(weights)}"
            )
        if not all(0 <= weight < math.inf for weight in weights):
            raise ValueError(f"matryoshka_weights must be >= 0 and finite, got {weights}")

    def settings(self, device_type: str) -> Settings:
        dims = () if self.matryoshka_dims is None else list(self.matryoshka_dims)
        weights = [1.0] * len(dims) if self.matryoshka_weights is None else self.matryoshka_weights
        ascending = sorted(dims)
        margin, workspace_bytes = self.false_negative_margin, self.workspace_bytes
        return Settings(
            normalize=bool(self.normalize),
            workspace_bytes=(
                DEFAULT_WORKSPACE[device_type] if workspace_bytes is None else workspace_bytes
            ),
            directions=tuple([name for name in DIRECTIONS if name in self.directions]),
            joint=self.partition == "joint",
            label_smoothing=float(self.label_smoothing),
            margin=None if margin is None else float(margin),
            relative_margin=self.margin_type == "relative",
            dims=tuple(ascending),
            dim_weights=tuple([float(weights[dims.index(prefix)]) for prefix in ascending]),
            hardness_mode=self.hardness_mode,
            hardness_strength=float(self.hardness_strength),
            gradient_filter=float(self.gradient_filter),
            backend=self.backend,
        )


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
    if relations.excluded_offsets is not None:
        columns = relations.excluded_columns
        lists.append((expand(relations.excluded_offsets.diff(), len(columns)), columns))
    for rows, columns in lists:
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
            known_MN |= (query_M == query_M[i])[:, None] & (text_N == text_N[j])
    return known_MN


def checked(
    batch: Batch, options: InfoNCEOptions, judge: str = "guide"
) -> tuple[Tensor, Tensor, Tensor | None, Relations, Settings, Tensor]:
    """(q, p, own, relations, settings, row weights): everything that can be told without looking at
    values on a device. `judge` is what the batch's guide is called."""
    M, N, device = _check_embeddings(batch, options, judge)
    settings = options.settings(device.type)
    embeddings = (batch.queries, batch.passages, batch.own_negatives)
    dtypes = [x.dtype for x in embeddings if x is not None]
    dtype = functools.reduce(torch.promote_types, dtypes)
    check_workspace(settings, N, compute_dtype(dtype))
    own, own_offsets = _own_negatives(batch, settings)
    labels, curated = batch.labels, batch.curated
    if labels is None:
        if M and (N < M or N % M):
            raise ValueError(
                f"without labels, passages must come in equal groups per query, positive first: "
                f"{N} passages do not divide by {M} queries"
            )
        group = N // max(M, 1)
        labels = torch.arange(0, M * group, max(group, 1), device=device)
        chosen, other = settings.hardness
        asked = settings.margin is not None or PP in settings.directions or chosen != other
        if curated is None and M and asked:
            curated = torch.arange(N, device=device) // group
    none_chosen = own is None and (curated is None or (batch.curated is None and N == M))
    if settings.hardness_mode == HARD and M and none_chosen:
        raise ValueError(
            "hardness_mode='hard_negatives' finds none: give curated, own_negatives, or (without "
            "labels) more than one passage per query"
        )
    relations = Relations(
        labels, *(batch.positives or (None, None)), batch.query_ids, batch.passage_ids,
        *(batch.excluded or (None, None)), own_offsets, curated,
        *_guide(batch.guide, dtype),
    )  # fmt: skip
    unlike = settings.hardness_mode or not is_plain(relations, settings)
    if settings.gradient_filter and unlike:
        raise ValueError(
            "gradient_filter goes with query_to_passage alone, without positives, own_negatives, "
            "label_smoothing, matryoshka_dims or hardness_mode"
        )
    _check_integers(relations, M, N, device)
    if device.type == "cuda" and not ranks.several(options.process_group):
        _assert_in_range(relations, batch.labels is not None, N)
    q, p, own = (x if x is None else x.to(dtype) for x in (batch.queries, batch.passages, own))
    weights = uniform_weight(M, options.reduction)
    if batch.weights is not None:
        weights = row_weights(q, batch.weights, M, options.reduction)
    return q, p, own, relations, settings, weights


def _check_embeddings(
    batch: Batch, options: InfoNCEOptions, judge: str
) -> tuple[int, int, torch.device]:
    queries, passages = batch.queries, batch.passages
    if queries.dim() != 2 or passages.dim() != 2:
        raise ValueError(
            f"queries and passages must be [M, D] and [N, D], got {tuple(queries.shape)} and "
            f"{tuple(passages.shape)}"
        )
    (M, D), N, device = queries.shape, passages.shape[0], queries.device
    if passages.shape[1] != D:
        raise ValueError(f"queries have D={D} but passages have D={passages.shape[1]}")
    if device.type not in DEFAULT_WORKSPACE:
        raise ValueError(f"embeddings are on {device}: the losses run on cpu and cuda")
    others = {"passages": passages, "own_negatives": batch.own_negatives}
    if batch.guide is not None:
        others[f"{judge} queries"], others[f"{judge} passages"] = guide = batch.guide
        if judge == "guide" and options.false_negative_margin is None:
            raise ValueError("guide decides about the false_negative_margin, which is not given")
        if [x.dim() for x in guide] != [2, 2] or [len(x) for x in guide] != [M, N]:
            raise ValueError(
                f"{judge} must be [{M}, G] and [{N}, G], got {tuple(guide[0].shape)} and "
                f"{tuple(guide[1].shape)}"
            )
        if guide[0].shape[1] != guide[1].shape[1]:
            raise ValueError(
                f"{judge} queries have G={guide[0].shape[1]} but {judge} passages have "
                f"G={guide[1].shape[1]}"
            )
    check_embeddings({"queries": queries} | others)
    if options.matryoshka_dims is not None and max(options.matryoshka_dims) > D:
        raise ValueError(
            f"matryoshka_dims must be distinct and of 1 to D={D}, got {options.matryoshka_dims}"
        )
    return M, N, device


def _guide(guide: tuple[Tensor, Tensor] | None, embeddings: torch.dtype) -> list[Tensor]:
    """In one dtype, above fp32 only where the embeddings are."""
    if guide is None:
        return []
    dtype = torch.promote_types(*[x.dtype for x in guide])
    if dtype == torch.float64:
        dtype = compute_dtype(embeddings)
    return [x.detach().to(dtype) for x in guide]


def _own_negatives(batch: Batch, settings: Settings) -> tuple[Tensor | None, Tensor | None]:
    """(own [H, D], offsets [M + 1])."""
    (M, D), own, offsets = batch.queries.shape, batch.own_negatives, batch.own_offsets
    if own is None:
        if offsets is not None:
            raise ValueError("own_offsets are given without own_negatives")
        return None, None
    if QP not in settings.directions:
        raise ValueError(
            f"own_negatives belong to {QP}, which is not among directions={settings.directions}"
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


def check_workspace(settings: Settings, N: int, dtype: torch.dtype) -> None:
    if settings.workspace_bytes < (row_bytes := N * dtype.itemsize):
        raise ValueError(
            f"workspace_bytes={settings.workspace_bytes} is too small for one row of {N} passages: "
            f"it takes {row_bytes}"
        )


def _check_integers(relations: Relations, M: int, N: int, device: torch.device) -> None:
    (
        labels, positive_offsets, positive_columns, query_ids, passage_ids,
        excluded_offsets, excluded_columns, own_offsets, curated, *_,
    ) = relations  # fmt: skip
    for name, tensor, length in (
        ("labels", labels, M),
        ("query_ids", query_ids, M),
        ("passage_ids", passage_ids, N),
        ("curated", curated, N),
        ("excluded offsets", excluded_offsets, M + 1),
        ("excluded columns", excluded_columns, None),
        ("positives offsets", positive_offsets, M + 1),
        ("positives columns", positive_columns, None),
        ("own_offsets", own_offsets, M + 1),
    ):
        if tensor is None:
            continue
        shape = (tensor.numel() if length is None else length,)
        if tensor.shape != shape or tensor.dtype != torch.int64 or tensor.device != device:
            raise ValueError(
                f"{name} must be int64 {list(shape)} on {device}, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}"
            )


def _assert_in_range(relations: Relations, labels_given: bool, N: int) -> None:
    """The same for columns on CUDA, where asking would cost a sync: the device asserts."""
    columns = [relations.labels_M] if labels_given else []
    columns += [relations.positive_columns, relations.excluded_columns]
    for column in columns:
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
        if offsets is not None:
            _check_range(f"{name} columns", columns, 0, N, "passages")
            _check_offsets(f"{name} offsets", offsets, len(columns), "columns")
    if relations.own_offsets is not None:
        _check_offsets("own_offsets", relations.own_offsets, H, "own_negatives")
    if relations.positive_offsets is not None:
        rows_P, columns_P, _ = positive_pairs(relations, torch.float32)
        keys, counts = (rows_P * N + columns_P).unique(return_counts=True)
        if (counts > 1).any():
            i, a = divmod(keys[counts > 1][0].item(), N)
            raise ValueError(
                f"positives must be distinct and without the label: query {i} has passage {a} twice"
            )


def _check_range(name: str, values: Tensor, low: int, stop: int, what: str) -> None:
    if not values.numel():
        return
    least, most = (x.item() for x in values.aminmax())
    if least < low or most >= stop:
        raise ValueError(f"{name} lie in [{least}, {most}] but there are {stop} {what}")


def _check_offsets(name: str, offsets: Tensor, length: int, what: str) -> None:
    if offsets[0] != 0 or offsets[-1] != length or (offsets.diff() < 0).any():
        raise ValueError(
            f"{name} must rise from 0 to the {length} {what}, got "
            f"{offsets[0].item()} ... {offsets[-1].item()}"
        )


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


def takes_triton(q: Tensor, settings: Settings) -> bool:
    """On CUDA, except in fp64; chunks of torch GEMMs elsewhere and where asked for."""
    on_gpu, exact = q.device.type == "cuda", q.dtype == torch.float64
    if settings.window is not None:
        return False  # the kernels have no queries besides those with a loss
    if settings.group is not None and not len(q):
        return False  # a rank without queries takes part in the collectives
    if settings.backend == "torch" or (settings.backend is None and (exact or not on_gpu)):
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
