"""`rankpo-fast clicks`: logs of clicks as preferences, for stage 2."""

from pathlib import Path

from rankpo_fast.config import ClicksConfig
from rankpo_fast.config.clicks import DEFAULT_ETA
from rankpo_fast.data.clicks import (
    ClickList,
    Propensity,
    click_preferences,
    estimated_propensity,
    listed_propensity,
    power_propensity,
    read_clicks,
)
from rankpo_fast.data.rows import PreferenceRow, write_jsonl


def run(config: ClicksConfig) -> None:
    """Raises InputError for rows that cannot be used, and propensities that cannot be had."""
    lists = read_clicks(config.clicks_data)
    made = click_preferences(lists, _propensity(config, lists), max_weight=config.max_weight)
    write_jsonl(config.output_file, map(_row, made.rows))
    print(made.summary())
    print(f"{len(made.rows):,} preferences in {config.output_file}")


def _propensity(config: ClicksConfig, lists: list[ClickList]) -> Propensity:
    if config.propensity == "power":
        return power_propensity(DEFAULT_ETA if config.eta is None else config.eta)
    if config.propensity == "estimate":
        found = estimated_propensity(lists)
        print("propensities: " + ", ".join(f"{k}: {p:.3f}" for k, p in sorted(found.items())))
        return found.__getitem__
    highest = max(position for each in lists for position in each.positions)
    return listed_propensity(Path(config.propensity), highest)


def _row(row: PreferenceRow) -> dict:
    # All digits, since a confidence of 0 is none: a pair seen once beside one seen 10,000 times.
    return {"query": row.query, "passage1": row.chosen, "passage2": row.rejected,
            "preferred": "A", "confidence_score": 100 * row.weight}  # fmt: skip
