"""Negatives from two ranks: gradients under DDP are those of sentence-transformers' losses."""

import pytest
import torch

from support import sentence_transformers_cases

pytest.importorskip("sentence_transformers")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import rankpo_fast.integrations.sentence_transformers  # noqa: E402, F401  (so that a fork has it)

RANKING = pytest.mark.parametrize(
    "kind", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]
)


@pytest.mark.parametrize("name", sentence_transformers_cases.RANKS)
def test_gathered_losses_are_theirs(two_ranks, name, tiny_tokenizer):
    two_ranks(sentence_transformers_cases.gathered, name, tiny_tokenizer)


@RANKING
def test_duplicates_of_other_ranks_are_masked(two_ranks, kind, tiny_tokenizer):
    two_ranks(sentence_transformers_cases.masked, kind, tiny_tokenizer)


@pytest.mark.parametrize("gather", [False, True], ids=["own", "gathered"])
@RANKING
def test_a_learnt_scale_is_one_on_all_ranks(two_ranks, kind, gather, tiny_tokenizer):
    of_one_process = two_ranks(
        sentence_transformers_cases.learnt_scales, kind, tiny_tokenizer, False, True
    )[0]
    first, second = two_ranks(
        sentence_transformers_cases.learnt_scales, kind, tiny_tokenizer, gather
    )
    assert first == second and first[0] != first[-1]
    if gather:
        assert first == pytest.approx(of_one_process, rel=1e-5)


@pytest.mark.long
def test_their_trainer_trains_alike_on_two_ranks(two_ranks, tiny_bert_dir, tmp_path):
    kind = "CachedMultipleNegativesRankingLoss"
    answers = two_ranks(
        sentence_transformers_cases.trained_by_ranks, kind, tiny_bert_dir, str(tmp_path)
    )
    true, got, _ = answers[0]
    assert len(true) == 6
    torch.testing.assert_close(torch.tensor(got), torch.tensor(true), rtol=1e-4, atol=0)
    scales = [scale for *_, scale in answers]
    assert scales[0] == scales[1] != 20
