"""Similarities of (query, chosen, rejected) rows and their gradients, in one pass over each.

    similarity_b = <q_b, x_b> * a_b * i_b,   a = 1/|q|, i = 1/|x| (ones without normalisation)
    d similarity/dq = a (i x - similarity a q),   d similarity/dx = i (a q - similarity i x)

B pairs, D dims. fp32 on the CPU goes to the native library, which reads each row once; everything
else is torch.
Both return the same: similarities [2, B] (chosen, rejected) and inverse norms [3, B] (query,
chosen, rejected).
"""

from torch import Tensor

from rankpo_kernels import native
from rankpo_kernels.norms import compute_dtype, inverse_norms


def pair_forward(
    q_BD: Tensor, c_BD: Tensor, r_BD: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Similarities [2, B] and inverse norms [3, B], in fp32 (fp64 for fp64 inputs)."""
    q_BD, c_BD, r_BD = _computable(q_BD, c_BD, r_BD)
    pairs, dtype = q_BD.shape[0], q_BD.dtype
    similarities_2B = q_BD.new_empty(2, pairs)
    inverse_3B = q_BD.new_empty(3, pairs)
    if native.usable(q_BD, c_BD, r_BD):
        native.pair_forward(q_BD, c_BD, r_BD, normalize, similarities_2B, inverse_3B)
        return similarities_2B, inverse_3B
    for inverse_B, x_BD in zip(inverse_3B, (q_BD, c_BD, r_BD), strict=True):
        inverse_B.copy_(inverse_norms(x_BD, dtype)) if normalize else inverse_B.fill_(1)
    q_BD = q_BD * inverse_3B[0, :, None]
    for similarity_B, x_BD, inverse_B in zip(
        similarities_2B, (c_BD, r_BD), inverse_3B[1:], strict=True
    ):
        similarity_B.copy_((q_BD * x_BD).sum(1) * inverse_B)
    return similarities_2B, inverse_3B


def pair_backward(
    q_BD: Tensor, c_BD: Tensor, r_BD: Tensor, normalize: bool,
    similarities_2B: Tensor, inverse_3B: Tensor, similarity_grads_2B: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, chosen and rejected [B, D] in the inputs' dtype."""
    stored = q_BD.dtype
    q_BD, c_BD, r_BD = _computable(q_BD, c_BD, r_BD)
    grads_2B = similarity_grads_2B.contiguous()
    if native.usable(q_BD, c_BD, r_BD):
        dq_BD, dc_BD, dr_BD = (q_BD.new_empty(q_BD.shape) for _ in range(3))
        native.pair_backward(
            q_BD, c_BD, r_BD, normalize, similarities_2B, inverse_3B, grads_2B, dq_BD, dc_BD, dr_BD
        )
        return dq_BD.to(stored), dc_BD.to(stored), dr_BD.to(stored)
    # Unit rows: [B, D]; without normalisation the factors are ones and the radial part is absent.
    iq_B1, ic_B1, ir_B1 = inverse_3B[:, :, None]
    q_BD, c_BD, r_BD = q_BD * iq_B1, c_BD * ic_B1, r_BD * ir_B1
    gc_B1, gr_B1 = grads_2B[:, :, None]
    along_c_B1, along_r_B1 = (grads_2B * similarities_2B * normalize)[:, :, None]
    dq_BD = iq_B1 * (gc_B1 * c_BD + gr_B1 * r_BD - (along_c_B1 + along_r_B1) * q_BD)
    dc_BD = ic_B1 * (gc_B1 * q_BD - along_c_B1 * c_BD)
    dr_BD = ir_B1 * (gr_B1 * q_BD - along_r_B1 * r_BD)
    return dq_BD.to(stored), dc_BD.to(stored), dr_BD.to(stored)


def _computable(*tensors: Tensor) -> list[Tensor]:
    dtype = compute_dtype(tensors[0].dtype)
    return [t.to(dtype) if t.stride(-1) == 1 else t.to(dtype).contiguous() for t in tensors]
