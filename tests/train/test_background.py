"""Checkpoints are written beside the training, and hold what they would if it had waited."""

import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rankpo_fast.data.files import tensor_bytes
from rankpo_fast.errors import TrainingStopped
from rankpo_fast.ranks import Ranks
from rankpo_fast.train import background
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train.callbacks import Callbacks
from rankpo_fast.train.checkpointer import Checkpointer
from rankpo_fast.train.log import MetricsLog
from rankpo_fast.train.optim import Optimizer
from support import rank_runs

EACH = {"save_steps": 3, "max_steps": 6}
PATIENCE = 20.0  # seconds, after which a test has failed


def tensors(output: Path) -> dict[str, bytes]:
    """All that checkpoints hold but the settings, in which two runs differ."""
    files = (output / "checkpoints").rglob("*.safetensors")
    return {
        f"{file.relative_to(output)}/{name}": bytes(tensor_bytes(tensor))
        for file in files
        for name, tensor in load_file(file).items()
    }


@pytest.fixture
def events(monkeypatch):
    """What happens in a training, in order: ("step", 3), ("saved", 3), ..."""
    order: list[tuple[str, int]] = []
    step, checkpoint = MetricsLog.step, Callbacks.checkpoint

    def stepped(self, done, *args):
        step(self, done, *args)
        order.append(("step", done))

    def saved(self, done, path):
        assert threading.current_thread() is threading.main_thread()
        assert checkpoints.read(path).step == done  # complete, when callbacks hear of it
        checkpoint(self, done, path)
        order.append(("saved", done))

    monkeypatch.setattr(MetricsLog, "step", stepped)
    monkeypatch.setattr(Callbacks, "checkpoint", saved)
    return order


@pytest.fixture
def slow_disk(monkeypatch, events):
    """The checkpoint of step 3 is on it once step 5 is done, or never will be."""
    save, over = checkpoints.save, threading.Event()

    def slow(directory, state, **more):
        end = time.monotonic() + PATIENCE
        while state.step == 3 and ("step", 5) not in events and not over.wait(0.001):
            assert time.monotonic() < end
        return save(directory, state, **more)

    monkeypatch.setattr(checkpoints, "save", slow)
    return over


def test_steps_go_on_while_a_checkpoint_is_written(slow_disk, events, tiny_llama_dir, run_stage):
    run_stage("contrastive", tiny_llama_dir, "out", **EACH)
    assert events.index(("step", 5)) < events.index(("saved", 3)) < events.index(("saved", 6))


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit"])
def test_it_holds_the_state_of_its_step(optim, slow_disk, tiny_llama_dir, run_stage):
    """Though two more steps were done before a byte of it was written."""
    of = {**EACH, "optim": optim}
    beside = run_stage("contrastive", tiny_llama_dir, "beside", **of)
    slow_disk.set()
    waiting = run_stage("contrastive", tiny_llama_dir, "waiting", background_saves=False, **of)
    assert tensors(beside) == tensors(waiting) != {}


@pytest.mark.long
def test_in_parts_too(tiny_llama_dir, contrastive_file, tmp_path):
    """All ranks write, and talk about it while they train."""
    of = {"stage": "contrastive", "model_name_or_path": str(tiny_llama_dir), "shard": "full",
          "train_data": [contrastive_file], "cache_dir": str(tmp_path / "cache")}  # fmt: skip
    for name in ("beside", "waiting"):
        of |= {"output_dir": str(tmp_path / name), "background_saves": name == "beside", **EACH}
        ended = rank_runs.start(
            2, tmp_path / f"{name}-ranks", rank_runs.train_on_a_slow_disk, **of
        ).ended()
        assert [rank.code for rank in ended] == [0, 0], ended
    beside, waiting = (tensors(tmp_path / name) for name in ("beside", "waiting"))
    assert beside == waiting != {}


def no_room(monkeypatch):
    monkeypatch.setattr(background, "host_room", lambda **_: 1000.0)


def no_pinned_memory(monkeypatch):
    def refuse(*_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(background.BlockingAsyncStager, "stage", refuse)


@pytest.mark.parametrize("host", [no_room, no_pinned_memory])
def test_without_room_for_a_copy_a_step_waits_and_that_is_said(
    host, events, monkeypatch, capsys, tiny_llama_dir, run_stage
):
    host(monkeypatch)
    save = checkpoints.save

    def slow(directory, state, **more):
        end = time.monotonic() + 0.3
        while ("step", state.step + 1) not in events and time.monotonic() < end:
            time.sleep(0.001)
        events.append(("written", state.step))
        return save(directory, state, **more)

    monkeypatch.setattr(checkpoints, "save", slow)
    run_stage("contrastive", tiny_llama_dir, "out", **EACH)
    assert events.index(("written", 3)) < events.index(("step", 4))
    assert capsys.readouterr().err.count("a host has no room for a copy") == 1


def test_a_gpu_s_copy_keeps_its_memory_for_the_next(monkeypatch):
    """Pinned memory takes long to get; here that of a host stands for it."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    copy = background.HostCopy(Ranks(torch.device("cuda")))

    def copied(model: nn.Module) -> int:
        optimizer = Optimizer([torch.optim.AdamW(model.parameters(), fused=True)])
        state = copy.of(checkpoints.state_of(1, model, optimizer, {}, 64))
        weight = state.tensors[checkpoints.WEIGHTS]["0.weight"]
        assert torch.equal(weight, model[0].weight)
        assert weight.data_ptr() != model[0].weight.data_ptr()
        return weight.data_ptr()

    model = nn.Sequential(nn.Linear(3, 3))
    first = copied(model)
    nn.init.ones_(model[0].weight)
    assert copied(model) == first


def test_where_another_rank_has_no_room_none_keeps_a_copy(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: emptied.append(1), raising=False)
    answers = iter([False, True])  # before the copy, and after it
    monkeypatch.setattr(background.HostCopy, "_anywhere", lambda *_: next(answers))
    copy = background.HostCopy(Ranks(torch.device("cuda")))
    model = nn.Sequential(nn.Linear(3, 3))
    optimizer = Optimizer([torch.optim.AdamW(model.parameters(), fused=True)])
    assert copy.of(checkpoints.state_of(1, model, optimizer, {}, 64)) is None
    assert copy.refused and copy._stager.state_dict_cache is None and emptied


@pytest.mark.parametrize(
    ("device", "taken"), [("cuda", [2]), ("cuda:1", [1]), ("cpu", [])], ids=["auto", "one", "cpu"]
)
def test_the_thread_works_on_the_gpu_of_the_run(device, taken, monkeypatch):
    """--device auto has no number, and torch.cuda.set_device refuses a device without one."""
    on = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", on.append, raising=False)
    assert background.begun(lambda: "written", torch.device(device)).result(PATIENCE) == "written"
    assert on == taken


def test_what_the_disk_refuses_is_in_the_lines_of_the_steps_that_went_on(
    monkeypatch, tiny_llama_dir, run_stage, read_metrics
):
    save, look = checkpoints.save, Checkpointer.look

    def refuse(directory, state, **more):
        if state.step == 2:
            raise OSError(28, "No space left on device")
        return save(directory, state, **more)

    def look_late(self):  # so that no chance decides which step hears of it
        if self._writing is not None:
            self._writing.exception()
        look(self)

    monkeypatch.setattr(checkpoints, "save", refuse)
    monkeypatch.setattr(Checkpointer, "look", look_late)
    output = run_stage("contrastive", tiny_llama_dir, "out", save_steps=2, max_steps=5)
    lines = read_metrics(output)
    assert [line.get("steps_not_saved") for line in lines] == [None, None, 3, 4, None]


def test_a_stop_tries_again_what_the_disk_refused(
    monkeypatch, stop_after, tiny_llama_dir, run_stage, tmp_path
):
    """Though it had been begun for the step after which the run stops."""
    save, refused = checkpoints.save, []

    def refuse_once(directory, state, **more):
        if not refused:
            refused.append(state.step)
            raise OSError(28, "No space left on device")
        return save(directory, state, **more)

    monkeypatch.setattr(checkpoints, "save", refuse_once)
    stop_after(2)
    with pytest.raises(TrainingStopped, match="step 2, which is saved"):
        run_stage("contrastive", tiny_llama_dir, "out", save_steps=2)
    assert refused == [2] and checkpoints.newest(tmp_path / "out/checkpoints").step == 2


def test_an_error_leaves_none_half_written(slow_disk, monkeypatch, tiny_llama_dir, run_stage,
                                           tmp_path):  # fmt: skip
    step = MetricsLog.step

    def fails(self, done, *args):
        step(self, done, *args)
        if done == 4:
            threading.Timer(0.2, slow_disk.set).start()
            raise ZeroDivisionError

    monkeypatch.setattr(MetricsLog, "step", fails)
    with pytest.raises(ZeroDivisionError):
        run_stage("contrastive", tiny_llama_dir, "out", **EACH)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000003"]
    assert checkpoints.newest(tmp_path / "out" / "checkpoints").step == 3
