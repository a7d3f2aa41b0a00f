"""Two CSV files to begin with, jobs and talents, and a small untrained model for them.

    python examples/records.py --output_dir walk

jobs.csv      job_id, title, field, rank, country, description
talents.csv   talent_id, fields (separated by ;), rank, country, profile, quality
model/        a tokenizer learnt from these texts and the config of an encoder of one layer, which
              trains from scratch on a CPU in a minute or two

They are of the demo's world. `quality` is the share of a profile's statements that are evidence
rather than phrase. No rule reads it: it is what `simulated_judge.py` prefers by.
"""

import argparse
import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def job_records(jobs: Iterable[Any]) -> Iterator[dict[str, Any]]:
    from rankpo_fast.demo import world

    for number, record in enumerate(world.job_records(jobs), 1):
        yield {
            "job_id": f"J{number}",
            "title": f"{record['rank'].capitalize()}, {record['field']}",
            "field": record["field"],
            "rank": record["rank"],
            "country": record["country"],
            "description": record["text"],
        }


def talent_records(talents: Sequence[Any]) -> Iterator[dict[str, Any]]:
    from rankpo_fast.demo import world

    records = world.talent_records(talents)
    for number, (record, talent) in enumerate(zip(records, talents, strict=True), 1):
        yield {
            "talent_id": f"T{number}",
            "fields": ";".join(record["fields"]),
            "rank": record["rank"],
            "country": record["country"],
            "profile": record["text"],
            "quality": round(talent.quality, 3),
        }


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("walk"))
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--talents", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    from rankpo_fast.demo import world
    from rankpo_fast.demo.steps import write_untrained_model

    sizes = {"all": world.SplitSize(options.jobs, options.talents)}
    made = world.make_world(options.seed, sizes)["all"]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_csv(options.output_dir / "jobs.csv", job_records(made.jobs))
    write_csv(options.output_dir / "talents.csv", talent_records(made.talents))
    texts = [record.text for record in (*made.jobs, *made.talents)]
    write_untrained_model(options.output_dir / "model", texts, hidden_size=64, max_length=128)
    print(f"{options.jobs:,} jobs, {options.talents:,} talents and a model in {options.output_dir}")


if __name__ == "__main__":
    main()
