"""Problems for the losses that are sums over pairs: small, ragged, by name; and their answers."""

from dataclasses import fields

import torch

from rankpo_fast import in_batch_rankpo_loss, siglip_loss
from rankpo_fast.ops.common import row_weights
from rankpo_fast.ops.in_batch import in_batch_rankpo_definition, siglip_definition
from rankpo_kernels.problem import MixtureOptions
from rankpo_kernels.relations import Relations
from support.gates import draw, longest_product
from support.info_nce_problems import lists

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
M, N, D = 19, 37, 24  # two small tiles of rows, two of columns, none full

# name: (loss, tensors of the batch, options)
GRID = {
    "rankpo": ("rankpo", (), {}),
    "dots": ("rankpo", (), {"normalize": False}),
    "smoothing": ("rankpo", (), {"label_smoothing": 0.2}),
    "gamma": ("rankpo", (), {"gamma_beta_ratio": 0.7}),
    "beta": ("rankpo", (), {"beta": 0.5}),
    "hinge": ("rankpo", (), {"loss_type": "hinge"}),
    "sft": ("rankpo", (), {"sft_weight": 0.6}),
    "sft-alone": ("rankpo", (), {"sft_weight": 0.6, "rankpo_weight": 0.0}),
    "halved": ("rankpo", (), {"rankpo_weight": 0.5}),
    "reference": ("rankpo", ("reference",), {}),
    "weights": ("rankpo", ("weights",), {}),
    "ids": ("rankpo", ("ids",), {}),
    "excluded": ("rankpo", ("excluded",), {}),
    "everything": (
        "rankpo", ("reference", "weights", "ids", "excluded"),
        {"label_smoothing": 0.1, "gamma_beta_ratio": 0.3, "sft_weight": 0.4, "rankpo_weight": 2.0},
    ),
    "everything-hinge": (
        "rankpo", ("reference", "weights", "ids", "excluded"),
        {"loss_type": "hinge", "gamma_beta_ratio": 0.3, "sft_weight": 0.4, "normalize": False},
    ),
    "siglip": ("siglip", (), {}),
    "siglip-dots": ("siglip", (), {"normalize": False}),
    "siglip-everything": ("siglip", ("weights", "ids", "excluded"), {}),
}  # fmt: skip
TEMPERATURE, SCALE, BIAS = 0.25, 8.0, -3.0


def problem(name, dtype=torch.float64, M=M, N=N, D=D, converged=False, seed=0):
    """(loss, queries, passages, options)."""
    loss, tensors, options = GRID[name]
    q, p, labels = draw(M, N, D, dtype, converged, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    options = dict(options, labels=labels)
    if loss == "rankpo":
        options["temperature"] = TEMPERATURE
    if "reference" in tensors:
        of_q, of_p, _ = draw(M, N, 7, dtype, converged, seed + 2)
        options |= {"reference_queries": of_q, "reference_passages": of_p}
    if "weights" in tensors:
        options["weights"] = torch.linspace(0.5, 2, M).where(torch.arange(M) != 1, 0)
    if "ids" in tensors:
        options["query_ids"] = torch.randint(12, (M,), generator=generator)
        options["passage_ids"] = torch.randint(25, (N,), generator=generator) * 10**12
    if "excluded" in tensors:
        options["excluded"] = lists([min(i % 5, N) for i in range(M)], N, generator)
    return loss, q, p, options


def largest_logit(loss, q, p, options) -> float:
    """Of any x of a pair, bias included."""
    similarity = 1.0 if options.get("normalize", True) else longest_product(q, p)
    if loss == "siglip":
        return SCALE * similarity + abs(BIAS)
    return options.get("beta", 2.0) / options["temperature"] * similarity


def relations_of(options) -> Relations:
    excluded = options.get("excluded", (None, None))
    reference = [options.get(f"reference_{side}") for side in ("queries", "passages")]
    return Relations(
        options["labels"], None, None, options.get("query_ids"), options.get("passage_ids"),
        *excluded, None, None, *(x if x is None else x.double() for x in reference),
    )  # fmt: skip


def of_definition(loss, q, p, options, scale=SCALE, bias=BIAS):
    """Losses [M] by the definition, in the dtype of q and p."""
    relations, normalize = relations_of(options), options.get("normalize", True)
    if loss == "siglip":
        return siglip_definition(q, p, scale, bias, relations, normalize)
    names = {of.name for of in fields(MixtureOptions)}
    margin = {name: value for name, value in options.items() if name in names}
    return in_batch_rankpo_definition(q, p, relations, normalize, **margin)


def exact(loss, q, p, options, **numbers):
    """Loss and its gradients of (q, p) and of SigLIP's (scale, bias), in fp64."""
    leaves = _leaves(loss, q.double(), p.double(), **numbers)
    loss_M = of_definition(loss, *leaves[:2], options, *leaves[2:])
    reduction = options.get("reduction", "mean")
    weights_M = row_weights(loss_M, options.get("weights"), len(q), reduction)
    total = (loss_M * weights_M).sum()
    return total.detach(), *torch.autograd.grad(total, leaves)


def ours(loss, q, p, options, loss_scale=1.0, **numbers):
    """The same by the public functions, on the CPU; on a GPU where triton is asked for."""
    device = DEVICE if options.get("backend") == "triton" else "cpu"
    q, p = q.detach().to(device), p.detach().to(device)
    leaves = _leaves(loss, q, p, **numbers)
    options = {key: _to(device, value) for key, value in options.items()}
    value = call(loss, leaves, options)
    upstream = torch.tensor(loss_scale, dtype=value.dtype, device=device)
    grads = torch.autograd.grad(value, leaves, upstream)
    return value.detach().cpu(), *(grad.double().cpu() / loss_scale for grad in grads)


def call(loss, leaves, options):
    if loss == "rankpo":
        return in_batch_rankpo_loss(*leaves[:2], **options)
    return siglip_loss(*leaves[:2], scale=leaves[2], bias=leaves[3], **options)


def _leaves(loss, q, p, scale=SCALE, bias=BIAS):
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (scale, bias)]
    leaves = [q.clone(), p.clone(), *(numbers if loss == "siglip" else [])]
    return [x.requires_grad_() for x in leaves]


def _to(device, value):
    if isinstance(value, tuple):
        return tuple(x.to(device) for x in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value
