"""A step is packed early, each text once; what it reports is read without waiting."""

import threading

import pytest
import torch

from rankpo_fast.config import ComputeConfig, ContrastiveLossConfig, EncoderConfig
from rankpo_fast.data.batches import ContrastiveData
from rankpo_fast.data.moving import to_device
from rankpo_fast.data.rows import ContrastiveRow
from rankpo_fast.model.load import load_encoder
from rankpo_fast.train.contrastive import ContrastiveStage
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.step import Objective, ahead, pack_step, summed
from rankpo_fast.train.texts import Texts


@pytest.fixture
def packed(tiny_llama_dir, tmp_path):
    """Two batches of 3 rows, packed: works, encoder, data and texts."""
    rows = [
        ContrastiveRow("a nurse", ("a midwife",), ("a cook", "a baker")),
        ContrastiveRow("a nurse", ("a carer",), ("a cook",)),
        ContrastiveRow("a midwife", ("a nurse",), ("a pilot",)),  # its texts stand on both sides
        *(ContrastiveRow(f"q{i}", (f"p{i}",), (f"n{i}",)) for i in range(3)),
    ]
    encoder = load_encoder(EncoderConfig(str(tiny_llama_dir)), device=torch.device("cpu"))
    data = ContrastiveData(rows, batch_size=3, num_negatives=2, seed=0)
    compute = ComputeConfig(cache_dir=str(tmp_path))
    texts = Texts.tokenize(encoder, data.query_texts, data.passage_texts, compute)
    objective = Objective(ContrastiveStage(data, texts, ContrastiveLossConfig()), weight=3.0)
    works = pack_step([objective], range(2, 4), encoder, Memory(40, 0.0, 0.0))  # of epoch 1
    return works, encoder, data, texts


def test_each_distinct_text_of_a_batch_is_encoded_once_and_found_again(packed):
    works, encoder, data, texts = packed
    seen = set()
    for work in works:
        vectors = torch.cat([encoder(group) for group in work.groups])
        queries = [data.query_texts[i] for i in work.batch.query_texts]
        passages = [data.passage_texts[i] for i in work.batch.passage_texts]
        assert len(vectors) == len({*queries, *passages})
        for found, names in ((work.query_places, queries), (work.passage_places, passages)):
            table = encoder.tokenize_passages(names)
            expected = encoder.embed(table, max_tokens=4096)
            torch.testing.assert_close(vectors[found], expected, rtol=0, atol=1e-5)
        seen |= {int(row) for row in work.batch.rows}
        assert all(sum(group.lengths) <= 40 for group in work.groups)
    assert seen == set(range(6))
    assert [work.share for work in works] == [1.5, 1.5]


def test_texts_on_both_sides_share_a_row_of_the_table(packed):
    *_, data, texts = packed
    row = texts.query_rows[data.query_texts.index("a nurse")]
    assert row == texts.passage_rows[data.passage_texts.index("a nurse")]
    assert len(texts.table) == len({*data.query_texts, *data.passage_texts})


def test_steps_come_in_order_and_at_most_three_are_made_early():
    made = []
    steps = ahead(lambda step: made.append(step) or [step], range(7))
    assert next(steps) == [0]
    assert len(made) <= 4
    assert [step for [step] in steps] == [1, 2, 3, 4, 5, 6]


def test_an_error_in_the_background_arrives_at_its_step_and_the_thread_ends():
    def make(step):
        if step == 1:
            raise ValueError("bad batch")
        return [step]

    steps = ahead(make, range(100))
    assert next(steps) == [0]
    with pytest.raises(ValueError, match="bad batch"):
        next(steps)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_rows_that_fall_on_one_place_are_summed():
    parts = [(torch.tensor([2, 0, 2]), torch.eye(3)), (torch.tensor([0]), torch.ones(1, 3))]
    assert summed(4, *parts).tolist() == [[1, 2, 1], [0, 0, 0], [1, 0, 1], [0, 0, 0]]


def test_a_work_moves_with_all_its_tensors(packed):
    work = to_device(packed[0][0], torch.device("meta"))
    tensors = [*vars(work.batch).values(), *(v for g in work.groups for v in vars(g).values())]
    tensors = [x for x in [*tensors, work.query_places] if isinstance(x, torch.Tensor)]
    assert len(tensors) >= 10 and all(x.is_meta for x in tensors)
    assert work.objective is packed[0][0].objective  # whose token table must stay where it is
