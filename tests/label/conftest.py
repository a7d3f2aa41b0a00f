"""Records of two kinds and a rule file that reads them, small enough to match by hand."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

COUNTRIES = {"Sweden": "north", "NO": "north", "Spain": "south", "Chile": None}
LADDER = ["student", "postdoc", "professor"]
SKILLS = list("abcdefgh")
SIDE = """\
  id: id
  text: "{title}[ <keyword> {skills|, }]"
  fields:
    region: {map: regions, of: country}
    level: {map: ladder, of: rank}
"""
HEAD = f"""\
queries:
{SIDE}items:
{SIDE}maps:
  regions: {{Sweden: north, NO: north, Spain: south}}
  ladder: [student, postdoc, professor]
rules:
"""
RULES = """\
  - name: geography
    same: region
  - name: seniority
    ordinal_distance: {field: level, below: 1, above: 0}
  - name: area
    overlap: {field: skills, at_least: 2}
"""


@dataclass(frozen=True)
class Files:
    """rules.yaml, jobs.jsonl and talents.jsonl in a folder, where out/ is to be written."""

    folder: Path

    @property
    def inputs(self) -> tuple[Path, Path, Path]:
        names = ("rules.yaml", "jobs.jsonl", "talents.jsonl")
        return tuple(self.folder / name for name in names)

    @property
    def command(self) -> list[str]:
        flags = zip(("--config", "--queries", "--items"), self.inputs, strict=True)
        return ["label", *(str(word) for pair in flags for word in pair),
                "--output_dir", str(self.folder / "out")]  # fmt: skip

    def rows(self, name: str) -> list[dict]:
        return rows(self.folder / "out" / name)


@pytest.fixture
def make(tmp_path) -> Callable[..., Files]:
    """Write records and a rule file."""

    def write(rules: str, queries: list[dict], items: list[dict], head: str = HEAD) -> Files:
        (tmp_path / "rules.yaml").write_text(head + rules)
        for name, records in (("jobs", queries), ("talents", items)):
            lines = [json.dumps(record) + "\n" for record in records]
            (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        return Files(tmp_path)

    return write


def records(count: int, seed: int, prefix: str = "") -> list[dict]:
    """Some without a skill, a rank or a place, as records are; texts may be equal."""
    rng = random.Random(seed)
    made = []
    for number in range(count):
        lat, lon = rng.choice([(0, 0), (60, 179.99), (89.99, 10), (-45, -179.9)])
        record = {
            "id": f"{prefix}{number}",
            "title": f"{prefix} {rng.randrange(count)}",
            "country": rng.choice([*COUNTRIES]),
            "rank": rng.choice([*LADDER, None]),
            "skills": rng.sample(SKILLS, rng.randrange(5)),
            "lat": max(-90, min(90, lat + rng.uniform(-1, 1))),
            # around the pole a step is any number of degrees
            "lon": (lon + rng.uniform(-1, 1) * (180 if lat > 80 else 2) + 180) % 360 - 180,
            "pay": rng.choice([None, rng.randrange(100)]),
            "least": rng.choice([None, rng.randrange(60)]),
            "start": rng.choice([None, f"2024-0{rng.randint(1, 9)}-15"]),
            "until": f"2024-0{rng.randint(1, 9)}-20",
        }
        made.append(record)
    return made


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
