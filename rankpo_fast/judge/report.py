"""How judges judged, in numbers: what their verdicts follow besides the texts, and what they cost.

A share of k among n verdicts has a Wilson interval of 95 %, and p is that of a fair coin giving a
share at least as far from one half (exact, two-sided).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rankpo_fast.config.judge import Mode
from rankpo_fast.data.jsonl import objects, text_at, value
from rankpo_fast.data.memory import Source
from rankpo_fast.data.sources import place
from rankpo_fast.errors import InputError
from rankpo_fast.judge.consensus import Said
from rankpo_fast.judge.cost import tokens_of
from rankpo_fast.judge.journal import Answer
from rankpo_fast.judge.questions import Item, verdict_in
from rankpo_fast.judge.server import Judge

Z = 1.959964  # of 95 %
BINS = 10  # of confidence, 0 to 100
NO_MODEL = "the judge"


@dataclass(frozen=True)
class Compared:
    """Two passages, one of which was preferred; each is None where it is not known, or equal.

    Attributes:
        first: whether it was the one shown first.
        longer: whether it was the one with more characters.
        ranked: whether it was the one that ranked higher for the model that found them.
    """

    first: bool | None
    longer: bool | None
    ranked: bool | None


def share(flags: Iterable[bool | None]) -> dict[str, Any] | None:
    known = [flag for flag in flags if flag is not None]
    if not known:
        return None
    count, of = sum(known), len(known)
    low, high = wilson(count, of)
    return {"count": count, "of": of, "share": round(count / of, 4), "low": round(low, 4),
            "high": round(high, 4), "p": fair_coin(count, of)}  # fmt: skip


def wilson(count: int, of: int) -> tuple[float, float]:
    """The interval of a share."""
    middle = (count + Z * Z / 2) / (of + Z * Z)
    half = Z / (of + Z * Z) * math.sqrt(count * (of - count) / of + Z * Z / 4)
    return middle - half, middle + half


def fair_coin(count: int, of: int) -> float:
    """Twice the chance of so many or more, at most 1; to four digits that count."""
    most = max(count, of - count)
    logs = [
        math.lgamma(of + 1) - math.lgamma(k + 1) - math.lgamma(of - k + 1) - of * math.log(2)
        for k in range(most, of + 1)
    ]
    return float(f"{min(1.0, 2 * math.fsum(map(math.exp, logs))):.4g}")


def compared(answer: Answer, item: Item) -> Iterator[Compared]:
    """Of a pair the one comparison that its answer makes, of a list all of them."""
    if "ranking" in answer:
        if answer["ranking"] is None:
            return
        rank = {passage: place for place, passage in enumerate(answer["ranking"])}
        for first, second in combinations(answer["shown"], 2):
            yield _compared(first, second, rank[first] < rank[second], item)
    elif answer.get("preferred") in ("A", "B"):
        first, second = answer["shown"]
        yield _compared(first, second, answer["preferred"] == "AB"[first], item)


def _compared(first: int, second: int, won: bool, item: Item) -> Compared:
    """Of the passages first and second shown, and whether the first was preferred."""
    lengths = [len(item.passages[i]) for i in (first, second)]
    found = [item.row.get(f"passage_rank{i + 1}") for i in (first, second)]
    ranks = [rank for rank in found if isinstance(rank, int | float)]
    usable = len(ranks) == 2 and ranks[0] != ranks[1]
    return Compared(
        won,
        None if lengths[0] == lengths[1] else won == (lengths[0] > lengths[1]),
        won == (ranks[0] < ranks[1]) if usable else None,
    )


def report(
    mode: Mode, items: Sequence[Item], answers: Iterable[Answer],
    said: Sequence[Mapping[str, Said]], judges: Mapping[str, Judge], **also: Any,
) -> dict[str, Any]:  # fmt: skip
    """All figures, of each judge and together; `also` is added as it is."""
    item_of = {item.key: item for item in items}
    of_judge: dict[str, list[Answer]] = {name: [] for name in judges}
    for answer in answers:
        if answer["judge"] in of_judge and answer["pair"] in item_of:
            of_judge[answer["judge"]].append(answer)
    figures: dict[str, Any] = {"mode": mode, "items": len(items), "judges": {}}
    for name, found in of_judge.items():
        states = Counter(one[name].state for one in said if name in one)
        figures["judges"][name] = _of_judge(mode, found, item_of, states, judges[name])
        if mode == "pair":
            figures["judges"][name]["ties"] = sum(
                name in one and one[name].state == "verdict" and one[name].value == "tie"
                for one in said
            )
    return figures | also


def _of_judge(
    mode: Mode, answers: list[Answer], item_of: Mapping[str, Item], states: Counter[str],
    judge: Judge,
) -> dict[str, Any]:  # fmt: skip
    parsed = [answer for answer in answers if verdict_in(answer, mode) is not None]
    errors = Counter(answer.get("error", "unparsed") for answer in answers
                     if verdict_in(answer, mode) is None)  # fmt: skip
    figures: dict[str, Any] = {"answers": len(answers), "without_verdict": dict(errors)}
    if mode == "grade":
        figures["grades"] = dict(sorted(Counter(str(answer["grade"]) for answer in parsed).items()))
    else:
        verdicts = [one for answer in parsed for one in compared(answer, item_of[answer["pair"]])]
        figures["first_shown_preferred"] = share(one.first for one in verdicts)
        once = _once(parsed, item_of)
        figures["longer_preferred"] = share(one.longer for one in once)
        figures["higher_ranked_preferred"] = share(one.ranked for one in once)
    if states["flip"] or any(answer["shown"] != sorted(answer["shown"]) for answer in answers):
        both = states["flip"] + states["verdict"]
        if mode == "pair" and both:
            figures["flipped"] = share([True] * states["flip"] + [False] * states["verdict"])
    sure = [answer["confidence"] for answer in parsed if answer.get("confidence") is not None]
    if sure:
        bins = [0] * BINS
        for confidence in sure:
            bins[min(int(confidence * BINS / 100), BINS - 1)] += 1
        logprobs = sum(answer.get("confidence_by") == "logprobs" for answer in parsed)
        figures["confidence"] = {"of": len(sure), "mean": round(math.fsum(sure) / len(sure), 2),
                                 "histogram": bins, "by_logprobs": logprobs}  # fmt: skip
    counted = [tokens_of(answer) for answer in answers]
    tokens_in, tokens_out = (sum(pair[i] for pair in counted) for i in (0, 1))
    figures["tokens"] = {"in": tokens_in, "out": tokens_out}
    cost = judge.cost(tokens_in, tokens_out)
    figures["cost"] = None if cost is None else round(cost, 6)
    return figures


def _once(answers: list[Answer], item_of: Mapping[str, Item]) -> list[Compared]:
    """A comparison an item, of those whose orders agree: both would count one judgement twice."""
    of_item: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        of_item[answer["pair"]].append(answer)
    found: list[Compared] = []
    for key, same in of_item.items():
        if "ranking" in same[0] or len({answer["preferred"] for answer in same}) == 1:
            found += compared(same[0], item_of[key])
    return found


def judged_rows(source: Source) -> tuple[list[Item], list[Answer], list[dict[str, Said]]]:
    """Rows with verdicts already, as if they had been asked in one order, passage1 first.

    InputError names the line of a row without a verdict, and rows whose order is not known.
    """
    items, answers, said = [], [], []
    for where, row in objects(source):
        pair = tuple(text_at(row, name, where) for name in ("passage1", "passage2"))
        item = Item(text_at(row, "query", where), pair, row)
        preferred = value(row, ("preferred",), where).value
        if preferred not in ("A", "B", "tie", None):
            raise InputError(f'{where}: "preferred" must be "A", "B", "tie" or null, got '
                             f"{preferred!r}")  # fmt: skip
        if row.get("orders") == "both":
            raise InputError(f"{where}: a verdict of both orders: the report that was written with "
                             f"it knows which came first")  # fmt: skip
        judge = str(row.get("model") or "+".join(row.get("judges") or ()) or NO_MODEL)
        confidence = row.get("confidence_score")
        known = isinstance(confidence, int | float) and 0 <= confidence <= 100
        answers.append(
            {"key": where, "judge": judge, "pair": item.key, "shown": [0, 1],
             "preferred": preferred, "confidence": confidence if known else None,
             "usage": row.get("usage") if isinstance(row.get("usage"), dict) else None}
        )  # fmt: skip
        items.append(item)
        said.append({judge: Said("unparsed" if preferred is None else "verdict", preferred)})
    if not items:
        raise InputError(f"{place(source)}: has no rows")
    return items, answers, said


def p_value(p: float) -> str:
    """As people write it: 1e-245 says no more than that it is very small."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def as_text(figures: Mapping[str, Any]) -> str:
    """A few lines for the terminal."""
    lines = []
    for name, one in figures["judges"].items():
        parts = [f"{one['answers']:,} answers"]
        without = sum(one["without_verdict"].values())
        if without:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in one["without_verdict"].items())
            parts.append(f"{without:,} without a verdict ({kinds})")
        for key, what in (("first_shown_preferred", "first shown preferred"),
                          ("flipped", "flipped with the order"),
                          ("longer_preferred", "longer preferred")):  # fmt: skip
            if found := one.get(key):
                p = "" if key == "flipped" else f", {p_value(found['p'])}"
                parts.append(f"{what} {found['count']:,} of {found['of']:,} "
                             f"({found['low']:.0%} to {found['high']:.0%}{p})")  # fmt: skip
        if one.get("ties"):
            parts.append(f"{one['ties']:,} ties")
        if one["cost"] is not None:
            parts.append(f"cost {one['cost']:.4f}")
        lines.append(f"{name}: {'; '.join(parts)}")
    alike = figures.get("agreement")
    if alike is not None:
        alpha = "not defined" if alike["alpha"] is None else f"{alike['alpha']:.3f}"
        lines.append(f"agreement of {len(alike['judges'])} judges: Krippendorff's alpha {alpha} "
                     f"({alike['level']}, {alike['units']:,} units)")  # fmt: skip
    return "\n".join(lines)
