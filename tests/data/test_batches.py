"""Batches: a pure function of (seed, epoch, index), every row once, known positives excluded."""

import time

import numpy as np
import pytest
import torch

from rankpo_fast.data.batches import ContrastiveBatch, ContrastiveData, PreferenceData
from rankpo_fast.data.rows import ContrastiveRow, PreferenceRow
from rankpo_fast.data.shares import Share, describe_shares, read_shares
from rankpo_fast.errors import InputError


def contrastive_rows(count=10, positives=3, negatives=6):
    """Own passages for every row, so that a passage tells whose it is."""
    return [
        ContrastiveRow(
            f"q{i}",
            tuple(f"p{i}.{j}" for j in range(positives)),
            tuple(f"n{i}.{j}" for j in range(negatives)),
        )
        for i in range(count)
    ]


def preference_rows(count=10):
    return [PreferenceRow(f"q{i // 2}", f"c{i}", f"r{i}", (i + 1) / count) for i in range(count)]


def contrastive(rows, batch_size=4, num_negatives=2, seed=0):
    return ContrastiveData(rows, batch_size=batch_size, num_negatives=num_negatives, seed=seed)


def fields(batch):
    return {
        name: value.tolist()
        for name, value in vars(batch).items()
        if isinstance(value, torch.Tensor)
    }


def epoch_of(data, epoch=0):
    return [data.batch(epoch, index) for index in range(data.batches_per_epoch)]


def texts_of(data, batch):
    """(query, positive, other passages of the batch, excluded passages) of every row, as texts."""
    passages = [data.passage_texts[i] for i in batch.passage_texts]
    for i, (query, label) in enumerate(zip(batch.query_rows, batch.labels, strict=True)):
        start, stop = batch.excluded_offsets[i : i + 2].tolist()
        excluded = {passages[column] for column in batch.excluded_columns[start:stop]}
        others = set(passages) - {passages[label]}
        yield data.query_texts[batch.query_texts[query]], passages[label], others, excluded


# --- order ---


@pytest.mark.parametrize("kind", ["contrastive", "preference"])
def test_batch_depends_on_seed_epoch_and_index_alone(kind):
    def build(seed=0):
        if kind == "contrastive":
            return contrastive(contrastive_rows(), seed=seed)
        return PreferenceData(preference_rows(), batch_size=4, seed=seed)

    asked = [(2, 1), (0, 0), (1, 1), (0, 1), (2, 1)]
    data = build()
    first = [fields(data.batch(*key)) for key in asked]
    np.random.seed(1)
    torch.manual_seed(1)
    assert [fields(build().batch(*key)) for key in asked] == first
    assert fields(build(seed=1).batch(2, 1)) != first[0]


def test_drawing_leaves_the_global_generators_alone():
    data = contrastive(contrastive_rows())
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    data.batch(0, 0)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


def test_epoch_holds_every_row_at_most_once_in_its_own_order():
    data = contrastive(contrastive_rows(10), batch_size=3)
    assert data.batches_per_epoch == 3
    orders = [
        [row for batch in epoch_of(data, epoch) for row in batch.rows.tolist()]
        for epoch in range(8)
    ]
    assert all(len(set(order)) == 9 for order in orders)
    assert len(set(map(tuple, orders))) == 8
    assert set().union(*orders) == set(range(10))  # the row left out is not always the same


@pytest.mark.parametrize(
    ("rows", "batches", "size"),
    [
        pytest.param(3, 1, 3, id="less-than-a-batch"),
        pytest.param(4, 1, 4, id="one-batch"),
        pytest.param(7, 1, 4, id="partial-one-dropped"),
        pytest.param(8, 2, 4, id="two-batches"),
    ],
)
def test_partial_batch_is_dropped_unless_it_is_the_only_one(rows, batches, size):
    for data in (
        contrastive(contrastive_rows(rows)),
        PreferenceData(preference_rows(rows), batch_size=4, seed=0),
    ):
        assert [len(batch.rows) for batch in epoch_of(data)] == [size] * batches
        with pytest.raises(AssertionError):
            data.batch(0, batches)


# --- contrastive ---


def test_row_gets_one_of_its_positives_and_its_own_negatives():
    rows = contrastive_rows()
    data = contrastive(rows, batch_size=1)
    for epoch in range(5):
        for batch in epoch_of(data, epoch):
            ((query, positive, others, excluded),) = texts_of(data, batch)
            row = rows[int(batch.rows)]
            assert query == row.query and positive in row.positives
            assert len(others) == 2 and others <= set(row.negatives) and not excluded


def test_epochs_draw_every_positive_and_every_negative():
    rows = contrastive_rows(1)
    data = contrastive(rows)
    drawn = [next(texts_of(data, data.batch(epoch, 0))) for epoch in range(40)]
    assert {positive for _, positive, _, _ in drawn} == set(rows[0].positives)
    assert set().union(*(others for _, _, others, _ in drawn)) == set(rows[0].negatives)
    assert len({frozenset(others) for _, _, others, _ in drawn}) == 15  # all pairs out of six


def test_equal_texts_of_a_batch_stand_in_it_once():
    rows = [ContrastiveRow("same", ("p",), ("n", f"m{i}")) for i in range(4)]
    data = contrastive(rows)
    batch = data.batch(0, 0)
    assert [data.query_texts[i] for i in batch.query_texts] == ["same"]
    assert sorted(data.passage_texts[i] for i in batch.passage_texts) == [
        *("m0", "m1", "m2", "m3", "n", "p")
    ]
    assert batch.query_rows.tolist() == [0] * 4 and len(set(batch.labels.tolist())) == 1


def test_known_positives_of_any_row_of_the_query_are_excluded_and_never_drawn():
    rows = [
        ContrastiveRow("q", ("a", "b"), ("x", "c", "a")),  # c is a positive in the next row
        ContrastiveRow("q", ("c",), ("y", "b")),
        ContrastiveRow("other", ("a",), ("b", "c")),  # to this query b and c are negatives
    ]
    data = contrastive(rows, batch_size=3, num_negatives=5)
    for epoch in range(20):
        batch = data.batch(epoch, 0)
        present = {data.passage_texts[i] for i in batch.passage_texts}
        assert present == {"a", "b", "c", "x", "y"}
        for query, positive, _, excluded in texts_of(data, batch):
            known = {"a", "b", "c"} if query == "q" else {"a"}
            assert positive in known and excluded == known - {positive}
    alone = contrastive(rows[:2], batch_size=1, num_negatives=5)
    for batch in epoch_of(alone):
        ((_, _, others, _),) = texts_of(alone, batch)
        assert others in ({"x"}, {"y"})


def test_parts_of_a_batch_have_its_rows_with_what_each_excludes():
    rows = [ContrastiveRow(f"q{i // 3}", (f"p{i}",), (f"n{i}",)) for i in range(12)]
    batch = contrastive(rows, batch_size=12).batch(0, 0)
    parts = [batch.part(rows) for rows in (slice(0, 5), slice(5, 5), slice(5, 12))]
    for name in ("query_rows", "labels", "excluded_columns", "rows"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(batch, name))
    counts = torch.cat([part.excluded_offsets.diff() for part in parts])
    assert torch.equal(counts, batch.excluded_offsets.diff()) and counts.min() == 2
    assert all(part.excluded_offsets[0] == 0 for part in parts)
    assert sum(part.weight for part in parts) == batch.weight


def test_known_positive_beyond_the_last_passage_of_the_batch_is_not_excluded():
    data = contrastive([ContrastiveRow("q", ("a", "b"), ())])
    for epoch in range(5):
        assert not len(data.batch(epoch, 0).excluded_columns)


def test_passages_of_a_batch_are_distinct_and_every_index_is_int64():
    data = contrastive(contrastive_rows())
    batch: ContrastiveBatch = data.batch(0, 0)
    assert len(set(batch.passage_texts.tolist())) == len(batch.passage_texts) == 12
    assert len(batch.excluded_offsets) == 5
    tensors = [value for value in vars(batch).values() if value is not None]
    assert len(tensors) == 10 and {tensor.dtype for tensor in tensors} == {torch.int64}


def test_rows_with_too_few_negatives_give_what_they_have_and_are_counted():
    rows = [
        ContrastiveRow("q0", ("p0",), ()),
        ContrastiveRow("q1", ("p1",), ("n1", "n1", "p1")),  # one, after all
        ContrastiveRow("q2", ("p2",), ("n2", "n3")),
    ]
    data = contrastive(rows, batch_size=1)
    assert data.short_rows == 2
    drawn = {query: others for b in epoch_of(data) for query, _, others, _ in texts_of(data, b)}
    assert drawn == {"q0": set(), "q1": {"n1"}, "q2": {"n2", "n3"}}


def test_no_negatives_asked_gives_none():
    data = contrastive(contrastive_rows(), num_negatives=0)
    assert data.short_rows == 0
    assert len(data.batch(0, 0).passage_texts) == 4


# --- texts of equal token ids ---


def numbered(*lists):
    """For each list of texts the numbers of their ids, where case makes no difference."""
    numbers = {}
    return [
        torch.tensor([numbers.setdefault(t.lower(), len(numbers)) for t in texts])
        for texts in lists
    ]


def merged(data):
    queries, passages = numbered(data.query_texts, data.passage_texts)
    own = numbered(data.passage_texts, data.query_texts)[1]  # as passages they are numbered alike
    return data.merged(queries, numbered(data.passage_texts)[0], own)


def test_queries_of_equal_ids_share_their_known_positives():
    rows = [
        ContrastiveRow("Q", ("A",), ("x", "b", "a")),  # b and a are twins of positives
        ContrastiveRow("q", ("B",), ("X", "x")),
        ContrastiveRow("other", ("c",), ()),
    ]
    before = contrastive(rows, batch_size=3, num_negatives=5)
    data = merged(before)
    assert (before.known_negatives, data.known_negatives) == (0, 2)
    for epoch in range(5):
        batch = data.batch(epoch, 0)
        assert {data.passage_texts[i] for i in batch.passage_texts} == {"A", "B", "c", "x"}
        for query, positive, _, excluded in texts_of(data, batch):
            assert excluded == (set() if query == "other" else {"A", "B"} - {positive})
    assert len(before.batch(0, 0).passage_texts) > 4  # which merging leaves as it was


def test_a_query_is_no_negative_of_itself_under_any_spelling():
    rows = [ContrastiveRow("q", ("p",), ("Q", "n")), ContrastiveRow("r", ("Q",), ())]
    data = merged(contrastive(rows, batch_size=2))
    assert data.known_negatives == 1
    for query, _, others, excluded in texts_of(data, data.batch(0, 0)):
        assert others == ({"Q", "n"} if query == "q" else {"p", "n"})
        assert excluded == ({"Q"} if query == "q" else set())


def test_a_query_may_be_its_own_positive():
    data = merged(contrastive([ContrastiveRow("q", ("Q",), ("n",))]))
    [(_, positive, others, excluded)] = texts_of(data, data.batch(0, 0))
    assert (positive, others, excluded) == ("Q", {"n"}, set())


def test_queries_cut_to_the_same_ids_spare_both_their_texts():
    """Past the limit of queries they differ, and so they do as passages, which have another."""
    rows = [ContrastiveRow("q 1", ("p",), ("q 2", "n")), ContrastiveRow("q 2", ("p",), ("q 1",))]
    data = contrastive(rows, batch_size=2)
    passages = numbered(data.passage_texts)[0]
    own = numbered(data.passage_texts, data.query_texts)[1]
    data = data.merged(torch.tensor([0, 0]), passages, own)
    assert {text for *_, others, _ in texts_of(data, data.batch(0, 0)) for text in others} == {"n"}


def test_merging_distinct_texts_changes_nothing():
    data = contrastive(contrastive_rows())
    assert merged(data) is data


def test_rows_left_without_negatives_are_counted_again():
    data = contrastive([ContrastiveRow("q", ("p",), ("P",))])
    assert (data.bare_rows, merged(data).bare_rows) == (0, 1)


def test_pairs_of_twins_are_in_no_batch_and_others_keep_number_and_margin():
    rows = [PreferenceRow(f"q{i}", f"c{i}", f"C{i}" if i % 2 else f"r{i}", 1.0) for i in range(8)]
    data = PreferenceData(rows, batch_size=2, seed=0).with_reference(torch.arange(8))
    data = data.merged(*numbered(data.query_texts, data.passage_texts))
    assert (data.equal_pairs, data.batches_per_epoch) == (4, 2)
    batches = epoch_of(data)
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == [0, 2, 4, 6]
    assert all(torch.equal(batch.reference_margins, batch.rows.float()) for batch in batches)
    twins = PreferenceData(rows[1:2], batch_size=2, seed=0)
    with pytest.raises(InputError, match="the two passages of every pair have the same tokens"):
        twins.merged(*numbered(twins.query_texts, twins.passage_texts))


# --- weights of files ---


def test_rows_come_as_often_as_their_files_weigh():
    shares = [Share("a", 4, 2.0), Share("b", 4, 0.5), Share("c", 4, 1.25)]
    data = PreferenceData(preference_rows(12), batch_size=5, seed=0, shares=shares)
    assert data.batches_per_epoch == 3  # of 8 + 2 + 5 rows
    drawn = set()
    for epoch in range(20):
        rows = [row for batch in epoch_of(data, epoch) for row in batch.rows.tolist()]
        counts = [rows.count(row) for row in range(12)]
        assert counts[:4] == [2] * 4 and sorted(counts[4:8]) == [0, 0, 1, 1]
        assert sorted(counts[8:]) == [1, 1, 1, 2]
        drawn |= {row for row in range(4, 8) if counts[row]}
        again = PreferenceData(preference_rows(12), batch_size=5, seed=0, shares=shares)
        assert fields(again.batch(epoch, 1)) == fields(data.batch(epoch, 1))
    assert drawn == {4, 5, 6, 7}


def test_weight_1_is_no_weight():
    shares = [Share("a", 4), Share("b", 6)]
    data = ContrastiveData(contrastive_rows(), batch_size=4, num_negatives=2, seed=0, shares=shares)
    assert fields(data.batch(1, 1)) == fields(contrastive(contrastive_rows()).batch(1, 1))


def test_shares_of_files_are_said():
    rows, shares = read_shares(lambda path: [path] * 3, ["a", "b"], [1.0, 0.1])
    assert rows == ["a", "a", "a", "b", "b", "b"]
    assert describe_shares(shares) == "; an epoch has 3 of a (3 x 1) + 1 of b (3 x 0.1)"
    assert describe_shares(read_shares(lambda path: [path], ["a", "b"], None)[1]) == ""


# --- preferences ---


def test_pair_keeps_its_query_passages_weight_and_margin():
    rows = preference_rows()
    margins = torch.arange(10, dtype=torch.float64) / 7
    data = PreferenceData(rows, batch_size=4, seed=0).with_reference(margins)
    seen = 0
    for batch in epoch_of(data):
        queries = [data.query_texts[i] for i in batch.query_texts[batch.query_rows]]
        chosen = [data.passage_texts[i] for i in batch.passage_texts[batch.chosen_rows]]
        rejected = [data.passage_texts[i] for i in batch.passage_texts[batch.rejected_rows]]
        for i, row in enumerate(batch.rows.tolist()):
            assert PreferenceRow(queries[i], chosen[i], rejected[i], rows[row].weight) == rows[row]
            seen += 1
        expected = torch.tensor([rows[row].weight for row in batch.rows])
        assert torch.equal(batch.weights, expected) and batch.weights.dtype == torch.float32
        assert torch.equal(batch.reference_margins, margins[batch.rows].float())
    assert seen == 8


def test_equal_texts_of_a_preference_batch_stand_in_it_once():
    rows = [PreferenceRow("q", "a", "b", 1.0), PreferenceRow("q", "b", "c", 1.0)]
    batch = PreferenceData(rows, batch_size=2, seed=0).batch(0, 0)
    assert (len(batch.query_texts), len(batch.passage_texts)) == (1, 3)
    assert batch.reference_margins is None


def test_reference_margins_change_nothing_else_and_not_the_data_they_come_to():
    data = PreferenceData(preference_rows(), batch_size=4, seed=0)
    referred = data.with_reference(torch.zeros(10))
    given = PreferenceData(
        preference_rows(), batch_size=4, seed=0, reference_margins=torch.zeros(10)
    )
    plain = fields(data.batch(1, 0))
    assert fields(referred.batch(1, 0)) == plain | {"reference_margins": [0.0] * 4}
    assert fields(given.batch(1, 0)) == fields(referred.batch(1, 0))
    assert data.batch(1, 0).reference_margins is None
    with pytest.raises(AssertionError):
        data.with_reference(torch.zeros(9))


def test_ids_of_all_pairs_point_at_their_texts():
    rows = preference_rows()
    data = PreferenceData(rows, batch_size=4, seed=0)
    assert [data.query_texts[i] for i in data.query_ids] == [row.query for row in rows]
    assert [data.passage_texts[i] for i in data.chosen_ids] == [row.chosen for row in rows]
    assert [data.passage_texts[i] for i in data.rejected_ids] == [row.rejected for row in rows]


# --- speed ---


def test_batch_costs_the_same_however_many_rows_there_are():
    def seconds(rows):
        data = contrastive(contrastive_rows(rows, positives=1, negatives=3), batch_size=8)
        data.batch(0, 0)  # orders the epoch
        times = []
        for index in range(1, 12):
            start = time.perf_counter()
            data.batch(0, index)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(40_000) < 5 * seconds(100)
