"""A path that cannot be written is refused by its flag, and asking leaves no trace."""

import pytest

from rankpo_fast.errors import InputError
from rankpo_fast.paths import check_writable


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
