"""Starts of several kinds are made of the demo's world, and stage 1 and 2 begin from each."""

import math

import pytest
import torch

from bench.training import language, starts
from bench.training.corpus import rules_met
from rankpo_fast.demo import world
from rankpo_fast.demo.steps import QUICK, write_untrained_model


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(starts, "SHORT", QUICK)
    monkeypatch.setattr(starts, "LARGER", QUICK)
    monkeypatch.setattr(language, "POOL", world.SplitSize(150, 250))
    for name in ("BASE_STEPS", "INSTRUCT_STEPS", "EMBEDDING_STEPS"):
        monkeypatch.setattr(starts, name, 4)


def test_instructions_ask_for_what_the_world_knows_and_views_say_one_text_twice(small):
    pool = language.pool_of(3)
    assert pool == language.pool_of(3) != language.pool_of(4)
    talents = {talent.text: talent for talent in pool.talents}
    jobs = {job.text: job for job in pool.jobs}
    asked = language.instructions(pool, 3)
    described = [one for one in asked if one.answer in talents]
    assert described and len(asked) == len(described) + 2 * len(jobs) + len(talents)
    for prompt, answer in described:
        job = jobs[prompt.partition(": ")[2].removesuffix(" Answer: ")]
        assert rules_met(job, talents[answer]) == world.NUM_RULES
    for row, (_, text) in zip(language.views(pool, 3), language.texts(pool), strict=True):
        for view in (row["query"], *row["positives"]):
            assert set(view.split()) <= set(text.split())


def test_the_loss_is_of_the_answer_alone(tmp_path, small):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    texts = [text for _, text in language.texts(language.pool_of(3))]
    write_untrained_model(tmp_path, texts, hidden_size=32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path))
    batch = [language.Example("Name the field: a job in optics ", "optics"),
             language.Example("Name: ", "soil science, of which there is more")]  # fmt: skip
    found = language._loss(model, tokenizer, batch).item()
    sums, count = 0.0, 0
    for prompt, answer in batch:
        prompt_ids, answer_ids = (tokenizer(text, add_special_tokens=False, return_tensors="pt")
                                  ["input_ids"][0] for text in (prompt, answer))  # fmt: skip
        ids = [tokenizer.bos_token_id, *prompt_ids, *answer_ids, tokenizer.eos_token_id]
        logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
        for place in range(1 + len(prompt_ids), len(ids)):
            sums, count = sums - logs[place - 1, ids[place]].item(), count + 1
    assert found == pytest.approx(sums / count, rel=1e-5)


@pytest.mark.long  # four times both stages
def test_all_starts_go_through_both_stages_on_the_same_pairs(
    tmp_path, small, tiny_bert_dir, capsys
):
    found = starts.of_seed(tmp_path, 3, starts.STARTS, tiny_bert_dir)
    assert list(found) == [*starts.STARTS, tiny_bert_dir.name]
    assert all(0 <= value <= 1 for figures in found.values()
               for axes in figures.values() for value in axes.values())  # fmt: skip
    before = {tuple(figures["untrained"].values()) for figures in found.values()}
    assert len(before) == len(found)
    pairs = {path.read_bytes() for path in tmp_path.rglob("test_preferences.jsonl")}
    assert len(pairs) == 1
    assert "base: " in capsys.readouterr().err


def test_the_table_has_differences_seed_by_seed():
    def of(ndcg):
        axes = {starts.NDCG: ndcg, starts.ALIGNMENT: 0.5}
        return dict.fromkeys(starts.STAGES, axes)

    found = [{"random": of(0.5), "base": of(0.6)}, {"random": of(0.7), "base": of(0.9)}]
    random, base = starts.table(found).splitlines()[2:]
    assert random.startswith("| random | 0.600 | 0.600 |")
    assert base.startswith(f"| base | 0.750 (+0.150 ± {0.1 / math.sqrt(2) / math.sqrt(2):.3f}) |")
    assert "±" not in starts.table(found[:1])
