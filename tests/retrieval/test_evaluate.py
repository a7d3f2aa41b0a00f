"""Evaluation end to end on a tiny encoder."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rankpo_fast.config import EncoderConfig
from rankpo_fast.data.retrieval import RetrievalSet
from rankpo_fast.data.rows import PreferenceRow
from rankpo_fast.model.encode import encode_texts
from rankpo_fast.model.load import load_encoder
from rankpo_fast.retrieval import evaluate as module
from rankpo_fast.retrieval.evaluate import measure

CORPUS = ["a nurse", "a teacher", "a data engineer", "a gardener in Lyon"]
QUERIES = ["wanted: nurse", "wanted: teacher"]


@pytest.fixture(scope="module")
def encoder(tiny_llama_dir):
    return load_encoder(EncoderConfig(str(tiny_llama_dir)), device=torch.device("cpu"))


def cosines(encoder, queries, passages):
    tables = encoder.tokenize_queries(queries), encoder.tokenize_passages(passages)
    query_vectors, passage_vectors = (encode_texts(encoder, t, max_tokens=64) for t in tables)
    return query_vectors @ passage_vectors.T


def figures(encoder, **settings) -> dict[str, float]:
    return measure(encoder, **settings).figures


def test_figures_are_those_of_the_cosines(encoder):
    scores = cosines(encoder, QUERIES, CORPUS)
    best = scores.argmax(dim=1).tolist()
    preferences = [
        PreferenceRow(QUERIES[0], CORPUS[chosen], CORPUS[rejected], 1.0)
        for chosen, rejected in [(0, 1), (1, 2), (2, 3), (3, 0)]
    ]
    margins = [scores[0, 0] - scores[0, 1], scores[0, 1] - scores[0, 2],
               scores[0, 2] - scores[0, 3], scores[0, 3] - scores[0, 0]]  # fmt: skip
    metrics = figures(
        encoder,
        retrieval=RetrievalSet(QUERIES, CORPUS, [{best[0]: 1}, {(best[1] + 1) % 4: 1}]),
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
    assert set(figures(encoder, preferences=pair, max_tokens=64)) == {"alignment"}
    retrieval = RetrievalSet(QUERIES, CORPUS, [{0: 1}, {1: 1}])
    only = figures(encoder, retrieval=retrieval, cutoffs=[5], max_tokens=64)
    assert set(only) == {"ndcg@5", "mrr@5", "recall@5"}


def test_each_distinct_text_is_encoded_once(encoder, monkeypatch):
    encoded = []

    def counting(encoder, table, **settings):
        encoded.append(len(table))
        return encode_texts(encoder, table, **settings)

    monkeypatch.setattr(module, "encode_texts", counting)
    measure(
        encoder,
        retrieval=RetrievalSet(
            [*QUERIES, QUERIES[0]], [*CORPUS, CORPUS[0]], [{0: 1}, {1: 1}, {4: 1}]
        ),
        preferences=[PreferenceRow(QUERIES[1], CORPUS[2], "a new one", 1.0)] * 2,
        max_tokens=64,
    )
    assert encoded == [2, 5]


def test_a_benchmark_has_the_figures_of_sentence_transformers_and_of_pytrec_eval(encoder, tmp_path):
    """Binary by the one, graded by the other, from the vectors of the one."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import evaluation

    trades, places = ["nurse", "cook", "pilot"], ["Lyon", "Oslo", "Rome", "Bonn"]
    corpus = {f"d{t}{p}": f"{trade} in {place}" for t, trade in enumerate(trades)
              for p, place in enumerate(places)}  # fmt: skip
    queries = {f"q{t}{p}": f"wanted in {place}: {trade}" for t, trade in enumerate(trades)
               for p, place in enumerate(places)}  # fmt: skip
    qrels = {
        query: {document: (query[1] == document[1]) + (query[2] == document[2])
                for document in corpus} for query in queries
    }  # fmt: skip
    grades = [
        {row: grade for row, grade in enumerate(qrels[query].values()) if grade} for query in qrels
    ]
    retrieval = RetrievalSet(list(queries.values()), list(corpus.values()), grades)
    ours = figures(encoder, retrieval=retrieval, cutoffs=[3, 5], max_tokens=64)

    encoder.save(tmp_path)
    model = st.SentenceTransformer(str(tmp_path), device="cpu")
    relevant = {query: {d for d, grade in of.items() if grade} for query, of in qrels.items()}
    at = {name: [3, 5] for name in ("mrr_at_k", "precision_recall_at_k", "map_at_k")}
    theirs = evaluation.InformationRetrievalEvaluator(
        queries, corpus, relevant, accuracy_at_k=[5], ndcg_at_k=[3], write_csv=False, **at
    )(model)
    for cutoff in (3, 5):
        assert ours[f"mrr@{cutoff}"] == pytest.approx(theirs[f"cosine_mrr@{cutoff}"])
        assert ours[f"recall@{cutoff}"] == pytest.approx(theirs[f"cosine_recall@{cutoff}"])
    scores = model.encode_query([*queries.values()]) @ model.encode_document([*corpus.values()]).T
    run = {
        query: dict(zip(corpus, map(float, row), strict=True))
        for query, row in zip(queries, scores, strict=True)
    }
    names = {"ndcg_cut_3", "ndcg_cut_5"}
    by_query = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(run).values()
    for cutoff in (3, 5):
        expected = sum(row[f"ndcg_cut_{cutoff}"] for row in by_query) / len(by_query)
        assert ours[f"ndcg@{cutoff}"] == pytest.approx(expected)


def test_vectors_are_held_once(encoder, monkeypatch):
    """What is made after encoding is small beside the vectors of the corpus."""
    count, dim = 20_000, encoder.dim
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not func.is_view:
                made.append(out.numel())
            return out

    def quick(encoder, table, **settings):
        vectors = torch.nn.functional.normalize(torch.randn(len(table), dim), dim=1)
        made.clear()
        return vectors

    monkeypatch.setattr(module, "encode_texts", quick)
    corpus = [f"{i}" for i in range(count)]
    pairs = [PreferenceRow(QUERIES[0], corpus[i], corpus[-1 - i], 1.0) for i in range(count // 2)]
    retrieval = RetrievalSet(QUERIES, corpus, [{0: 1}, {1: 1}])
    with Sizes():
        measure(encoder, retrieval=retrieval, preferences=pairs)
    assert made and max(made) < count * dim / 4


def test_ties_are_counted_beside_the_alignment(encoder):
    pairs = [PreferenceRow(QUERIES[0], chosen, "x", 1.0) for chosen in ("x", CORPUS[0])]
    measured = measure(encoder, preferences=pairs, cutoffs=[1])
    assert measured.counts["preferences"]["ties"] == 1 and measured.figures["alignment"] <= 0.5


def test_texts_that_are_equal_as_tokens_are_encoded_once_and_tie(uncased_llama_dir, monkeypatch):
    """Whatever the micro-batches: rounding decides nothing between a text and its twin."""
    encoder = load_encoder(EncoderConfig(str(uncased_llama_dir)), device=torch.device("cpu"))
    encoded = []

    def counting(encoder, table, **settings):
        encoded.append((len(table), settings["texts"]))
        return encode_texts(encoder, table, **settings)

    monkeypatch.setattr(module, "encode_texts", counting)
    twins = [text.upper() for text in CORPUS]
    pairs = [PreferenceRow("Q", *pair, 1.0) for pair in zip(CORPUS, twins, strict=True)]
    pairs += [PreferenceRow("q", *pair, 1.0) for pair in zip(twins, CORPUS, strict=True)]
    corpus = [*twins[:3], "", *CORPUS[:3]]
    retrieval = RetrievalSet(["q"], corpus, [{4: 1}])
    measured = measure(encoder, retrieval=retrieval, preferences=pairs, cutoffs=[7], max_tokens=16)
    assert encoded == [(1, ["q"]), (4, [*twins[:3], CORPUS[3]])]
    assert (measured.counts["preferences"]["ties"], measured.figures["alignment"]) == (8, 0)
    [(documents, scores)] = measured.rankings
    assert documents[1::2] == [document + 4 for document in documents[:6:2]]
    assert documents[-1] == 3 and scores[0] == scores[1]


def test_documents_with_one_text_and_without_any_are_all_ranked(encoder):
    """The empty one last, the twins in a row, and no text that is empty is encoded."""
    retrieval = RetrievalSet(QUERIES[:1], ["", CORPUS[0], CORPUS[1], CORPUS[0]], [{0: 1, 3: 1}])
    measured = measure(encoder, retrieval=retrieval, cutoffs=[2, 4])
    [ranking] = measured.rankings
    assert ranking.documents in ([1, 3, 2, 0], [2, 1, 3, 0])
    assert measured.figures["recall@4"] == 1
    assert module.evaluation_texts(retrieval, [])[1] == [CORPUS[0], CORPUS[1]]


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


def test_models_are_compared_though_one_reads_queries_as_the_same(encoder, uncased_llama_dir):
    uncased = load_encoder(EncoderConfig(str(uncased_llama_dir)), device=torch.device("cpu"))
    pairs = [PreferenceRow(query, CORPUS[0], CORPUS[1], 1.0) for query in ("Nurse", "nurse", "x")]
    one, two = (measure(e, preferences=pairs, max_tokens=64) for e in (encoder, uncased))
    change = two.against(one)["alignment"]
    assert change.value == pytest.approx(two.figures["alignment"] - one.figures["alignment"])
