"""Settings that save memory, in whole runs: each resumes bit by bit, saves its own, learns."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rankpo_fast.config import EncoderConfig, ModelConfig
from rankpo_fast.errors import InputError, TrainingStopped
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.load import load_encoder

BF16 = {"weights_dtype": "bf16", "bf16": True}
LORA = {"lora_rank": 4, "lora_dropout": 0.1}
CPU = torch.device("cpu")
# One of each mechanism: rounding drawn at random, states of few bits, adapters' dropout, frozen
# weights that no file of the run holds, two optimizers in one.
LEVERS = {
    "bf16-weights": {**BF16, "optim": "adamw"},
    "bf16-weights-8-bit-states": {**BF16, "optim": "adamw_8bit"},
    "lora": {**LORA, "weights_dtype": "bf16", "bf16": True},
    "qlora-dora": {**LORA, "weights_dtype": "nf4", "lora_dora": True, "optim": "paged_adamw_8bit"},
    "frozen-and-cut": {"layers": 1, "freeze_embeddings": True, "optim": "muon"},
}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize("lever", LEVERS)
def test_a_run_with_it_resumes_bit_by_bit(
    lever, tiny_bert_dir, goes_on_bit_by_bit, contrastive_file
):
    """In stage 2, against a reference, with replay, two batches a step, dropout on; micro-batches
    so small that a step has several backward passes."""
    flags = {**LEVERS[lever], "max_steps": 5, "reference_free": False, "save_dtype": "float32",
             "max_tokens_per_micro_batch": 48, "activation_memory_gb": 0.0,
             "replay_data": [contrastive_file], "replay_num_negatives": 1}  # fmt: skip
    _, stopped = goes_on_bit_by_bit("rankpo", tiny_bert_dir, **flags)
    got, before = weights(stopped), weights(tiny_bert_dir)
    changed = {name for name in got if not torch.equal(got[name], before[name].float())}
    assert changed, "nothing was trained"
    if lever == "frozen-and-cut":
        assert not any("embeddings" in name and "LayerNorm" not in name for name in changed)
        assert not any(".layer.1." in name for name in got)


@pytest.mark.parametrize("lever", ["lora", "frozen-and-cut"])
def test_a_checkpoint_holds_what_is_trained_alone(lever, tiny_bert_dir, run_stage):
    output = run_stage("contrastive", tiny_bert_dir, "out", save_steps=6, **LEVERS[lever])
    names = load_file(output / "checkpoints/step-00000006/weights.safetensors").keys()
    if lever == "lora":
        assert names and all(".lora_" in name for name in names)
    else:
        assert names and not any("word_embeddings" in name for name in names)


def test_training_goes_on_with_an_adapter_where_it_ended(tiny_llama_dir, run_stage):
    """Its base is the same, its start the adapter of the first run, not a fresh one."""
    first = run_stage("contrastive", tiny_llama_dir, "first", lora_rank=4)
    was = load_file(first / "adapter/adapter_model.safetensors")
    second = run_stage(
        "rankpo", first / "adapter", "second", lora_rank=4, learning_rate=1e-9, pooling="last"
    )
    now = load_file(second / "adapter/adapter_model.safetensors")
    assert was.keys() == now.keys()
    assert all(torch.allclose(was[name], now[name], atol=1e-6) for name in was)
    named = json.loads((second / "adapter/adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(tiny_llama_dir.resolve())


def test_the_reference_of_a_fresh_adapter_is_its_base(tiny_llama_dir, run_stage, read_metrics):
    """No second model: the first step's margins against it are 0, as a model's against itself."""
    flags = {"reference_free": False, "logging_steps": 1, "max_steps": 1}
    output = run_stage("rankpo", tiny_llama_dir, "out", lora_rank=4, **flags)
    assert read_metrics(output)[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_adapters_and_frozen_weights_learn(tiny_llama_dir, run_stage, read_metrics):
    for name, flags in [
        ("lora", {"lora_rank": 8}),
        ("qlora", {"lora_rank": 8, "weights_dtype": "nf4"}),
        ("bidirectional", {"bidirectional": True, "freeze_layers": 1}),
    ]:
        output = run_stage("contrastive", tiny_llama_dir, name, max_steps=12, **flags)
        losses = [line["loss"] for line in read_metrics(output) if "loss" in line]
        assert sum(losses[-3:]) < 0.8 * sum(losses[:3]), name


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"lora_alpha": 8.0}, "--lora_alpha needs --lora_rank"),
        ({"weights_dtype": "nf4"}, "--weights_dtype nf4 needs --lora_rank"),
        ({"weights_dtype": "bf16", "bf16": False}, "--weights_dtype bf16 needs --bf16"),
        ({"lora_rank": 4, "freeze_layers": 1}, "--lora_rank and --freeze_layers do not go"),
        ({"lora_rank": 4, "from_scratch": True}, "--lora_rank and --from_scratch do not go"),
        ({"layers": 3}, "--layers 3: .* has 2"),
        ({"freeze_layers": 3}, "--freeze_layers 3: there are 2 layers"),
        ({"lora_rank": 4, "lora_targets": ["wq"]}, "--lora_targets wq: .*there are .*q_proj"),
        ({"lora_rank": 4, "lora_modules_to_save": ["head"]}, "--lora_modules_to_save head: .*norm"),
        ({"lora_rank": 4, "special_tokens": ["<t>"]}, "--special_tokens: 1 new .* embed_tokens"),
        ({"float8": True, "bf16": True}, "--float8: needs a GPU"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_be_is_refused_by_name(flags, named, tiny_llama_dir):
    with pytest.raises(InputError, match=named):
        load_encoder(ModelConfig(str(tiny_llama_dir), **{"bf16": False, **flags}), device=CPU)


def test_new_tokens_are_trained_beside_an_adapter_that_saves_the_embedding(
    tiny_llama_dir, run_stage
):
    flags = {
        "lora_rank": 4,
        "special_tokens": ["<title>"],
        "lora_modules_to_save": ["embed_tokens"],
    }
    output = run_stage("contrastive", tiny_llama_dir, "out", **flags)
    before = weights(tiny_llama_dir)["embed_tokens.weight"]
    after = weights(output)["embed_tokens.weight"]
    assert len(after) == len(before) + 1
    assert not torch.equal(after[: len(before)], before)
    assert not (output / "adapter").exists()  # its base has no such row
    Encoder.from_pretrained(output, pooling="last").encode(["<title> nurse"])


def test_an_adapter_that_changes_nothing_or_was_made_otherwise_is_refused(tiny_llama_dir, tmp_path):
    fresh = load_encoder(ModelConfig(str(tiny_llama_dir), lora_rank=4, bf16=False), device=CPU)
    fresh.save(tmp_path)
    adapter = str(tmp_path / "adapter")
    for rank, flags, named in [
        (4, {}, "changes nothing"),
        (8, {}, "--lora_rank 8: .* of rank 4"),
        (4, {"lora_alpha": 1.0}, "--lora_alpha: .*as it was made"),
        (4, {"weights_dtype": "nf4"}, "--weights_dtype nf4: .*not of 4 bits"),
    ]:
        with pytest.raises(InputError, match=named):
            load_encoder(ModelConfig(adapter, lora_rank=rank, bf16=False, **flags), device=CPU)
    with pytest.raises(InputError, match="changes nothing"):
        load_encoder(EncoderConfig(adapter), device=CPU)


def test_auto_takes_the_plan_at_the_start_and_the_record_afterwards(
    tiny_llama_dir, run_stage, stop_after, monkeypatch
):
    """The plan is for GPUs: what it would say of one stands in for it here."""
    from rankpo_fast.train import auto

    asked = []

    def plan(model, training, **about):
        asked.append(about)
        settings = {"optim": "adamw_8bit", "learning_rate": training.learning_rate}
        return replace(model, lora_rank=2), replace(training, **settings), "LoRA"

    monkeypatch.setattr(auto, "auto_settings", plan)
    stop_after(3)
    with pytest.raises(TrainingStopped):
        run_stage("contrastive", tiny_llama_dir, "out", auto=True)
    monkeypatch.undo()
    output = run_stage("contrastive", tiny_llama_dir, "out", auto=True, resume="newest")
    assert (output / "adapter").exists() and len(asked) == 1
    assert json.loads((output / "training.json").read_text())["settings"]["--optim"] == "adamw_8bit"


def test_auto_is_refused_where_there_is_no_gpu(tiny_llama_dir, run_stage):
    with pytest.raises(InputError, match="--auto fits a training into a GPU's memory"):
        run_stage("contrastive", tiny_llama_dir, "out", auto=True)
