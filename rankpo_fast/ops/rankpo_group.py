"""RankPO for graded groups: several passages of a query, some preferred to others.

    pairs:          mean of `rankpo_loss` over the ordered pairs (a, b) with grade_a > grade_b
    plackett_luce:  -sum over a of log(exp(r_a) / (exp(r_a) + sum over b of lower grade exp(r_b)))
                    r = beta (s - s_reference) / temperature, over the a that have such a b
    lambda:         sum of |change in nDCG if a and b swapped places| * `rankpo_loss` of (a, b)

The second is the likelihood of the ranking under Plackett and Luce's model (Rafailov et al. 2023,
appendix A.3), in which ties are not compared with each other. The third is LambdaLoss (Wang et al.
2018), as LiPO-lambda has it for preferences (Liu et al. 2024): places are those by similarity, and
the weights have no gradient. B queries, K passages, D dims.
"""

from typing import Any

import torch
from torch import Tensor

from rankpo_fast.ops.common import unit_rows
from rankpo_fast.ops.options import Form, RankPOGroupCall, takes
from rankpo_fast.ops.rankpo import check_ranking, margin_loss, ranking_loss
from rankpo_kernels.problem import RankPOProblem, RankPOSettings


def rankpo_group_definition(
    q_BD: Tensor, p_BKD: Tensor, grades_BK: Tensor, reference_BK: Tensor | None = None,
    *, form: Form = "pairs", normalize: bool = True, beta: float = 2.0, temperature: float = 0.1,
    **options: Any,
) -> Tensor:  # fmt: skip
    """Losses [B], a query, a passage at a time: what the op must equal."""
    unit = unit_rows if normalize else Tensor.clone
    loss_B = []
    for b, grades_K in enumerate(grades_BK):
        there = ~grades_K.isnan()
        s_K, g_K = unit(p_BKD[b, there]) @ unit(q_BD[b : b + 1])[0], grades_K[there]
        ref_K = s_K.new_zeros(len(s_K)) if reference_BK is None else reference_BK[b, there]
        r_K = beta * (s_K - ref_K) / temperature
        terms: list[Tensor] = []
        for a in range(len(s_K)):
            lower = g_K < g_K[a]
            if form == "plackett_luce":
                if lower.any():
                    terms.append(torch.cat([r_K[a : a + 1], r_K[lower]]).logsumexp(0) - r_K[a])
                continue
            margins: dict[str, Any] = {"reference_margins": ref_K[a] - ref_K[lower]}
            options |= {"beta": beta, "temperature": temperature}
            losses = margin_loss(s_K[a] - s_K[lower], **margins, **options)
            if form == "lambda":
                losses = losses * _ndcg_changes_definition(s_K.detach(), g_K, a)[lower]
            terms += losses
        total = torch.stack(terms).sum() if terms else 0 * s_K.sum() + 0 * q_BD[b].sum()
        loss_B.append(total / max(1, len(terms)) if form == "pairs" else total)
    return torch.stack(loss_B)


def _ndcg_changes_definition(s_K: Tensor, g_K: Tensor, a: int) -> Tensor:
    """|change in nDCG| [K] if passage a and each other swapped their places."""
    gain_K = g_K.clamp(min=0).double().exp2() - 1
    order_K = s_K.sort(descending=True, stable=True).indices
    discount_K = 1 / torch.arange(2, len(g_K) + 2, device=s_K.device).double().log2()
    ideal = (gain_K.sort(descending=True).values * discount_K).sum()
    changes = []
    for b in range(len(g_K)):
        swapped_K = gain_K.clone()
        swapped_K[[a, b]] = gain_K[[b, a]]
        changes.append((discount_K * (swapped_K - gain_K)[order_K]).sum().abs())
    return (torch.stack(changes) / ideal.masked_fill(ideal == 0, torch.inf)).to(s_K.dtype)


@takes(RankPOGroupCall)
def rankpo_group_loss(call: RankPOGroupCall) -> Tensor:
    """RankPO loss of graded groups. With two passages a query and distinct grades both forms are
    `rankpo_loss`.

    Args:
        queries: [B, D] of fp64, fp32, bf16 or fp16.
        passages: [B, K, D], same device; where dtypes differ, the wider one is taken.
        grades: [B, K], the higher the better; only their order in fp32 counts, but for "lambda".
            NaN is padding: no passage, whatever its embedding.
        form: "pairs", the mean over all pairs of different grades (0 if there is none);
            "plackett_luce", the negative log-likelihood of the ranking, which is a sum over
            passages and is not divided by their number; "lambda", the sum over pairs of different
            grades, each weighed by what nDCG would change if the two swapped places. Its gains are
            2^grade - 1, of grades below 0 none; torch computes it, on CUDA too.
        reference_similarities: [B, K] under the frozen reference model; None is reference-free.
        beta, temperature, normalize, reduction: as in `rankpo_loss`.
        gamma_beta_ratio, label_smoothing, loss_type: as in `rankpo_loss`; not of "plackett_luce".
        weights: [B] >= 0, the importance of each query.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes, devices or options that do not fit, or that mean nothing for the form.
    """
    return ranking_loss(check_group(call), call.weights, call.reduction)


def check_group(call: RankPOGroupCall) -> RankPOProblem:
    queries, passages, grades = call.queries, call.passages, call.grades
    if queries.dim() != 2 or passages.dim() != 3 or not passages.shape[1]:
        shapes = tuple(queries.shape), tuple(passages.shape)
        raise ValueError(
            "queries and passages must be [B, D] and [B, K, D], got {}, {}".format(*shapes)
        )
    (B, D), (_, K, _) = queries.shape, passages.shape
    if passages.shape != (B, K, D):
        raise ValueError(f"passages must be [{B}, K, {D}], got {tuple(passages.shape)}")
    if grades.shape != (B, K) or grades.device != queries.device:
        raise ValueError(
            f"grades must be {[B, K]} on {queries.device}, got {list(grades.shape)} on "
            f"{grades.device}"
        )
    settings = RankPOSettings.of(
        call, listwise=call.form == "plackett_luce", by_ndcg=call.form == "lambda",
        sft_weight=0.0, rankpo_weight=1.0,
    )  # fmt: skip
    reference = ("reference_similarities", call.reference_similarities)
    return check_ranking(queries, {"passages": passages}, grades, reference, settings)
