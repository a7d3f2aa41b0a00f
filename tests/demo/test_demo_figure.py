"""The demo's report: its sentences are computed from the figures, its picture is a PNG."""

import pytest

from rankpo_fast.demo import figure


def metrics(**points: tuple[float, float]) -> dict:
    """points: (nDCG@20, alignment) of sft, simrankpo, rankpo."""
    named = {"stage1": (0.8, 0.5), **points}
    return {
        **{name: {"ndcg@20": ndcg, "alignment": a} for name, (ndcg, a) in named.items()},
        "judge_ceiling": 0.82,
        "test_pairs": 400,
        "seed": 0,
        "scale": {"splits": {"test": {"jobs": 30, "talents": 80}}},
    }


TRADE = metrics(sft=(0.4, 0.75), simrankpo=(0.6, 0.7), rankpo=(0.72, 0.65))
WON = metrics(sft=(0.5, 0.6), simrankpo=(0.6, 0.6), rankpo=(0.76, 0.7))
LOST = metrics(sft=(0.5, 0.8), simrankpo=(0.7, 0.7), rankpo=(0.6, 0.6))


def test_the_title_names_who_leads_on_each_axis():
    assert figure.finding(TRADE) == (
        "SFT agrees most with the judge (0.50 to 0.75), RankPO keeps most of nDCG@20 (90%)"
    )
    assert figure.finding(WON).startswith("RankPO agrees most with the judge (0.50 to 0.70) and")


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        pytest.param(TRADE, "No method wins on both axes.", id="trade"),
        pytest.param(WON, "RankPO wins", id="won"),
        pytest.param(LOST, "RankPO does not win here: SimRankPO is no worse", id="lost"),
    ],
)
def test_the_verdict_says_so_when_rankpo_does_not_win(figures, says):
    assert figure.verdict(figures).startswith(says)


def test_the_report_is_a_picture(tmp_path):
    stage1 = [{"step": 5, "ndcg@20": 0.4}, {"step": 10, "ndcg@20": 0.8}]
    stage2 = [{"step": step, "ndcg@20": 0.8, "alignment": 0.5} for step in (0, 10)]
    curves = {"stage1_random_negatives": stage1, "stage1": stage1}
    curves |= dict.fromkeys(figure.NAMES, stage2)
    figure.draw(TRADE, curves, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.png"]
