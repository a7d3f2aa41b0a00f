"""Ranks that train, as torchrun starts them, but forked from a process that has imported all.

What a function returns, says on stderr and exits with comes back from every rank; none may hang.
"""

import contextlib
import functools
import itertools
import math
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import peft
import torch
import torch.distributed as dist
import transformers.models.bert.modeling_bert
import transformers.models.llama.modeling_llama  # noqa: F401  (so that a fork has them)
from torch import nn
from torch.distributed.tensor import DTensor

from rankpo_fast import cli
from rankpo_fast.config import ComputeConfig
from rankpo_fast.data.packing import one_token
from rankpo_fast.errors import InputError, TrainingStopped
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.load import META, load_encoder
from rankpo_fast.model.vocabulary import trim_vocabulary
from rankpo_fast.ops import ranks
from rankpo_fast.plan.counter import Meter
from rankpo_fast.ranks import Ranks
from rankpo_fast.train import checkpoint, contrastive, output, prepare, step
from rankpo_fast.train.engine import Replicated, Sharded
from rankpo_fast.train.log import MetricsLog
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.optim import Optimizer
from support import stages

SECONDS = 60  # that ranks may take to end


class Ended(NamedTuple):
    code: int  # of the exit; -15 after a SIGTERM that nothing caught
    said: str
    answer: Any


@dataclass(frozen=True)
class Started:
    """Ranks at work."""

    processes: list[multiprocessing.Process]
    directory: Path

    def ended(self, frozen: int | None = None) -> list[Ended]:
        """Of each rank, once all have ended; TimeoutError if one does not, but for a frozen one,
        which is killed then."""
        end = time.monotonic() + SECONDS
        for rank, process in enumerate(self.processes):
            if rank != frozen:
                process.join(max(0, end - time.monotonic()))
        if frozen is not None:
            self.processes[frozen].kill()
            self.processes[frozen].join()
        hanging = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for process in self.processes:
            process.kill()
        results = []
        for rank, process in enumerate(self.processes):
            answer = self.directory / f"answer-{rank}"
            of_rank = torch.load(answer) if answer.exists() else None
            said = (self.directory / f"said-{rank}").read_text()
            results.append(Ended(process.exitcode, said, of_rank))
        if hanging:
            raise TimeoutError(f"ranks {hanging} hang: {results}")
        return results


def start(size: int, directory: Path, function: Callable, *args: Any, **options: Any) -> Started:
    """Have `size` ranks call the function; `directory` is for what they leave."""
    directory.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    processes = []
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        for rank in range(size):
            of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
            of_rank = {name: str(value) for name, value in of_rank.items()}
            target = (of_rank, directory, function, args, options)
            processes.append(context.Process(target=_be, args=target, daemon=True))
            processes[-1].start()
    return Started(processes, directory)


def _be(environment, directory, function, args, options) -> None:
    os.environ |= environment | {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    with open(directory / f"said-{environment['RANK']}", "w") as said:
        os.dup2(said.fileno(), 2)
    answer = function(*args, **options)
    torch.save(answer, directory / f"answer-{environment['RANK']}")


# --- what they do ---


class Steps:
    """A context manager: fp64, and optimizer steps as plain gradient descent, so that rounding
    stays small, where AdamW divides by it; what they got, and what travelled for them.

    Vectors are rounded to fp32 as ever, but `wide`: losses see them in fp64.
    """

    def __init__(self, wide):
        self._wide = wide
        self.gradients: list[dict[int, torch.Tensor]] = []  # by number of the parameter
        self.losses: list[list[float]] = []
        self.reductions: list[int] = []  # of gradients, until then

    def __enter__(self):
        self._count = 0
        self._patches = contextlib.ExitStack()
        put = self._patches.enter_context
        load = prepare.load_encoder
        put(mock.patch.object(prepare, "load_encoder", lambda *a, **k: load(*a, **k).double()))
        put(mock.patch.object(Encoder, "forward", self._widened(Encoder.forward)))
        put(mock.patch.object(Optimizer, "update", lambda *args: self._update(*args)))
        put(mock.patch.object(dist, "all_reduce", self._counted(dist.all_reduce)))
        return self

    def __exit__(self, *error):
        self._patches.close()

    def _widened(self, forward):
        def widened(encoder, batch):
            vectors = forward(encoder, batch)
            return vectors.double() if self._wide and encoder.training else vectors

        return widened

    def _counted(self, all_reduce):
        def counted(tensor, *args, **kwargs):
            self._count += tensor.is_floating_point() and tensor.numel() > 1000
            return all_reduce(tensor, *args, **kwargs)

        return counted

    def _update(self, optimizer, losses, rate, max_norm):
        parameters = optimizer.parameters
        gradients = {i: p.grad for i, p in enumerate(parameters) if p.grad is not None}
        # Engines keep the memory of gradients for the next step's.
        wholes = {i: whole(gradient).clone() for i, gradient in gradients.items()}
        self.gradients.append(wholes)
        self.losses.append([loss.item() for loss in losses])
        self.reductions.append(self._count)
        with torch.no_grad():
            for i, gradient in gradients.items():
                parameters[i] -= 1e-3 * gradient
        optimizer.zero_grad()
        return nn.utils.get_total_norm(list(wholes.values()))


def whole(tensor):
    """Of what lies in parts on several ranks all; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def descend(stage, wide=True, **flags):
    """(gradients, losses, reductions so far) of every step."""
    with Steps(wide) as steps:
        stages.run(stage, **flags)
    return steps.gradients, steps.losses, steps.reductions


def weights(stage, lora=False, **flags):
    """Those that the first rank saves, of a training in fp64."""
    saved = {}
    load = prepare.load_encoder

    def loaded(*args, **options):
        encoder = load(*args, **options).double()
        if lora:
            config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"])
            torch.manual_seed(0)
            peft.inject_adapter_in_model(config, encoder.backbone)
            encoder.double()
        if dist.is_initialized() and dist.get_rank() > 0:  # those of the first are everybody's
            with torch.no_grad():
                for parameter in encoder.parameters():
                    parameter.mul_(1 + dist.get_rank())
        return encoder

    def save(path, encoder, card):
        saved.update({name: x.clone() for name, x in encoder.backbone.state_dict().items()})

    with contextlib.ExitStack() as patches:
        put = patches.enter_context
        put(mock.patch.object(prepare, "load_encoder", loaded))
        put(mock.patch.object(Encoder, "forward", Steps(True)._widened(Encoder.forward)))
        put(mock.patch.object(output, "save_model", save))
        stages.run(stage, **flags)
    return saved


def both(stages):
    """One training after the other."""
    for flags in stages:
        train(**flags)


def refused(stage, **flags):
    """What the error says, and whether it is another's."""
    try:
        stages.run(stage, **flags)
    except InputError as error:
        return str(error), error.copied


def train(stage, stop=None, **flags):
    """`stop`: SIGTERM comes to the last rank in that step."""
    say = MetricsLog.step

    def said(self, done, *args):
        say(self, done, *args)
        if done == stop and dist.get_rank() == dist.get_world_size() - 1:
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(MetricsLog, "step", said):
        try:
            stages.run(stage, **flags)
        except TrainingStopped as stopped:
            sys.exit(stopped.exit_code)


def train_on_a_slow_disk(stage, **flags):
    """It has the checkpoint of step 3 once step 5 is done; without --background_saves at once."""
    save, step, later = checkpoint.save, MetricsLog.step, threading.Event()

    def stepped(self, done, *args):
        step(self, done, *args)
        if done == 5:
            later.set()

    def slow(directory, state, **more):
        if state.step == 3 and flags["background_saves"]:
            assert later.wait(SECONDS / 2)
        return save(directory, state, **more)

    with (
        mock.patch.object(MetricsLog, "step", stepped),
        mock.patch.object(checkpoint, "save", slow),
    ):
        stages.run(stage, **flags)


def arguments(flags, *more):
    """Those of `flags` on the command line."""
    given = {"--device": "cpu", "--logging_steps": 1, "--per_device_train_batch_size": 8}
    given |= {f"--{name}": value for name, value in flags.items() if name != "stage"}
    words = [
        word
        for name, value in given.items()
        for word in (name, *(value if isinstance(value, list) else [value]))
    ]
    return [flags["stage"], *(str(word) for word in words if word is not None), *more]


def command(*flags):
    """The command line."""
    sys.exit(cli.main(list(flags)))


def _opened():
    """A list of the files that this process' Python opens from now on."""
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    return opened


def files_opened(*flags):
    """For the command line."""
    opened = _opened()
    assert cli.main(list(flags)) == 0
    return opened


def command_with_nan(*flags):
    """It comes up in the last rank's part of the loss."""
    compute = contrastive.info_nce_loss_and_grads

    def loss(*args, **kwargs):
        loss, *others = compute(*args, **kwargs)
        last = dist.get_rank() == dist.get_world_size() - 1
        return loss * (math.nan if last else 1), *others

    with mock.patch.object(contrastive, "info_nce_loss_and_grads", loss):
        command(*flags)


def command_on_a_full_disk(saving, *flags):
    """As the first rank finds it when it calls the function `saving`."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    with mock.patch(saving, fail):
        command(*flags)


def command_with_own(own, *flags):
    """The last rank has more flags than the others."""
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    command(*flags, *(own if last else []))


def train_out_of_memory(stage, stop=None, **flags):
    """The second batch fails on the last rank, on the first, on the second, each time further on
    and with the work done."""
    losses = itertools.count(1)
    compute, vectors = contrastive.info_nce_loss_and_grads, step.CachedVectors
    through = Replicated.backward
    rank, done = int(os.environ["RANK"]), [0]

    def loss(*args, **kwargs):
        done[0] = next(losses)
        return compute(*args, **kwargs)

    def backward(engine, *args, last):
        through(engine, *args, last=last)
        if rank == 1 and done[0] == 5 and not last:  # of the third try; the fourth has more
            raise torch.OutOfMemoryError("CUDA out of memory, as it were")

    with contextlib.ExitStack() as patches:
        put = patches.enter_context
        loss = _failing(loss, 3) if rank == 0 else loss
        put(mock.patch.object(contrastive, "info_nce_loss_and_grads", loss))
        put(mock.patch.object(Replicated, "backward", backward))
        if rank == 2:
            put(mock.patch.object(step, "CachedVectors", _failing(vectors, 2)))
        train(stage, stop, **flags)


def _failing(function, at):
    calls = itertools.count(1)

    def failing(*args, **kwargs):
        result = function(*args, **kwargs)
        if next(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory, as it were")
        return result

    return failing


def command_out_of_memory_in_a_pass(*flags):
    """Of the last rank, in the third step, while others wait for what it has in the pass."""
    forward, passes = Sharded.backward, itertools.count(1)
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)

    def backward(*args, **kwargs):
        if last and next(passes) == 4:  # the first is of the start
            raise torch.OutOfMemoryError("CUDA out of memory, as it were")
        forward(*args, **kwargs)

    with mock.patch.object(Sharded, "backward", backward):
        command(*flags)


def command_killed(*flags):
    """The last rank, in the midst of the third step."""
    vectors, calls = step.CachedVectors, itertools.count(1)
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)

    def killed(*args, **kwargs):
        if last and next(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return vectors(*args, **kwargs)

    with mock.patch.object(step, "CachedVectors", killed):
        command(*flags)


def command_frozen(frozen, place, *flags):
    """A rank, in the third call of the function `place`, SIGSTOP."""
    module, name = place.rsplit(".", 1)
    function, calls = getattr(pkgutil.resolve_name(module), name), itertools.count(1)

    def freezing(*args, **kwargs):
        if int(os.environ["RANK"]) == frozen and next(calls) == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        return function(*args, **kwargs)

    with mock.patch(place, freezing):
        command(*flags)


def command_out_of_memory(*flags):
    """Of the last rank, whatever the step does."""
    vectors = step.CachedVectors

    def fail(*args, **kwargs):
        if dist.get_rank() == dist.get_world_size() - 1:
            raise torch.OutOfMemoryError("out of memory")
        return vectors(*args, **kwargs)

    with mock.patch.object(step, "CachedVectors", fail):
        command(*flags)


def connected(stage, **flags):
    """The collectives that the devices' group had been used for when memory was measured."""
    with contextlib.ExitStack() as patches:
        spies = {
            name: patches.enter_context(mock.patch.object(owner, name, wraps=getattr(owner, name)))
            for owner, name in [
                (dist, "all_reduce"),
                (dist, "all_to_all_single"),
                (ranks, "_all_gather"),
            ]
        }
        used, measure = set(), Memory.measure

        def measured(*args):
            for name, spy in spies.items():
                if any(call.kwargs["group"] is dist.group.WORLD for call in spy.mock_calls):
                    used.add(name)
            return measure(*args)

        patches.enter_context(mock.patch.object(Memory, "measure", measured))
        stages.run(stage, **flags)
    return used


def _noted(most, meter, waiting):
    most.append(max(meter.peaks.values()))
    waiting()


def in_parts(*configs, trimmed=()):
    """Of each encoder, loaded for --shard full: `read`, the weights that this rank has from files;
    `weights` as they come to all; `most`, bytes that lived at once until then; `own`, its parts'.
    """
    cpu, answers = torch.device("cpu"), []
    with Ranks.joined(ComputeConfig(device="cpu")) as ranks:
        for config in configs:
            encoder = load_encoder(config, device=cpu, weights=cpu if ranks.first else META)
            if trimmed:
                trim_vocabulary(encoder, trimmed, trimmed)
            state = encoder.backbone.state_dict().items()
            read = {name: x.clone() for name, x in state if not x.is_meta}
            micro_batch = one_token(encoder.tokenize_passages(["a nurse"]))
            most: list[int] = []
            with Meter() as meter:
                encoder.waiting = functools.partial(_noted, most, meter, encoder.waiting)
                Sharded(encoder, replace(ranks, lockstep=True), "full", micro_batch)
            parts = encoder.backbone.state_dict()
            own = sum(getattr(x, "_local_tensor", x).nbytes for x in parts.values())
            weights = {name: whole(x) for name, x in parts.items()}
            answers.append({"read": read, "weights": weights, "most": most[0], "own": own})
    return answers


def _two_nodes():
    """In a place of its own for each half of the ranks."""
    half = int(os.environ["RANK"]) * 2 // int(os.environ["WORLD_SIZE"])
    return mock.patch("rankpo_fast.ranks._node", lambda: (f"node {half}", ""))


def on_two_nodes(stage, **flags):
    """How often the rank has read rows, which files it has opened, whether its token ids lie in a
    file without a name, how many texts it has, and its gradients."""
    answer = {"opened": _opened()}
    read, trained = mock.Mock(wraps=contrastive.read_contrastive), contrastive.train

    def noted(run, encoder, tasks, *args):
        [task] = tasks
        start = task.texts.table.ids.data_ptr()
        answer["mapped"] = any(
            int(begin, 16) <= start < int(end, 16)
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith("(deleted)")
            for begin, end in [line.split()[0].split("-")]
        )
        answer["texts"] = len(task.data.query_texts) + len(task.data.passage_texts)
        return trained(run, encoder, tasks, *args)

    with contextlib.ExitStack() as patches:
        patches.enter_context(_two_nodes())
        patches.enter_context(mock.patch.object(contrastive, "read_contrastive", read))
        patches.enter_context(mock.patch.object(contrastive, "train", noted))
        gradients, *_ = descend(stage, **flags)
    return answer | {"reads": read.call_count, "gradients": gradients}


def refused_on_two_nodes(reader, stage, **flags):
    """The rank `reader` finds no rows."""

    def missing(*_):
        raise InputError("rows are not there")

    rank = int(os.environ["RANK"])
    read = missing if rank == reader else contrastive.read_contrastive
    with _two_nodes(), mock.patch.object(contrastive, "read_contrastive", read):
        said, copied = refused(stage, **flags)
    return [said, bool(copied)]
