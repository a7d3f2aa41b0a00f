"""A cache saves time and decides nothing: damaged, read-only, full or homeless, the run goes on."""

import hashlib
import os
import warnings

import pytest
import torch

from rankpo_fast.config import ComputeConfig
from rankpo_fast.data.cache import cached, check_cache
from rankpo_fast.errors import InputError

KEY = hashlib.sha256(b"all that it follows from").hexdigest()


def keep(directory, made=None):
    """What the cache gives; `made` counts how often it was computed."""

    def make():
        if made is not None:
            made.append(1)
        return {"ids": torch.arange(6), "count": torch.tensor(2)}

    tensors = cached(directory, "numbers", lambda: KEY, make)
    assert tensors["ids"].tolist() == [0, 1, 2, 3, 4, 5] and int(tensors["count"]) == 2
    return tensors


def damage_a_bit(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(damage_a_bit, id="flipped-bit"),
        pytest.param(lambda data: data.replace(b'"count"', b'"other"'), id="other-name"),
        pytest.param(lambda data: data.replace(b"[6]", b"[3]").replace(b"I64", b"I32"), id="kind"),
        pytest.param(lambda data: data[:-7], id="cut-off"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"\xff" * 64, id="noise"),
        pytest.param(lambda data: data.replace(b"sha256", b"sha999"), id="no-checksum"),
    ],
)
def test_damaged_file_is_made_anew_with_a_warning(damage, tmp_path):
    made = []
    keep(tmp_path, made)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    assert damage(whole) != whole
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match=f"{path.name}: damaged cache file"):
        keep(tmp_path, made)
    keep(tmp_path, made)
    assert len(made) == 2


def test_file_of_another_format_is_passed_over_in_silence(tmp_path, monkeypatch):
    """As after an update, or of an older program that shares the directory."""
    keep(tmp_path)
    monkeypatch.setattr("rankpo_fast.data.cache.FORMAT", -1)
    monkeypatch.setattr("rankpo_fast.data.cache._content_hash", lambda *_: "0" * 64)
    made = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep(tmp_path, made)
        keep(tmp_path, made)
    assert len(made) == 1 and len(list(tmp_path.iterdir())) == 2


def test_a_directory_that_cannot_be_made_is_done_without_and_said_once():
    """/proc takes no files, not even root's."""
    with pytest.warns(
        UserWarning, match="/proc/rankpo-fast/one cannot be used .*--no_cache"
    ) as said:
        keep("/proc/rankpo-fast/one")
        keep("/proc/rankpo-fast/one")
    assert len(said) == 1


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The file of the tensors; nothing has been said of its directory in this process."""
    monkeypatch.setattr("rankpo_fast.data.cache._said", set())
    keep(tmp_path)
    (path,) = tmp_path.iterdir()
    return path


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda path: os.chown(path, 12345, -1), "another user's"),
        (lambda path: (path.unlink(), path.mkdir()), "is no file"),
        (lambda path: (path.unlink(), os.mkfifo(path)), "is no file"),
        (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "is no file"),
    ],
    ids=["another-users", "directory", "fifo", "device"],
)
def test_what_is_no_file_of_ours_is_made_anew_and_said_once(change, said, kept, monkeypatch):
    if "user" in said and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    change(kept)
    made = []
    with pytest.warns(UserWarning, match=f"cannot be used .*{said}") as warned:
        for _ in range(2):
            keep(kept.parent, made)
    assert len(made) == 2 and len(warned) == 1


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_may_not_be_read_is_made_anew_and_said_once(what, kept):
    """As another user: the system lets root read everything."""
    (kept if what == "file" else kept.parent).chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    made = []
    try:
        with pytest.warns(UserWarning, match="cannot be used .Permission denied") as warned:
            for _ in range(2):
                keep(kept.parent, made)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        kept.parent.chmod(0o755)
    assert len(made) == 2 and len(warned) == 1


def test_what_cannot_have_been_computed_is_made_anew(kept):
    """Though its checksum is right."""
    made = []

    def make():
        made.append(1)
        return {"ids": torch.arange(6), "count": torch.tensor(2)}

    for fits, times in ((lambda kept: int(kept["ids"].max()) < 5, 1), (lambda kept: True, 1)):
        with warnings.catch_warnings(record=True) as said:
            cached(kept.parent, "numbers", lambda: KEY, make, fits)
        assert len(made) == times
    assert not said


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["save_tensors", "whole_file"])
def test_a_full_disk_is_done_without(what, tmp_path, monkeypatch):
    monkeypatch.setattr(f"rankpo_fast.data.cache.{what}", full)
    with pytest.warns(UserWarning, match="cannot be used .No space left on device"):
        keep(tmp_path / what)
    assert not list(tmp_path.rglob("*.*"))


def test_no_room_to_find_the_key_is_done_without(tmp_path):
    with pytest.warns(UserWarning, match="cannot be used .No space left on device"):
        assert cached(tmp_path, "numbers", full, dict) == {}


def test_what_is_kept_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    made = []
    keep(tmp_path, made)
    monkeypatch.setattr("rankpo_fast.data.cache.whole_file", full)
    keep(tmp_path, made)
    assert len(made) == 1


def test_only_a_file_in_its_place_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        with pytest.raises(InputError, match="--cache_dir .*file"):
            check_cache(ComputeConfig(cache_dir=str(tmp_path / name)))
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.warns(UserWarning, match="no permission to write in"):
        check_cache(ComputeConfig(cache_dir=str(tmp_path / "new" / "cache")))


def test_without_a_home_nothing_is_kept_in_a_directory_named_tilde(monkeypatch):
    config = ComputeConfig(cache_dir="~nobody-of-this-name/cache")
    assert config.cache_path is None
    with pytest.warns(UserWarning, match="no such home directory"):
        check_cache(config)


def test_no_cache_keeps_nothing_and_says_nothing():
    config = ComputeConfig(cache_dir="/proc/rankpo-fast/never", no_cache=True)
    assert config.cache_path is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_cache(config)
