"""Processes that are the ranks of a gloo group.

They start once, since each imports torch, and take one function after the other. What it returns or
raises comes back from every rank; none may hang.
"""

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120  # that any answer may take


@contextlib.contextmanager
def processes(size: int, directory: Path, method: str = "spawn") -> Iterator["Ranks"]:
    """The ranks, at work until the context ends."""
    # Any: typeshed knows the Process of each kind of context, not that of their base.
    context: Any = torch.multiprocessing.get_context(method)
    pipes = [context.Pipe() for _ in range(size)]
    ranks = [
        context.Process(target=_serve, args=(rank, size, directory / "meet", there), daemon=True)
        for rank, (_, there) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()

    try:
        yield Ranks([here for here, _ in pipes])
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


class Ranks:
    """Called with a function and its arguments they all call it; what each answers comes back, an
    exception too."""

    def __init__(self, pipes: Sequence[Connection]):
        self.pipes, self.size = pipes, len(pipes)

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments, options))
        answers, end = [], time.monotonic() + SECONDS
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0, end - time.monotonic())):
                raise TimeoutError(
                    f"rank {rank} of {self.size} gives no answer to {function.__name__}"
                )
            answers.append(pipe.recv())
        return answers


def _serve(rank: int, size: int, meet: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    patience = timedelta(seconds=SECONDS / 2)
    dist.init_process_group("gloo", f"file://{meet}", patience, rank=rank, world_size=size)
    while True:
        function, arguments, options = pipe.recv()
        try:
            answer = function(*arguments, **options)
        except Exception as failure:
            failure.add_note(traceback.format_exc())  # it would not come through the pipe
            answer = failure
        pipe.send(answer)


def answered(answers: list[Any]) -> list[Any]:
    """The ranks' answers, or the first exception among them, raised."""
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers
