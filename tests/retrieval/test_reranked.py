"""`mine --reranker`: no candidate as good as a positive, by the cross-encoder's own scores."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from rankpo_fast import mine_hard_negatives
from rankpo_fast.cli import main
from rankpo_fast.errors import InputError
from rankpo_fast.model.reranker import Reranker
from rankpo_fast.retrieval import reranked
from rankpo_fast.retrieval.reranked import RerankerFilter

CORPUS = [f"{title} in {place}" for title in ("nurse", "teacher", "cook") for place in "ABCDE"]
ROWS = [
    {"query": "wanted: nurse", "positives": ["nurse in A", "a nurse, of whom"], "negatives": []},
    {"query": "wanted: cook", "positives": ["cook in B"], "negatives": []},
    {"query": "wanted: cook", "positives": ["cook in C"], "negatives": []},
]
POSITIVES = [["nurse in A", "a nurse, of whom"], ["cook in B", "cook in C"]]  # of each query
ALL = {"num_negatives": 15, "search_range": "0-15", "method": "topk", "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tiny_tokenizer, tmp_path_factory):
    """A cross-encoder with weights large enough that scores differ."""
    folder = tmp_path_factory.mktemp("models") / "reranker"
    config = BertConfig(
        vocab_size=len(tiny_tokenizer), num_labels=1, pad_token_id=tiny_tokenizer.pad_token_id,
        initializer_range=0.5, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scores(folder):
    """Of each query and passage, which one is scored alone."""
    reranker = Reranker.load(str(folder), device=torch.device("cpu"))
    passages = {*CORPUS, *(text for texts in POSITIVES for text in texts)}
    return {
        (row["query"], passage): reranker.scores([(row["query"], passage)])[0][0]
        for row in ROWS
        for passage in passages
    }


@pytest.mark.filterwarnings("ignore:.*got fewer than")
@pytest.mark.filterwarnings("ignore:.*are none of the passages")
@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("pairs", [1, 8192], ids=["a-query-at-a-time", "all-at-once"])
def test_the_candidates_left_are_those_below_the_lowest_positive(
    margin, pairs, folder, scores, tiny_llama_dir, monkeypatch
):
    monkeypatch.setattr(reranked, "PAIRS_AT_ONCE", pairs)
    mined = mine_hard_negatives(
        tiny_llama_dir, ROWS, [{"text": text} for text in CORPUS], reranker=str(folder),
        reranker_margin=margin, **ALL,
    )  # fmt: skip
    left = {}
    for query, positives in zip(("wanted: nurse", "wanted: cook"), POSITIVES, strict=True):
        ceiling = min(scores[query, text] for text in positives) - margin
        others = [text for text in CORPUS if text not in positives]
        left[query] = {text for text in others if scores[query, text] <= ceiling}
    assert [{*row.negatives} for row in mined.examples] == [left[row["query"]] for row in ROWS]
    known = 1 + 2  # positives among the corpus
    assert mined.dropped["positives"] == known
    dropped = 2 * 15 - known - sum(map(len, left.values()))
    assert 0 < dropped < 2 * 15 - known  # the scores tell
    assert mined.dropped["reranker_margin"] == dropped
    assert f"{dropped} for --reranker_margin" in mined.summary()


def test_no_more_than_a_portion_is_scored_at_once_and_no_query_without_candidates(monkeypatch):
    """Scores are lengths of passages."""
    sizes = []

    def score(pairs, **_):
        sizes.append(len(pairs))
        assert all(query != "q3" for query, _ in pairs)
        return [float(len(passage)) for _, passage in pairs], 1

    monkeypatch.setattr(reranked, "PAIRS_AT_ONCE", 8)
    left = np.ones((40, 5), bool)
    left[3] = False
    left[7, 1:] = False
    corpus = ["x" * length for length in range(1, 6)]
    drops, cut = RerankerFilter(SimpleNamespace(scores=score), margin=1.0).drops(
        left, [f"q{i}" for i in range(40)], [["xxxx", "xxx"]] * 40, [[4, 3, 2, 1, 0]] * 40, corpus
    )
    assert max(sizes) < 8 + 5 + 2 and sum(sizes) == 38 * 7 + 1 + 2 and cut == len(sizes)
    # 5, 4 and 3 letters are above 3 - 1.
    assert (drops == (left & np.array([True, True, True, False, False]))).all()


def test_pairs_that_were_cut_are_counted(folder, tiny_llama_dir):
    with pytest.warns(UserWarning, match="--reranker: 31 pairs were cut to 8 tokens"):
        mine_hard_negatives(
            tiny_llama_dir, ROWS[:2], [{"text": text} for text in CORPUS], reranker=str(folder),
            reranker_max_length=8, **ALL | {"num_negatives": 1},
        )  # fmt: skip


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--reranker_margin", "1"], "--reranker_margin needs --reranker"),
        (["--reranker", "R", "--reranker_margin", "-1"], "--reranker_margin must be >= 0"),
        (["--reranker", "no/such/model"], "--reranker no/such/model"),
        (["--reranker", "R", "--reranker_max_length", "65"], "--reranker_max_length 65 is more"),
        (["--reranker", "R", "--max_tokens_per_micro_batch", "32"], "smaller --reranker_max_len"),
    ],
)
def test_what_cannot_score_is_named(flags, named, folder, tiny_llama_dir, tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "mined.jsonl"
    rows.write_text("".join(json.dumps({**row, "negatives": ["x"]}) + "\n" for row in ROWS))
    words = [str(folder) if flag == "R" else flag for flag in flags]
    assert main([
        "mine", "--model_name_or_path", str(tiny_llama_dir), "--train_data", str(rows),
        "--output_file", str(out), "--device", "cpu", *words,
    ]) == 2  # fmt: skip
    assert named in capsys.readouterr().err and not out.exists()


def test_the_mined_file_may_not_replace_the_reranker(folder, tiny_llama_dir, tmp_path, capsys):
    assert main([
        "mine", "--model_name_or_path", str(tiny_llama_dir), "--train_data", "rows.jsonl",
        "--reranker", str(folder), "--output_file", str(folder / "config.json"),
    ]) == 2  # fmt: skip
    assert "is also read (--reranker" in capsys.readouterr().err


def test_several_ranks_are_refused(folder, tiny_llama_dir):
    from rankpo_fast.config import ComputeConfig, MineConfig
    from rankpo_fast.functions import mined

    class Two:
        size, first = 2, True

        def first_ahead(self):
            return torch.no_grad()  # some context

    with pytest.raises(InputError, match="--reranker scores in one process"):
        mined(lambda: None, MineConfig(ROWS, reranker=str(folder)), ComputeConfig("cpu"),
              ranks=Two())  # fmt: skip
