"""Signals end a program between two parts of its work, and none is lost."""

import json
import os
import signal
import subprocess
import sys

import pytest

from rankpo_fast import cli, signals
from rankpo_fast.errors import TrainingStopped
from rankpo_fast.model import encode
from rankpo_fast.train.signals import StopSignal

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 138}


@pytest.fixture(autouse=True)
def handlers():
    """As a program has them that was started in a terminal."""
    before = {number: signal.getsignal(number) for number in CODES}
    for number in CODES:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signals.Signals.current is None
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def sent(monkeypatch):
    """sent(number): the signal comes while the second micro-batch is encoded; returns the texts of
    each that was."""
    original, batches = encode._encode, []

    def arm(number):
        def encoding(encoder, table, text_ids, ranks):
            batches.append(len(text_ids))
            if len(batches) == 2:
                signal.raise_signal(number)
            return original(encoder, table, text_ids, ranks)

        monkeypatch.setattr(encode, "_encode", encoding)
        return batches

    return arm


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [f"nurse number {i} of {i % 7}" for i in range(40)]
    rows = [{"query": text, "positives": [f"the {text}"], "negatives": []} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
@pytest.mark.parametrize("command", ["mine", "encode"])
def test_a_command_ends_after_the_micro_batch_under_way_in_one_line_and_leaves_no_file(
    command, number, sent, rows, tiny_llama_dir, tmp_path, capsys
):
    batches, output = sent(number), tmp_path / "output.npy"
    files = {
        "mine": ["--train_data", rows, "--output_file", output, "--num_negatives", 1],
        "encode": ["--input", rows, "--text_key", "query", "--output", output],
    }
    words = [command, "--model_name_or_path", tiny_llama_dir, *files[command], "--no_cache",
             "--device", "cpu", "--max_tokens_per_micro_batch", 200]  # fmt: skip
    assert cli.main([str(word) for word in words]) == CODES[number]
    assert len(batches) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"rankpo-fast: error: stopped by {number.name}"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)
def test_a_training_saves_and_stops_in_the_midst_of_an_evaluation(
    number, sent, tiny_llama_dir, rows, tmp_path, capsys
):
    from support import stages

    batches = sent(number)
    texts = [json.loads(line)["query"] for line in rows.read_text().splitlines()]
    pairs = [{"query": t, "passage1": f"a {t}", "passage2": f"b {t}", "preferred": "A"}
             for t in texts]  # fmt: skip
    preferences = tmp_path / "preferences.jsonl"
    preferences.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with pytest.raises(TrainingStopped) as stop:
        stages.run(
            "contrastive", model_name_or_path=str(tiny_llama_dir), train_data=[str(rows)],
            output_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"), eval_steps=2,
            preference_data=[str(preferences)], max_tokens_per_micro_batch=200, num_negatives=0,
        )  # fmt: skip
    assert stop.value.exit_code == CODES[number] and stop.value.step == 2
    assert len(batches) == 2
    assert "after step 2, which is saved" in capsys.readouterr().err
    assert (tmp_path / "out/checkpoints/step-00000002/manifest.json").exists()


def test_a_signal_that_comes_in_a_destructor_is_not_lost():
    class Falls:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)
            sum(range(10))  # a handler that raises would do it here, and Python would drop it

    with pytest.raises(signals.Interrupted) as stop, signals.EndsCommand():
        Falls()
        signals.ask()
    assert stop.value.exit_code == 130


def test_a_second_ctrl_c_in_a_training_of_the_command_line_ends_it_at_once():
    child = os.fork()
    if child == 0:
        with signals.EndsCommand(), StopSignal():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGINT


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.EndsCommand() as inside:
        signal.raise_signal(signal.SIGHUP)
        signals.ask()
    assert inside.requested is None


def test_a_signal_before_a_training_is_one_in_it():
    with signals.EndsCommand(), signals.Signals() as outer:
        signal.raise_signal(signal.SIGTERM)
        with signals.Signals() as inner:
            assert inner.requested == outer.requested == signal.SIGTERM


def test_a_command_that_asks_for_no_signal_ends_all_the_same():
    program = (
        "import signal, time\n"
        "from rankpo_fast import signals\n"
        "signals.GRACE = 0.1\n"
        "with signals.EndsCommand():\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 143
    assert done.stderr == "rankpo-fast: error: stopped by SIGTERM\n"


def test_ctrl_c_while_torch_is_imported_waits_until_it_is():
    held = False
    with pytest.raises(KeyboardInterrupt), signals.held_back():
        signal.raise_signal(signal.SIGINT)
        held = sum(range(1000)) > 0
    assert held
