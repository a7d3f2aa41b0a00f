"""Evaluation end to end on a tiny encoder."""

import pytest
import torch

from rankpo_fast.config import EncoderConfig
from rankpo_fast.data.retrieval import RetrievalSet
from rankpo_fast.data.rows import PreferenceRow
from rankpo_fast.model.load import load_encoder
from rankpo_fast.retrieval import evaluate as module
from rankpo_fast.retrieval.encode import encode_texts
from rankpo_fast.retrieval.evaluate import evaluate

CORPUS = ["a nurse", "a teacher", "a data engineer", "a gardener in Lyon"]
QUERIES = ["wanted: nurse", "wanted: teacher"]


@pytest.fixture(scope="module")
def encoder(tiny_llama_dir):
    return load_encoder(EncoderConfig(str(tiny_llama_dir)), device=torch.device("cpu"))


def cosines(encoder, queries, passages):
    tables = encoder.tokenize_queries(queries), encoder.tokenize_passages(passages)
    query_vectors, passage_vectors = (encode_texts(encoder, t, max_tokens=64) for t in tables)
    return query_vectors @ passage_vectors.T


def test_figures_are_those_of_the_cosines(encoder):
    scores = cosines(encoder, QUERIES, CORPUS)
    best = scores.argmax(dim=1).tolist()
    preferences = [
        PreferenceRow(QUERIES[0], CORPUS[chosen], CORPUS[rejected], 1.0)
        for chosen, rejected in [(0, 1), (1, 2), (2, 3), (3, 0)]
    ]
    margins = [scores[0, 0] - scores[0, 1], scores[0, 1] - scores[0, 2],
               scores[0, 2] - scores[0, 3], scores[0, 3] - scores[0, 0]]  # fmt: skip
    metrics = evaluate(
        encoder,
        retrieval=RetrievalSet(QUERIES, CORPUS, [[best[0]], [(best[1] + 1) % 4]]),
        preferences=preferences,
        cutoffs=[1, 20],
        max_tokens=64,
    )
    assert metrics["ndcg@1"] == metrics["recall@1"] == 0.5
    assert metrics["recall@20"] == 1.0
    assert metrics["alignment"] == sum(margin > 0 for margin in margins) / 4
    assert set(metrics) == {
        "ndcg@1", "mrr@1", "recall@1", "ndcg@20", "mrr@20", "recall@20", "alignment",
    }  # fmt: skip


def test_only_what_is_given_is_measured(encoder):
    pair = [PreferenceRow(QUERIES[0], CORPUS[0], CORPUS[1], 1.0)]
    assert set(evaluate(encoder, preferences=pair, max_tokens=64)) == {"alignment"}
    retrieval = RetrievalSet(QUERIES, CORPUS, [[0], [1]])
    only = evaluate(encoder, retrieval=retrieval, cutoffs=[5], max_tokens=64)
    assert set(only) == {"ndcg@5", "mrr@5", "recall@5"}


def test_each_distinct_text_is_encoded_once(encoder, monkeypatch):
    encoded = []

    def counting(encoder, table, **settings):
        encoded.append(len(table))
        return encode_texts(encoder, table, **settings)

    monkeypatch.setattr(module, "encode_texts", counting)
    evaluate(
        encoder,
        retrieval=RetrievalSet([*QUERIES, QUERIES[0]], [*CORPUS, CORPUS[0]], [[0], [1], [4]]),
        preferences=[PreferenceRow(QUERIES[1], CORPUS[2], "a new one", 1.0)] * 2,
        max_tokens=64,
    )
    assert encoded == [2, 5]


def test_encoding_leaves_no_graph_and_the_mode_as_it_was(tiny_bert_dir):
    encoder = load_encoder(EncoderConfig(str(tiny_bert_dir)), device=torch.device("cpu")).train()
    table = encoder.tokenize_passages(CORPUS)
    first, second = (encode_texts(encoder, table, max_tokens=64) for _ in range(2))
    assert encoder.training
    assert not first.requires_grad
    assert torch.equal(first, second)  # dropout was off
    torch.testing.assert_close(first.norm(dim=1), torch.ones(4))


def test_vectors_are_fp32_whatever_torchs_default(encoder):
    table = encoder.tokenize_queries(["one"])
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert encode_texts(encoder, table, max_tokens=64).dtype == torch.float32
        assert encoder.embed(table, torch.tensor([], dtype=torch.int64), max_tokens=64).dtype == (
            torch.float32
        )
    finally:
        torch.set_default_dtype(default)


def test_encoding_goes_on_in_halves_where_memory_does_not_suffice(tiny_llama_dir, monkeypatch):
    encoder = load_encoder(EncoderConfig(str(tiny_llama_dir)), device=torch.device("cpu"))
    table = encoder.tokenize_passages([f"nurse number {i}" for i in range(13)])
    expected, sizes, states = encode_texts(encoder, table), [], encoder.states

    def at_most_three(batch):
        sizes.append(len(batch.lengths))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError
        return states(batch)

    monkeypatch.setattr(encoder, "states", at_most_three)
    torch.testing.assert_close(encode_texts(encoder, table), expected, rtol=0, atol=1e-5)
    assert sizes[0] == 13
