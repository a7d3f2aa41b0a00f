"""Rows are read once on a node, and what becomes of them lies in its memory once."""

import hashlib
import os
import tempfile

import numpy as np
import pytest
import torch

from rankpo_fast import node
from rankpo_fast.data import sources
from rankpo_fast.node import Node, load, save
from rankpo_fast.ranks import _reader
from support import rank_runs


@pytest.fixture
def file():
    with tempfile.TemporaryFile(buffering=0) as file:
        yield file


@pytest.fixture
def flags(tmp_path, contrastive_file, preference_file, tiny_bert_dir):
    def of(stage, name, **more):
        files = {"contrastive": contrastive_file, "rankpo": preference_file}
        return {
            "model_name_or_path": str(tiny_bert_dir), "train_data": [files[stage]], "stage": stage,
            "output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache"),
            "max_tokens_per_micro_batch": 100, "disable_dropout": True, **more,
        }  # fmt: skip

    return of


@pytest.fixture
def ran(tmp_path):
    def run(ranks, function, *args, **options):
        directory = tmp_path / f"ranks-{len(list(tmp_path.glob('ranks-*')))}"
        return rank_runs.start(ranks, directory, function, *args, **options).ended()

    return run


def test_what_is_handed_over_comes_back_as_it_was_and_once_where_it_was_once(file):
    ids = torch.arange(70, dtype=torch.int32)
    empty = np.fromiter([], np.int64), torch.empty(0, 3), np.array([[True], [False]])
    half = torch.tensor([[1.5, 2.5]], dtype=torch.bfloat16).T
    save({"ids": [ids, ids], "others": (*empty, half), "words": ["a", 1]}, file)
    got = load(f"/proc/self/fd/{file.fileno()}")
    assert got["words"] == ["a", 1]
    assert got["ids"][0].data_ptr() == got["ids"][1].data_ptr()
    assert torch.equal(got["ids"][0], ids) and got["ids"][0].dtype == ids.dtype
    for was, now in zip(empty, got["others"], strict=False):
        assert type(was) is type(now) and was.dtype == now.dtype and was.shape == now.shape
        assert (was == now).all()
    assert torch.equal(got["others"][3], half)


def test_a_change_is_seen_by_nobody_else(file):
    save(torch.zeros(3), file)
    path = f"/proc/self/fd/{file.fileno()}"
    load(path).add_(1)
    assert load(path).tolist() == [0, 0, 0]


def test_a_rank_that_cannot_open_the_files_of_the_first_of_its_node_reads_for_itself():
    here, there = (("node", "boot", name) for name in ("here", "there"))
    places = [(there, os.getpid()), (there, os.getpid()), (here, os.getpid()), (here, 0)]
    assert [_reader(rank, places) for rank in range(4)] == [0, 0, 2, 2]
    gone = [(here, 2**22 + 1), (here, os.getpid())]  # beyond the highest number of a process
    assert _reader(1, gone) == 1


def test_what_the_disk_refuses_is_handed_over_in_memory(file, monkeypatch):
    """With room for the first of two: what was written of it is not seen."""
    values, written = [torch.arange(20), torch.arange(30)], node._write

    def to_a_full_disk(to, data):
        if to is file and to.tell() > 100:
            raise OSError(28, "No space left on device")
        written(to, data)

    monkeypatch.setattr(node, "_write", to_a_full_disk)
    path = f"/proc/self/fd/{file.fileno()}"
    with pytest.warns(UserWarning, match="kept in memory .No space left on device"):
        handed = Node(file, path).hand(values)
    for got in (handed, Node(None, path).given()):
        assert [tensor.tolist() for tensor in got] == [tensor.tolist() for tensor in values]


def test_what_a_rank_has_read_the_others_know_the_hash_of(file, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_bytes(b"a\nb\n")
    path = f"/proc/self/fd/{file.fileno()}"
    with sources.digests_kept():
        list(sources.byte_lines(tmp_path / "rows.jsonl"))
        weights = sources.digest_of_bytes(tmp_path / "rows.jsonl")
        Node(file, path).hand([1])
    (tmp_path / "rows.jsonl").unlink()
    with sources.digests_kept():
        assert Node(None, path).given() == [1]
        assert sources.digest(tmp_path / "rows.jsonl") == hashlib.sha256(b"a\nb\n").hexdigest()
        assert sources.digest_of_bytes(tmp_path / "rows.jsonl") == weights


@pytest.mark.long
def test_one_rank_of_each_node_reads_and_all_map_what_it_has_read(
    ran, flags, preference_file, tiny_bert_dir
):
    """Of two nodes with two ranks each; the steps are those of one process. Data of an evaluation,
    and the bytes of all files, for their hashes, are read as seldom as rows."""
    more = {"max_steps": 3, "eval_steps": 2, "preference_data": [preference_file]}
    one = rank_runs.descend(**flags("contrastive", "one", per_device_train_batch_size=8, **more))
    of = flags("contrastive", "many", per_device_train_batch_size=2, **more)
    ended = ran(4, rank_runs.on_two_nodes, **of)
    assert [rank.code for rank in ended] == [0] * 4, ended
    assert [rank.answer["reads"] for rank in ended] == [1, 0, 1, 0]
    assert all(rank.answer["mapped"] and not rank.answer["texts"] for rank in ended)
    for name in (*of["train_data"], preference_file):
        opened = [name in rank.answer["opened"] for rank in ended]
        assert opened == [True, False, True, False], name
    weights = f"{tiny_bert_dir}/model.safetensors"  # which all load, and those that read hash
    opened = [rank.answer["opened"].count(weights) for rank in ended]
    loaded = opened[1]
    assert opened == [loaded + 1, loaded, loaded + 1, loaded]
    for was, now in zip(one[0], ended[0].answer["gradients"], strict=True):
        for name in was:
            torch.testing.assert_close(now[name], was[name], rtol=1e-6, atol=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("reader", [0, 2])
def test_what_is_wrong_for_one_that_reads_is_wrong_for_all(reader, ran, flags):
    ended = ran(4, rank_runs.refused_on_two_nodes, reader, **flags("contrastive", "bad"))
    assert [rank.code for rank in ended] == [0] * 4, ended
    copied = [rank != reader for rank in range(4)]
    assert [rank.answer for rank in ended] == [["rows are not there", c] for c in copied]


@pytest.mark.long
def test_stage_two_in_parts_asks_its_own_reference_by_all_ranks(ran, flags, contrastive_file):
    """With replay; again from the cache; the weights are those of one process."""
    more = {"max_steps": 4, "replay_data": [contrastive_file]}
    one = rank_runs.weights(**flags("rankpo", "one", per_device_train_batch_size=4, **more))
    for name in ("many", "again"):
        many = flags("rankpo", name, per_device_train_batch_size=2, shard="full", **more)
        ended = ran(2, rank_runs.weights, **many)
        assert [rank.code for rank in ended] == [0, 0], ended
        for key, want in one.items():
            torch.testing.assert_close(ended[0].answer[key], want, rtol=1e-6, atol=1e-9)
