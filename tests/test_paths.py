"""A path that cannot be written is refused by its flag, and asking leaves no trace."""

import json
import os
from types import SimpleNamespace

import pytest

from rankpo_fast.errors import InputError
from rankpo_fast.paths import check_output, check_writable, model_files


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize(
    "name, reason",
    [
        ("file/below", "Not a directory"),
        ("file/below/that", "Not a directory"),
        ("link", "symbolic link to nothing"),
        ("link/below", "link is not a directory"),
        ("new/" + "x" * 256, "a name of more than"),
        ("x" * 5000, "name too long"),
        ("a\0b", "null"),
        ("closed/file", "no permission to write in"),
    ],
    ids=lambda x: x[:20].replace("\0", "NUL"),
)
def test_path_that_cannot_be_written_is_named_with_its_flag(
    name, reason, directory, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path / "closed")
    with pytest.raises(InputError, match=f"(?i)^--output .*{reason}"):
        check_writable("--output", tmp_path / name, directory=directory)


def test_path_that_can_be_written_is_left_alone(tmp_path):
    check_writable("--output", tmp_path / "new" / "x.json")
    check_writable("--output_dir", tmp_path / "new" / "out", directory=True)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def model(tmp_path):
    """A model directory: weights behind a link, a module in a folder, and a user's own file."""
    directory = tmp_path / "model"
    (directory / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "1_Pooling/config.json", "figures.json"):
        (directory / name).write_text("{}")
    (tmp_path / "weights.safetensors").touch()
    (directory / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    (tmp_path / "link").symlink_to(directory)
    os.link(directory / "config.json", tmp_path / "hard-link.json")
    (tmp_path / "rows.jsonl").touch()
    return directory


@pytest.mark.parametrize(
    "output",
    ["model/model.safetensors", "link/tokenizer.json", "model/1_Pooling/../config.json",
     "model/1_Pooling/config.json", "weights.safetensors", "hard-link.json", "rows.jsonl"],
)  # fmt: skip
def test_output_over_what_is_read_is_refused_by_whatever_name(output, model, tmp_path):
    settings = SimpleNamespace(
        model_name_or_path=str(model), train_data=[str(tmp_path / "rows.jsonl")]
    )
    with pytest.raises(InputError, match=r"--output .* is also read \(--(model|train)"):
        check_output("--output", tmp_path / output, settings)


@pytest.mark.parametrize("folder", [".", "0_Transformer"])
def test_output_over_the_model_of_an_adapter_is_refused(folder, model, tmp_path):
    place = tmp_path / "adapter" / folder
    place.mkdir(parents=True)
    (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    settings = SimpleNamespace(model_name_or_path=str(tmp_path / "adapter"))
    for output in ("weights.safetensors", "model/config.json"):
        with pytest.raises(InputError, match=r"--output .* is also read \(--model"):
            check_output("--output", tmp_path / output, settings)


def test_figures_may_lie_beside_the_model_they_are_of(model):
    settings = SimpleNamespace(model_name_or_path=str(model), tokenizer_name="hub/name")
    for name in ("figures.json", "new.jsonl"):
        check_output("--output", model / name, settings)
    assert "figures.json" not in map(str, model_files(model))
