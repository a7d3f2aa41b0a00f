"""Answers -> what each judge says of an item -> what they say together -> rows to train on.

Bradley-Terry: passage i of a query has a strength t_i, and p(i beats j) = sigmoid(t_i - t_j); the
strengths fit all verdicts of all judges on the query's pairs, with a prior that keeps them finite.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np

from rankpo_fast.config.judge import AnnotateConfig, Mode
from rankpo_fast.judge.journal import Answer
from rankpo_fast.judge.questions import Item, Question, verdict_in

PRIOR = 0.1  # of strengths, their squares: a single verdict then reads as 83 %
HIGHEST = 3.0  # grade, of the best of a list
Level = Literal["nominal", "ordinal"]


@dataclass(frozen=True)
class Said:
    """By one judge of one item.

    Attributes:
        state: "open" where a question has no answer, "unparsed", "flip" where the verdicts of the
            two orders differ, else "verdict".
        value: of a pair "A", "B" or "tie"; a grade of each passage; of a list the mean place of
            each passage. None where there is none.
        confidence: from 0 to 100, where one is known.
    """

    state: str
    value: Any = None
    confidence: float | None = None


def answers_by_key(answers: Iterable[Answer], mode: Mode) -> dict[str, Answer]:
    """The last one that parses, else the last."""
    found: dict[str, Answer] = {}
    for answer in answers:
        before = found.get(answer["key"])
        if before is None or verdict_in(answer, mode) is not None:
            found[answer["key"]] = answer
    return found


def by_judges(
    item_questions: Sequence[Question], answers: Mapping[str, Answer], config: AnnotateConfig
) -> dict[str, Said]:
    """What each judge says of the item that these questions are all of."""
    of_judge: dict[str, list[Answer | None]] = defaultdict(list)
    for question in item_questions:
        of_judge[question.judge].append(answers.get(question.key))
    combine = {"pair": _pair, "grade": _grades, "list": _places}[config.mode]
    return {
        judge: Said("open") if None in found else combine(found, config.flips)  # type: ignore[arg-type]
        for judge, found in of_judge.items()
    }


def _pair(answers: Sequence[Answer], flips: str) -> Said:
    verdicts = {answer["preferred"] for answer in answers}
    if None in verdicts:
        return Said("unparsed")
    if len(verdicts) > 1:
        return Said("flip", "tie" if flips == "tie" else None)
    return Said("verdict", verdicts.pop(), _mean(answer["confidence"] for answer in answers))


def _grades(answers: Sequence[Answer], flips: str) -> Said:
    grades = {answer["shown"][0]: answer["grade"] for answer in answers}
    if all(grade is None for grade in grades.values()):
        return Said("unparsed")
    return Said("verdict", grades, _mean(answer["confidence"] for answer in answers))


def _places(answers: Sequence[Answer], flips: str) -> Said:
    if any(answer["ranking"] is None for answer in answers):
        return Said("unparsed")
    places: dict[int, list[int]] = defaultdict(list)
    for answer in answers:
        for rank, passage in enumerate(answer["ranking"]):
            places[passage].append(rank)
    means = {passage: fmean(ranks) for passage, ranks in places.items()}
    return Said("verdict", means, _mean(answer["confidence"] for answer in answers))


def _mean(numbers: Iterable[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return round(fmean(known), 2) if known else None


# --- together ---

Together = tuple[str | None, float | None]  # preferred, and the confidence in it


def majority(said: Mapping[str, Said]) -> Together:
    """More judges for one than for the other; the confidence is that of a single judge, else the
    share of the judges, of whom a tie is half for each."""
    values = [one.value for one in said.values() if one.value is not None]
    if not values:
        return None, None
    wins = (values.count("A") + values.count("tie") / 2) / len(values)
    if wins == 0.5:
        return "tie", None
    preferred = "A" if wins > 0.5 else "B"
    if len(said) == 1:
        [only] = said.values()
        return preferred, only.confidence
    return preferred, round(100 * max(wins, 1 - wins), 2)


def bradley_terry(items: Sequence[Item], said: Sequence[Mapping[str, Said]]) -> list[Together]:
    """For each item by the strengths of its query's passages; a tie where they are equal."""
    import choix

    of_query: dict[str, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        of_query[item.query].append(number)
    found: list[Together] = [(None, None)] * len(items)
    for numbers in of_query.values():
        passage_of = dict.fromkeys(text for n in numbers for text in items[n].passages)
        place = {text: i for i, text in enumerate(passage_of)}
        wins: list[tuple[int, int]] = []  # winner, loser; each verdict twice, so that a tie is 1:1
        judged = []
        for number in numbers:
            first, second = (place[text] for text in items[number].passages)
            values = [one.value for one in said[number].values() if one.value is not None]
            for value in values:
                wins += {
                    "A": [(first, second)] * 2,
                    "B": [(second, first)] * 2,
                    "tie": [(first, second), (second, first)],
                }[value]
            judged += [(number, first, second)] if values else []
        if not wins:
            continue
        strengths = choix.opt_pairwise(len(place), wins, alpha=2 * PRIOR)
        for number, first, second in judged:
            wins_a = 1 / (1 + np.exp(strengths[second] - strengths[first]))
            score = round(100 * float(max(wins_a, 1 - wins_a)), 2)
            preferred = "A" if wins_a > 0.5 else "B"
            found[number] = ("tie", None) if score == 50 else (preferred, score)
    return found


def agreement(said: Sequence[Mapping[str, Said]], mode: Mode) -> dict[str, Any] | None:
    """Krippendorff's alpha over the judges; None of a single one, or where all say one thing."""
    names = sorted({name for one in said for name in one})
    if len(names) < 2:
        return None
    codes: dict[str, float] = {"A": 0, "B": 1, "tie": 2}
    units: list[list[float]] = []
    for one in said:
        values = [one[name].value if name in one else None for name in names]
        if mode == "pair":
            units.append([np.nan if value is None else codes[value] for value in values])
            continue
        passages = {passage for value in values if value is not None for passage in value}
        for passage in sorted(passages):
            marks = [None if value is None else value.get(passage) for value in values]
            units.append([np.nan if mark is None else mark for mark in marks])
    ratings = np.array(units, dtype=float).T  # [judges, units]
    known = ratings[~np.isnan(ratings)]
    level: Level = "nominal" if mode == "pair" else "ordinal"
    both = int((~np.isnan(ratings)).sum(0).__ge__(2).sum()) if units else 0
    alpha = None
    if both and len(np.unique(known)) > 1:
        import krippendorff

        alpha = round(float(krippendorff.alpha(ratings, level_of_measurement=level)), 4)
    return {"alpha": alpha, "level": level, "units": both, "judges": names}


# --- rows ---


@dataclass(frozen=True)
class Results:
    """Attributes:
    rows: to train on.
    ties: as graded rows.
    counts: of items, by where they are: "rows", "ties", "without_verdict", "open".
    """

    rows: list[dict[str, Any]]
    ties: list[dict[str, Any]]
    counts: dict[str, int]


def results(
    items: Sequence[Item], said: Sequence[Mapping[str, Said]], config: AnnotateConfig
) -> Results:
    """Rows of stage 2, or graded rows, of the items on which all who were asked were heard."""
    judges = len({name for one in said for name in one})
    way = config.consensus or ("bradley_terry" if judges > 1 else "majority")
    rows: list[dict[str, Any]] = []
    ties: list[dict[str, Any]] = []
    counts = {"rows": 0, "ties": 0, "without_verdict": 0, "open": 0}
    is_open = [not one or any(x.state == "open" for x in one.values()) for one in said]
    counts["open"] = sum(is_open)
    whole = [i for i, waits in enumerate(is_open) if not waits]
    items, said = [items[i] for i in whole], [said[i] for i in whole]
    if config.mode != "pair":
        for item, of_item in zip(items, said, strict=True):
            row = _graded(item, of_item, config.mode)
            rows += [row] if row else []
        return Results(rows, [], counts | {"rows": len(rows),
                                           "without_verdict": len(items) - len(rows)})  # fmt: skip
    together = bradley_terry(items, said) if way == "bradley_terry" else list(map(majority, said))
    for item, of_item, (preferred, confidence) in zip(items, said, together, strict=True):
        told = {name: _told(one) for name, one in of_item.items()}
        provenance = {"judges": told, "orders": "both" if config.both else "one",
                      "consensus": way}  # fmt: skip
        if preferred is None:
            counts["without_verdict"] += 1
        elif preferred == "tie":
            counts["ties"] += 1
            ids = [item.row.get(f"passage_id{number}") for number in (1, 2)]
            row = {"query": item.query, "passages": [*item.passages], "grades": [1, 1]}
            row |= {"query_id": item.row["query_id"]} if "query_id" in item.row else {}
            row |= {} if None in ids else {"passage_ids": ids}
            ties.append(row | provenance)
        else:
            row = {key: value for key, value in item.row.items() if key != "confidence_score"}
            row["preferred"] = preferred
            if confidence is not None:  # 0 would be no weight at all, which stage 2 refuses
                row["confidence_score"] = max(confidence, 1)
            rows.append(row | provenance)
    return Results(rows, ties, counts | {"rows": len(rows)})


def _told(said: Said) -> dict[str, Any]:
    return {"preferred": said.value, "confidence": said.confidence} | (
        {"state": said.state} if said.state != "verdict" else {}
    )


def _graded(item: Item, said: Mapping[str, Said], mode: Mode) -> dict[str, Any] | None:
    """The judges' means; passages that none could grade are left out. None of fewer than two."""
    highest = len(item.passages) - 1
    scale: Callable[[float], float] = (
        (lambda place: HIGHEST * (1 - place / highest)) if mode == "list" else float
    )
    marks: dict[int, float] = {}
    for passage in range(len(item.passages)):
        values = [one.value.get(passage) for one in said.values() if one.value is not None]
        mean = _mean(None if value is None else scale(value) for value in values)
        if mean is not None:
            marks[passage] = int(mean) if mean == int(mean) else mean
    if len(marks) < 2:
        return None
    row = {**item.row, "passages": [item.passages[i] for i in marks], "grades": [*marks.values()]}
    ids = row.get("passage_ids")
    if isinstance(ids, list) and len(ids) == len(item.passages):
        row["passage_ids"] = [ids[i] for i in marks]
    confidence = _mean(one.confidence for one in said.values())
    row |= {} if confidence is None else {"confidence_score": max(confidence, 1)}
    return row | {"judges": sorted(said)}
