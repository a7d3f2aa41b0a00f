"""Logs of clicks -> weighted preferences, debiased by how often each position is looked at.

    {"query": str, "passages": [str], "clicks": [0, 1], "positions": [1, 2], "impressions": 1}

A list that was shown, or shown `impressions` times with its clicks summed. A "click" may be a
grade, an application 2 beside a click 1. In the position-based model a passage is clicked if it is
looked at, with the propensity p_k of its position k, and relevant: clicks / p_k are unbiased. Of
two passages i and j of a list the one with more of them is preferred, with the weight

    | clicks_i / p_i  -  clicks_j / p_j |        1 / p at most `max_weight`

summed over all lists of the query that hold both, with signs, and divided by the largest of all.
Where a click stands alone that is the propensity-weighted pair of Joachims, Swaminathan and
Schnabel 2017 (arXiv 1608.04468).
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rankpo_fast.data.jsonl import expect, objects, passage, shown, text_at, value
from rankpo_fast.data.memory import Source
from rankpo_fast.data.rows import PreferenceRow
from rankpo_fast.errors import InputError
from rankpo_fast.paths import reason

Propensity = Callable[[int], float]  # position, from 1 -> share of lists in which it is looked at


@dataclass(frozen=True, slots=True)
class ClickList:
    """Passages that were shown for a query; impressions[i] times, with clicks[i] in all."""

    query: str
    passages: tuple[str, ...]
    clicks: tuple[float, ...]
    positions: tuple[int, ...]  # from 1
    impressions: tuple[int, ...]


def read_clicks(paths: Iterable[Path | Source]) -> list[ClickList]:
    """Read rows of clicks. Raises InputError, with file and line, for one that cannot be used."""
    return [_list(row, where) for path in paths for where, row in objects(path)]


def _list(row: dict, where: str) -> ClickList:
    query = text_at(row, "query", where)
    given = expect(list, *value(row, ("passages",), where), where)
    passages = tuple(passage(f"passages[{i}]", item, where) for i, item in enumerate(given))
    if len(passages) < 2:
        raise InputError(f'{where}: "passages" has {len(passages)} of the two that it needs')
    if repeated := sorted({text for text in passages if passages.count(text) > 1}):
        raise InputError(f'{where}: "passages" has {shown(repeated[0])} twice')

    def numbers(name: str, what: str, fits: Callable[[Any], bool]) -> tuple:
        found = expect(list, *value(row, (name,), where), where)
        if len(found) != len(passages):
            raise InputError(f'{where}: "{name}" has {len(found)} numbers for {len(passages)} '
                             f"passages")  # fmt: skip
        for number in found:
            if not fits(number):
                raise InputError(f'{where}: "{name}" must be {what}, got {shown(number)}')
        return tuple(found)

    clicks = numbers("clicks", "numbers of 0 or more", _is_count)
    positions = tuple(range(1, len(passages) + 1))
    if row.get("positions") is not None:
        positions = numbers("positions", "whole numbers from 1", _is_natural)
        if len(set(positions)) < len(positions):
            raise InputError(f'{where}: "positions" has a number twice')
    impressions = row.get("impressions")
    if isinstance(impressions, list):
        shows = numbers("impressions", "whole numbers from 1", _is_natural)
    elif impressions is None or _is_natural(impressions):
        shows = (1 if impressions is None else impressions,) * len(passages)
    else:
        raise InputError(f'{where}: "impressions" must be a whole number from 1, or one for each '
                         f"passage, got {shown(impressions)}")  # fmt: skip
    return ClickList(query, passages, clicks, positions, shows)


def _is_count(number: Any) -> bool:
    return type(number) in (int, float) and math.isfinite(number) and number >= 0


def _is_natural(number: Any) -> bool:
    return type(number) is int and number >= 1


# --- propensities ---


def power_propensity(eta: float) -> Propensity:
    """position^-eta; 0 leaves clicks as they are."""
    return lambda position: float(position) ** -eta


def listed_propensity(path: Path, highest: int) -> Propensity:
    """Of a JSON list, position 1 first; InputError unless it has one in (0, 1] for each position
    up to `highest`."""
    try:
        listed = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no JSON list of propensities: {error}") from None
    if not isinstance(listed, list):
        raise InputError(f"{path}: no JSON list of propensities, position 1 first")
    for position, number in enumerate(listed, 1):
        if not (_is_count(number) and 0 < number <= 1):
            raise InputError(f"{path}: the propensity of position {position} must be in (0, 1], "
                             f"got {shown(number)}")  # fmt: skip
    if len(listed) < highest:
        raise InputError(f"{path}: has propensities of {len(listed)} positions, but passages were "
                         f"shown at position {highest}")  # fmt: skip
    return lambda position: float(listed[position - 1])


def estimated_propensity(lists: Sequence[ClickList]) -> dict[int, float]:
    """{position: propensity}, the highest 1, from passages that one query showed at several.

    Such a passage is as relevant at k as at l, so its click rates there have the ratio p_k / p_l
    (intervention harvesting, Agarwal et al. 2019, arXiv 1812.05161). The logarithms of the ratios
    of all pairs of positions, each weighted by the inverse of its variance, give log p by least
    squares. Raises InputError where clicks do not connect all positions.
    """
    seen = _by_position(lists)
    rates: dict[tuple[int, int], np.ndarray] = defaultdict(lambda: np.zeros(4))
    for places in seen.values():
        for k, l in combinations(sorted(places), 2):  # noqa: E741
            (clicks_k, shows_k), (clicks_l, shows_l) = places[k], places[l]
            weight = shows_k * shows_l / (shows_k + shows_l)
            rates[k, l] += (weight * clicks_k / shows_k, weight * clicks_l / shows_l,
                            clicks_k, clicks_l)  # fmt: skip
    ratios = {pair: sums for pair, sums in rates.items() if sums[2] > 0 and sums[3] > 0}
    positions = sorted({position for places in seen.values() for position in places})
    _check_connected(positions, ratios)
    # One row a ratio: log p_k - log p_l = log of it, times the root of its weight; the variance of
    # the logarithm of a count is about 1 / count.
    rows, right = np.zeros((len(ratios), len(positions))), np.zeros(len(ratios))
    for i, ((k, l), (rate_k, rate_l, clicks_k, clicks_l)) in enumerate(ratios.items()):  # noqa: E741
        root = (1 / clicks_k + 1 / clicks_l) ** -0.5
        rows[i, positions.index(k)], rows[i, positions.index(l)] = root, -root
        right[i] = root * math.log(rate_k / rate_l)
    # Of all solutions, which differ by a constant, the shortest; the constant goes in the end.
    logs = np.linalg.lstsq(rows, right, rcond=None)[0]
    return dict(zip(positions, np.exp(logs - logs.max()).tolist(), strict=True))


def _by_position(
    lists: Sequence[ClickList],
) -> dict[tuple[str, str], dict[int, tuple[float, int]]]:
    """(query, passage) -> position -> clicks and impressions."""
    seen: dict[tuple[str, str], dict[int, tuple[float, int]]] = defaultdict(dict)
    for each in lists:
        for text, position, clicks, shows in zip(
            each.passages, each.positions, each.clicks, each.impressions, strict=True
        ):
            places = seen[each.query, text]
            before = places.get(position, (0.0, 0))
            places[position] = (before[0] + clicks, before[1] + shows)
    return seen


def _check_connected(positions: list[int], ratios: Iterable[tuple[int, int]]) -> None:
    reached, waiting = {positions[0]}, list(ratios)
    while nearer := [pair for pair in waiting if reached & set(pair)]:
        reached.update(*nearer)
        waiting = [pair for pair in waiting if not reached.issuperset(pair)]
    if missing := [position for position in positions if position not in reached]:
        names = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        raise InputError(
            f"--propensity estimate: the data do not say how position {names} compares with "
            f"position {positions[0]}: too few passages were shown, for one query, at both and "
            f"clicked at each; give --propensity power, or a file"
        )


# --- preferences ---


def _inverse(propensity: float) -> float:
    return 1 / propensity if propensity > 0 else math.inf  # as position^-eta may end up


@dataclass(frozen=True)
class ClickPreferences:
    """Preferences and what they were made of."""

    rows: list[PreferenceRow]
    lists: int
    without_click: int  # lists
    clicked: int  # passages of lists
    clipped: int  # of them, those whose 1 / propensity was cut to max_weight
    ties: int  # pairs that were clicked, and alike in the end

    def summary(self) -> str:
        return (
            f"{self.lists:,} lists, {self.without_click:,} without a click; {self.clicked:,} "
            f"clicked passages, {self.clipped:,} of them clipped at the largest weight; "
            f"{self.ties:,} ties left out"
        )


def click_preferences(
    lists: Sequence[ClickList], propensity: Propensity, *, max_weight: float = 10.0
) -> ClickPreferences:
    """One preference for each two passages that a query's lists tell apart, in order of the lists.

    Raises InputError where no passage was clicked.
    """
    sums: dict[tuple[str, str, str], float] = {}
    without_click = clicked = clipped = 0
    for each in lists:
        inverse = [_inverse(propensity(position)) for position in each.positions]
        gains = [
            min(weight, max_weight) * clicks / shows
            for weight, clicks, shows in zip(inverse, each.clicks, each.impressions, strict=True)
        ]
        hit = [i for i, clicks in enumerate(each.clicks) if clicks > 0]
        without_click, clicked = without_click + (not hit), clicked + len(hit)
        clipped += sum(inverse[i] > max_weight for i in hit)
        for i in hit:
            for j, gain in enumerate(gains):
                if j == i or (gain > 0 and j < i):  # of two that were clicked, once
                    continue
                more = min(each.impressions[i], each.impressions[j]) * (gains[i] - gain)
                key = each.query, each.passages[i], each.passages[j]
                turned = each.query, each.passages[j], each.passages[i]
                if turned in sums:
                    sums[turned] -= more
                else:
                    sums[key] = sums.get(key, 0.0) + more
    if not sums:
        raise InputError("--clicks_data: no passage was clicked, so none is preferred")
    largest = max(map(abs, sums.values()))
    rows = [
        PreferenceRow(query, *((one, other) if weight > 0 else (other, one)), abs(weight) / largest)
        for (query, one, other), weight in sums.items()
        if abs(weight) > 1e-9 * largest  # what clicks that cancel leave over is rounding
    ]
    if not rows:
        raise InputError("--clicks_data: all clicked passages are alike, so none is preferred")
    return ClickPreferences(rows, len(lists), without_click, clicked, clipped,
                            len(sums) - len(rows))  # fmt: skip
