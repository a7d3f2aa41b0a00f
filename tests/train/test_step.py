"""A step is packed early, each text once; what it reports is read without waiting."""

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankpo_fast.config import (
    ComputeConfig,
    ContrastiveLossConfig,
    EncoderConfig,
    ModelConfig,
    RankPOLossConfig,
    TrainingConfig,
)
from rankpo_fast.data.batches import ContrastiveData, PreferenceData
from rankpo_fast.data.moving import to_device
from rankpo_fast.data.rows import ContrastiveRow, read_preferences
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.texts import Texts
from rankpo_fast.ranks import ALONE
from rankpo_fast.train.contrastive import ContrastiveTask
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.optim import make_optimizer
from rankpo_fast.train.prefetch import Prefetcher, pack_step
from rankpo_fast.train.rankpo import RankPOTask
from rankpo_fast.train.step import train_step
from rankpo_fast.train.task import scatter_sum

MEMORY = Memory(40, 0.0, 1.0)


@pytest.fixture
def packed(tiny_llama_dir, tmp_path):
    """Two batches of 3 rows, packed, then encoder, data and texts."""
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
    task = ContrastiveTask(data, texts, ContrastiveLossConfig(), weight=3.0)
    batches = pack_step([task], encoder, ALONE, range(2, 4), 40)  # of epoch 1
    return batches, encoder, data, texts


def test_each_distinct_text_of_a_batch_is_encoded_once_and_found_again(packed):
    batches, encoder, data, texts = packed
    seen = set()
    for batch in batches:
        vectors = torch.cat([encoder(group) for group in batch.micro_batches])[batch.order]
        queries = [data.query_texts[i] for i in batch.own.query_texts]
        passages = [data.passage_texts[i] for i in batch.own.passage_texts]
        assert len(vectors) == len({*queries, *passages})
        for found, names in ((batch.query_places, queries), (batch.passage_places, passages)):
            table = encoder.tokenize_passages(names)
            expected = encoder.embed(table, max_tokens=4096)
            torch.testing.assert_close(vectors[found], expected, rtol=0, atol=1e-5)
        seen |= {int(row) for row in batch.own.rows}
        assert all(sum(group.lengths) <= 40 for group in batch.micro_batches)
    assert seen == set(range(6))
    assert [batch.weight for batch in batches] == [1.5, 1.5]


def test_texts_on_both_sides_share_a_row_of_the_table(packed):
    *_, data, texts = packed
    row = texts.query_rows[data.query_texts.index("a nurse")]
    assert row == texts.passage_rows[data.passage_texts.index("a nurse")]
    assert len(texts.table) == len({*data.query_texts, *data.passage_texts})


def test_steps_come_in_order_and_at_most_three_are_made_early():
    made = []
    with Prefetcher(lambda step, _: made.append(step) or [step], range(7), MEMORY) as steps:
        assert next(steps) == [0]
        assert len(made) <= 3
        assert [step for [step] in steps] == [1, 2, 3, 4, 5, 6]


def test_an_error_in_the_background_arrives_at_its_step_and_the_thread_ends():
    def make(step, max_tokens):
        if step == 1:
            raise ValueError("bad batch")
        return [step]

    with pytest.raises(ValueError, match="bad batch"), Prefetcher(make, range(9), MEMORY) as steps:
        assert next(steps) == [0]
        next(steps)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_rows_that_fall_on_one_place_are_summed():
    parts = [(torch.tensor([2, 0, 2]), torch.eye(3)), (torch.tensor([0]), torch.ones(1, 3))]
    assert scatter_sum(4, *parts).tolist() == [[1, 2, 1], [0, 0, 0], [1, 0, 1], [0, 0, 0]]


def test_a_packed_batch_moves_with_all_its_tensors(packed):
    [[batch, _], *_] = packed
    moved = to_device(batch, torch.device("meta"))
    values = [moved.order, moved.query_places, *vars(moved.own).values()]
    values += [value for group in moved.micro_batches for value in vars(group).values()]
    tensors = [x for x in values if isinstance(x, torch.Tensor)]
    assert len(tensors) >= 10 and all(x.is_meta for x in tensors)
    assert moved.task is batch.task  # whose token table must stay where it is


# --- nothing waits for the device ---


class NoAnswers(TorchDispatchMode):
    """The CPU stands in for a card: whatever would have to wait for its values is an error."""

    WAIT = {
        "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
        "unique_dim", "unique_consecutive",
    }  # fmt: skip

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        chosen = name in ("index", "index_put", "index_put_")
        masks = chosen and any(
            x.dtype in (torch.bool, torch.uint8)
            for x in tree_leaves(args[1])
            if isinstance(x, torch.Tensor)
        )
        counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in self.WAIT or masks or counted:
            raise AssertionError(f"{func} asks the device")
        return func(*args, **(kwargs or {}))


def test_what_asks_the_device_is_noticed():
    mask = torch.ones(3, dtype=torch.bool)
    questions = [mask.all, mask.nonzero, lambda: mask[mask], lambda: mask.repeat_interleave(mask)]
    with NoAnswers():
        for question in questions:
            with pytest.raises(AssertionError, match="asks the device"):
                bool(question())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("stage", ["contrastive", "rankpo"])
def test_a_step_does_not_ask_the_device(
    stage, checkpointing, packed, preference_file, tiny_bert_dir, tmp_path, monkeypatch
):
    _, _, data, texts = packed
    flags = {"bf16": True, "gradient_checkpointing": checkpointing}
    encoder = load_encoder(ModelConfig(str(tiny_bert_dir), **flags), device=torch.device("cpu"))
    task = ContrastiveTask(data, texts, ContrastiveLossConfig())
    if stage == "rankpo":
        rows = read_preferences([preference_file], use_confidence=True)
        # It looks at weights only where they are on the CPU.
        monkeypatch.setattr("rankpo_fast.ops.rankpo.row_weights", lambda q, w, *_: w / w.sum())
        reference = torch.rand(2, len(rows))
        pairs = PreferenceData(rows, batch_size=6, seed=0).with_reference(reference[0])
        compute = ComputeConfig(cache_dir=str(tmp_path))
        texts = Texts.tokenize(encoder, pairs.query_texts, pairs.passage_texts, compute)
        config = RankPOLossConfig(reference_free=False, sft_weight=0.5)
        task = RankPOTask(pairs, texts, config, reference)
    steps = iter([pack_step([task], encoder.train(), ALONE, range(2), 60) for _ in range(2)])
    optimizer, memory = (
        make_optimizer(encoder, TrainingConfig(str(tmp_path))),
        Memory(60, 50.0, 1.0),
    )
    for _ in range(2):
        with NoAnswers():
            metrics = train_step(encoder, steps, optimizer, 1e-3, 1.0, memory, ALONE)
        metrics.check_finite(1)
        assert metrics.loss > 0 and metrics.grad_norm > 0
