"""A disk that is full costs what does not fit, and says so in one line; what was there stays."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import rankpo_fast.commands.contrastive
import rankpo_fast.commands.encode  # noqa: F401
from rankpo_fast.config import TrainingConfig
from rankpo_fast.judge.journal import Journal
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train.log import MetricsLog
from rankpo_fast.train.reporters import About, Reporters
from support import small_disk
from support.bounded import Outcome, command
from support.small_disk import on_small_disk, resize

needs_mounts = pytest.mark.skipif(
    not small_disk.can_mount(), reason="this system lets nobody mount a disk of their own"
)
FULL = "/dev/full"
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason="there is no /dev/full")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    row = {"positives": ["nurse"], "negatives": ["a cook"]}
    path.write_text("".join(json.dumps({"query": f"nurse {i}", **row}) + "\n" for i in range(8)))
    return path


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture
def train(tiny_llama_dir, rows):
    """train(output directory, ...) -> how it ended."""

    def run(output: Path, *flags, **options) -> Outcome:
        return command(
            *("contrastive", "--model_name_or_path", tiny_llama_dir, "--train_data", rows),
            *("--output_dir", output, "--no_cache", "true", "--device", "cpu", "--bf16", "false"),
            *("--max_steps", 3, "--save_steps", 1, "--save_total_limit", 2, "--num_negatives", 1),
            *("--per_device_train_batch_size", 4, "--logging_steps", 1, "--auto_resume"),
            *flags,
            **options,
        )

    return run


@pytest.fixture
def encode(tiny_llama_dir, rows):
    """encode(output file, ...) -> how it ended."""

    def run(output: Path | str, **options) -> Outcome:
        return command(
            *("encode", "--model_name_or_path", tiny_llama_dir, "--input", rows),
            *("--text_key", "query", "--output", output, "--no_cache", "true", "--device", "cpu"),
            **options,
        )

    return run


def full(*descriptors: int):
    """Makes standard output or error a disk that is full."""

    def change() -> None:
        for number in descriptors:
            os.dup2(os.open(FULL, os.O_WRONLY), number)

    return change


def names(folder: Path) -> list[str]:
    """Of what is there, but for complete checkpoints."""
    there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return [name for name in there if not name.startswith("checkpoints/step-")]


def in_one_line(ended: Outcome, code: int) -> bool:
    assert ended.code == code and "Traceback" not in ended.said, ended.said
    return ended.complaint.startswith("rankpo-fast: error: ")


@needs_mounts
@pytest.mark.parametrize(
    "kibibytes",
    [
        pytest.param(900, id="900k"),
        *(pytest.param(size, id=f"{size}k", marks=pytest.mark.long)
          for size in (8, 64, 200, 400, 600, 700, 800, 1000)),
    ],
)  # fmt: skip
def test_a_training_on_a_disk_too_small_ends_in_one_line_and_goes_on_once_there_is_room(
    kibibytes, train, disk, tmp_path
):
    straight = tmp_path / "straight"
    assert train(straight).code == 0

    def twice() -> tuple[Outcome, bool, Outcome, list[str], bytes]:
        first = train(disk / "out")
        (disk / "out/checkpoints").mkdir(parents=True, exist_ok=True)
        for path in (disk / "out/checkpoints").iterdir():  # what is there is whole
            checkpoints.read(path)
        finished = (disk / "out/config.json").exists()
        if finished:
            load_file(disk / "out/model.safetensors")
        resize(disk, 8192)
        second = train(disk / "out")
        model = disk / "out/model.safetensors"
        return first, finished, second, names(disk / "out"), model.read_bytes()

    first, finished, second, there, weights = on_small_disk(disk, kibibytes, twice)
    assert in_one_line(first, 1) and "No space left on device" in first.complaint
    assert finished == ("the model is saved" in first.complaint)
    assert second.code == 0, second.said
    assert there == names(straight)
    assert weights == (straight / "model.safetensors").read_bytes()


@needs_mounts
@pytest.mark.long
def test_a_metrics_file_that_is_full_ends_no_training(train, disk):
    """There is room for its first page of lines."""
    ended = on_small_disk(disk, 20, lambda: train(disk / "out", "--max_steps", 60))
    assert in_one_line(ended, 1) and "step 60 of 60" in ended.said
    assert ended.said.count("metrics.jsonl cannot be written ([Errno 28] No space left on") == 1
    assert re.search(r"metrics.jsonl: \d+ lines could not be written", ended.said)


@needs_mounts
def test_lines_of_metrics_wait_until_there_is_room(disk):
    def run() -> list[int]:
        config = TrainingConfig(str(disk))
        with MetricsLog(disk, config, Reporters([], About(disk, "", None, {}, 0)), 0, 400) as log:
            for step in range(400):
                if step == 300:
                    resize(disk, 64)
                log.write(step, {"loss": 0.5})
        return [json.loads(line)["step"] for line in (disk / "metrics.jsonl").open()]

    assert on_small_disk(disk, 8, run) == list(range(400))


@needs_mounts
def test_an_output_that_does_not_fit_leaves_the_file_that_was_there(encode, disk):
    def run() -> tuple[Outcome, list[str], str]:
        output = disk / "vectors.npy"
        output.write_text("before")
        ended = encode(output)
        return ended, names(disk), output.read_text()

    ended, there, content = on_small_disk(disk, 4, run)
    assert in_one_line(ended, 1) and "No space left on device" in ended.complaint
    assert there == ["vectors.npy"] and content == "before"


@needs_mounts
def test_answers_that_were_journalled_outlive_a_full_disk(disk):
    def run() -> tuple[int, list[str], list[str]]:
        path, written = disk / "journal.jsonl", []
        journal = Journal(path, {"prompt": "p"})
        try:
            for number in range(1000):
                journal.add({"key": str(number), "answer": "A" * 100})
                written.append(str(number))
        except OSError:
            pass
        assert [answer["key"] for answer in journal.answers] == written
        del journal
        resize(disk, 256)
        with pytest.warns(UserWarning, match="cut off in the middle, taken away"):
            reopened = Journal(path, {"prompt": "p"})
        with reopened:
            reopened.add({"key": "another"})
        with Journal(path, {"prompt": "p"}) as last:
            return written, [answer["key"] for answer in last.answers]

    written, there = on_small_disk(disk, 8, run)
    assert 10 < len(written) < 1000 and there == [*written, "another"]


@needs_full
def test_a_log_that_cannot_be_written_ends_no_training(train, tmp_path):
    assert train(tmp_path / "out", before=full(2)).code == 0
    assert (tmp_path / "out/config.json").exists()


@needs_full
def test_a_device_is_no_output(train):
    ended = train(Path(FULL))
    assert in_one_line(ended, 2) and "/dev/full is a file; a directory is to" in ended.complaint


@needs_full
@pytest.mark.parametrize("word, code", [("--version", 1), ("no-command", 2)])
def test_results_that_cannot_be_printed_are_a_failure(word, code):
    assert command(word, before=full(1)).code == code
    assert command(word, before=full(1, 2)).code == code


@needs_full
@pytest.mark.long  # processes of their own: Python tries once more when it ends
def test_the_exit_status_is_ours_and_the_failure_one_line():
    words = [sys.executable, "-m", "rankpo_fast.cli"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open(FULL, "w") as out:
        done = subprocess.run([*words, "--version"], stdout=out, stderr=subprocess.PIPE, text=True,
                              env=environment)  # fmt: skip
        helped = subprocess.run([*words, "evaluate", "--help"], stdout=out, env=environment)
        silent = subprocess.run([*words, "no-command"], stdout=out, stderr=out, env=environment)
    [line] = done.stderr.splitlines()
    assert line == "rankpo-fast: error: [Errno 28] No space left on device: 'standard output'"
    assert [done.returncode, helped.returncode, silent.returncode] == [1, 1, 2]
