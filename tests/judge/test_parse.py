"""Verdicts are read in whatever layout judges write them, and never guessed."""

import pytest

from rankpo_fast.judge.parse import parse

PAIRS = [
    ("Comparison: B has done this work; A has not.\n\nPreferred: B\nConfidence score: 85", "B", 85),
    ("Comparison: both could.\nPreferred: A  \n\nConfidence score: 60  \n\n**Reasons:**\n- B is "
     "less close.\n\n**Conclusion:** Candidate A it is.", "A", 60),
    ("**Preferred:** Candidate B\n**Confidence score:** 85%", "B", 85),
    ("Preferred candidate: B.\nConfidence: 8/10", "B", 80),
    ('{"comparison": "x. Preferred: A, y", "preferred": "B", "confidence": 85}', "B", 85),
    ('```json\n{\n "preferred": "A",\n "confidence": 0.85\n}\n```', "A", 85),
    ('{"comparison": "x", "preferred": "A", "confi', "A", None),  # cut off after the verdict
    ("<think>Preferred: A? No.\nPreferred: A</think>\nPreferred: tie", "tie", None),
    ("My verdict is [[B]].", "B", None),
    ("B", "B", None),
    ("Preferred: A\nConfidence score: 850", "A", None),
    # no verdict, or two
    ("Preferred: A or B", None, None),
    ("Preferred: (A, B or tie)", None, None),
    ("Preferred: A/B", None, None),
    ("Preferred: A\nOn reflection:\nPreferred: B", None, None),
    ('{"comparison": "x", "preferred": "', None, None),
    ('{"preferred": "C"}', None, None),
    ("A good question. Both have merits.", None, None),
    ("", None, None),
]  # fmt: skip


@pytest.mark.parametrize("answer, value, confidence", PAIRS, ids=lambda x: str(x)[:30])
def test_a_pair(answer, value, confidence):
    verdict = parse("pair", answer)
    assert verdict.value == value
    assert verdict.confidence == confidence or value is None
    if value in ("A", "B"):
        assert answer[verdict.place] == value  # where its probability is looked up


@pytest.mark.parametrize(
    "mode, answer, value",
    [
        ("grade", "Assessment: good\nGrade: 2\nConfidence score: 90", 2),
        ("grade", '{"assessment": "s", "grade": 3, "confidence": 70}', 3),
        ("grade", "Grade: 0, 1, 2 or 3", None),
        ("grade", "Grade: 2.5", None),
        ("grade", '{"grade": 4}', None),
        ("list", "Ranking: [2] > [1] > [3]\nConfidence score: 70", (1, 0, 2)),
        ("list", '{"ranking": [3,\n1,\n2], "confidence": 70}', (2, 0, 1)),
        ("list", "2, 1, 3", (1, 0, 2)),
        ("list", "Ranking: 1, 2", None),
        ("list", "Ranking: 1, 2, 2", None),
    ],
)
def test_grades_and_rankings(mode, answer, value):
    assert parse(mode, answer, 3).value == value
