"""The demo's world: its rules, its judge, its rows."""

import math
from itertools import product

import pytest

from bench.training.corpus import rules_met as rules_by_bench
from rankpo_fast.data.retrieval import read_retrieval
from rankpo_fast.data.rows import read_contrastive, read_preferences, write_jsonl
from rankpo_fast.demo import lexicon
from rankpo_fast.demo.world import (
    FIELDS,
    JUDGE_SHARPNESS,
    RULES,
    SplitSize,
    contrastive_rows,
    job_records,
    judge_ceiling,
    make_world,
    preference_probability,
    preference_rows,
    retrieval_rows,
    talent_records,
)
from rankpo_fast.label.run import rules_met

SIZES = {"train": SplitSize(80, 300), "test": SplitSize(40, 200)}


@pytest.fixture(scope="module")
def world():
    return make_world(3, SIZES)


@pytest.fixture(scope="module")
def labels(world, tmp_path_factory):
    """What `rankpo-fast label` finds."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "rules.yaml").write_text(RULES)
    found = {}
    for name, split in world.items():
        write_jsonl(folder / f"{name}_jobs.jsonl", job_records(split.jobs))
        write_jsonl(folder / f"{name}_talents.jsonl", talent_records(split.talents))
        records = (folder / f"{name}_{kind}.jsonl" for kind in ("jobs", "talents"))
        found[name] = rules_met(folder / "rules.yaml", *records)
    return found


@pytest.fixture(scope="module")
def judged(world, labels):
    """Every talent of the test split is a candidate of every job."""
    split = world["test"]
    everyone = [range(len(split.talents))] * len(split.jobs)
    return list(preference_rows(split, labels["test"], everyone, pairs_per_job=50, seed=0))


def held(job, talent) -> int:
    """The rules once more, from their description."""
    same_place = job.region == talent.region
    rank_or_one_below = 0 <= job.rank - talent.rank <= 1
    works_on_it = job.field in {talent.field, talent.second_field}
    return same_place + rank_or_one_below + works_on_it


def fits(job, talent) -> bool:
    return held(job, talent) == 3


def test_labels_are_those_of_every_job_held_against_every_talent(world, labels):
    for name, split in world.items():
        for job, met in zip(split.jobs, labels[name], strict=True):
            by_hand = {i: held(job, talent) for i, talent in enumerate(split.talents)}
            assert met == {i: rules for i, rules in by_hand.items() if rules >= 2}


def test_the_bench_which_has_no_engine_counts_the_same_rules(world):
    split = world["test"]
    for job, talent in product(split.jobs, split.talents):
        assert rules_by_bench(job, talent) == held(job, talent)


def test_the_seed_decides_the_world(world):
    assert make_world(3, SIZES) == world
    assert make_world(4, SIZES) != world


def test_no_text_occurs_twice_within_or_across_splits(world):
    texts = [item.text for split in world.values() for item in (*split.jobs, *split.talents)]
    assert len(set(texts)) == len(texts) == 620


def test_stage_1_rows_follow_the_rules(world, labels, tmp_path):
    split = world["train"]
    rows = contrastive_rows(split, labels["train"], num_negatives=4, seed=0)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    rows = {row.query: row for row in read_contrastive([tmp_path / "rows.jsonl"])}
    for job in split.jobs:
        fitting = {talent.text for talent in split.talents if fits(job, talent)}
        assert (job.text in rows) == bool(fitting)
        if fitting:
            assert set(rows[job.text].positives) == fitting
            assert len(set(rows[job.text].negatives)) == 4
            assert not fitting & set(rows[job.text].negatives)


def test_retrieval_rows_follow_the_rules(world, labels, tmp_path):
    split = world["test"]
    queries, corpus = retrieval_rows(split, labels["test"])
    write_jsonl(tmp_path / "queries.jsonl", queries)
    write_jsonl(tmp_path / "corpus.jsonl", corpus)
    read = read_retrieval(tmp_path / "queries.jsonl", tmp_path / "corpus.jsonl")
    assert read.corpus == [talent.text for talent in split.talents]
    jobs = {job.text: job for job in split.jobs}
    for query, grades in zip(read.queries, read.grades, strict=True):
        assert list(grades) == [i for i, t in enumerate(split.talents) if fits(jobs[query], t)]


def test_texts_say_what_the_rules_look_at(world):
    for job in world["train"].jobs:
        assert_names_field_and_place(job)
        assert any(post.lower() in job.text.lower() for post in lexicon.RANKS[job.rank].posts)
    for talent in world["train"].talents:
        assert_names_field_and_place(talent)
        titles = lexicon.RANKS[talent.rank].titles
        assert any(title.lower() in talent.text.lower() for title in titles)


def assert_names_field_and_place(item):
    assert any(name.lower() in item.text.lower() for name in FIELDS[item.field].names)
    cities = [city for group in lexicon.REGIONS[item.region].values() for city in group]
    assert any(city in item.text for city in cities)
    assert "{" not in item.text


def test_quality_is_written_in_the_text_and_independent_of_the_rules(world):
    talents = [talent for split in world.values() for talent in split.talents]
    starts = tuple(sentence.partition("{")[0] for sentence in lexicon.EVIDENCE)
    for talent in talents:
        sentences = talent.text.replace("?", ".").split(". ")
        evidence = sum(sentence.startswith(starts) for sentence in sentences)
        assert evidence == round(3 * talent.quality)
    for rank in range(len(lexicon.RANKS)):
        qualities = [talent.quality for talent in talents if talent.rank == rank]
        assert 0.35 < sum(qualities) / len(qualities) < 0.65


def test_the_judges_probability_follows_quality():
    levels = [0, 1 / 3, 2 / 3, 1]
    for a, b in product(levels, levels):
        p = preference_probability(a, b)
        assert math.isclose(p + preference_probability(b, a), 1)
        assert math.isclose(math.log(p / (1 - p)), JUDGE_SHARPNESS * (a - b), abs_tol=1e-9)


def test_the_judges_choices_occur_as_often_as_their_probability(judged):
    by_difference: dict[float, list[bool]] = {}
    for row in judged:
        difference = round(row["quality1"] - row["quality2"], 3)
        by_difference.setdefault(difference, []).append(row["preferred"] == "A")
    assert len(by_difference) == 7
    for difference, choices in by_difference.items():
        p = preference_probability(difference, 0)
        noise = 4 * math.sqrt(p * (1 - p) / len(choices))
        assert abs(sum(choices) / len(choices) - p) < noise + 1e-3


def test_the_ceiling_is_the_alignment_of_who_knows_the_quality(judged):
    agreed = [
        0.5 if row["quality1"] == row["quality2"]
        else (row["quality1"] > row["quality2"]) == (row["preferred"] == "A")
        for row in judged
    ]  # fmt: skip
    assert abs(sum(agreed) / len(agreed) - judge_ceiling(judged)) < 0.04


def test_like_is_compared_with_like_and_nobody_twice_for_a_job(world, judged):
    jobs = {job.text: job for job in world["test"].jobs}
    talents = {talent.text: talent for talent in world["test"].talents}
    seen = set()
    for row in judged:
        job = jobs[row["query"]]
        pair = [talents[row["passage1"]], talents[row["passage2"]]]
        assert fits(job, pair[0]) == fits(job, pair[1])
        for talent in pair:
            assert (job.text, talent.text) not in seen
            seen.add((job.text, talent.text))


def test_preference_rows_parse(judged, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", judged)
    rows = read_preferences([tmp_path / "pairs.jsonl"], use_confidence=True)
    for row, raw in zip(rows, judged, strict=True):
        passages = raw["passage1"], raw["passage2"]
        assert (row.chosen, row.rejected) == (
            passages if raw["preferred"] == "A" else passages[::-1]
        )
        assert 0.5 <= row.weight <= 1
