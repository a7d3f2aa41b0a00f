"""What a loss over a batch is asked: its options, its tensors, and what one pass over them gives.

Options are said once, under the names that users know, and read where they act. They cross a
registered op as text, since ops take tensors and plain values alone.

M queries, N passages, H own negatives, P positive pairs, B ranked queries, K of their passages,
D dims, L prefixes.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, NamedTuple, Self

import torch
from torch import Tensor

from rankpo_kernels.relations import Relations
from rankpo_kernels.workspace import workspace_of

Backend = Literal["torch", "triton"]
Precision = Literal["exact", "tf32x3", "fp8"]
Direction = Literal["query_to_passage", "passage_to_query", "query_to_query", "passage_to_passage"]
HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
LossType = Literal["sigmoid", "hinge"]

QP: Final = "query_to_passage"
PQ: Final = "passage_to_query"
QQ: Final = "query_to_query"
PP: Final = "passage_to_passage"
DIRECTIONS: tuple[Direction, ...] = (QP, PQ, QQ, PP)
IN_BATCH, HARD = "in_batch_negatives", "hard_negatives"
HARDNESS_MODES = (IN_BATCH, HARD, "all_negatives")
SIGMOID, HINGE, SIGLIP = KINDS = ("sigmoid", "hinge", "siglip")


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype that losses compute in: fp32 for everything up to fp32, fp64 for fp64."""
    return torch.float64 if stored == torch.float64 else torch.float32


def gradient_dtype(stored: torch.dtype) -> torch.dtype:
    """The inputs' dtype, but fp32 for fp16, in which unscaled gradients underflow."""
    return torch.float32 if stored == torch.float16 else stored


# --- options ---


@dataclass(frozen=True)
class Settings:
    """What is no tensor and crosses a registered op; wrong values are named when it is made."""

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """ValueError that names what is wrong."""

    def check_one_of(self, name: str, allowed: tuple[str | None, ...]) -> None:
        if (value := getattr(self, name)) not in allowed:
            names = ", ".join([repr(value) for value in allowed])
            raise ValueError(f"{name} must be one of {names}, got {value!r}")

    def check_no_tensor(self, *names: str) -> None:
        for name in names:
            if isinstance(getattr(self, name), Tensor):
                raise ValueError(f"{name} must be a number: as a tensor it would get no gradient")

    @classmethod
    def of(cls, options: "Settings", **more: Any) -> Self:
        """From options that have all its fields but `more`."""
        names = [name for name in cls.__dataclass_fields__ if name not in more]
        values = {name: getattr(options, name) for name in names} | more
        return cls(**{name: _plain(value) for name, value in values.items()})

    def text(self) -> str:
        """In steps that torch.compile can trace, which json's encoder is not."""
        items = [f'"{of.name}": {_json(getattr(self, of.name))}' for of in fields(self)]
        return "{" + ", ".join(items) + "}"

    @classmethod
    @functools.lru_cache(maxsize=256)
    def parse(cls, text: str) -> Self:
        return cls(**{name: _plain(value) for name, value in json.loads(text).items()})


def _plain(value: Any) -> Any:
    """Numbers of other types as Python's, lists and arrays as tuples."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float)):  # under torch.compile maybe a symbol, and a number by this
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Tensor):
        return value.item() if value.dim() == 0 else tuple(value.tolist())
    if hasattr(value, "__iter__"):
        return tuple([_plain(element) for element in value])
    return int(value) if hasattr(value, "__index__") else float(value)


def _json(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join([_json(element) for element in value]) + "]"
    return f'"{value}"' if isinstance(value, str) else f"{value}"


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(Settings):
    """Of every loss over the scores of a batch."""

    normalize: bool = True  # similarities are cosines, else dot products
    workspace_bytes: int | None = None  # for one chunk of scores; None: the device's
    backend: Backend | None = None  # None: triton on CUDA, torch elsewhere and in fp64
    precision: Precision = "exact"  # of products, where triton has others

    def check(self) -> None:
        super().check()
        self.check_one_of("backend", (None, "torch", "triton"))
        self.check_one_of("precision", ("exact", "tf32x3", "fp8"))
        if self.workspace_bytes is not None and not isinstance(self.workspace_bytes, int):
            raise ValueError(f"workspace_bytes must be an integer, got {self.workspace_bytes!r}")

    def workspace(self, device: torch.device) -> int:
        """Bytes for one chunk of scores."""
        if self.workspace_bytes is not None:
            return self.workspace_bytes
        return workspace_of(device)


@dataclass(frozen=True, kw_only=True)
class InfoNCEOptions(ScoreOptions):
    """What stays from batch to batch; `rankpo_fast.info_nce_loss` says what each means. A new
    option is a field here and its check below: callers, ops and kernels have it by that."""

    label_smoothing: float = 0.0
    directions: Sequence[Direction] = (QP,)
    partition: Literal["joint", "per_direction"] = "joint"
    false_negative_margin: float | None = None
    margin_type: Literal["absolute", "relative"] = "absolute"
    matryoshka_dims: Sequence[int] | None = None
    matryoshka_weights: Sequence[float] | None = None
    hardness_mode: HardnessMode | None = None
    hardness_strength: float = 0.0
    gradient_filter: float = 0.0

    def check(self) -> None:
        super().check()
        self.check_one_of("partition", ("joint", "per_direction"))
        self.check_one_of("margin_type", ("absolute", "relative"))
        self.check_one_of("hardness_mode", (None, *HARDNESS_MODES))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if not 0 <= self.gradient_filter < 1:
            raise ValueError(f"gradient_filter must lie in [0, 1), got {self.gradient_filter}")
        for name in ("false_negative_margin", "hardness_strength"):
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
        if self.gradient_filter and not self.plain:
            raise ValueError(
                "gradient_filter goes with query_to_passage alone, without label_smoothing or "
                "matryoshka_dims"
            )
        judged = self.matryoshka_dims is not None or self.false_negative_margin is not None
        cosines = self.normalize and {*directions} <= {QP, PQ}
        if self.precision == "fp8" and (judged or not cosines):
            raise ValueError(
                "precision='fp8' goes with cosines of query_to_passage and passage_to_query, "
                "without matryoshka_dims or false_negative_margin"
            )
        self._check_matryoshka()

    def _check_matryoshka(self) -> None:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if dims is None:
            if weights is not None:
                raise ValueError(f"matryoshka_weights {weights} are given without matryoshka_dims")
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

    @property
    def plain(self) -> bool:
        """One softmax per query over one block of scores, as far as options say."""
        one_way = tuple(self.directions) == (QP,)
        return one_way and self.matryoshka_dims is None and self.label_smoothing == 0

    @property
    def joint(self) -> bool:
        """One softmax over all directions, or the mean of one each."""
        return self.partition == "joint"

    @property
    def hardness(self) -> tuple[float, float]:
        """(of negatives that were chosen for the query, of others): what is added to a logit of
        query_to_passage, per similarity."""
        strength = self.hardness_strength
        return (
            0.0 if self.hardness_mode == IN_BATCH else strength,
            0.0 if self.hardness_mode == HARD else strength,
        )

    def levels(self, D: int) -> list[tuple[int, float]]:
        """(prefix, weight) of each level, the shortest first; D alone without matryoshka_dims."""
        if self.matryoshka_dims is None:
            return [(D, 1.0)]
        weights = self.matryoshka_weights or [1.0] * len(self.matryoshka_dims)
        return sorted(zip(self.matryoshka_dims, weights, strict=True))


@dataclass(frozen=True, kw_only=True)
class InfoNCESettings(InfoNCEOptions):
    """Options, and where the queries stand among those of several ranks."""

    group: str | None = None  # the process group whose queries all count in a column
    window: tuple[int, int] | None = None  # a rank's own rows of q, where q holds those of all

    @property
    def own(self) -> slice:
        """The queries that have a loss, among all of q."""
        return slice(None) if self.window is None else slice(*self.window)


@dataclass(frozen=True, kw_only=True)
class InBatchSettings(ScoreOptions):
    """Of a loss that is a sum over pairs, see `chunked.in_batch`."""

    kind: str = SIGMOID  # of KINDS
    label_smoothing: float = 0.0
    rankpo_weight: float = 1.0
    sft_weight: float = 0.0
    sft_scale: float = 0.0

    def check(self) -> None:
        super().check()
        if self.precision == "fp8":
            raise ValueError("precision='fp8' is of info_nce_loss alone")


@dataclass(frozen=True, kw_only=True)
class MarginOptions(Settings):
    """What a margin costs, as `rankpo_fast.rankpo_loss` takes it."""

    beta: float = 2.0
    temperature: float = 0.1
    gamma_beta_ratio: float = 0.0
    label_smoothing: float = 0.0
    loss_type: LossType = "sigmoid"

    def check(self) -> None:
        super().check()
        self.check_no_tensor(
            "beta", "temperature", "gamma_beta_ratio", "label_smoothing", "loss_type"
        )
        for name in ("beta", "temperature"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {value}")
        if not -math.inf < self.gamma_beta_ratio < math.inf:
            raise ValueError(f"gamma_beta_ratio must be finite, got {self.gamma_beta_ratio}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.loss_type not in ("sigmoid", "hinge"):
            raise ValueError(f"loss_type must be 'sigmoid' or 'hinge', got {self.loss_type!r}")


@dataclass(frozen=True, kw_only=True)
class MixtureOptions(MarginOptions):
    """sft_weight of the two-way cross entropy of a pair, and rankpo_weight of its margin's cost."""

    sft_weight: float = 0.0
    rankpo_weight: float = 1.0

    def check(self) -> None:
        super().check()
        self.check_no_tensor("sft_weight", "rankpo_weight")
        sft, rankpo = self.sft_weight, self.rankpo_weight
        if not (sft >= 0 and rankpo >= 0 and 0 < sft + rankpo < math.inf):
            raise ValueError(
                f"sft_weight and rankpo_weight must be >= 0 and not both 0, got {sft} and {rankpo}"
            )


@dataclass(frozen=True, kw_only=True)
class RankPOSettings(MixtureOptions):
    """Of passages ranked for a query, see `chunked.rankpo`."""

    listwise: bool = False  # plackett_luce
    by_ndcg: bool = False  # lambda
    normalize: bool = True

    @property
    def hinge(self) -> bool:
        return self.loss_type == "hinge"


# --- problems: tensors and options, checked; and results ---


class InfoNCEProblem(NamedTuple):
    """One batch of InfoNCE, as kernels take it."""

    q_MD: Tensor
    p_ND: Tensor
    own_HD: Tensor | None  # own negatives of the queries
    scale: Tensor  # one number, on the CPU or with the embeddings
    relations: Relations
    settings: InfoNCESettings

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        """What may have a gradient."""
        return self.q_MD, self.p_ND, self.own_HD, self.scale


class Needs(NamedTuple):
    """Which gradients of InfoNCE are asked for."""

    q: bool = False
    p: bool = False
    own: bool = False
    scale: bool = False


class InfoNCEResult(NamedTuple):
    """What one pass gives; gradients are of sum_i w_i loss_i, None where none were asked for."""

    loss_M: Tensor  # unweighted
    positive_M: Tensor  # similarity of the label
    hardest_M: Tensor  # similarity of the hardest negative, -inf if there is none
    dq_MD: Tensor | None = None
    dp_ND: Tensor | None = None
    d_own_HD: Tensor | None = None
    d_scale: Tensor | None = None
    total: Tensor | None = None  # sum_i w_i loss_i, where it came along


class InBatchProblem(NamedTuple):
    """One batch of a loss that is a sum over pairs, as kernels take it."""

    q_MD: Tensor
    p_ND: Tensor
    scale: Tensor
    bias: Tensor
    relations: Relations  # its guide is the reference
    settings: InBatchSettings

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What may have a gradient."""
        return self.q_MD, self.p_ND, self.scale, self.bias


class InBatchResult(NamedTuple):
    """What one pass gives; gradients are of sum_i w_i loss_i, None where none were asked for."""

    loss_M: Tensor  # sum over the open pairs of the row, unweighted
    positive_M: Tensor  # similarity of the label
    hardest_M: Tensor  # similarity of the hardest open passage, -inf if there is none
    wins_M: Tensor  # number of open pairs with x < 0
    total_M: Tensor  # sum of their x
    dq_MD: Tensor | None = None
    dp_ND: Tensor | None = None
    d_scale: Tensor | None = None
    d_bias: Tensor | None = None


class RankPOProblem(NamedTuple):
    """Passages ranked for queries, as kernels take them."""

    q_BD: Tensor
    passages: list[Tensor]  # [B, D] or [B, K, D] each, one after the other; of one dtype
    grades_BK: Tensor | None  # NaN: no passage; None: two passages, the first preferred
    reference_BC: Tensor | None  # similarities of the first C passages, 0 for the others
    settings: RankPOSettings

    @property
    def K(self) -> int:
        """How many passages a query has."""
        return sum([x.shape[1] if x.dim() == 3 else 1 for x in self.passages])

    def prepared(
        self, weights_B: Tensor | None, needs: Sequence[bool], new: Callable[..., Tensor]
    ) -> tuple["RankPOProblem", Tensor | None, "RankPOResult"]:
        """Grades, reference and weights as launchers read them, and a result to be filled, whose
        gradients are made by new(like, dtype=...), contiguous."""
        q_BD, dtype = self.q_BD, compute_dtype(self.q_BD.dtype)
        grades_BK, reference_BC, weights_B = (
            None if x is None else x.to(dtype).contiguous()
            for x in (self.grades_BK, self.reference_BC, weights_B)
        )
        tensors = (q_BD, *self.passages)
        grads = [
            new(x, dtype=gradient_dtype(x.dtype)) if need else None
            for x, need in zip(tensors, needs or [False] * len(tensors), strict=True)
        ]
        loss_B = q_BD.new_empty(len(q_BD), dtype=dtype)
        result = RankPOResult(loss_B, q_BD.new_empty(len(q_BD), self.K, dtype=dtype), grads)
        return self._replace(grades_BK=grades_BK, reference_BC=reference_BC), weights_B, result


class RankPOResult(NamedTuple):
    loss_B: Tensor  # unweighted; fp32 (fp64)
    similarity_BK: Tensor
    grads: list[Tensor | None]  # of sum_b weights_b loss_b, for queries and each of the passages


def is_plain(relations: Relations, settings: InfoNCEOptions) -> bool:
    """One softmax per query over one block of scores: a row knows all it needs by itself."""
    more = relations.positive_offsets is not None or relations.own_offsets is not None
    return settings.plain and not more
