"""Losses of every pair of a batch by itself: RankPO of each query's positive against every other
passage, and SigLIP's sigmoid loss.

    margin_ij = ((s_i,label - s_ij) - (r_i,label - r_ij)) / temperature - gamma_beta_ratio
    RankPO: loss_i = mean over j of the pair loss of `rankpo`
    SigLIP: loss_i = -sum over j of logsigmoid(z_ij (scale s_ij + bias)),  z = -1, for the label 1

j are the passages that are not known to query i, for SigLIP with its label; s are similarities, r
those of a frozen reference model.
M queries, N passages, D dims, G dims of the reference. The M x N scores are never stored: a pair's
gradient needs its own score and the positive's, so one pass over chunks of them has it all.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rankpo_fast.ops import ranks
from rankpo_fast.ops.batch import (
    Batch,
    InfoNCEOptions,
    as_scale,
    check_values,
    check_workspace,
    checked,
    known_definition,
    one_number,
    takes_triton,
)
from rankpo_fast.ops.common import Reduction, apart, mean, register_gradients, unit_rows
from rankpo_fast.ops.rankpo import LossType, MarginOptions, margin_loss
from rankpo_kernels import pointwise
from rankpo_kernels.norms import compute_dtype
from rankpo_kernels.objective import (
    SIGLIP,
    PairSettings,
    Relations,
    count_others,
    gradient_dtype,
    known,
    of_rows,
    softplus,
)
from rankpo_kernels.pointwise import PairResult


def in_batch_rankpo_definition(
    q_MD: Tensor, p_ND: Tensor, relations: Relations, normalize: bool = True, **margin: Any
) -> Tensor:
    """Losses [M]: what the op must equal; the reference is the relations' guide. Stores M x N."""
    unit, labels_M1 = unit_rows if normalize else Tensor.clone, relations.labels_M[:, None]

    def advantage(q: Tensor, p: Tensor) -> Tensor:
        s_MN = unit(q) @ unit(p).T
        return s_MN.gather(1, labels_M1) - s_MN

    reference = None
    if relations.guide_queries is not None:
        reference = advantage(*(x.to(q_MD.dtype) for x in relations[-2:]))
    loss_MN = margin_loss(advantage(q_MD, p_ND), reference_margins=reference, **margin)
    known_MN = known_definition(relations, len(p_ND))
    return loss_MN.masked_fill(known_MN, 0).sum(1) / (~known_MN).sum(1).clamp(min=1)


def siglip_definition(
    q_MD: Tensor, p_ND: Tensor, scale: Tensor | float, bias: Tensor | float, relations: Relations,
    normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Losses [M]: what the op must equal. Stores M x N."""
    unit, labels_M1 = unit_rows if normalize else Tensor.clone, relations.labels_M[:, None]
    x_MN = scale * (unit(q_MD) @ unit(p_ND).T) + bias
    known_MN = known_definition(relations, len(p_ND))
    loss_M = softplus(x_MN).masked_fill(known_MN, 0).sum(1)
    return loss_M + softplus(-x_MN.gather(1, labels_M1))[:, 0]


@torch.library.custom_op("rankpo_fast::pair_losses", mutates_args=())
def _pair_losses(
    q: Tensor, p: Tensor, scale: Tensor, bias: Tensor, relations: list[Tensor | None], settings: str
) -> Tensor:
    """Losses [M] in 2MND flops; their backward recomputes the scores (8MND in all)."""
    return apart(_launch(q, p, scale, bias, relations, settings)[0].loss_M)[0]


@torch.library.custom_op("rankpo_fast::pair_losses_grads", mutates_args=())
def _pair_losses_grads(
    q: Tensor, p: Tensor, scale: Tensor, bias: Tensor,
    relations: list[Tensor | None], settings: str, weights: Tensor, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """sum_i weights_i loss_i, losses, similarities of the positives, statistics [4, M] (hardest,
    wins, total x, pairs), and the gradients of (q, p, scale, bias); those not needed are empty."""
    result, count_M = _launch(q, p, scale, bias, relations, settings, weights, tuple(needs))
    stats_4M = torch.stack([result.hardest_M, result.wins_M, result.total_M, count_M])
    grads = [
        empty if grad is None else grad.to(empty.device)
        for grad, empty in zip(result[5:], _no_grads(q, scale, bias), strict=True)
    ]
    total = (weights * result.loss_M).sum()
    return total, *apart(result.loss_M, result.positive_M), stats_4M, *grads


def _launch(
    q, p, scale, bias, relations, settings, weights=None, needs=(False,) * 4
) -> tuple[PairResult, Tensor]:
    """What a row's sum is divided by joins its weight: kernels know sums alone. With it the number
    of pairs [M]."""
    relations, settings = Relations(*relations), PairSettings.parse(settings)
    if q.device.type == "cpu":
        check_values(relations, len(p), 0)
    launcher = pointwise.pair_losses
    if takes_triton(q, settings):
        from rankpo_kernels.gpu.pointwise import pair_losses as launcher  # Linux alone has triton
    keys, dtype = None, compute_dtype(q.dtype)
    count_M = q.new_full((len(q),), len(p) - 1, dtype=dtype)
    if any(x is not None for x in relations[3:7]):  # ids or exclusions, else it is the label alone
        keys = known(relations, len(p))
        count_M = count_others(keys).to(dtype)
    share = 1.0  # of a pair in its row's loss: a number where all rows have as many
    if settings.kind != SIGLIP:
        share = 1 / max(len(p) - 1, 1) if keys is None else 1 / count_M.clamp(min=1)
    if weights is not None:
        weights = of_rows(weights, len(q), q.device, dtype) * share
    # Triton launches on the current device, which need not be the tensors'
    with torch.autocast(q.device.type, enabled=False), torch.cuda.device_of(q):
        result = launcher(q, p, scale, bias, relations, keys, settings, weights, needs)
    return result._replace(loss_M=result.loss_M * share), count_M


def _no_grads(q: Tensor, scale: Tensor, bias: Tensor) -> list[Tensor]:
    """Empty tensors of the gradients' dtypes and devices; scale and bias may live on the CPU."""
    embeddings = [q.new_empty(0, dtype=gradient_dtype(q.dtype)) for _ in range(2)]
    return embeddings + [x.new_empty(0, dtype=compute_dtype(q.dtype)) for x in (scale, bias)]


@_pair_losses.register_fake
def _(q, *rest):
    return q.new_empty(q.shape[0], dtype=compute_dtype(q.dtype))


@_pair_losses_grads.register_fake
def _(q, p, scale, bias, relations, settings, weights, needs):
    rows = [q.new_empty(*size, q.shape[0], dtype=compute_dtype(q.dtype)) for size in ((), (), (4,))]
    grads = [
        empty.new_empty(x.shape) if need else empty
        for empty, x, need in zip(
            _no_grads(q, scale, bias), (q, p, scale, bias), needs, strict=True
        )
    ]
    return rows[0].new_empty(()), *rows, *grads


register_gradients(_pair_losses, _pair_losses_grads)


def _reduced(arguments: tuple, weights: Tensor, reduction: Reduction) -> Tensor:
    needs = [torch.is_grad_enabled() and x.requires_grad for x in arguments[:4]]
    if reduction == "none" or not any(needs):
        loss_M = _pair_losses(*arguments) * weights
        return loss_M if reduction == "none" else loss_M.sum()
    return _pair_losses_grads(*arguments, weights, needs)[0]


def in_batch_rankpo_loss(
    queries: Tensor,
    passages: Tensor,
    labels: Tensor | None = None,
    *,
    reference_queries: Tensor | None = None,
    reference_passages: Tensor | None = None,
    beta: float = 2.0,
    temperature: float = 0.1,
    gamma_beta_ratio: float = 0.0,
    label_smoothing: float = 0.0,
    loss_type: LossType = "sigmoid",
    normalize: bool = True,
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
    query_ids: Tensor | None = None,
    passage_ids: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    sft_weight: float = 0.0,
    rankpo_weight: float = 1.0,
    workspace_bytes: int | None = None,
    backend: Literal["torch", "triton"] | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """RankPO (arXiv 2503.10723) with the positive of each query preferred to every other passage of
    the batch; the loss of a query is the mean over these pairs.

    Args:
        queries, passages, labels: [M, D], [N, D] and [M] as in `info_nce_loss`.
        reference_queries, reference_passages: [M, G] and [N, G], embeddings of the frozen reference
            model, which receive no gradient. None is the reference-free form (SimRankPO).
        beta, temperature, gamma_beta_ratio, label_smoothing, loss_type, sft_weight, rankpo_weight:
            as in `rankpo_loss`.
        normalize, reduction, weights, query_ids, passage_ids, excluded, workspace_bytes, backend,
            process_group: as in `info_nce_loss`; who is no negative there makes no pair here.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs). A query without any pair has loss 0.

    Raises:
        ValueError: shapes, dtypes, devices, values or options that do not fit; across ranks on all
            of them. On CUDA without a group, columns out of range are a device-side assertion.
    """
    margin = {
        "beta": beta, "temperature": temperature, "gamma_beta_ratio": gamma_beta_ratio,
        "label_smoothing": label_smoothing, "loss_type": loss_type, "sft_weight": sft_weight,
        "rankpo_weight": rankpo_weight,
    }  # fmt: skip
    arguments, weights, _ = _rankpo_arguments(
        queries, passages, labels, margin, reference_queries=reference_queries,
        reference_passages=reference_passages, normalize=normalize, reduction=reduction,
        weights=weights, query_ids=query_ids, passage_ids=passage_ids, excluded=excluded,
        workspace_bytes=workspace_bytes, backend=backend, process_group=process_group,
    )  # fmt: skip
    return _reduced(arguments, weights, reduction)


class InBatchRankPOStats(NamedTuple):
    """What a training log wants to know of a batch; tensors on its device, no host sync. Of no
    queries all are 0."""

    accuracy: Tensor  # share of pairs with a margin above 0
    margin: Tensor  # mean over pairs
    positive_similarity: Tensor  # mean over queries
    hardest_negative_similarity: Tensor  # mean over the queries that have a pair


@torch.no_grad()
def in_batch_rankpo_loss_and_grads(
    queries: Tensor,
    passages: Tensor,
    labels: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, InBatchRankPOStats]:
    """`in_batch_rankpo_loss` and its gradients without autograd, for gradient caching and logging.

    Args:
        options: those of `in_batch_rankpo_loss`; the reduction is "mean" or "sum".

    Returns:
        (loss, d_queries [M, D], d_passages [N, D], stats), gradients in the dtypes of their inputs.
        Stats are those of a rank's own queries.
    """
    margin, options = split_margin(options)
    arguments, weights, of_all = _rankpo_arguments(queries, passages, labels, margin, **options)
    if options.get("reduction") == "none":  # told after the ranks have agreed on it
        raise ValueError("in_batch_rankpo_loss_and_grads needs one loss: reduction 'mean' or 'sum'")
    loss, _, positive_M, (hardest_M, wins_M, total_M, count_M), dq, dp, *_ = _pair_losses_grads(
        *arguments, weights, [True, True, False, False]
    )
    if of_all is not None:
        dp = ranks.sum_rows(dp, of_all.passages, of_all.group)
    pairs, has_pair_M = count_M.sum().clamp(min=1), count_M > 0
    stats = InBatchRankPOStats(
        wins_M.sum() / pairs,
        -total_M.sum() / pairs / margin.get("beta", MarginOptions.beta),
        mean(positive_M),
        hardest_M.masked_fill(~has_pair_M, 0).sum() / has_pair_M.sum().clamp(min=1),
    )
    return loss, dq.to(queries.dtype), dp.to(passages.dtype), stats


def siglip_loss(
    queries: Tensor,
    passages: Tensor,
    labels: Tensor | None = None,
    *,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    normalize: bool = True,
    reduction: Reduction = "mean",
    weights: Tensor | None = None,
    query_ids: Tensor | None = None,
    passage_ids: Tensor | None = None,
    excluded: tuple[Tensor, Tensor] | None = None,
    workspace_bytes: int | None = None,
    backend: Literal["torch", "triton"] | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Sigmoid loss of every pair of the batch (Zhai et al. 2023, SigLIP), summed over the passages
    of each query.

    Args:
        queries, passages, labels: [M, D], [N, D] and [M] as in `info_nce_loss`.
        scale, bias: of the similarities; as a tensor of one number each receives a gradient. The
            defaults are what the paper starts from.
        normalize, reduction, weights, query_ids, passage_ids, excluded, workspace_bytes, backend,
            process_group: as in `info_nce_loss`; who is no negative there is left out here. Across
            ranks the gradients of scale and bias are those of the own loss: their mean over ranks,
            which DDP takes, is the gradient of one process (of reduction "sum" their sum).

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, dtypes, devices, values or options that do not fit; across ranks on all
            of them. On CUDA without a group, columns out of range are a device-side assertion.
    """
    loss = PairLoss(scale, bias, {"kind": SIGLIP}, {"scale": scale, "bias": bias})
    arguments, weights, _ = _arguments(
        queries, passages, labels, (None, None), lambda: loss,
        normalize=normalize, reduction=reduction, weights=weights, query_ids=query_ids,
        passage_ids=passage_ids, excluded=excluded, workspace_bytes=workspace_bytes,
        backend=backend, process_group=process_group,
    )  # fmt: skip
    return _reduced(arguments, weights, reduction)


def split_margin(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of margins, and the others."""
    names = {field.name for field in fields(MarginOptions)}
    margin = {name: options[name] for name in options if name in names}
    return margin, {name: options[name] for name in options if name not in names}


class PairLoss(NamedTuple):
    """What tells pair losses apart."""

    scale: float | Tensor
    bias: float | Tensor
    form: dict[str, Any]  # fields of `PairSettings`
    said: dict[str, Any]  # what the caller said of them


def _rankpo_arguments(
    queries: Tensor, passages: Tensor, labels: Tensor | None, margin: dict[str, Any], *,
    reference_queries: Tensor | None = None, reference_passages: Tensor | None = None,
    **options: Any,
) -> tuple[tuple, Tensor, ranks.Ranks | None]:  # fmt: skip

    def loss() -> PairLoss:
        """x = -beta * margin, see `rankpo_kernels.pointwise`."""
        of = MarginOptions(**margin)
        form = {
            "kind": of.loss_type, "label_smoothing": float(of.label_smoothing),
            "rankpo_weight": float(of.rankpo_weight), "sft_weight": float(of.sft_weight),
            "sft_scale": 1 / of.temperature,
        }  # fmt: skip
        scale, bias = of.beta / of.temperature, of.beta * of.gamma_beta_ratio
        return PairLoss(scale, bias, form, asdict(of))

    reference = (reference_queries, reference_passages)
    return _arguments(queries, passages, labels, reference, loss, **options)


def _arguments(
    queries: Tensor, passages: Tensor, labels: Tensor | None,
    reference: tuple[Tensor | None, Tensor | None], loss: Callable[[], PairLoss], *,
    weights: Tensor | None = None, query_ids: Tensor | None = None,
    passage_ids: Tensor | None = None, excluded: tuple[Tensor, Tensor] | None = None,
    normalize: bool = True, reduction: Reduction = "mean", workspace_bytes: int | None = None,
    backend: str | None = None, process_group: ProcessGroup | None = None,
) -> tuple[tuple, Tensor, ranks.Ranks | None]:  # fmt: skip
    """The ops' arguments and the row weights, checked; with the passages of all ranks where there
    are several, who hear of it if `loss` refuses its options on one."""
    several = ranks.several(process_group)

    def prepare() -> ranks.Local:
        of = loss()
        options = InfoNCEOptions(
            normalize, reduction, workspace_bytes=workspace_bytes, backend=backend,
            process_group=process_group,
        )  # fmt: skip
        batch = Batch(
            queries, passages, labels, weights, query_ids, passage_ids, excluded,
            guide=_both(*reference),
        )  # fmt: skip
        of_rank = replace(options, reduction="sum") if several else options
        q, p, _, relations, settings, weights_M = checked(batch, of_rank, "reference")
        settings = PairSettings(**asdict(settings) | of.form)
        numbers = as_scale(None, of.scale, "cpu", q.device), _bias(of.bias, q.device)
        terms = {}
        if several:
            check_values(relations, len(p), 0)
            terms = {k: "a tensor" if isinstance(v, Tensor) else v for k, v in of.said.items()}
            terms = vars(options) | {"process_group": None} | terms
        return ranks.Local(q, p, relations, weights_M, terms, reduction, rest=(numbers, settings))

    if several:
        local, of_all = ranks.spread(process_group, queries.device, prepare)
        check_workspace(local.rest[1], len(local.p), compute_dtype(local.q.dtype))
    else:
        local, of_all = prepare(), None
    q, p, relations, weights_M = local[:4]
    numbers, settings = local.rest
    return (q, p, *numbers, list(relations), settings.text()), weights_M, of_all


def _both(
    reference_queries: Tensor | None, reference_passages: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    if (reference_queries is None) != (reference_passages is None):
        missing = "queries" if reference_queries is None else "passages"
        raise ValueError(f"a reference needs both its embeddings: reference_{missing} are missing")
    return None if reference_queries is None else (reference_queries, reference_passages)


def _bias(bias: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(bias, Tensor):
        return one_number("bias", bias, device)
    if not -math.inf < bias < math.inf:
        raise ValueError(f"bias must be finite, got {bias}")
    return torch.full((), bias, dtype=torch.float64)
