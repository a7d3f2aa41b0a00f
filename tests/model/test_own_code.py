"""A model's own code runs if it is asked for, from a pinned commit of the hub, and else never."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from rankpo_fast.config import EncoderConfig
from rankpo_fast.errors import InputError
from rankpo_fast.model.backbone_config import Code, load_config

COMMIT, NAME = "0123456789abcdef" * 2 + "01234567", "owner/own-model"
PINNED = ["--trust_remote_code", "--revision", COMMIT]
CODE = {
    "configuration_own.py": """
from transformers import BertConfig


class OwnConfig(BertConfig):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import BertModel

from .configuration_own import OwnConfig

print("the code runs")


class OwnModel(BertModel):
    config_class = OwnConfig
""",
}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}


def with_auto_map(folder, auto_map):
    path = folder / "config.json"
    content = json.loads(path.read_text()) | {"model_type": "own", "auto_map": auto_map}
    path.write_text(json.dumps(content))


@pytest.fixture
def hub(tmp_path, tiny_bert_dir):
    """The home of a hub whose cache has one commit of a repository with code."""
    snapshot = tmp_path / f"home/hub/models--owner--own-model/snapshots/{COMMIT}"
    shutil.copytree(tiny_bert_dir, snapshot)
    with_auto_map(snapshot, AUTO_MAP)
    for name, text in CODE.items():
        (snapshot / name).write_text(text)
    return tmp_path / "home"


@pytest.mark.long  # a process for each, since Python keeps modules that it has imported
def test_code_of_a_pinned_commit_runs_and_what_is_trained_with_it_goes_on_with_it(hub, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text('{"query": "nurse", "positives": ["a nurse"], "negatives": ["cook"]}\n' * 4)

    def command(*flags):
        variables = {"HF_HOME": str(hub), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "rankpo_fast.cli", *map(str, flags), "--device", "cpu"],
            env={**os.environ, **variables}, capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        return done.returncode, "the code runs" in done.stdout, done.stderr

    def encoded(model, *flags):
        file = tmp_path / "vectors.npy"
        return command("encode", "--model_name_or_path", model, "--input", rows, "--text_key",
                       "query", "--output", file, "--max_length", "16", *flags)  # fmt: skip

    code, ran, said = encoded(f"{NAME}@{COMMIT}")
    assert (code, ran) == (2, False) and "--trust_remote_code" in said, said
    trained = command("contrastive", "--model_name_or_path", NAME, *PINNED, "--train_data", rows,
                      "--output_dir", out, "--max_steps", "1", "--no_cache",
                      "--per_device_train_batch_size", "4", "--num_negatives", "1")  # fmt: skip
    assert trained[:2] == (0, True), trained[2]
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"] == {kind: f"{NAME}--{name}" for kind, name in AUTO_MAP.items()}
    assert not list(out.rglob("*.py"))
    code, ran, said = encoded(out)
    assert (code, ran) == (2, False), said
    assert encoded(out, *PINNED)[:2] == (0, True)
    # A directory's own code, even where code is trusted.
    (out / "modeling_own.py").write_text(CODE["modeling_own.py"])
    (out / "configuration_own.py").write_text(CODE["configuration_own.py"])
    with_auto_map(out, AUTO_MAP)
    code, ran, said = encoded(out, *PINNED)
    assert (code, ran) == (2, False) and "code of the directory itself" in said, said


@pytest.mark.parametrize(
    ("auto_map", "said"),
    [
        ({"AutoModel": "own.Model"}, "must name a class for AutoConfig and one for AutoModel"),
        (AUTO_MAP | {"AutoModel": "somebody/else--own.Model"}, "a commit of owner/own-model"),
        (AUTO_MAP | {"AutoModel": "../own.Model"}, "file.Class or owner/name--file.Class"),
        (AUTO_MAP | {"AutoModel": "/tmp/a--own.Model"}, "file.Class or owner/name--file.Class"),
    ],
)
def test_code_that_the_commit_does_not_pin_is_refused(auto_map, said, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with_auto_map(tmp_path, auto_map)
    with pytest.raises(InputError, match=said):
        load_config(tmp_path, Code(NAME, COMMIT))


def test_classes_of_two_repositories_and_directories_with_their_names_are_refused(
    tmp_path, monkeypatch
):
    (tmp_path / "config.json").write_text("{}")
    with_auto_map(tmp_path, {"AutoConfig": "a/b--own.Config", "AutoModel": "a/c--own.Model"})
    with pytest.raises(InputError, match="classes of two repositories"):
        load_config(tmp_path, Code(None, COMMIT))
    (tmp_path / "a/c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="a directory of that name is here"):
        load_config(tmp_path, Code(None, COMMIT))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trust_remote_code": True}, "--trust_remote_code needs --revision"),
        ({"trust_remote_code": True, "revision": "main"}, "--revision must be a commit, 40 digits"),
        ({"revision": COMMIT[:-1]}, "--revision must be a commit, 40 digits"),
        ({"revision": COMMIT, "model_name_or_path": "."}, "but . is a directory"),
        ({"revision": COMMIT, "model_name_or_path": f"a/b@{'0' * 40}"}, "names another one"),
    ],
)
def test_only_a_whole_commit_pins_code(settings, said):
    with pytest.raises(InputError, match=said):
        EncoderConfig(**{"model_name_or_path": NAME} | settings)


def test_a_revision_holds_for_all_that_is_read_by_the_name_and_code_is_off_by_default():
    config = EncoderConfig(NAME, revision=COMMIT)
    assert config.model_name_or_path == f"{NAME}@{COMMIT}"
    assert Code.of(config) is None
    assert Code.of(EncoderConfig(NAME, revision=COMMIT, trust_remote_code=True)) == Code(
        NAME, COMMIT
    )
