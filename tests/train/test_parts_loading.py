"""Weights that lie in parts on several ranks are never whole on one, but on the first's host."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

from rankpo_fast.config import ModelConfig
from support import rank_runs

LORA = {"lora_rank": 2, "lora_targets": ["all-linear"], "bf16": False}


@pytest.fixture
def loaded(tmp_path):
    """What two ranks have of encoders that were loaded in parts."""

    def load(*configs, **options):
        ended = rank_runs.start(2, tmp_path / "ranks", rank_runs.in_parts, *configs, **options)
        first, other = ended.ended()
        assert first.code == other.code == 0, first.said + other.said
        answers = zip(first.answer, other.answer, strict=True)
        return [[SimpleNamespace(**of_rank) for of_rank in both] for both in answers]

    return load


@pytest.fixture
def deep_dir(tiny_llama_dir, tmp_path):
    """Of twelve layers, none of which is much of it."""
    directory = shutil.copytree(tiny_llama_dir, tmp_path / "deep")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 12}))
    return directory


@pytest.fixture
def adapter_dir(tiny_llama_dir, tmp_path):
    """An adapter that peft has written, of the tiny Llama, with numbers that change it."""
    model = AutoModel.from_pretrained(tiny_llama_dir)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.long
def test_a_rank_holds_its_parts_and_the_whole_of_one_module(deep_dir, loaded):
    [ranks] = loaded(ModelConfig(str(deep_dir), from_scratch=True, bf16=False))
    whole = sum(x.nbytes for x in ranks[0].weights.values())
    modules = {}
    for name, x in ranks[0].weights.items():
        module = name.split(".")[1] if name.startswith("layers.") else name
        modules[module] = modules.get(module, 0) + x.nbytes
    for rank in ranks:
        assert rank.most <= rank.own + max(modules.values()) + 4096 < 0.8 * whole
    assert ranks[0].read and not ranks[1].read


@pytest.mark.long
def test_all_ranks_have_the_weights_of_the_first_however_they_were_made(
    tiny_llama_dir, tiny_bert_dir, adapter_dir, loaded
):
    """Adapters of every kind, new tokens, layers that are tried out once weights are there."""
    llama, bert = str(tiny_llama_dir), str(tiny_bert_dir)
    configs = [
        ModelConfig(bert, special_tokens=["<skill>"], gradient_checkpointing="selective"),
        ModelConfig(bert, layers=1, mlp_chunk=64, **LORA),
        ModelConfig(llama, lora_init="orthogonal", lora_dora=True, **LORA),
        ModelConfig(llama, lora_modules_to_save=["embed_tokens"], **LORA),
        ModelConfig(llama, weights_dtype="bf16", lora_rank=2),
        ModelConfig(str(adapter_dir)),
        ModelConfig(str(adapter_dir), lora_rank=2),
    ]
    for config, (first, other) in zip(configs, loaded(*configs), strict=True):
        assert first.weights.keys() == other.weights.keys() == first.read.keys()
        for name, want in first.read.items():
            assert torch.equal(first.weights[name], want), (config, name)
            assert torch.equal(other.weights[name], want), (config, name)


@pytest.mark.long
def test_a_vocabulary_is_trimmed_before_weights_are_there(tiny_llama_dir, loaded):
    config = ModelConfig(str(tiny_llama_dir), trim_vocabulary=True)
    [(first, other)] = loaded(config, trimmed=["a nurse"])
    name = "embed_tokens.weight"
    whole = load_file(tiny_llama_dir / "model.safetensors")[name]
    assert len(first.weights[name]) < len(whole)
    assert torch.equal(first.weights[name], other.weights[name])
