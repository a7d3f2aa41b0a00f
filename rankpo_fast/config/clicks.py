"""Logs of clicks to pairs of stage 2."""

from dataclasses import dataclass

from rankpo_fast.data.memory import Source
from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config, check_at_least, check_names, flag, require

DEFAULT_ETA = 1.0


@dataclass(frozen=True)
class ClicksConfig(Config):
    """Clicks to preferences, debiased by position."""

    _argument_group_name = "clicks"

    clicks_data: list[Source] = flag(
        'JSONL files of {"query", "passages": [str], "clicks": [number]}, each a list that was '
        'shown, with "positions" (else in order, from 1) and "impressions" (else 1); also .gz, '
        ".zst, .parquet, - for standard input, owner/name of the hub."
    )
    output_file: str = flag("The preferences, as rows of stage 2 with confidence_score.")
    propensity: str = flag(
        "How likely each position is looked at: power (position^-eta), estimate (from passages "
        "that were shown at several positions), or a JSON file with a list of them.",
        "power",
    )
    eta: float | None = flag("Of --propensity power; 0 takes clicks as they are. [1.0]", None)
    max_weight: float = flag("A click counts at most so much: 1 / propensity is cut there.", 10.0)

    def check(self) -> None:
        check_names(self, "clicks_data", "output_file", "propensity")
        require(self, "clicks_data", "at least one file or row", len(self.clicks_data) > 0)
        check_at_least(self, 0, "eta")
        check_at_least(self, 1, "max_weight")
        if self.eta is not None and self.propensity != "power":
            raise InputError(f"--eta {self.eta} needs --propensity power, not {self.propensity}")
