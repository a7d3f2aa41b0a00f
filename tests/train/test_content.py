"""A run is known by what it read: hashed as it was read, whatever lies under its name since."""

import hashlib
import json
import shutil
from pathlib import Path

import peft
import pytest
from transformers import AutoModel

from rankpo_fast.data import sources
from rankpo_fast.errors import InputError
from rankpo_fast.train import contrastive, loop


def recorded(output: Path, flag: str):
    settings = json.loads((output / "training.json").read_text())["settings"]
    return settings[f"content of --{flag}"]


def test_a_digest_is_of_what_was_read_not_of_what_took_its_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"first\nsecond\n")
    with sources.digests_kept():
        assert [*sources.byte_lines(path)] == [b"first\n", b"second\n"]
        path.write_bytes(b"another\n")
        assert sources.digest(str(path)) == hashlib.sha256(b"first\nsecond\n").hexdigest()
        with pytest.raises(InputError, match="has changed since it was first read"):
            list(sources.byte_lines(path))
    assert sources.digest(path) == hashlib.sha256(b"another\n").hexdigest()


def test_what_is_read_in_part_has_the_digest_of_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"first\nsecond\n")
    with sources.digests_kept():
        next(sources.byte_lines(path))
        assert sources.digest(path) == hashlib.sha256(b"first\nsecond\n").hexdigest()


def test_rows_that_are_swapped_once_they_are_read_are_recorded_as_they_were_read(
    tiny_llama_dir, run_stage, contrastive_file, tmp_path, monkeypatch
):
    rows = Path(shutil.copy(contrastive_file, tmp_path / "rows.jsonl"))
    expected, prepare = hashlib.sha256(rows.read_bytes()).hexdigest(), contrastive.prepare_run

    def swap_and_prepare(*args, **kwargs):
        rows.write_text(rows.read_text().replace("nurse", "judge"))
        return prepare(*args, **kwargs)

    monkeypatch.setattr(contrastive, "prepare_run", swap_and_prepare)
    output = run_stage("contrastive", tiny_llama_dir, "out", train_data=[str(rows)], max_steps=1)
    assert recorded(output, "train_data") == [expected]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_that_is_swapped_while_it_is_read_is_refused(
    file, tiny_llama_dir, run_stage, tmp_path, monkeypatch
):
    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    introduce = loop.introduce

    def swap(*args):
        (tmp_path / "new").write_bytes((model / file).read_bytes())
        (tmp_path / "new").rename(model / file)
        introduce(*args)

    monkeypatch.setattr(loop, "introduce", swap)
    with pytest.raises(InputError, match=f"{file} has changed while it was read"):
        run_stage("contrastive", model, "out")
    assert not (tmp_path / "out" / "training.json").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("config.json", {"hidden_dropout_prob": 0.5}, "config.json"),
        ("config.json", {"hidden_act": "relu"}, "config.json"),
        ("config.json", {"num_hidden_layers": 1}, "config.json"),
        ("config_sentence_transformers.json", {"prompts": {"query": "find: "}}, "config_sentence"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "1_Pooling/config.json"),
        ("modules.json", {}, "modules.json"),
        ("tokenizer.json", {"truncation": None, "more": 1}, "tokenizer.json"),
    ],
    ids=["dropout", "activation", "layers", "prefix", "pooling", "modules", "tokenizer"],
)
@pytest.mark.parametrize("flag", ["model_name_or_path", "reference_model_name_or_path"])
def test_what_decides_a_bit_of_a_model_is_refused_on_resume_by_name(
    flag, file, change, named, tiny_bert_dir, run_stage, tmp_path
):
    other = Path(shutil.copytree(tiny_bert_dir, tmp_path / "model"))
    models = {"model_name_or_path": tiny_bert_dir, "reference_model_name_or_path": tiny_bert_dir}
    flags = {"max_steps": 2, "save_steps": 1, "reference_free": False}

    def run(models, **more):
        models = {name: str(path) for name, path in models.items()}
        return run_stage(
            "rankpo", models.pop("model_name_or_path"), "out", **models, **flags, **more
        )

    output = run(models)
    (output / "config.json").unlink()
    path = other / file
    path.parent.mkdir(exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | change))
    with pytest.raises(InputError, match=f"content of --{flag} differs: {named}"):
        run(models | {flag: other}, resume="newest")


def test_the_base_of_an_adapter_is_a_part_of_it(tiny_llama_dir, run_stage, tmp_path):
    base = Path(shutil.copytree(tiny_llama_dir, tmp_path / "base"))
    adapter = peft.get_peft_model(
        AutoModel.from_pretrained(base),
        peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]),
    )
    adapter.save_pretrained(tmp_path / "adapter")
    for file in base.glob("token*"):
        shutil.copy(file, tmp_path / "adapter")
    output = run_stage("contrastive", tmp_path / "adapter", "out", max_steps=2, save_steps=1)
    (output / "config.json").unlink()
    with (base / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(InputError, match="content of --model_name_or_path differs: base/config"):
        run_stage("contrastive", tmp_path / "adapter", "out", max_steps=2, save_steps=1,
                  resume="newest")  # fmt: skip
