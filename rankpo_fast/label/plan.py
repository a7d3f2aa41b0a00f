"""Rules -> alternatives, of which every pair that is looked for meets one.

An alternative is a join: the leaves whose keys must all be equal. Rules that must all hold are one
alternative of many keys; `any`, `at_least` and sums of weights are several.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rankpo_fast.label.predicates import AtLeast, Leaf, Not, Predicate
from rankpo_fast.label.rule_file import Rule

MOST = 200  # alternatives of one set of rules


@dataclass(frozen=True)
class Alternative:
    leaves: tuple[Leaf, ...]


def alternatives(predicate: Predicate) -> list[Alternative] | None:
    """None where some pairs that meet it meet no key."""
    if isinstance(predicate, Leaf):
        return [Alternative((predicate,))] if predicate.drives else None
    if isinstance(predicate, Not):
        inner = predicate.part
        return alternatives(inner.part) if isinstance(inner, Not) else None
    assert isinstance(predicate, AtLeast)
    weights = [1.0] * len(predicate.parts)
    return met_by_weight(predicate.parts, weights, float(predicate.count))


def of_rules(rules: Sequence[Rule], least: float) -> list[Alternative] | None:
    """Of rules whose weights sum up to `least` or more where they hold."""
    return met_by_weight([r.predicate for r in rules], [r.weight for r in rules], least)


def met_by_weight(
    parts: Sequence[Predicate], weights: Sequence[float], least: float
) -> list[Alternative] | None:
    """One conjunction for each smallest set of parts whose weights reach `least`."""
    plans = [alternatives(part) for part in parts]
    slack = 1e-9 * math.fsum(weights)
    found: dict[Alternative, None] = {}
    smallest: list[frozenset[int]] = []
    for size in range(1, len(parts) + 1):
        for chosen in map(frozenset, itertools.combinations(range(len(parts)), size)):
            if math.fsum(weights[k] for k in chosen) < least - slack:
                continue
            if any(known <= chosen for known in smallest):
                continue
            smallest.append(chosen)
            together = _together([plan for k in sorted(chosen) if (plan := plans[k])])
            if together is None:
                return None
            found.update(dict.fromkeys(together))
            if len(found) > MOST:
                return None
    return list(found)


def _together(plans: Sequence[list[Alternative]]) -> list[Alternative] | None:
    """Of parts that all hold: those of one alternative join at once, else the shortest plan."""
    single = [plan[0].leaves for plan in plans if len(plan) == 1]
    if single:
        return [Alternative(tuple(dict.fromkeys(itertools.chain(*single))))]
    return min(plans, key=len) if plans else None
