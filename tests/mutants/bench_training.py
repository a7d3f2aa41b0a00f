"""The bench of training: mutants would flatter it."""

from mutants.mutant import Mutant
from mutants.suites import bench

STEPS = "bench/training/steps.py"
IMPLEMENTATIONS = "bench/training/implementations.py"
CORPUS = "bench/training/corpus.py"
BACKBONES = "bench/training/backbones.py"
END_TO_END = "bench/training/end_to_end.py"

MUTANTS = [
    Mutant(
        "padding-is-tokens", CORPUS,
        "Batches(float(batch * of_a_row), flops",
        "Batches(float(np.mean(padded)), flops",
        bench("training", "padding"),
    ),
    Mutant(
        "mfu-doubled", BACKBONES,
        "return 3 * (2 * matrices",
        "return 6 * (2 * matrices",
        bench("training", "useful_flops"),
    ),
    Mutant(
        "joules-of-all-steps-by-the-tokens-of-one", STEPS,
        "(of.tokens * one.counted / 1e6)",
        "(of.tokens / 1e6)",
        bench("training", "joules"),
    ),
    Mutant(
        "only-the-first-round-is-throttled", STEPS,
        "next((one.throttled for one in given if one.throttled), None)",
        "given[0].throttled",
        bench("training", "one_throttled"),
    ),
    Mutant(
        "a-round-that-failed-is-left-out", STEPS,
        "        if notes := [one for one in given if isinstance(one, str)]:\n"
        "            rows.append(Row(name, notes[-1]))\n"
        "            continue\n"
        "        ratios = []",
        "        notes = [one for one in given if isinstance(one, str)]\n"
        "        given = [one for one in given if not isinstance(one, str)]\n"
        "        if not given:\n"
        "            rows.append(Row(name, notes[-1]))\n"
        "            continue\n"
        "        ratios = []",
        bench("training", "failed_in_one_round"),
    ),
    Mutant(
        "steps-before-the-clock-count", IMPLEMENTATIONS,
        "task.device) / counted,",
        "task.device) / task.steps,",
        bench("training", "settled"),
    ),
    Mutant(
        "moments-made-early-are-no-memory", IMPLEMENTATIONS,
        " - self.of_optimizer\n",
        "\n",
        bench("training", "whenever_they_are_made"),
    ),
    Mutant(
        "an-evaluation-is-training", END_TO_END,
        "        self.memory.settle()  # an evaluation is no part of a training\n",
        "",
        bench("end_to_end", "first_evaluation_above"),
    ),
]  # fmt: skip
