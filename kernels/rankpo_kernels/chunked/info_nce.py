"""InfoNCE on chunks of rows, on any device: GEMMs and the work between them, never M x N.

    s_ij = scale * <a_i, b_j> / (|a_i| |b_j|),   loss and slopes dS from rankpo_kernels.objective

    plain     one softmax per query, fp32 on the CPU: a native row pass between the GEMMs    6MND
    both      of both directions, the same: exponentials that are kept              6 to 8MND
    prefixes  of dims, the same: one pass over the rows of all                               6MND
    general   everything else: `combine` turns statistics of rows and columns into slopes,
              from which dS is written                                               6 to 8MND

M queries, N passages, H own negatives, D dims.
"""

from torch import Tensor

from rankpo_kernels.chunked import native
from rankpo_kernels.chunked.info_nce_both import both, takes_both
from rankpo_kernels.chunked.info_nce_general import general
from rankpo_kernels.chunked.info_nce_plain import plain, takes_plain
from rankpo_kernels.chunked.info_nce_prefixes import prefixes, takes_prefixes
from rankpo_kernels.objective import expanded_weights, on_device
from rankpo_kernels.problem import (
    InfoNCEProblem,
    InfoNCEResult,
    Needs,
    compute_dtype,
    gradient_dtype,
)


def info_nce(
    problem: InfoNCEProblem, weights_M: Tensor | None = None,
    needs: tuple[bool, bool, bool, bool] = (False,) * 4,
) -> InfoNCEResult:  # fmt: skip
    """Losses of all queries and, given weights ([M], or [] for all), the gradients of
    sum_i w_i loss_i that `needs` (q, p, own, scale) names.

    With gradient_filter, the two products of a chunk of the plain form leave out the rows that have
    the least to learn, whose pulls (`objective.by_pull`) sum to that share of the chunk's.
    """
    q_MD, p_ND, own_HD, scale, relations, settings = problem
    dtype, device = compute_dtype(q_MD.dtype), q_MD.device
    problem = problem._replace(scale=on_device(scale, device, dtype))
    needed = Needs() if weights_M is None else Needs(*needs)
    needed = needed._replace(own=needed.own and own_HD is not None)
    if weights_M is not None:
        M = len(relations.rows(settings.window).labels_M)
        weights_M = expanded_weights(weights_M, M, device, dtype)
    result: InfoNCEResult | None = None
    if native.usable(q_MD.new_empty(0, dtype=dtype)):
        if takes_plain(problem):
            result = plain(problem, weights_M, needed)
        elif takes_prefixes(problem):
            result = prefixes(problem, weights_M, needed)
        elif takes_both(problem, needed):
            result = both(problem, weights_M, needed)
    if result is None:
        result = general(problem, weights_M, needed)
    stored = {"dq_MD": q_MD, "dp_ND": p_ND, "d_own_HD": own_HD}
    return result._replace(**{
        name: grad.to(gradient_dtype(x.dtype))
        for name, x in stored.items()
        if x is not None and (grad := getattr(result, name)) is not None
    })  # fmt: skip
