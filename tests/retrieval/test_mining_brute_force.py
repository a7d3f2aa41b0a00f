"""Mining of 5,000 passages with given vectors, beside a plain loop over all of them; and its
memory at 200,000."""

import subprocess
import sys

import pytest
import torch

from rankpo_fast.config import EncoderConfig
from rankpo_fast.data.rows import ContrastiveRow
from rankpo_fast.model.load import load_encoder
from rankpo_fast.retrieval import index, mining
from rankpo_fast.retrieval.draw import Drawing
from rankpo_fast.retrieval.mining import Limits
from rankpo_fast.retrieval.search import search

PASSAGES, QUERIES, DIMS = 5000, 40, 16
CORPUS = [f"passage {n}" for n in range(PASSAGES)]
RANGE, NEGATIVES, MARGIN = (3, 60), 8, 0.05


@pytest.fixture(scope="module")
def encoder(tiny_llama_dir):
    return load_encoder(EncoderConfig(str(tiny_llama_dir)), device=torch.device("cpu"))


def unit(rows: int, seed: int) -> torch.Tensor:
    vectors = torch.randn(rows, DIMS, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("method", ["topk", "sample", "cluster"])
def test_mining_is_the_plain_loop(method, on_disk, encoder, monkeypatch, tmp_path):
    queries, passages = unit(QUERIES, 0), unit(PASSAGES, 1)
    calls = iter([queries, passages] if not on_disk else [queries])
    monkeypatch.setattr(mining, "encode_texts", lambda *a, **k: next(calls))
    starts = iter(range(0, PASSAGES, 1024))

    def portion(encoder, table, **settings):
        start = next(starts)
        return passages[start : start + len(table)]

    monkeypatch.setattr(index, "TEXTS", 1024)
    monkeypatch.setattr(index, "encode_texts", portion)
    monkeypatch.setattr(type(encoder), "dim", property(lambda self: DIMS))
    positives = [int((passages @ query).argsort(descending=True)[5]) for query in queries]
    rows = [ContrastiveRow(f"query {n}", (CORPUS[p],), ()) for n, p in enumerate(positives)]
    drawing = Drawing(method, seed=7, clusters=4, decay=0.3)
    found = mining.mine(
        encoder, rows, CORPUS, search_range=RANGE, num_negatives=NEGATIVES, drawing=drawing,
        limits=Limits(absolute_margin=MARGIN), index_dir=tmp_path if on_disk else None,
    )  # fmt: skip
    stored = passages.half().float() if on_disk else passages
    near = 0
    for number, (query, positive) in enumerate(zip(queries, positives, strict=True)):
        scores = stored @ query
        order = scores.argsort(descending=True, stable=True)[RANGE[0] : RANGE[1]].tolist()
        ceiling = scores[positive] - MARGIN
        near += int(((scores[order] - ceiling).abs() < 1e-6).sum())
        left = [n for n in order if n != positive and scores[n] <= ceiling]
        taken = drawing.order(stored[left].numpy(), len(left), number)[:NEGATIVES]
        assert found.examples[number].negatives == tuple(CORPUS[left[i]] for i in taken)
        ranks = found.origins[number].ranks
        assert [order[rank - RANGE[0]] for rank in ranks] == [left[i] for i in taken]
    assert near == 0, "vectors where rounding decides about the margin"


def test_vectors_on_disk_are_found_again_and_belong_to_model_and_tokens(encoder, tmp_path):
    table = encoder.tokenize_passages(CORPUS[:20])
    first = index.indexed(encoder, table, tmp_path, max_tokens=64)
    assert first.dtype == torch.float16 and len(first) == 20
    exact = index.encode_texts(encoder, table, max_tokens=64)
    torch.testing.assert_close(first.float(), exact, atol=1e-3, rtol=0)
    with pytest.warns(UserWarning, match="vectors are those in"):
        again = index.indexed(encoder, table, tmp_path, max_tokens=64)
    assert torch.equal(first, again)
    index.indexed(encoder, encoder.tokenize_passages(CORPUS[:19]), tmp_path, max_tokens=64)
    assert len(list(tmp_path.iterdir())) == 2


def test_sums_that_fp16_cannot_hold_are_no_fault_of_the_vectors():
    corpus = torch.full((70_000, 2), 1.0, dtype=torch.float16)
    scores, rows = search(torch.tensor([[1.0, 0.0]]), corpus, 2)
    assert scores.tolist() == [[1.0, 1.0]] and rows.tolist() == [[0, 1]]


@pytest.mark.long
def test_200_000_passages_are_searched_within_2_gib(tmp_path):
    """Vectors of 768 dims in a file, of which all pages that are touched count; 2,000 queries."""
    program = f"""
import resource, numpy as np, torch
from rankpo_fast.retrieval.search import search
file = np.lib.format.open_memmap({str(tmp_path / "v.npy")!r}, "w+", np.float16, (200_000, 768))
random = np.random.default_rng(0)
for start in range(0, len(file), 10_000):
    file[start:start + 10_000] = random.normal(0, 0.036, (10_000, 768))
del file
corpus = torch.from_numpy(np.load({str(tmp_path / "v.npy")!r}, mmap_mode="r"))
search(torch.randn(2_000, 768), corpus, 100)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True,
                          text=True, check=True)  # fmt: skip
    assert int(done.stdout) < 2048, f"{done.stdout} MiB"
