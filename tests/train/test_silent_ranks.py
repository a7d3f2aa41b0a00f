"""Ranks that are stopped, and signals that come while others wait."""

import pytest

from support import rank_runs
from support.rank_runs import arguments

TIMEOUT = 3  # seconds


@pytest.fixture
def flags(tmp_path, contrastive_file, tiny_llama_dir):
    return arguments({
        "stage": "contrastive", "model_name_or_path": str(tiny_llama_dir),
        "train_data": [contrastive_file], "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"), "max_steps": 6, "rank_timeout": TIMEOUT,
    })  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(
    ("frozen", "place", "where"),
    [
        pytest.param(1, "rankpo_fast.train.log.MetricsLog.step", "agreed", id="others-on-hosts"),
        pytest.param(2, "rankpo_fast.ranks.Ranks.total", "in total", id="others-on-devices"),
        pytest.param(0, "rankpo_fast.ranks.Ranks.total", "in total", id="which-has-the-store"),
    ],
)
def test_all_end_soon_after_one_is_frozen_and_say_who_waited_where(
    frozen, place, where, flags, tmp_path
):
    started = rank_runs.start(
        3, tmp_path / "ranks", rank_runs.command_frozen, frozen, place, *flags
    )
    ended = started.ended(frozen)
    said = "".join(rank.said for rank in ended)
    assert [rank.code for rank in ended] == [-9 if r == frozen else 1 for r in range(3)], said
    assert said.count("Ranks were here:") == 1 and where in said
    if frozen:
        assert f"rank {frozen} has been silent for {TIMEOUT} s (--rank_timeout)" in said
        assert ", and then silent" in said
    else:
        assert "the process that has torch's store has been silent" in said
