"""Processes that are the ranks of a gloo group.

They start once, since each imports torch, and take one function after the other. What it returns or
raises comes back from every rank; none may hang.
"""

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120  # that any answer may take


@contextlib.contextmanager
def processes(
    size: int, directory: Path, method: str = "spawn"
) -> Iterator[Callable[..., list[Any]]]:
    """A function that has all ranks call one, and returns what each answers, an exception too."""
    context = torch.multiprocessing.get_context(method)
    pipes = [context.Pipe() for _ in range(size)]
    ranks = [
        context.Process(target=_serve, args=(rank, size, directory / "meet", there), daemon=True)
        for rank, (_, there) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()

    def ask(function, *arguments, **options):
        for here, _ in pipes:
            here.send((function, arguments, options))
        answers, end = [], time.monotonic() + SECONDS
        for rank, (here, _) in enumerate(pipes):
            if not here.poll(max(0, end - time.monotonic())):
                raise TimeoutError(f"rank {rank} of {size} gives no answer to {function.__name__}")
            answers.append(here.recv())
        return answers

    ask.size = size
    try:
        yield ask
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _serve(rank: int, size: int, meet: Path, pipe) -> None:
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
