"""`rankpo-fast label`: rows of stage 1 and evaluation sets, of records and rules."""

from rankpo_fast.config.label import LabelConfig
from rankpo_fast.label.run import label


def run(config: LabelConfig) -> None:
    """InputError for rules and records that cannot be used; nothing is written then."""
    report = label(config)
    print(report.summary())
    for note in report.notes:
        print(note)
    print(f"written to {config.output_dir}, with report.md")
