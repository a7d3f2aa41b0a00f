"""The card of a trained model says where it comes from, what it is worth, and how to load it."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import AutoModel

from rankpo_fast.config import EncoderConfig, TrainingConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.load import load_encoder
from rankpo_fast.train.card import base_license
from rankpo_fast.train.optim import make_optimizer

HEAD = "---\nlicense: {}\nlicense_name: own\n---\nA card.\n"


@pytest.fixture
def base(tiny_bert_dir, tmp_path):
    directory = shutil.copytree(tiny_bert_dir, tmp_path / "base")
    (directory / "README.md").write_text(HEAD.format("apache-2.0"))
    return directory


def test_the_card_has_base_licence_data_figures_and_versions(
    base, run_stage, contrastive_file, preference_file
):
    path = run_stage("contrastive", base, "trained", max_steps=1, pooling="mean",
                     query_prefix="find: ", preference_data=[preference_file])  # fmt: skip
    card = ModelCard.load(path / "README.md")
    head = card.data.to_dict()
    assert head["library_name"] == "sentence-transformers"
    assert head["pipeline_tag"] == "sentence-similarity"
    assert head["license"] == "apache-2.0" and "base_model" not in head  # being no hub name
    settings = json.loads((path / "training.json").read_text())["settings"]
    [digest] = settings["content of --train_data"]
    figures = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
    for text in (str(base), contrastive_file, digest, "24 rows", "'find: '", "mean of the states",
                 f"| alignment | {figures['eval/alignment']:.4f} |", "| --learning_rate |",
                 "| transformers |", "SentenceTransformer("):  # fmt: skip
        assert text in card.text, text
    assert "A card." not in card.text
    run_stage("contrastive", base, "trained", max_steps=1, overwrite_output_dir=True)
    assert "no evaluation data was given" in (path / "README.md").read_text()
    assert "README.md" in json.loads((path / "training.json").read_text())["model_files"]


@pytest.mark.parametrize(
    ("text", "license"),
    [
        pytest.param(HEAD.format("mit"), {"license": "mit", "license_name": "own"}, id="there"),
        pytest.param("no head", {}, id="no-head"),
        pytest.param("---\n- a\n---\n", {}, id="a-list"),
        pytest.param("---\na: [\n---\n", {}, id="broken"),
        pytest.param(HEAD.format("[a, b]"), {"license_name": "own"}, id="several"),
        pytest.param(None, {}, id="no-card"),
    ],
)
def test_a_licence_is_taken_from_the_card_of_the_base_and_not_invented(tmp_path, text, license):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert base_license([tmp_path / "none", tmp_path]) == license


@pytest.mark.parametrize("layout", ["classic", "adapter", "adapter-of-classic"])
def test_the_licence_is_found_wherever_the_base_has_its_card(layout, tiny_llama_dir, tmp_path):
    """At the root, above the folder of the weights; or with the base that an adapter names."""
    root = tmp_path / "root"
    folder = root / "0_Transformer" if "classic" in layout else root
    shutil.copytree(tiny_llama_dir, folder)
    if folder != root:
        modules = [{"type": "sentence_transformers.models.Transformer", "path": folder.name}]
        (root / "modules.json").write_text(json.dumps(modules))
    (root / "README.md").write_text(HEAD.format("apache-2.0"))
    if "adapter" in layout:
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
        model = peft.get_peft_model(AutoModel.from_pretrained(folder), lora)
        model.peft_config["default"].base_model_name_or_path = str(root)
        root = tmp_path / "adapter"
        model.save_pretrained(root)  # with a card that names no licence
    encoder = load_encoder(EncoderConfig(str(root)), device=torch.device("cpu"))
    assert base_license(encoder.origins)["license"] == "apache-2.0"


def test_a_model_with_nothing_to_train_is_refused():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(InputError, match="nothing to train"):
        make_optimizer(frozen, TrainingConfig("unused"))
