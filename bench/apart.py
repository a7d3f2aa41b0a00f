"""A process for each implementation: its memory is its own, and if it dies, only it does."""

import functools
import gc
import multiprocessing
import os
import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

from .measure import noting, status_bytes
from .questions import OUT_OF_MEMORY

# Whether there is a GPU is then asked without touching it: a process forked from one that has
# touched it could not use it.
UNTOUCHED = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
ANSWER_S, END_S = 1200, 20  # that an answer may take, and a process's end after its last one
Answers = Callable[..., Iterator[Any]]


def in_a_process(function: Callable[..., Any], *arguments: Any, memory: int | None = None) -> Any:
    """What the function returns there, or a note, a str, of what stopped it."""
    once = functools.partial(_once, function)
    answers, note = answers_of_a_process(once, *arguments, memory=memory)
    return answers[0] if answers else note


def answers_of_a_process(
    answers: Answers, *arguments: Any, memory: int | None = None
) -> tuple[Sequence[Any], str]:
    """What the generator yields there until it ends or something stops it, and a note of that.

    memory: the bytes that the process may have beyond those it begins with. A request for more
    fails there, as it would on a machine of that size.
    """
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what this process has of the GPU is not the other's
    context = server()
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, answers, arguments, memory))
    process.start()
    there.close()  # so that the process's end is the pipe's
    got, note = [], None
    try:
        while note is None:
            if not here.poll(ANSWER_S):
                process.kill()
                note = f"no answer within {ANSWER_S:g} s"
                break
            answer, note = here.recv()
            if note is None:
                got.append(answer)
    except EOFError:  # it has died
        process.join()
        note = OUT_OF_MEMORY if process.exitcode == -9 else f"exit code {process.exitcode}"
    finally:
        process.join(END_S)
        process.kill()
    return got, note


def answers_here(answers: Answers, *arguments: Any) -> tuple[Sequence[Any], str]:
    """The same in this process."""
    got: list[Any] = []
    notes: dict[str, str] = {}
    with noting("", notes):
        for answer in answers(*arguments):
            got.append(answer)
    return got, notes.get("", "")


def server() -> ForkServerContext:
    """Whose processes are forked from one that has imported all they need."""
    os.environ.update(UNTOUCHED)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preload"])
    return context


def _once(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    yield function(*arguments)


def _answer(pipe: Connection, answers: Answers, arguments: tuple, memory: int | None) -> None:
    """Sends (answer, None) of each, then (None, note)."""
    gc.freeze()  # what the server has imported: to go through it would copy it, at every peak
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, it is this one's turn
    if memory is not None:
        most = status_bytes("VmData") + memory
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    notes: dict[str, str] = {}
    with tempfile.TemporaryFile() as log:
        for stream in (1, 2):  # so that the table stays whole
            os.dup2(log.fileno(), stream)
        with noting("", notes):
            for answer in answers(*arguments):
                pipe.send((answer, None))
    pipe.send((None, notes.get("", "")))
