"""The training engine, the model and the data."""

from mutants.mutant import Mutant
from mutants.suites import of

CACHE = "rankpo_fast/train/cache.py"
STEP = "rankpo_fast/train/step.py"
OPTIM = "rankpo_fast/train/optim.py"
ATTENTION = "rankpo_fast/model/attention.py"
PACKING = "rankpo_fast/data/packing.py"

MUTANTS = [
    Mutant(
        "dropout-is-drawn-anew", CACHE,
        "        set_random_states(states, device)\n        yield",
        "        yield",
        of("tests/train/test_cache.py", "no_bit and dropout"),
    ),
    Mutant(
        "tasks-weigh-alike", STEP,
        "* (batch.weight * batch.loss_share)",
        "* batch.loss_share",
        of("tests/train/test_replay.py", "weighted_sum"),
    ),
    Mutant(
        "nan-stops-one-step-alone", OPTIM,
        "torch.maximum(optimizer.found_inf, bad.float())",
        "bad.float()",
        of("tests/train/test_loop.py", "not_finite"),
    ),
    Mutant(
        "small-gradients-are-scaled-up", OPTIM,
        ".clamp(min=1.0)",
        "",
        of("tests/train/test_loop.py", "scaled_down"),
    ),
    Mutant(
        "window-wider-by-one", ATTENTION,
        "    return window - 1, 0 if",
        "    return window, 0 if",
        of("tests/model/test_attention.py", "alone and fp64"),
    ),
    Mutant(
        "packs-take-one-token-more", PACKING,
        "(length, -1)",
        "(length - 1, -1)",
        ("tests/data/test_packing.py",),
    ),
]  # fmt: skip
