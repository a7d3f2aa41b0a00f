"""What callers of the losses say: a record of the arguments of each.

A public function takes the fields of its record as arguments (`takes`), so an option is declared
once: here, or in `rankpo_kernels.problem` where kernels read it. Wrong values are named when the
record is made.

M queries, N passages, H own negatives, B pairs, D dims, G dims of a guide or reference.
"""

import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rankpo_kernels.problem import (
    InfoNCEOptions,
    MarginOptions,
    MixtureOptions,
    ScoreOptions,
    Settings,
)

Form = Literal["pairs", "plackett_luce", "lambda"]
Reduction = Literal["mean", "sum", "none"]
ListPerQuery = tuple[
    Tensor, Tensor
]  # (offsets [M + 1], columns): of query i offsets[i] : offsets[i + 1]

P = ParamSpec("P")
Record = TypeVar("Record")
R = TypeVar("R")


def takes(record: Callable[P, Record]) -> Callable[[Callable[[Record], R]], Callable[P, R]]:
    """Make of a function of a record one of the record's fields."""

    signature = inspect.signature(record)
    names, kind = frozenset(signature.parameters), getattr(record, "__name__", "")
    order = [n for n, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]

    def decorate(function: Callable[[Record], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def public(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in names:
                    raise TypeError(f"{function.__name__} has no option {name}")
            try:
                if len(args) > len(order):
                    call = record(*args, **kwargs)
                else:  # by names, which torch.compile of 2.11 needs
                    named: Callable[..., Record] = record
                    call = named(**dict(zip(order, args, strict=False)), **kwargs)
            except TypeError as error:  # of too many arguments or too few
                words = str(error).replace(f"{kind}.__init__", function.__name__)
                raise TypeError(words) from None
            return function(call)

        returns = inspect.signature(function).return_annotation
        vars(public)["__signature__"] = signature.replace(return_annotation=returns)  # for help()
        return public

    return decorate


# --- tensors of a batch ---


@dataclass(frozen=True, eq=False)
class ScoreBatch:
    """[M, D], [N, D] and what relates them."""

    queries: Tensor
    passages: Tensor
    labels: Tensor | None = None
    _: KW_ONLY
    weights: Tensor | None = None
    query_ids: Tensor | None = None
    passage_ids: Tensor | None = None
    excluded: ListPerQuery | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class InfoNCEBatch(ScoreBatch):
    positives: ListPerQuery | None = None
    own_negatives: Tensor | None = None
    own_offsets: Tensor | None = None
    curated: Tensor | None = None
    guide: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class InBatchRankPOBatch(ScoreBatch):
    reference_queries: Tensor | None = None
    reference_passages: Tensor | None = None


# --- what stays from batch to batch ---


@dataclass(frozen=True, kw_only=True)
class CommonOptions(ScoreOptions):
    """Of every loss over the scores of a batch; `info_nce_loss` says what each means."""

    reduction: Reduction = "mean"
    process_group: ProcessGroup | None = None

    def check(self) -> None:
        self.check_one_of("reduction", ("mean", "sum", "none"))
        super().check()


@dataclass(frozen=True, kw_only=True)
class InfoNCELossOptions(CommonOptions, InfoNCEOptions):
    exchange: Literal["gather", "ring"] = "gather"

    def check(self) -> None:
        self.check_one_of("exchange", ("gather", "ring"))
        super().check()
        if self.exchange == "ring" and self.process_group is None:
            raise ValueError("exchange='ring' is given without process_group")


@dataclass(frozen=True, kw_only=True)
class InBatchRankPOOptions(CommonOptions, MixtureOptions):
    """Of the margins of a batch."""

    def check(self) -> None:
        super().check()
        if self.rankpo_weight:
            _warn_of_smoothing(self)


@dataclass(frozen=True, kw_only=True)
class RankPOOptions(MixtureOptions):
    """Of pairs."""

    normalize: bool = True
    reduction: Reduction = "mean"

    def check(self) -> None:
        super().check()
        _check_reduction(self.reduction)
        if self.rankpo_weight:
            _warn_of_smoothing(self)


@dataclass(frozen=True, kw_only=True)
class RankPOGroupOptions(MarginOptions):
    """Of graded groups."""

    form: Form = "pairs"
    normalize: bool = True
    reduction: Reduction = "mean"

    def check(self) -> None:
        self.check_one_of("form", ("pairs", "plackett_luce", "lambda"))
        neutral = {"gamma_beta_ratio": 0, "label_smoothing": 0, "loss_type": "sigmoid"}
        for name, nothing in neutral.items():
            if self.form == "plackett_luce" and (value := getattr(self, name)) != nothing:
                raise ValueError(
                    f"{name}={value!r} belongs to form='pairs', not to 'plackett_luce'"
                )
        super().check()
        _check_reduction(self.reduction)
        _warn_of_smoothing(self)


@dataclass(frozen=True, kw_only=True)
class DistillKLOptions(Settings):
    """Of similarities that follow a teacher's scores."""

    temperature: float = 0.02
    teacher_temperature: float = 1.0
    normalize: bool = True
    reduction: Reduction = "mean"

    def check(self) -> None:
        super().check()
        for name in ("temperature", "teacher_temperature"):
            self.check_no_tensor(name)
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {value}")
        _check_reduction(self.reduction)


@dataclass(frozen=True, kw_only=True)
class MarginMSEOptions(DistillKLOptions):
    """Of their margins."""

    pairs: Literal["all", "first"] = "all"

    def check(self) -> None:
        super().check()
        self.check_one_of("pairs", ("all", "first"))


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _warn_of_smoothing(margin: MarginOptions) -> None:
    """At the line that called this package, however deep in it the reason is found."""
    if margin.loss_type != "hinge" or not margin.label_smoothing or torch.compiler.is_compiling():
        return
    frame, level, inside = sys._getframe(), 1, ("rankpo_fast.", "rankpo_kernels.", "torch.")
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(inside):
        frame, level = frame.f_back, level + 1
    message = f"label_smoothing={margin.label_smoothing} has no effect with loss_type='hinge'"
    warnings.warn(message, stacklevel=level)


# --- calls ---


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Of similarities; a tensor receives a gradient."""

    temperature: float | None = None
    scale: float | Tensor | None = None


class Unchecked:
    """First of the bases of a call: it is checked not when it is made but by `across_ranks`, where
    other ranks hear of what is refused."""

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class InfoNCECall(Unchecked, InfoNCEBatch, InfoNCELossOptions, Scale):
    tensors: ClassVar[type] = InfoNCEBatch


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class InBatchRankPOCall(Unchecked, InBatchRankPOBatch, InBatchRankPOOptions):
    tensors: ClassVar[type] = InBatchRankPOBatch


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SigLIPCall(Unchecked, ScoreBatch, CommonOptions):
    tensors: ClassVar[type] = ScoreBatch
    scale: float | Tensor = 10.0
    bias: float | Tensor = -10.0


@dataclass(frozen=True, eq=False, repr=False)
class RankPOCall(RankPOOptions):
    queries: Tensor
    chosen: Tensor
    rejected: Tensor
    _: KW_ONLY
    reference_margins: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class RankPOGroupCall(RankPOGroupOptions):
    queries: Tensor
    passages: Tensor
    grades: Tensor
    _: KW_ONLY
    reference_similarities: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class DistillKLCall(DistillKLOptions):
    queries: Tensor
    passages: Tensor
    scores: Tensor
    _: KW_ONLY
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class MarginMSECall(MarginMSEOptions):
    queries: Tensor
    passages: Tensor
    scores: Tensor
    _: KW_ONLY
    weights: Tensor | None = None


DistillationCall = DistillKLCall | MarginMSECall
ScoreCall = InfoNCECall | InBatchRankPOCall | SigLIPCall


def terms(call: ScoreCall) -> dict[str, Any]:
    """What is said besides the batch, by name: the same on all ranks of a process group."""
    names = {of.name for of in fields(call)} - {of.name for of in fields(call.tensors)}
    values = {name: getattr(call, name) for name in sorted(names - {"process_group"})}
    return {k: "a tensor" if isinstance(v, Tensor) else v for k, v in values.items()}
