"""A sweep: its file, and where it goes."""

from dataclasses import dataclass

from rankpo_fast.fields import Config, check_at_least, check_names, flag


@dataclass(frozen=True)
class SweepConfig(Config):
    """Trainings of one file, run one after the other or several at once."""

    _argument_group_name = "sweep"

    sweep: str = flag("YAML file of what to train: docs/sweeps.md.")
    output_dir: str = flag("Where trainings, figures and the report go; a sweep there goes on.")
    parallel: int = flag("Trainings at once, each with a GPU of its own where there are any.", 1)

    def check(self) -> None:
        check_names(self, "sweep", "output_dir")
        check_at_least(self, 1, "parallel")
