"""The training engine, the model and the data."""

from mutants.mutant import Mutant
from mutants.suites import of

CACHE = "rankpo_fast/train/cache.py"
STEP = "rankpo_fast/train/step.py"
OPTIM = "rankpo_fast/train/optim.py"
ATTENTION = "rankpo_fast/model/attention.py"
PACKING = "rankpo_fast/data/packing.py"
BATCHES = "rankpo_fast/data/batches.py"
CONTRASTIVE = "rankpo_fast/train/contrastive.py"
FIELDS = "rankpo_fast/fields.py"
A_STEP = of("tests/train/test_loss_options.py", "its_options_say")

MUTANTS = [
    Mutant(
        "dropout-is-drawn-anew", CACHE,
        "        set_random_states(states, device)\n        yield",
        "        yield",
        of("tests/train/test_cache.py", "no_bit and dropout"),
    ),
    Mutant(
        "tasks-weigh-alike", STEP,
        "            ) * (batch.weight * batch.loss_share)",
        "            ) * batch.loss_share",
        of("tests/train/test_replay.py", "weighted_sum"),
    ),
    Mutant(
        "nan-stops-one-step-alone", OPTIM,
        "torch.maximum(self._broken, bad.to(self._broken))",
        "bad.to(self._broken)",
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
    Mutant(
        "a-chosen-negative-is-anybodys", CONTRASTIVE,
        'more["curated"] = batch.chosen_for',
        'more["curated"] = batch.chosen_for * 0 - 1',
        A_STEP,
    ),
    Mutant(
        "own-negatives-get-no-gradient", CONTRASTIVE,
        "(batch.negatives,), grads.own_negatives,",
        "(batch.negatives,), 0 * grads.own_negatives,",
        A_STEP,
    ),
    Mutant(
        "own-negatives-count-twice", BATCHES,
        "met = np.isin(negatives, candidates)",
        "met = np.isin(negatives, candidates) & (not self._own_negatives)",
        A_STEP,
    ),
    Mutant(
        "of-two-rows-the-last-has-chosen", BATCHES,
        "[::-1]] = drawn_for[met][::-1]",
        "] = drawn_for[met]",
        A_STEP,
    ),
    Mutant(
        "a-temperature-is-learnt-as-it-is", CONTRASTIVE,
        "(self.log_scale, grads.scale * scale)",
        "(self.log_scale, grads.scale)",
        of("tests/train/test_loss_options.py", "its_gradient"),
    ),
    Mutant(
        "all-ranks-count-in-full", "rankpo_fast/train/prefetch.py",
        "share = 1 / ranks.size",
        "share = 1.0",
        of("tests/train/test_several_ranks.py", "whole-batch"),
    ),
    Mutant(
        "text-will-do-for-a-number", FIELDS,
        "int if hint is int else int | float)",
        "int if hint is int else int | float | str)",
        of("tests/test_trainers.py", "at_fault"),
    ),
]  # fmt: skip
