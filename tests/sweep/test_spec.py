"""What a sweep's file asks for, and what of it is refused before anything is trained."""

import pytest

from rankpo_fast.errors import InputError
from rankpo_fast.sweep.spec import read_sweep

PLAIN = """
start: out/stage1-<seed>
settings: {train_data: pairs.jsonl, max_steps: 3}
methods:
  SimRankPO: {}
  RankPO: {reference_free: false, grid: {beta: [1, 2]}}
  fixed: {learning_rate: 7e-5, alphas: [0.5, 1]}
  more of stage 1: {command: contrastive, train_data: rows.jsonl, learning_rate: 1e-4}
grid: {learning_rate: [1e-4, 3e-4]}
seeds: [0, 1]
validation: {preference_data: held-out-<seed>.jsonl}
"""


def read(tmp_path, text):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return read_sweep(path)


def test_each_method_has_its_grid_and_every_seed(tmp_path):
    sweep = read(tmp_path, PLAIN)
    setups = [str(job.setup) for job in sweep.jobs if job.seed == 0]
    assert setups == [
        "SimRankPO (learning_rate 1e-4)",
        "SimRankPO (learning_rate 3e-4)",
        *(f"RankPO (learning_rate {rate}, beta {beta})"
          for rate in ("1e-4", "3e-4") for beta in (1, 2)),
        "fixed",  # its own rate is no axis
        "more of stage 1",
    ]  # fmt: skip
    assert len(sweep.jobs) == 2 * len(setups) == len({job.folder for job in sweep.jobs})
    *_, fixed, _, more, _ = sweep.jobs
    assert (fixed.alphas, more.alphas, more.command) == ((0.5, 1), (1,), "contrastive")
    assert "--train_data=rows.jsonl" in more.flags
    assert "--model_name_or_path=out/stage1-1" in sweep.jobs[1].flags
    assert "--seed=1" in sweep.jobs[1].flags and "--learning_rate=1e-4" in sweep.jobs[1].flags
    assert sweep.flags_of(sweep.validation, "m", 1)[1:] == ["--preference_data=held-out-1.jsonl"]


def test_draws_take_some_of_a_grid_the_same_every_time(tmp_path):
    text = PLAIN + "draws: 2\n"
    drawn, again = read(tmp_path, text), read(tmp_path, text)
    assert drawn == again
    assert len(drawn.jobs) == 2 * (2 + 2 + 1 + 1)
    assert {job.folder for job in drawn.jobs} <= {job.folder for job in read(tmp_path, PLAIN).jobs}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seeds:", "seed:", "unknown key seed .did you mean seeds"),
        ("max_steps: 3", "max_step: 3", "SimRankPO .learning_rate 1e-4., seed 0: unknown flag "
                                        "--max_step .did you mean --max_steps"),
        ("max_steps: 3", "seed: 3", "SimRankPO: seed is the sweep's to give"),
        ("[1e-4, 3e-4]", "1e-4", "grid: learning_rate must be a list"),
        ("[1e-4, 3e-4]", "[-1]", "SimRankPO .learning_rate -1., seed 0: --learning_rate must be"),
        ("SimRankPO", "start", "methods: start is the name of the model"),
        ("preference_data: held-out-<seed>.jsonl", "cutoffs: 5", "validation: nothing to measure"),
        ("start: out", "strt: out", "unknown key strt"),
        ("seeds: [0, 1]", "alphas: [0]", "alphas must be > 0"),
        ("seeds: [0, 1]", "seeds: [a]", "seeds must be finite numbers, got 'a'"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(tmp_path, old, new, said):
    assert old in PLAIN
    with pytest.raises(InputError, match=f"sweep.yaml: {said}"):
        read(tmp_path, PLAIN.replace(old, new))
