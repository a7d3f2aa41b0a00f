"""Metrics go to several places at once, and what one of them does not take stops no run."""

import importlib.metadata
import json
import sys
import threading
from types import SimpleNamespace

import pytest

from rankpo_fast.config import TrainingConfig
from rankpo_fast.errors import InputError
from rankpo_fast.train import reporters
from rankpo_fast.train.reporters import REPORTERS, About, Reporters, chosen


class Notes:
    """A reporter that remembers, and that fails at the steps it is told to."""

    failing, written, closed = (), [], []

    def __init__(self, about):
        self.about = about
        Notes.written, Notes.closed = [], []

    def write(self, step, line):
        if step in self.failing:
            raise ConnectionError("no route\nto host")
        Notes.written.append((step, line))

    def close(self):
        Notes.closed.append(True)


class Refusing(Notes):
    def __init__(self, about):
        raise RuntimeError("no API key: log in first")


@pytest.fixture
def installed(monkeypatch):
    """wandb and trackio as notes, whether or not they are installed; mlflow is not."""
    for name, kind in {"wandb": Notes, "trackio": Refusing}.items():
        monkeypatch.setitem(REPORTERS, name, kind)
    monkeypatch.setattr(reporters, "_installed", lambda name: name != "mlflow")
    monkeypatch.setattr(Notes, "failing", ())


def test_several_reporters_get_every_line(installed, tiny_llama_dir, run_stage, read_metrics):
    flags = {"report_to": ["tensorboard", "wandb"], "project": "p", "run_name": "night"}
    output = run_stage("contrastive", tiny_llama_dir, "out", logging_steps=2, **flags)
    assert [step for step, _ in Notes.written] == [2, 4, 6] and Notes.closed
    assert [{"step": s, **line} for s, line in Notes.written] == read_metrics(output)
    assert list((output / "tensorboard" / "night").iterdir())


def test_one_that_fails_is_said_once_counted_and_the_run_goes_on(
    installed, tiny_llama_dir, run_stage, read_metrics, monkeypatch
):
    monkeypatch.setattr(Notes, "failing", (2, 3, 4, 5))
    with pytest.warns(UserWarning) as said:
        output = run_stage("contrastive", tiny_llama_dir, "out", report_to=["wandb"])
    assert [str(w.message) for w in said if "wandb" in str(w.message)] == [
        "--report_to wandb failed, and the run goes on: ConnectionError: no route to host",
        "wandb took 2 of 6 lines; metrics.jsonl has all of them",
    ]
    assert [line["step"] for line in read_metrics(output)] == [1, 2, 3, 4, 5, 6]
    assert (output / "config.json").exists()


def test_keys_and_tokens_are_in_no_message_and_in_no_file(
    installed, tiny_llama_dir, run_stage, monkeypatch
):
    def write(self, step, line):
        raise ConnectionError(f"401: {secrets} at https://me:{secrets[0]}@there")

    secrets = ["4b9f0c2e7a", "hf_0123456789abcdefghij"]
    monkeypatch.setenv("WANDB_API_KEY", secrets[0])
    monkeypatch.setenv("HF_TOKEN", secrets[1])
    monkeypatch.setattr(Notes, "write", write)
    with pytest.warns(UserWarning) as said:
        output = run_stage("contrastive", tiny_llama_dir, "out", max_steps=1, report_to=["wandb"])
    failed = next(str(w.message) for w in said if "failed" in str(w.message))
    assert "['[WANDB_API_KEY]', '[HF_TOKEN]'] at https://[password]@there" in failed
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [p for p in files if any(secret.encode() in p.read_bytes() for secret in secrets)]


def test_one_that_hangs_delays_nothing_and_is_not_waited_for(installed, monkeypatch, tmp_path):
    over = threading.Event()
    monkeypatch.setattr(Notes, "write", lambda self, step, line: over.wait(20))
    monkeypatch.setattr(reporters, "PATIENCE", 0.1)
    with (
        pytest.warns(UserWarning, match="wandb took 0 of 3 lines"),
        Reporters(["wandb"], About(tmp_path, "p", None, {})) as open_reporters,
    ):
        for step in range(3):
            open_reporters.write(step, {"loss": 1.0})
    assert all(one.daemon for one in threading.enumerate() if one is not threading.main_thread())
    over.set()


def test_one_that_does_not_start_is_refused_by_name(installed, tmp_path):
    about = About(tmp_path, "p", None, {})
    with pytest.raises(InputError, match="--report_to trackio: .* no API key: log in first"):
        Reporters(["wandb", "trackio"], about).__enter__()
    assert Notes.closed  # which had been started


@pytest.mark.parametrize("before", [None, ["tensorboard"]], ids=["fresh", "overwriting"])
def test_where_one_does_not_start_all_is_as_it_was(
    before, installed, tiny_llama_dir, run_stage, tmp_path
):
    if before is not None:
        run_stage("contrastive", tiny_llama_dir, "out", max_steps=1, report_to=before)
    files = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(InputError, match="trackio: it does not start"):
        run_stage(
            "contrastive", tiny_llama_dir, "out", report_to=["tensorboard", "trackio"],
            overwrite_output_dir=before is not None,
        )  # fmt: skip
    assert {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*")} == files
    run_stage("contrastive", tiny_llama_dir, "out", max_steps=1, report_to=["tensorboard"],
              overwrite_output_dir=before is not None)  # fmt: skip
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == 1
    assert not list((tmp_path / "out").glob(".*"))


def test_a_run_that_goes_on_has_each_step_once(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        about = About(tmp_path, "p", None, {}, first_step=first)
        with Reporters(["tensorboard"], about) as open_reporters:
            for step in steps:
                open_reporters.write(step, {"loss": float(first)})
    read = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in read.Scalars("loss")] == [
        (1, 0),
        (2, 0),
        (3, 2),
        (4, 2),
    ]


def test_what_is_not_installed_is_refused_by_name_before_the_model(installed, run_stage):
    with pytest.raises(InputError, match="--report_to mlflow: it is not installed"):
        run_stage("contrastive", "no/such-model", "out", report_to=["tensorboard", "mlflow"])
    assert chosen(["all"]) == ["tensorboard", "wandb", "trackio"]


def test_a_folder_of_that_name_is_no_installed_reporter(tmp_path, monkeypatch):
    """wandb leaves one where it ran."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    there = "wandb" in importlib.metadata.packages_distributions()
    assert reporters._installed("wandb") == there


@pytest.mark.parametrize(
    "flags, named",
    [
        ({"report_to": ["tensorbord"]}, "--report_to must be none, all, or some of tensorboard"),
        ({"report_to": ["none", "wandb"]}, "--report_to must be"),
        ({"report_to": ["wandb", "wandb"]}, "--report_to must be"),
        ({"report_to": []}, "--report_to must be"),
        ({"project": "p"}, "--project needs --report_to, one of wandb, trackio, mlflow"),
        ({"report_to": "tensorboard", "project": "p"}, "--project needs"),
        ({"run_name": "r"}, "--run_name needs --report_to"),
        ({"report_to": ["wandb"], "run_name": "../r"}, "--run_name must be the name of a folder"),
        ({"report_to": ["wandb"], "run_name": ".."}, "--run_name must be the name of a folder"),
    ],
)
def test_reporters_that_cannot_be_meant_are_refused(flags, named):
    with pytest.raises(InputError, match=named):
        TrainingConfig("out", **flags)


# --- each as its owners mean it to be called, where it is installed or by a stand-in ---


def calls_of(monkeypatch, module, run):
    """Stand in for a module whose `init` gives a run; what it was called with."""
    calls = []
    made = SimpleNamespace(
        log=lambda line, step: calls.append((step, line)), finish=lambda: calls.append("finished")
    )
    stand_in = SimpleNamespace(init=lambda **given: calls.append(given) or made)
    monkeypatch.setitem(sys.modules, module, stand_in)
    run()
    return calls


@pytest.mark.parametrize("module", ["wandb", "trackio"])
def test_project_run_and_settings_reach(module, monkeypatch, tmp_path):
    def run():
        about = About(tmp_path / "out", "p", None, {"--seed": 1})
        with Reporters([module], about) as open_reporters:
            open_reporters.write(3, {"loss": 0.5})

    given, line, end = calls_of(monkeypatch, module, run)
    assert (given["project"], given["name"], given["config"]) == ("p", "out", {"--seed": 1})
    assert module != "wandb" or given["dir"] == str(tmp_path / "out")
    assert (line, end) == ((3, {"loss": 0.5}), "finished")


def test_mlflow_keeps_its_files_in_the_output_directory(monkeypatch, tmp_path):
    pytest.importorskip("sqlalchemy")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    about = About(tmp_path / "out", "p", "night", {"--seed": 1})
    with Reporters(["mlflow"], about) as open_reporters:
        open_reporters.write(3, {"loss": 0.5, "eval/ndcg@10": 0.25})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/out/mlflow/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert run.data.metrics == {"loss": 0.5, "eval/ndcg_at_10": 0.25}
    assert (run.info.run_name, run.info.status) == ("night", "FINISHED")
    assert json.loads(run.data.params["--seed"]) == 1
