"""Ranks that encode and evaluate together give what one process gives, and say it once."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from rankpo_fast.cli import main
from support import rank_runs

RANKS = 3
TRADES, PLACES = ["nurse", "cook", "pilot"], ["Lyon", "Oslo in the north", "Rome"]


@pytest.fixture
def files(tmp_path):
    """A directory of a corpus, queries and qrels, and preference pairs."""
    texts = [f"{trade} in {place}" for trade in TRADES for place in PLACES]
    documents = [{"_id": i, "text": text} for i, text in enumerate([*texts, texts[0], ""])]
    queries = [{"_id": f"q{i}", "text": f"wanted: {text}"} for i, text in enumerate(texts)]
    pairs = [{"query": "wanted", "passage1": texts[i], "passage2": texts[i + 1], "preferred": "A"}
             for i in range(8)]  # fmt: skip
    directory = tmp_path / "beir"
    (directory / "qrels").mkdir(parents=True)
    stage1 = [{"query": f"wanted: {text}", "positives": [text], "negatives": []} for text in texts]
    named = [("corpus", documents), ("queries", queries), ("pairs", pairs), ("stage1", stage1)]
    for name, rows in named:
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    qrels = "".join(f"q{i}\t{i}\t2\nq{i}\t{i // 2}\t1\n" for i in range(9))
    (directory / "qrels" / "test.tsv").write_text(qrels)
    return directory


@pytest.fixture
def flags(files, tmp_path):
    """Micro-batches of few tokens, so that every rank has some."""

    def of(model, command, name):
        common = ["--model_name_or_path", model, "--device", "cpu", "--cache_dir", tmp_path / name,
                  "--max_tokens_per_micro_batch", 40]  # fmt: skip
        evaluate = ["--query_data", files, "--preference_data", files / "pairs.jsonl", "--output",
                    tmp_path / f"{name}.json", "--output_run", tmp_path / f"{name}.trec",
                    "--cutoffs", 3, 20]  # fmt: skip
        encode = ["--input", files / "pairs.jsonl", "--text_key", "passage1", "--output",
                  tmp_path / f"{name}.npy"]  # fmt: skip
        mine = ["--train_data", files / "stage1.jsonl", "--output_file",
                tmp_path / f"{name}.jsonl", "--num_negatives", 2,
                "--search_range", "0-6"]  # fmt: skip
        own = {"evaluate": evaluate, "encode": encode, "mine": mine}[command]
        return [command, *map(str, [*common, *own])]

    return of


@pytest.mark.long
@pytest.mark.parametrize(
    "command, left", [("evaluate", ["json", "trec"]), ("encode", ["npy"]), ("mine", ["jsonl"])]
)
def test_ranks_leave_the_files_of_one_process_and_one_of_them_reads(
    command, left, flags, files, tiny_llama_dir, tmp_path
):
    assert main(flags(tiny_llama_dir, command, "one")) == 0
    of_ranks = flags(tiny_llama_dir, command, "ranks")
    ended = rank_runs.start(RANKS, tmp_path / "said", rank_runs.files_opened, *of_ranks).ended()
    assert [rank.code for rank in ended] == [0] * RANKS, ended
    read = [any(str(files) in name for name in rank.answer) for rank in ended]
    assert read == [True] + [False] * (RANKS - 1)
    for kind in left:
        one, ours = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("one", "ranks"))
        assert one == ours
    assert sum("no file there names the pooling" in rank.said for rank in ended) == 1


def test_a_vector_that_is_not_finite_ends_all_and_is_named_once(
    flags, files, tiny_llama_dir, tmp_path
):
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights["norm.weight"] *= float("inf")
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    of_ranks = [*flags(directory, "encode", "ranks"), "--packing", "false"]  # no check at the start
    ended = rank_runs.start(RANKS, tmp_path / "said", rank_runs.command, *of_ranks).ended()
    assert [rank.code for rank in ended] == [2] * RANKS, ended
    [message] = [rank.said for rank in ended if "error: " in rank.said]
    assert f"8 of 8 texts have vectors that are not finite: {files / 'pairs.jsonl'}:1 " in message
    assert not (tmp_path / "ranks.npy").exists()
