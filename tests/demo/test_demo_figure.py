"""The demo's report: its sentences are computed from the figures, its picture is a PNG."""

import pytest

from rankpo_fast.demo import figure


def metrics(**points: tuple[float, float]) -> dict:
    """points: (nDCG@20, alignment) of sft, simrankpo, rankpo, rankpo_replay."""
    named = {"stage1_random_negatives": (0.7, 0.5), "stage1": (0.8, 0.5), **points}
    return {
        **{name: {"ndcg@20": ndcg, "alignment": a} for name, (ndcg, a) in named.items()},
        "judge_ceiling": 0.82,
        "test_pairs": 400,
        "seed": 0,
        "scale": {"mined_steps": 60, "splits": {"test": {"jobs": 30, "talents": 80}}},
    }


TRADE = metrics(
    sft=(0.4, 0.75), simrankpo=(0.6, 0.7), rankpo=(0.68, 0.66), rankpo_replay=(0.72, 0.65)
)
WON = metrics(sft=(0.5, 0.6), simrankpo=(0.6, 0.6), rankpo=(0.76, 0.7), rankpo_replay=(0.7, 0.7))
LOST = metrics(sft=(0.5, 0.8), simrankpo=(0.7, 0.7), rankpo=(0.6, 0.6), rankpo_replay=(0.7, 0.6))


def test_stage_1_is_told_before_and_after_its_steps_with_mined_negatives():
    assert figure.of_stage_1(TRADE) == (
        "Stage 1 stood at nDCG@20 0.70 after its steps with random negatives, and at "
        "0.80 after 60 more with mined ones"
    )


def test_the_title_names_who_leads_on_each_axis():
    assert figure.finding(TRADE) == (
        "SFT agrees most with the judge (0.50 to 0.75), RankPO + replay keeps most of nDCG@20 (90%)"
    )
    assert figure.finding(WON).startswith("RankPO agrees most with the judge (0.50 to 0.70) and")


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        pytest.param(
            TRADE,
            "No method wins on both axes. Agreement for nDCG@20 kept: SFT 0.75 for 50%, "
            "SimRankPO 0.70 for 75%, RankPO 0.66 for 85%, RankPO + replay 0.65 for 90%.",
            id="trade",
        ),
        pytest.param(WON, "RankPO wins: no other method is better on either axis.", id="won"),
        pytest.param(
            LOST,
            "No method wins on both axes. RankPO is no better than SimRankPO or RankPO + replay on "
            "either. RankPO + replay is no better than SimRankPO on either. "
            "Agreement for nDCG@20 kept: SFT 0.80 for 62%, SimRankPO 0.70 for 87%.",
            id="lost",
        ),
    ],
)
def test_the_verdict_says_who_wins_and_who_loses_to_whom(figures, says):
    assert figure.verdict(figures) == says


def test_methods_that_were_not_measured_are_not_spoken_of():
    two = metrics(simrankpo=(0.4, 0.7), rankpo_replay=(0.72, 0.6))
    assert figure.finding(two) == (
        "SimRankPO agrees most with the judge (0.50 to 0.70), "
        "RankPO + replay keeps most of nDCG@20 (90%)"
    )
    assert figure.verdict(two) == (
        "No method wins on both axes. Agreement for nDCG@20 kept: SimRankPO 0.70 for 50%, "
        "RankPO + replay 0.60 for 90%."
    )


@pytest.mark.parametrize(
    "figures",
    [
        pytest.param(metrics(simrankpo=(0.4, 0.7), rankpo_replay=(0.72, 0.6)), id="short"),
        pytest.param(TRADE, id="full"),
    ],
)
def test_the_report_is_a_picture_that_a_repository_can_hold(figures, tmp_path):
    stage1 = [{"step": 5, "ndcg@20": 0.4}, {"step": 10, "ndcg@20": 0.8}]
    stage2 = [{"step": step, "ndcg@20": 0.8, "alignment": 0.5} for step in (0, 10)]
    curves = {"stage1_random_negatives": stage1, "stage1": stage1}
    curves |= dict.fromkeys(figure.methods(figures), stage2)
    figure.draw(figures, curves, tmp_path / "report.png")
    picture = (tmp_path / "report.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) < 90_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.png"]


def test_labels_of_points_at_one_height_stand_below_each_other():
    heights = figure._apart({"sft": 0.5, "simrankpo": 0.81, "rankpo": 0.8}, gap=0.05)
    assert heights == {"simrankpo": 0.81, "rankpo": pytest.approx(0.76), "sft": 0.5}
