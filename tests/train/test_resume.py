"""A run can stop anywhere and go on as if it had not; what cannot go on is refused."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import nn

from rankpo_fast.config import ModelConfig, TrainingConfig
from rankpo_fast.errors import InputError, TrainingStopped
from rankpo_fast.model.precision import Precision
from rankpo_fast.retrieval.evaluate import Evaluation
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train.arithmetic import arithmetic
from rankpo_fast.train.optim import Optimizer
from rankpo_fast.train.resume import shared_precision
from rankpo_fast.train.signals import StopSignal


@pytest.mark.parametrize(
    "stage, flags",
    [
        pytest.param("contrastive", {}, id="contrastive"),
        pytest.param("rankpo", {"reference_free": False}, id="rankpo-with-reference"),
        pytest.param("contrastive", {"mlp_chunk": 16, "gradient_checkpointing": True}, id="chunks"),
    ],
)
def test_resumed_run_gives_the_same_weights_bit_by_bit(
    stage, flags, tiny_bert_dir, goes_on_bit_by_bit, read_metrics
):
    """Three steps are an epoch; the run stops in the second one, with dropout on."""
    _, stopped = goes_on_bit_by_bit(stage, tiny_bert_dir, stop=4, max_steps=7, **flags)
    assert [line["step"] for line in read_metrics(stopped)] == list(range(1, 8))


@pytest.fixture
def stopped(tiny_llama_dir, run_stage, stop_after, monkeypatch):
    """An output directory with checkpoints of steps 2 and 3."""

    def make(**flags):
        stop_after(3)
        with pytest.raises(TrainingStopped):
            run_stage("contrastive", tiny_llama_dir, "out", save_steps=2, **flags)
        monkeypatch.undo()

    return make


@pytest.mark.parametrize(
    "flags, named",
    [
        pytest.param({"learning_rate": 1.0}, "--learning_rate was 0.003, is 1.0", id="rate"),
        pytest.param({"temperature": 0.5}, "--temperature was 0.02, is 0.5", id="loss"),
        pytest.param({"max_steps": 60}, "--max_steps was 6, is 60", id="length"),
    ],
)
def test_changed_settings_are_refused(flags, named, stopped, tiny_llama_dir, run_stage):
    stopped()
    with pytest.raises(InputError, match=named):
        run_stage("contrastive", tiny_llama_dir, "out", resume="newest", **flags)


def test_changed_data_is_refused(stopped, tiny_llama_dir, run_stage, contrastive_file, tmp_path):
    stopped()
    changed = tmp_path / "changed.jsonl"
    changed.write_text(Path(contrastive_file).read_text().split("\n", 1)[1])
    with pytest.raises(InputError, match="content of --train_data"):
        run_stage("contrastive", tiny_llama_dir, "out", resume="newest", train_data=[str(changed)])


def test_a_model_that_moved_goes_on_and_files_beside_it_may_change(
    tiny_llama_dir, run_stage, stopped, tmp_path, monkeypatch
):
    """Named by a link, and from another directory, in which paths read otherwise."""
    stopped()
    moved = Path(shutil.copytree(tiny_llama_dir, tmp_path / "elsewhere" / "model"))
    (moved / "figures.json").write_text("{}")
    (tmp_path / "elsewhere" / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path / "elsewhere")
    flags = {"output_dir": "../out", "cache_dir": "cache", "resume": "newest"}
    output = run_stage("contrastive", "link", "out", **flags)
    assert (output / "config.json").exists()


@pytest.mark.parametrize(
    "file, content",
    [
        pytest.param("tokenizer_config.json", b" ", id="tokenizer"),
        pytest.param("model.safetensors", b"\0", id="weights"),
        pytest.param("config_sentence_transformers.json", b"{}", id="settings"),
    ],
)
def test_a_changed_model_is_refused_and_its_file_named(
    file, content, tiny_llama_dir, run_stage, stopped, tmp_path
):
    stopped()
    other = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    with (other / file).open("ab") as opened:
        opened.write(content)
    with pytest.raises(InputError, match=f"content of --model_name_or_path differs: {file}"):
        run_stage("contrastive", other, "out", resume="newest")


def test_of_a_model_from_scratch_weights_do_not_matter(
    tiny_llama_dir, run_stage, stopped, tmp_path
):
    stopped(from_scratch=True)
    other = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    (other / "model.safetensors").unlink()
    run_stage("contrastive", other, "out", resume="newest", from_scratch=True)


def test_another_arithmetic_is_said_and_goes_on(tiny_llama_dir, run_stage, stopped, monkeypatch):
    """As where a cluster gives the run another kind of machine, or it was updated meanwhile."""
    stopped()
    now = arithmetic(torch.device("cpu"))
    other = {**now, "threads": "64", "torch": "3.0"}
    monkeypatch.setattr("rankpo_fast.train.resume.arithmetic", lambda device: other)
    expected = f"threads was {now['threads']}, is 64; torch was {now['torch']}, is 3.0: sums"
    with pytest.warns(UserWarning, match=re.escape(expected)):
        run_stage("contrastive", tiny_llama_dir, "out", resume="newest")


def test_all_that_changes_bits_is_recorded(tiny_llama_dir, run_stage, stopped, tmp_path):
    stopped()
    recorded = json.loads((tmp_path / "out/training.json").read_text())["settings"]["arithmetic"]
    assert set(recorded) == {
        "threads", "instruction set of torch", "losses", "native library", "torch",
        "transformers", "rankpo-fast",
    }  # fmt: skip


def test_a_record_with_names_of_models_is_explained(tiny_llama_dir, run_stage, stopped, tmp_path):
    stopped()
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    record["settings"]["--model_name_or_path"] = str(tiny_llama_dir)
    (tmp_path / "out" / "training.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="an earlier version wrote it"):
        run_stage("contrastive", tiny_llama_dir, "out", resume="newest")


def test_a_run_goes_on_in_the_precision_it_was_begun_in(
    stopped, tiny_llama_dir, run_stage, monkeypatch, capsys
):
    """Whatever the CPU is measured to be faster in the next time."""
    monkeypatch.setattr(Precision, "of", lambda *_: Precision(False, "bf16 products took longer"))
    stopped(bf16="auto")
    assert "fp32 (bf16 products took" in capsys.readouterr().err
    monkeypatch.setattr(Precision, "of", lambda *_: Precision(True, "measured otherwise"))
    output = run_stage("contrastive", tiny_llama_dir, "out", resume="newest", bf16="auto")
    assert "fp32 (as the run that goes on had it)" in capsys.readouterr().err
    assert json.loads((output / "training.json").read_text())["settings"]["--bf16"] is False


def test_all_ranks_compute_in_what_the_first_one_chose():
    others = SimpleNamespace(first=False, objects=lambda own: [Precision(True, "its GPU"), own])
    chosen = shared_precision(ModelConfig("m"), TrainingConfig("out"), others)
    assert chosen == Precision(True, "its GPU")


def test_ctrl_c_saves_and_exits_130(tiny_llama_dir, run_stage, stop_after, capsys, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, as behind a &
    stop_after(3, signal.SIGINT)
    with pytest.raises(TrainingStopped) as stop:
        run_stage("contrastive", tiny_llama_dir, "out")
    assert stop.value.exit_code == 130
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    assert "stopped by SIGINT after step 3" in capsys.readouterr().err
    assert checkpoints.newest(tmp_path / "out" / "checkpoints").step == 3


def test_second_ctrl_c_interrupts_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "steps, left",
    [
        pytest.param(4, "checkpoints/step-00000002", id="on-the-way"),
        pytest.param(2, "config.json", id="the-last-one"),
    ],
)
def test_sigterm_in_an_evaluation_is_honoured_after_it(
    steps, left, tiny_llama_dir, run_stage, preference_file, monkeypatch, tmp_path, read_metrics
):
    def evaluate(*_, **__):
        signal.raise_signal(signal.SIGTERM)
        return Evaluation({"alignment": 0.5})

    monkeypatch.setattr("rankpo_fast.train.loop.measure", evaluate)
    flags = {"max_steps": steps, "eval_steps": 2, "preference_data": [preference_file]}
    with pytest.raises(TrainingStopped) as stop:
        run_stage("rankpo", tiny_llama_dir, "out", **flags)
    assert stop.value.exit_code == 143
    assert (tmp_path / "out" / left).exists()
    assert read_metrics(tmp_path / "out")[-1] == {"step": 2, "eval/alignment": 0.5}


def test_finished_run_and_one_without_checkpoints_refuse_other_settings(tiny_llama_dir, run_stage):
    output = run_stage("contrastive", tiny_llama_dir, "out", max_steps=1)
    for _ in ("finished", "unfinished"):
        with pytest.raises(InputError, match="--learning_rate was 0.003, is 1.0"):
            run_stage("contrastive", tiny_llama_dir, "out", resume="newest", learning_rate=1.0)
        with pytest.raises(InputError, match="stage was contrastive, is rankpo"):
            run_stage("rankpo", tiny_llama_dir, "out", resume="newest")
        (output / "config.json").unlink(missing_ok=True)


def test_damaged_lines_of_metrics_are_dropped(
    stopped, tiny_llama_dir, run_stage, read_metrics, tmp_path
):
    stopped()
    with (tmp_path / "out" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1, \n\xff\n[1]\n{"step": 2')
    with pytest.warns(UserWarning, match="dropped damaged lines, 4 of them"):
        output = run_stage("contrastive", tiny_llama_dir, "out", resume="newest")
    assert [line["step"] for line in read_metrics(output)] == [1, 2, 3, 4, 5, 6]


def test_how_activations_are_kept_may_change_but_chunks_may_not(
    stopped, tiny_llama_dir, run_stage, monkeypatch
):
    """Chunks change how products round. (Nothing is offloaded here, without a GPU.)"""
    stopped()
    for check in ("check_offload", "set_offload"):
        monkeypatch.setattr(f"rankpo_fast.train.prepare.{check}", lambda *given: None)
    flags = {"resume": "newest", "gradient_checkpointing": "selective"}
    with pytest.raises(InputError, match="--mlp_chunk was None, is 64"):
        run_stage("contrastive", tiny_llama_dir, "out", mlp_chunk=64, resume="newest")
    with pytest.raises(InputError, match=r"--offload was \[\], is \['optimizer'\]"):
        run_stage("contrastive", tiny_llama_dir, "out", offload=["optimizer"], **flags)
    run_stage("contrastive", tiny_llama_dir, "out", offload=["activations"], **flags)


def test_logging_may_change(stopped, tiny_llama_dir, run_stage, read_metrics):
    stopped()
    output = run_stage("contrastive", tiny_llama_dir, "out", resume="newest", logging_steps=3)
    assert [line["step"] for line in read_metrics(output)] == [1, 2, 3, 6]


def test_a_run_without_a_checkpoint_starts_from_the_beginning(
    stopped, tiny_llama_dir, run_stage, capsys, tmp_path
):
    stopped()
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    output = run_stage("contrastive", tiny_llama_dir, "out", resume="newest")
    assert (output / "config.json").exists()
    assert "starting from the beginning" in capsys.readouterr().err


def test_where_no_run_is_none_is_resumed(tiny_llama_dir, run_stage):
    """Not even by a name that is mistyped."""
    with pytest.raises(InputError, match="--resume: there is no run in .*out; --auto_resume"):
        run_stage("contrastive", tiny_llama_dir, "out", resume="newest")


def test_finished_run_is_left_as_it_is(tiny_llama_dir, run_stage, capsys):
    output = run_stage("contrastive", tiny_llama_dir, "out")
    before = (output / "model.safetensors").stat().st_mtime_ns
    assert run_stage("contrastive", tiny_llama_dir, "out", resume="newest") == output
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    said = capsys.readouterr().err
    assert "finished" in said and "no complete checkpoint" not in said


def test_an_evaluation_that_a_finished_run_lacks_is_said(
    tiny_llama_dir, run_stage, preference_file, capsys
):
    asked = {"preference_data": [preference_file], "max_steps": 1}
    for name, flags, lacks in (("without", {"max_steps": 1}, True), ("with", asked, False)):
        run_stage("contrastive", tiny_llama_dir, name, **flags)
        run_stage("contrastive", tiny_llama_dir, name, resume="newest", **asked)
        assert ("nothing to resume but for its evaluation" in capsys.readouterr().err) == lacks


def test_a_finished_model_that_lost_a_file_is_made_anew(tiny_llama_dir, run_stage):
    output = run_stage("contrastive", tiny_llama_dir, "out", save_steps=6)
    before = (output / "model.safetensors").read_bytes()
    (output / "model.safetensors").unlink()
    run_stage("contrastive", tiny_llama_dir, "out", save_steps=6, resume="newest")
    assert (output / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("keep", [2, 0], ids=["two", "all"])
def test_only_the_newest_checkpoints_are_kept(keep, tiny_llama_dir, run_stage):
    output = run_stage(
        "contrastive", tiny_llama_dir, "out", save_steps=1, save_total_limit=keep, max_steps=4
    )
    names = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert names == [f"step-0000000{step}" for step in range(1, 5)][-keep:]


def test_a_run_that_goes_on_reads_no_checkpoint_but_its_own(
    stopped, tiny_llama_dir, run_stage, monkeypatch
):
    """Of as many as are kept: to hash gigabytes of another would be work for nothing."""
    stopped()
    seen, read = [], checkpoints.read
    monkeypatch.setattr(checkpoints, "read", lambda path: seen.append(path.name) or read(path))
    monkeypatch.setattr(checkpoints, "_verified", {})  # as in another process
    run_stage("contrastive", tiny_llama_dir, "out", resume="newest", save_steps=2)
    assert set(seen) == {"step-00000003"}


# --- the files themselves ---


@pytest.fixture
def two_checkpoints(tmp_path):
    """Checkpoints of steps 1 and 2 of a tiny model with tied weights and a buffer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    optimizer = Optimizer([torch.optim.AdamW(model.parameters(), fused=True)])
    for step in (1, 2):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.update([torch.zeros(())], 1e-3, 0.0)
        checkpoints.save(tmp_path, checkpoints.state_of(step, model, optimizer, {"--seed": 0}, 64))
    return tmp_path, model, optimizer


def test_everything_comes_back(two_checkpoints):
    directory, model, optimizer = two_checkpoints
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {p: optimizer.state_of(p)["exp_avg"].clone() for p in optimizer.parameters}
    drawn = torch.rand(3)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    newest = checkpoints.newest(directory)
    fresh = Optimizer([torch.optim.AdamW(model.parameters(), fused=True)])
    checkpoints.restore(newest, model, fresh)
    assert (newest.step, newest.settings) == (2, {"--seed": 0})
    assert all(torch.equal(expected[n], value) for n, value in model.state_dict().items())
    assert all(torch.equal(moments[p], fresh.state_of(p)["exp_avg"]) for p in moments)
    assert fresh.updates == 2
    assert torch.equal(torch.rand(3), drawn)


def flip_a_bit(path):
    content = bytearray((path / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "weights.safetensors").write_bytes(content)


def truncate(path):
    with (path / "optimizer.safetensors").open("r+b") as file:
        file.truncate(10)


def rewrite(path, name, content):
    """A file that the manifest vouches for, whatever is in it."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[name] = hashlib.sha256(content).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        truncate,
        lambda path: (path / "random.safetensors").unlink(),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text("[]"),
        lambda path: (path / "manifest.json").write_text('{"weights.safetensors": '),
        lambda path: rewrite(path, "weights.safetensors", b"\xff" * 64),
        lambda path: rewrite(path, "optimizer.safetensors", b""),
        lambda path: rewrite(path, "state.json", b'{"step": 2, "settings": 3, "max_tokens": 1}'),
    ],
    ids=["flipped-bit", "truncated", "file-gone", "manifest-gone", "no-manifest", "half-manifest",
         "no-tensors", "empty", "no-settings"],
)  # fmt: skip
def test_broken_checkpoint_is_passed_over_and_refused_by_name(damage, two_checkpoints):
    directory, *_ = two_checkpoints
    broken = directory / "step-00000002"
    damage(broken)
    with pytest.warns(UserWarning, match="skipped a broken checkpoint: .*step-00000002"):
        assert checkpoints.newest(directory).step == 1
    with pytest.raises(InputError, match="step-00000002"):
        checkpoints.read(broken)


@pytest.mark.parametrize(
    "name, change, named",
    [
        ("weights", {"0.bias": torch.zeros(4)}, "0.bias is of shape .4,., should be of shape .3,."),
        ("weights", {"more": torch.zeros(1)}, "more is of shape .1,., should be not there"),
        ("optimizer", {"0.bias/exp_avg": torch.zeros(2)}, "0.bias/exp_avg is of shape .2,."),
        ("optimizer", {"more/step": torch.zeros(())}, "more/step is of shape .., should be not"),
        ("random", {"0/torch": torch.zeros(5, dtype=torch.uint8)}, "torch is of shape .5,."),
    ],
)
def test_tensors_of_another_model_are_named_and_nothing_is_restored(
    name, change, named, two_checkpoints
):
    directory, model, optimizer = two_checkpoints
    path = directory / "step-00000002"
    tensors = load_file(path / f"{name}.safetensors") | change
    rewrite(path, f"{name}.safetensors", safetensors.torch.save(tensors))
    before = {key: value.clone().zero_() for key, value in model.state_dict().items()}
    model.load_state_dict(before)
    with pytest.raises(InputError, match=f"{name}.safetensors: {named}"):
        checkpoints.restore(checkpoints.read(path), model, optimizer)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_state_without_random_numbers_is_named(two_checkpoints):
    directory, model, optimizer = two_checkpoints
    state = {"step": 2, "settings": {}, "max_tokens": 1, "random": [{"python": [3, [1], None]}]}
    rewrite(directory / "step-00000002", "state.json", json.dumps(state).encode())
    with pytest.raises(InputError, match="state.json: no random states"):
        checkpoints.restore(checkpoints.newest(directory), model, optimizer)


def test_a_disk_that_refuses_is_an_os_error(two_checkpoints):
    """safetensors has an error of its own for it, which nobody expects from a full disk."""
    directory, model, optimizer = two_checkpoints
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="weights.safetensors: .*File too large"):
            checkpoints.save(
                directory, checkpoints.state_of(3, nn.Linear(50, 50), optimizer, {}, 64)
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.newest(directory).step == 2


def test_broken_checkpoint_is_replaced_when_its_step_comes_again(two_checkpoints):
    directory, model, optimizer = two_checkpoints
    flip_a_bit(directory / "step-00000002")
    checkpoints.save(directory, checkpoints.state_of(2, model, optimizer, {}, 64))
    assert checkpoints.newest(directory).step == 2


@pytest.mark.parametrize("keep, left", [(1, "4"), (2, "1234"), (3, "1234")])
@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_no_good_checkpoint_is_deleted_for_a_bad_one(damage, keep, left, two_checkpoints):
    """Of 1 to 4, 2 and 3 are damaged: what was damaged counts for nothing among those kept."""
    directory, model, optimizer = two_checkpoints
    checkpoints.save(directory, checkpoints.state_of(3, model, optimizer, {}, 64))
    for step in (2, 3):
        damage(directory / f"step-0000000{step}")
    checkpoints.save(directory, checkpoints.state_of(4, model, optimizer, {}, 64), keep=keep)
    there = "".join(sorted(path.name[-1] for path in directory.iterdir()))
    assert there == left


def test_a_run_that_goes_back_deletes_no_later_checkpoint(two_checkpoints):
    directory, model, optimizer = two_checkpoints
    for step in (4, 5):
        checkpoints.save(directory, checkpoints.state_of(step, model, optimizer, {}, 64))
    checkpoints.save(directory, checkpoints.state_of(3, model, optimizer, {}, 64), keep=1)
    assert sorted(path.name[-1] for path in directory.iterdir()) == ["3", "4", "5"]


def test_of_a_linked_checkpoint_the_link_alone_is_deleted(two_checkpoints, tmp_path_factory):
    directory, model, optimizer = two_checkpoints
    outside = tmp_path_factory.mktemp("outside") / "kept"
    for step, again, keep in ((2, 2, None), (1, 3, 1)):  # written once more, and dropped
        link = directory / f"step-0000000{step}"
        kept = outside / str(step)
        shutil.copytree(link, kept)
        shutil.rmtree(link)
        link.symlink_to(kept)
        checkpoints.save(
            directory, checkpoints.state_of(again, model, optimizer, {}, 64), keep=keep
        )
        assert len(list(kept.iterdir())) == 5
    assert not any(path.is_symlink() for path in directory.iterdir())


def test_later_ones_do_not_count_as_kept(two_checkpoints):
    """Of a run that went back, since they are broken: what it saves then is the newest."""
    directory, model, optimizer = two_checkpoints
    for step in (7, 8):
        (directory / f"step-0000000{step}").mkdir()
        (directory / f"step-0000000{step}" / "manifest.json").touch()
    checkpoints.save(directory, checkpoints.state_of(3, model, optimizer, {}, 64), keep=2)
    assert sorted(path.name[-1] for path in directory.iterdir()) == ["2", "3", "7", "8"]
    with pytest.warns(UserWarning, match="skipped a broken checkpoint"):
        assert checkpoints.newest(directory).step == 3


def test_a_crash_while_saving_leaves_what_was_there(two_checkpoints, monkeypatch):
    directory, model, optimizer = two_checkpoints

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_tensors", disk_full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(directory, checkpoints.state_of(3, model, optimizer, {}, 64))
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["step-00000001", "step-00000002"]


def test_what_a_killed_run_left_is_cleared(two_checkpoints):
    directory, model, optimizer = two_checkpoints
    for step in (3, 5):
        shutil.copytree(directory / "step-00000002", directory / f".step-0000000{step}.tmp")
    assert checkpoints.newest(directory).step == 2
    checkpoints.save(directory, checkpoints.state_of(3, model, optimizer, {}, 64))
    assert not list(directory.glob(".*"))


def test_no_checkpoint_file_can_run_code(two_checkpoints):
    directory, *_ = two_checkpoints
    kinds = {path.suffix for path in (directory / "step-00000002").iterdir()}
    assert kinds == {".safetensors", ".json"}


@pytest.mark.long
def test_sigterm_finishes_the_step_saves_and_exits_143(
    tiny_llama_dir, contrastive_file, run_stage, tmp_path
):
    """Meanwhile no other run may use its directory, and none takes anything away."""
    output = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "rankpo_fast.cli", "contrastive"),
        *("--model_name_or_path", str(tiny_llama_dir), "--train_data", contrastive_file),
        *("--output_dir", str(output), "--cache_dir", str(tmp_path / "cache")),
        *("--max_steps", "1000000", "--logging_steps", "1", "--device", "cpu"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        metrics = output / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        for flags in ({"overwrite_output_dir": True}, {"resume": "newest"}):
            with pytest.raises(InputError, match=f"in use by process {process.pid}"):
                run_stage("contrastive", "no/such-model", "out", **flags)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "stopped by SIGTERM after step" in said
    checkpoint = checkpoints.newest(output / "checkpoints")
    assert checkpoint.step == json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert not (output / "config.json").exists()
