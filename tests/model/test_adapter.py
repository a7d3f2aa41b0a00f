"""Adapters are opened with their base, with the vectors that other libraries give, or refused."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from rankpo_fast.config import EncoderConfig, ModelConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model import adapter
from rankpo_fast.model.load import load_encoder

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")
IDS = torch.tensor([[1, 5, 6, 7, 2]])


def lora(**settings):
    settings = {"target_modules": ["q_proj", "v_proj"]} | settings
    return peft.LoraConfig(r=4, init_lora_weights=False, **settings)


def states(model):
    with torch.no_grad():
        return model(input_ids=IDS).last_hidden_state


@pytest.fixture(params=["backbone", "head", "head-of-a-task"])
def written(request, tiny_llama_dir, tmp_path):
    """An adapter as peft writes it, of the backbone or of the model with a head around it, and the
    states [1, 5, D] that it gives."""
    from transformers import AutoModel, AutoModelForCausalLM

    task, kind = {
        "backbone": (None, AutoModel),
        "head": (None, AutoModelForCausalLM),
        "head-of-a-task": ("CAUSAL_LM", AutoModelForCausalLM),
    }[request.param]
    torch.manual_seed(1)
    adapted = lora(task_type=task)
    model = peft.get_peft_model(kind.from_pretrained(tiny_llama_dir), adapted).eval()
    model.save_pretrained(tmp_path / "adapter")
    inner = model.base_model.model
    return tmp_path / "adapter", states(inner if kind is AutoModel else inner.model)


def load(directory, **settings):
    return load_encoder(EncoderConfig(str(directory), **settings), device=CPU)


def test_an_adapter_is_merged_into_the_base_it_names(written, tiny_llama_dir, tmp_path):
    directory, expected = written
    with pytest.warns(UserWarning, match=f"adapter of {tiny_llama_dir}, is merged .* whole model"):
        encoder = load(directory)
    encoder.use_kernel(None)
    torch.testing.assert_close(states(encoder.backbone), expected, rtol=0, atol=1e-5)
    assert (expected - states(load(tiny_llama_dir, packing=False).backbone)).abs().max() > 1e-2
    encoder.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / adapter.CONFIG_FILE).exists()
    again = load(tmp_path / "saved", packing=False)
    torch.testing.assert_close(states(again.backbone), expected, rtol=0, atol=1e-5)


def test_an_adapter_trains_as_a_whole_model(written):
    directory, _ = written
    encoder = load_encoder(
        ModelConfig(str(directory), bf16=False, disable_dropout=True), device=CPU
    )
    encoder.train().embed(encoder.tokenize_queries(["a"]), max_tokens=64).sum().backward()
    names = [name for name, p in encoder.named_parameters() if p.grad is not None]
    assert len(names) == len(list(encoder.parameters())) and not any("lora" in n for n in names)


def test_the_layout_of_sentence_transformers_gives_equal_vectors(tiny_bert_dir, tmp_path):
    """Which has the adapter's files where the backbone's would be."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import AutoModel

    parts = [Transformer(str(tiny_bert_dir)), Pooling(32, "cls")]
    model = library.SentenceTransformer(modules=parts, device="cpu", prompts={"query": "Find: "})
    directory = tmp_path / "theirs"
    model.save(str(directory), create_model_card=False)
    for name in ("config.json", "model.safetensors"):
        (directory / name).unlink()
    torch.manual_seed(1)
    backbone = AutoModel.from_pretrained(tiny_bert_dir)
    adapted = peft.get_peft_model(backbone, lora(target_modules=["query", "value"]))
    adapted.save_pretrained(directory)
    model[0].model.load_state_dict(adapted.merge_and_unload().state_dict())
    expected = model.encode_query(["a nurse"], convert_to_tensor=True)
    encoder = load(directory)
    with torch.no_grad():
        vectors = encoder.embed(encoder.tokenize_queries(["a nurse"]), max_tokens=64)
    torch.testing.assert_close(F.normalize(vectors), F.normalize(expected), rtol=0, atol=1e-5)


def test_an_adapter_without_settings_has_those_of_its_base(tiny_llama_dir, tmp_path):
    base = tmp_path / "base"
    load(tiny_llama_dir, pooling="mean", query_prefix="Find: ").save(base)
    from transformers import AutoModel

    peft.get_peft_model(AutoModel.from_pretrained(base), lora()).save_pretrained(tmp_path / "a")
    settings = load(tmp_path / "a").settings
    assert (settings.pooling, settings.query_prefix) == ("mean", "Find: ")


# --- refused ---


def refused(directory, *parts):
    with pytest.raises(InputError) as error:
        load(directory)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_what_an_adapter_lacks_is_named(written, tiny_llama_dir, monkeypatch):
    directory, _ = written
    monkeypatch.setattr(adapter, "find_spec", lambda name: None)
    refused(directory, "this is an adapter (LORA)", "rankpo-fast[lora]")
    monkeypatch.undo()
    path = directory / adapter.CONFIG_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere/base"}))
    refused(directory, "adapter (LORA) of /nowhere/base", "no such directory")
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    refused(directory, "base_model_name_or_path")
    path.write_text(json.dumps(config))
    shutil.copy(tiny_llama_dir / "model.safetensors", directory)
    refused(directory, "adapter", "also a whole model")
    (directory / "model.safetensors").unlink()
    (directory / adapter.WEIGHTS_FILE).rename(directory / "adapter_model.bin")
    refused(directory, "adapter", f"{adapter.WEIGHTS_FILE} is not there")


def test_the_base_must_be_safe_too(written, tiny_llama_dir, tmp_path):
    directory, _ = written
    base = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    path = directory / adapter.CONFIG_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    refused(directory, "adapter", "its base", "model.safetensors")


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "truncated", "kind"])
def test_an_adapter_that_does_not_fit_is_refused(written, fault):
    directory, _ = written
    path = directory / adapter.WEIGHTS_FILE
    weights = load_file(path)
    name = sorted(weights)[0]
    if fault == "missing":
        del weights[name]
    elif fault == "surplus":
        weights[name.replace("layers.0", "layers.9")] = weights[name].clone()
    elif fault == "shape":
        weights[name] = weights[name][:, :3].contiguous()
    save_file(weights, path)
    if fault == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    if fault == "kind":
        config = json.loads((directory / adapter.CONFIG_FILE).read_text())
        config["peft_type"] = "UNHEARD"
        (directory / adapter.CONFIG_FILE).write_text(json.dumps(config))
    refused(directory, str(directory), "adapter")
