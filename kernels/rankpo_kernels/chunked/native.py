"""The native CPU library through ctypes: row work in one pass over memory.

Where the library was not built, or does not match this file, `library()` says so once and the
callers use torch.
Pointers are taken from named, contiguous tensors only: that of a temporary would be freed before C
reads it.
"""

import ctypes
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankpo_kernels.problem import KINDS, InBatchSettings, RankPOSettings

ABI_VERSION = 7
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as `RankPORows` counts them
MOST_PASSAGES = 256  # RANKPO_MOST_PASSAGES
GROUP = 64  # RANKPO_GROUP


class _InfoNCERows(ctypes.Structure):  # InfoNCERows of kernels/native/rankpo_native.h
    _fields_ = [
        ("scores", ctypes.c_void_p),
        ("column_scale", ctypes.c_void_p),
        ("labels", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("stop", ctypes.c_void_p),
        ("known_columns", ctypes.c_void_p),
        ("limit", ctypes.c_void_p),
        ("judge", ctypes.c_void_p),
        ("judge_scale", ctypes.c_void_p),
        ("curated", ctypes.c_void_p),
        ("row_weights", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
        ("positive", ctypes.c_void_p),
        ("hardest", ctypes.c_void_p),
        ("d_logits", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("tops", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("first_row", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("chosen_hardness", ctypes.c_float),
        ("other_hardness", ctypes.c_float),
    ]


class _InfoNCEPrefixes(ctypes.Structure):  # InfoNCEPrefixes of kernels/native/rankpo_native.h
    _fields_ = [
        ("levels", ctypes.POINTER(_InfoNCERows)),
        ("along", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    ]


class _OwnRows(ctypes.Structure):  # OwnRows of kernels/native/rankpo_native.h
    _fields_ = [
        *[
            (name, ctypes.c_void_p)
            for name in ("scores", "unit", "own", "inverse", "offsets", "d_unit", "d_own")
        ],
        *[(name, ctypes.c_int64) for name in ("rows", "columns", "width", "dims")],
        ("normalize", ctypes.c_int32),
    ]


class _BothDirections(ctypes.Structure):  # BothDirections of kernels/native/rankpo_native.h
    _fields_ = [
        *[
            (name, ctypes.c_void_p)
            for name in (
                "exponentials", "share", "labels", "row_slopes", "column_scale", "column_slopes",
                "label_slopes",
            )
        ],
        *[(name, ctypes.c_int64) for name in ("rows", "columns")],
    ]  # fmt: skip


class _InBatchRows(ctypes.Structure):  # InBatchRows of kernels/native/rankpo_native.h
    _fields_ = [
        *[
            (name, ctypes.c_void_p)
            for name in (
                "scores", "column_scale", "labels", "first", "last", "start", "stop",
                "known_columns", "reference", "reference_scale", "row_weights", "loss", "positive",
                "hardest", "wins", "total", "d_scale", "d_bias",
            )
        ],
        *[(name, ctypes.c_int64) for name in ("rows", "columns", "kind")],
        *[
            (name, ctypes.c_float)
            for name in (
                "scale", "bias", "label_smoothing", "rankpo_weight", "sft_weight", "sft_scale",
            )
        ],
    ]  # fmt: skip


class _Rows(ctypes.Structure):  # Rows of kernels/native/rankpo_native.h
    _fields_ = [
        ("values", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("dims", ctypes.c_int64),
    ]


class _RankPORows(ctypes.Structure):  # RankPORows of kernels/native/rankpo_native.h
    _fields_ = [
        ("query", ctypes.c_void_p),
        ("passages", ctypes.c_void_p),
        ("passage_strides", ctypes.c_void_p),
        ("grades", ctypes.c_void_p),
        ("reference", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
        ("similarities", ctypes.c_void_p),
        ("query_grad", ctypes.c_void_p),
        ("passage_grads", ctypes.c_void_p),
        ("grad_strides", ctypes.c_void_p),
        ("query_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("dims", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("reference_count", ctypes.c_int64),
        ("beta", ctypes.c_float),
        ("temperature", ctypes.c_float),
        ("gamma_beta_ratio", ctypes.c_float),
        ("label_smoothing", ctypes.c_float),
        ("sft_weight", ctypes.c_float),
        ("rankpo_weight", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("hinge", ctypes.c_int32),
        ("listwise", ctypes.c_int32),
        ("normalize", ctypes.c_int32),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None (with one warning) where it is missing or of another version."""
    paths = sorted(Path(__file__).parent.parent.glob("librankpo_native*"))
    if not paths:
        warnings.warn(
            "rankpo-fast's native CPU library is not built (no C++ compiler at install time?): "
            "losses on the CPU take the slower torch path. Install a C++ compiler and reinstall.",
            stacklevel=2,
        )
        return None
    lib = ctypes.CDLL(str(paths[-1]))
    lib.rankpo_instruction_set.restype = ctypes.c_char_p
    if (found := lib.rankpo_abi_version()) != ABI_VERSION:
        warnings.warn(
            f"{paths[-1]} has ABI version {found}, this release needs {ABI_VERSION}: losses on "
            "the CPU take the slower torch path. Reinstall rankpo-fast.",
            stacklevel=2,
        )
        return None
    threads, pointer = ctypes.c_int32, ctypes.c_void_p
    lib.rankpo_info_nce_rows.argtypes = [ctypes.POINTER(_InfoNCERows), threads]
    lib.rankpo_info_nce_prefixes.argtypes = [ctypes.POINTER(_InfoNCEPrefixes), threads]
    lib.rankpo_own_dots.argtypes = [ctypes.POINTER(_OwnRows), threads]
    lib.rankpo_own_gradients.argtypes = [ctypes.POINTER(_OwnRows), threads]
    lib.rankpo_column_sums.argtypes = [ctypes.POINTER(_BothDirections), pointer, threads]
    lib.rankpo_both_directions.argtypes = [ctypes.POINTER(_BothDirections), threads]
    lib.rankpo_in_batch_rows.argtypes = [ctypes.POINTER(_InBatchRows), threads]
    lib.rankpo_inverse_norms.argtypes = [ctypes.POINTER(_Rows), pointer, threads]
    lib.rankpo_tangent.argtypes = [ctypes.POINTER(_Rows), pointer, pointer, pointer, threads]
    lib.rankpo_rankpo_rows.argtypes = [ctypes.POINTER(_RankPORows), threads]
    lib.rankpo_will_be_written.argtypes = [pointer, ctypes.c_int64]
    for function in (
        lib.rankpo_info_nce_rows, lib.rankpo_info_nce_prefixes, lib.rankpo_own_dots,
        lib.rankpo_own_gradients, lib.rankpo_column_sums, lib.rankpo_both_directions,
        lib.rankpo_in_batch_rows, lib.rankpo_inverse_norms, lib.rankpo_tangent,
        lib.rankpo_rankpo_rows, lib.rankpo_will_be_written,
    ):  # fmt: skip
        function.restype = None
    return lib


def _loaded() -> ctypes.CDLL:
    """For whoever has asked whether it is `usable`."""
    lib = library()
    assert lib is not None
    return lib


def instruction_sets() -> dict[str, str]:
    """By which sums on the CPU are rounded: of our rows ("avx2", or "torch" without the library),
    and of torch's own kernels ("AVX2")."""
    lib = library()
    rows = "torch" if lib is None else lib.rankpo_instruction_set().decode()
    return {"rows": rows, "torch": torch.backends.cpu.get_cpu_capability()}


def usable(*tensors: Tensor) -> bool:
    """Whether the library can take these tensors: fp32 on the CPU, last dimension contiguous."""
    fits = all(
        t.dtype == torch.float32
        and t.device.type == "cpu"
        and (t.stride(-1) == 1 or t.shape[-1] == 1)
        for t in tensors
    )
    return fits and library() is not None


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.int64, torch.int32)
    return tensor.data_ptr()


def info_nce_rows(*arguments: Any, **more: Any) -> None:
    """One chunk of rows, in place, as `rows` has it."""
    chunk = rows(*arguments, **more)
    _loaded().rankpo_info_nce_rows(ctypes.byref(chunk), torch.get_num_threads())


def rows(
    scores_RN: Tensor, column_scale: Tensor | None, labels: Tensor,
    known: tuple[Tensor, ...] | None,  # first [R], last [R], start [E], stop [E], columns [N]
    limit: Tensor | None, judge: tuple[Tensor, Tensor] | None, curated: Tensor | None,
    row_weights: Tensor | None,
    loss: Tensor, positive: Tensor, hardest: Tensor, d_logits: Tensor | None,
    first_row: int, scale: float, hardness: tuple[float, float] = (0.0, 0.0), *,
    row_scale: Tensor | None = None, sums: Tensor | None = None, tops: Tensor | None = None,
) -> _InfoNCERows:  # fmt: skip
    """The fields of `InfoNCERows`; the tensors must live as long."""
    tensors = (
        scores_RN, column_scale, labels, *(known or (None,) * 5), limit, *(judge or (None,) * 2),
        curated, row_weights, row_scale, loss, positive, hardest, d_logits, sums, tops,
    )  # fmt: skip
    return _InfoNCERows(*map(_pointer, tensors), *scores_RN.shape, first_row, scale, *hardness)


def info_nce_prefixes(levels: Sequence[_InfoNCERows], like: Tensor) -> Tensor:
    """The same of several prefixes, in place: see `InfoNCEPrefixes`. Returns [L, N]: sums over the
    rows of dots times their gradients, with row_weights."""
    groups, N = -(-levels[0].rows // GROUP), levels[0].columns
    along = like.new_empty(groups, len(levels) + 1, N)
    array = (_InfoNCERows * len(levels))(*levels)
    chunk = _InfoNCEPrefixes(array, along.data_ptr(), len(levels))
    _loaded().rankpo_info_nce_prefixes(ctypes.byref(chunk), torch.get_num_threads())
    return along[:, :-1].sum(0)


def own_rows(
    scores_RC: Tensor, unit_RD: Tensor, own_HD: Tensor, inverse_H: Tensor, offsets: Tensor,
    width: int, normalize: bool, d_unit_RD: Tensor | None = None, d_own_HD: Tensor | None = None,
) -> _OwnRows:  # fmt: skip
    """The fields of `OwnRows`; the tensors must live as long."""
    tensors = scores_RC, unit_RD, own_HD, inverse_H, offsets, d_unit_RD, d_own_HD
    R, C = scores_RC.shape
    return _OwnRows(*map(_pointer, tensors), R, C - width, width, own_HD.shape[1], normalize)


def own_dots(rows: _OwnRows) -> None:
    _loaded().rankpo_own_dots(ctypes.byref(rows), torch.get_num_threads())


def own_gradients(rows: _OwnRows) -> None:
    _loaded().rankpo_own_gradients(ctypes.byref(rows), torch.get_num_threads())


def column_sums(exponentials_RN: Tensor, share_R: Tensor) -> Tensor:
    """[N] in fp64: sum_i share_i e_ij."""
    sums_N = exponentials_RN.new_empty(exponentials_RN.shape[1], dtype=torch.float64)
    none = (None,) * 5
    chunk = _BothDirections(
        *map(_pointer, (exponentials_RN, share_R)), *none, *exponentials_RN.shape
    )
    _loaded().rankpo_column_sums(ctypes.byref(chunk), sums_N.data_ptr(), torch.get_num_threads())
    return sums_N


def both_directions_(
    exponentials_RN: Tensor, share_R: Tensor, labels_R: Tensor, row_slopes_R: Tensor,
    column_scale_N: Tensor, column_slopes_N: Tensor, label_slopes_R: Tensor,
) -> None:  # fmt: skip
    """In place: e_ij := e_ij (row_slopes_i column_scale_j + share_i column_slopes_j), and the
    labels' elements."""
    tensors = (
        exponentials_RN, share_R, labels_R, row_slopes_R, column_scale_N, column_slopes_N,
        label_slopes_R,
    )  # fmt: skip
    chunk = _BothDirections(*map(_pointer, tensors), *exponentials_RN.shape)
    _loaded().rankpo_both_directions(ctypes.byref(chunk), torch.get_num_threads())


def in_batch_rows(
    scores_RN: Tensor, column_scale: Tensor, labels: Tensor,
    known: tuple[Tensor, ...] | None,  # first [R], last [R], start [E], stop [E], columns [N]
    reference: tuple[Tensor, Tensor] | None, row_weights: Tensor, outputs: list[Tensor],
    scale: float, bias: float, settings: InBatchSettings,
) -> None:  # fmt: skip
    """One chunk of rows, in place; the arguments are the fields of `InBatchRows`."""
    tensors = (
        scores_RN, column_scale, labels, *(known or (None,) * 5), *(reference or (None,) * 2),
        row_weights, *outputs,
    )  # fmt: skip
    chunk = _InBatchRows(
        *map(_pointer, tensors), *scores_RN.shape, KINDS.index(settings.kind), scale, bias,
        settings.label_smoothing, settings.rankpo_weight, settings.sft_weight, settings.sft_scale,
    )  # fmt: skip
    _loaded().rankpo_in_batch_rows(ctypes.byref(chunk), torch.get_num_threads())


def inverse_norms(x_ND: Tensor, inverse_N: Tensor) -> None:
    """Fill 1 / |x_n|; 0 for a zero vector."""
    rows = _Rows(x_ND.data_ptr(), x_ND.stride(0), *x_ND.shape)
    _loaded().rankpo_inverse_norms(ctypes.byref(rows), _pointer(inverse_N), torch.get_num_threads())


def tangent_(grad_ND: Tensor, x_ND: Tensor, inverse_N: Tensor, factor_N: Tensor | None) -> None:
    """In place: grad_n := factor_n (grad_n - <grad_n, u_n> u_n), u_n = x_n / |x_n|."""
    rows = _Rows(x_ND.data_ptr(), x_ND.stride(0), *x_ND.shape)
    _loaded().rankpo_tangent(
        ctypes.byref(rows), *map(_pointer, (inverse_N, factor_N, grad_ND)), torch.get_num_threads()
    )


def new_empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous memory of the same shape, in huge pages where the kernel has some."""
    return in_huge_pages(torch.empty(like.shape, dtype=dtype, device=like.device))


def in_huge_pages(new: Tensor) -> Tensor:
    """The same tensor, if all of it will be written."""
    if new.device.type == "cpu" and usable():
        _loaded().rankpo_will_be_written(new.data_ptr(), new.nbytes)
    return new


def rankpo_rows(
    q_BD: Tensor, passages: Sequence[Tensor], passage_grads: Sequence[Tensor | None],
    grades_BK: Tensor | None, reference_BC: Tensor | None, weights_B: Tensor | None,
    loss_B: Tensor, similarity_BK: Tensor, dq_BD: Tensor | None, settings: RankPOSettings,
) -> None:  # fmt: skip
    """Fill losses, similarities and the gradients that are there; the arguments are the fields of
    `RankPORows`."""
    pointers, integers = ctypes.c_void_p * len(passages), ctypes.c_int64 * len(passages)
    address = lambda x: None if x is None else x.data_ptr()  # noqa: E731
    stride = lambda x: 0 if x is None else x.stride(0)  # noqa: E731
    lists = (
        pointers(*map(address, passages)), integers(*map(stride, passages)),
        pointers(*map(address, passage_grads)), integers(*map(stride, passage_grads)),
    )  # fmt: skip
    p, p_strides, dp, dp_strides = (ctypes.addressof(values) for values in lists)
    rows = map(_pointer, (grades_BK, reference_BC, weights_B, loss_B, similarity_BK))
    chunk = _RankPORows(
        q_BD.data_ptr(), p, p_strides, *rows, address(dq_BD), dp, dp_strides,
        q_BD.stride(0), *q_BD.shape, len(passages),
        0 if reference_BC is None else reference_BC.shape[1],
        settings.beta, settings.temperature, settings.gamma_beta_ratio, settings.label_smoothing,
        settings.sft_weight, settings.rankpo_weight, TYPES[q_BD.dtype], int(settings.hinge),
        int(settings.listwise), int(settings.normalize),
    )  # fmt: skip
    _loaded().rankpo_rankpo_rows(ctypes.byref(chunk), torch.get_num_threads())
