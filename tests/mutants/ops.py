"""What the ops share: gradients from above, checks of a batch."""

from mutants.mutant import Mutant
from mutants.suites import PAIRS, info_nce

COMMON = "rankpo_fast/ops/common.py"
CHECKS = "rankpo_fast/ops/checks.py"
PROBLEM = "kernels/rankpo_kernels/problem.py"

GRADCHECK = info_nce("gradcheck")

MUTANTS = [
    Mutant(
        "grad-output-forgotten", COMMON,
        "times(grad, by.to(grad.device)).to(dtype)",
        "grad.to(dtype)",
        GRADCHECK,
    ),
    Mutant(
        "upstream-rows-forgotten", COMMON,
        "ctx.settings, grad_loss_M.contiguous(), needs",
        "ctx.settings, torch.ones_like(grad_loss_M), needs",
        GRADCHECK,
    ),
    Mutant(
        "guides-of-two-dtypes", CHECKS,
        "queries.detach().to(dtype), passages.detach().to(dtype)",
        "queries.detach(), passages.detach()",
        info_nce("guide"),
    ),
    Mutant(
        "guide-loses-fp64", CHECKS,
        "dtype = compute_dtype(embeddings)",
        "dtype = torch.float32",
        info_nce("guide"),
    ),
    Mutant(
        "own-offsets-start-anywhere", CHECKS,
        "relations.own_offsets[0] == 0",
        "relations.own_offsets[0] >= 0",
        info_nce("device_asserts"),
    ),
    Mutant(
        "workspace-of-a-fraction", PROBLEM,
        "not isinstance(self.workspace_bytes, int)",
        "False",
        info_nce("bad_arguments"),
    ),
    Mutant(
        "any-upstream-gradient-is-one", COMMON,
        'by.device.type == "cpu" and by == 1',
        'by.device.type == "cpu"',
        PAIRS,
    ),
]  # fmt: skip
