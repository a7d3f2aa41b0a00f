"""A synthetic job-talent world: jobs, talents, the rules that match them, the judge who prefers.

RULES decide who fits, as in the paper's labels: job and talent lie in one region (geography), the
talent holds the job's rank or the one below (seniority), and the job's field is the talent's first
or second (research area). `rankpo-fast label` reads them and the records of jobs and talents; here
stands what it finds (`Labels`). The rules do not see how well a profile is evidenced. The judge
does: quality is the share of a profile's statements that are evidence rather than phrase, and

    P(judge prefers a to b) = sigmoid(JUDGE_SHARPNESS * (quality_a - quality_b))    (Bradley-Terry)

Everything is drawn from one seed. The splits (train, validation, test) share no job and no talent:
what a model shows on the test split it has learnt from words, not from having met the people.
"""

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rankpo_fast.demo import lexicon

JUDGE_SHARPNESS = 6.0  # one statement more of three: 0.88 sure; two more: 0.98
STATEMENTS = 3  # of a profile, each evidence or phrase
NUM_RULES = 3

FIELDS = [field for cluster in lexicon.FIELD_CLUSTERS for field in cluster]
CLUSTER_SIZE = len(lexicon.FIELD_CLUSTERS[0])


class City(NamedTuple):
    region: int  # of lexicon.REGIONS
    country: str
    name: str


CITIES = [
    City(region, country, city)
    for region, countries in enumerate(lexicon.REGIONS)
    for country, cities in countries.items()
    for city in cities
]
HIGHEST_RANK = len(lexicon.RANKS) - 1
RULES = f"""\
queries:
  id: id
  text: "{{text}}"
  fields:
    region: {{map: regions, of: country}}
    level: {{map: ladder, of: rank}}
items:
  id: id
  text: "{{text}}"
  fields:
    region: {{map: regions, of: country}}
    level: {{map: ladder, of: rank}}
maps:
  regions: {json.dumps({city.country: f"region {city.region}" for city in CITIES})}
  ladder: {json.dumps([rank.titles[0] for rank in lexicon.RANKS])}
rules:
  - name: geography
    same: region
  - name: seniority
    ordinal_distance: {{field: level, below: 1, above: 0}}
  - name: research area
    in: {{query: field, item: fields}}
"""
Labels = Sequence[
    Mapping[int, int]
]  # for each job {row of a talent: rules met}, of all or all but one


@dataclass(frozen=True)
class Job:
    """field, region, rank: rows of FIELDS, lexicon.REGIONS and lexicon.RANKS; rank from 1."""

    field: int
    region: int
    rank: int
    country: str
    text: str


@dataclass(frozen=True)
class Talent:
    """As Job, but rank from 0; quality in [0, 1] is the share of statements that are evidence."""

    field: int
    second_field: int | None
    region: int
    rank: int
    country: str
    quality: float
    text: str


@dataclass(frozen=True)
class Split:
    jobs: tuple[Job, ...]
    talents: tuple[Talent, ...]


@dataclass(frozen=True)
class SplitSize:
    jobs: int
    talents: int


def make_world(seed: int, sizes: dict[str, SplitSize]) -> dict[str, Split]:
    """The splits named in `sizes`; no text occurs twice, within a split or across them."""
    rng = random.Random(seed)
    seen: set[str] = set()
    return {
        name: Split(
            tuple(_distinct(make_job, size.jobs, rng, seen)),
            tuple(_distinct(make_talent, size.talents, rng, seen)),
        )
        for name, size in sizes.items()
    }


def job_records(jobs: Iterable[Job]) -> Iterator[dict]:
    """Jobs as RULES read them."""
    for number, job in enumerate(jobs):
        yield _record(number, job) | {"field": FIELDS[job.field].names[0]}


def talent_records(talents: Iterable[Talent]) -> Iterator[dict]:
    for number, talent in enumerate(talents):
        fields = [field for field in (talent.field, talent.second_field) if field is not None]
        yield _record(number, talent) | {"fields": [FIELDS[field].names[0] for field in fields]}


def _record(number: int, item: Job | Talent) -> dict:
    rank = lexicon.RANKS[item.rank].titles[0]
    return {"id": number, "text": item.text, "country": item.country, "rank": rank}


def positives(met: Mapping[int, int]) -> list[int]:
    """Row numbers of the talents who meet all rules, ascending."""
    return [i for i, rules in sorted(met.items()) if rules == NUM_RULES]


def preference_probability(quality_a: float, quality_b: float) -> float:
    """Of the judge preferring a to b."""
    return 1 / (1 + math.exp(-JUDGE_SHARPNESS * (quality_a - quality_b)))


# ---- rows in the project's own formats ----


def contrastive_rows(
    split: Split, labels: Labels, *, num_negatives: int, seed: int
) -> Iterable[dict]:
    """Stage 1: all who fit are positives, `num_negatives` random others negatives.

    Jobs that nobody fits are left out.
    """
    rng = random.Random(seed)
    for job, met in zip(split.jobs, labels, strict=True):
        fits = positives(met)
        if fits:
            others = sorted(set(range(len(split.talents))) - set(fits))
            yield {
                "query": job.text,
                "positives": [split.talents[i].text for i in fits],
                "negatives": [split.talents[i].text for i in rng.sample(others, num_negatives)],
            }


def retrieval_rows(split: Split, labels: Labels) -> tuple[list[dict], list[dict]]:
    """Evaluation: queries with the row numbers of their positives, and the corpus.

    Jobs that nobody fits are left out.
    """
    fits = ((job, positives(met)) for job, met in zip(split.jobs, labels, strict=True))
    queries = [
        {"query": {"text": job.text}, "positives": {"index": found}} for job, found in fits if found
    ]
    return queries, [{"text": talent.text} for talent in split.talents]


def preference_rows(
    split: Split,
    labels: Labels,
    candidates: Sequence[Sequence[int]],
    *,
    pairs_per_job: int,
    seed: int,
) -> Iterable[dict]:
    """Stage 2: the judge compares candidates retrieved for each job.

    Like is compared with like: two who both fit, or two who both miss one rule. No candidate stands
    in two pairs of one job.

    Args:
        candidates: for each job of the split the rows of talents that a model retrieved.
    """
    rng = random.Random(seed)
    for job, met, found in zip(split.jobs, labels, candidates, strict=True):
        pairs: list[tuple[int, int]] = []
        for rules in (NUM_RULES, NUM_RULES - 1):
            alike = [i for i in found if met.get(i) == rules]
            rng.shuffle(alike)
            pairs += zip(alike[::2], alike[1::2], strict=False)
        rng.shuffle(pairs)
        for first, second in pairs[:pairs_per_job]:
            yield _judge(job, split.talents[first], split.talents[second], rng)


def judge_ceiling(rows: Sequence[dict]) -> float:
    """Expected alignment of who always names the judge's likelier choice: noise leaves no more."""
    return sum(row["confidence_score"] for row in rows) / (100 * len(rows))


def _judge(job: Job, a: Talent, b: Talent, rng: random.Random) -> dict:
    """confidence_score (percent): how likely the likelier choice was, whichever was made."""
    probability = preference_probability(a.quality, b.quality)
    return {
        "query": job.text,
        "passage1": a.text,
        "passage2": b.text,
        "preferred": "A" if rng.random() < probability else "B",
        "confidence_score": round(100 * max(probability, 1 - probability), 1),
        "quality1": a.quality,
        "quality2": b.quality,
    }


# ---- texts ----


def make_job(rng: random.Random) -> Job:
    field, rank = rng.randrange(len(FIELDS)), rng.randint(1, HIGHEST_RANK)
    region, country, city = rng.choice(CITIES)
    words = _place_words(rng, country, city) | {
        "field": lambda: rng.choice(FIELDS[field].names),
        "term": _term_drawer(rng, field),
        "post": lambda: rng.choice(lexicon.RANKS[rank].posts),
        "ask": lambda: rng.choice(lexicon.RANKS[rank].asks),
    }
    body = [
        rng.choice(lexicon.JOB_TOPICS),
        rng.choice(lexicon.JOB_ASKS),
        *rng.sample(lexicon.JOB_NOISE, rng.randint(1, 2)),
        *rng.sample(lexicon.JOB_PLACES, rng.randint(0, 1)),
    ]
    rng.shuffle(body)
    return Job(
        field, region, rank, country, _fill([rng.choice(lexicon.JOB_OPENINGS), *body], words)
    )


def make_talent(rng: random.Random) -> Talent:
    field, rank = rng.randrange(len(FIELDS)), rng.randint(0, HIGHEST_RANK)
    second_field = rng.choice(_neighbours(field)) if rng.random() < 0.5 else None
    region, country, city = rng.choice(CITIES)
    words = _place_words(rng, country, city) | {
        "field": lambda: rng.choice(FIELDS[field].names),
        "term": _term_drawer(rng, field),
        "title": lambda: rng.choice(lexicon.RANKS[rank].titles),
    }
    evidence = rng.randint(0, STATEMENTS)
    body = [
        *rng.sample(lexicon.EVIDENCE, evidence),
        *rng.sample(lexicon.PHRASES, STATEMENTS - evidence),
        *rng.sample(lexicon.PROFILE_NOISE, rng.randint(0, 1)),
    ]
    body = [_fill([sentence], words) for sentence in body]
    if second_field is not None:
        second_words = {
            "field": lambda: rng.choice(FIELDS[second_field].names),
            "term": _term_drawer(rng, second_field),
        }
        body.append(_fill([rng.choice(lexicon.PROFILE_SECOND)], second_words))
    rng.shuffle(body)
    text = " ".join([_fill([rng.choice(lexicon.PROFILE_OPENINGS)], words), *body])
    return Talent(field, second_field, region, rank, country, evidence / STATEMENTS, text)


def _distinct(make: Callable, count: int, rng: random.Random, seen: set[str]) -> Iterable:
    while count:
        made = make(rng)
        if made.text not in seen:
            seen.add(made.text)
            count -= 1
            yield made


def _neighbours(field: int) -> list[int]:
    first = field - field % CLUSTER_SIZE
    return [other for other in range(first, first + CLUSTER_SIZE) if other != field]


def _term_drawer(rng: random.Random, field: int) -> Callable[[], str]:
    """Terms of the field without repetition, one in eight from a neighbouring field."""
    own = rng.sample(FIELDS[field].terms, len(FIELDS[field].terms))

    def draw() -> str:
        if rng.random() < 1 / 8:
            return rng.choice(FIELDS[rng.choice(_neighbours(field))].terms)
        return own.pop()

    return draw


def _place_words(rng: random.Random, country: str, city: str) -> dict[str, Callable[[], str]]:
    return {
        "city": lambda: city,
        "country": lambda: country,
        "institution": lambda: rng.choice(lexicon.INSTITUTIONS).format(city=city),
        "other_city": lambda: rng.choice(CITIES).name,
        "venue": lambda: rng.choice(lexicon.VENUES),
        "funder": lambda: rng.choice(lexicon.FUNDERS),
        "n": lambda: str(rng.randint(2, 30)),
    }


def _fill(templates: Sequence[str], words: dict[str, Callable[[], str]]) -> str:
    """Each brace gets a word of its own; {Title} is {title} with a capital."""

    def word(match: re.Match) -> str:
        name = match.group(1)
        drawn = words[name.lower()]()
        return drawn if name.islower() else drawn[0].upper() + drawn[1:]

    filled = re.sub(r"\{(\w+)\}", word, " ".join(templates))
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", filled)
