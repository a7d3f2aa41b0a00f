"""A process for each contender: the memory it takes is its own, and if it dies, only it does."""

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

from bench.measure import noting
from bench.training.contenders import Contender, Measured, Task, measure

# Imported once, by the server that every process is forked from; those not installed are skipped.
IMPORTED = [
    "bench.training.contenders", "rankpo_fast.train.contrastive", "rankpo_fast.retrieval.evaluate",
    "transformers.models.bert.modeling_bert", "datasets", "accelerate",
    "sentence_transformers.sentence_transformer.losses",
]  # fmt: skip
NOT_INSTALLED, OUT_OF_MEMORY = "is not installed", "out of memory"


def in_a_process(contender: Contender, task: Task) -> Measured | str:
    """What `measure` returns there, or what stopped it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    here, there = context.Pipe()
    process = context.Process(target=_measure, args=(there, contender, task))
    process.start()
    there.close()  # so that the process's end is the pipe's
    try:
        return here.recv()
    except EOFError:
        process.join()
        return OUT_OF_MEMORY if process.exitcode == -9 else f"exit code {process.exitcode}"
    finally:
        process.join()


def _measure(pipe: Connection, contender: Contender, task: Task) -> None:
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, it is this one's turn
    log = os.open(task.output.with_name("log"), os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):  # so that the table stays whole
        os.dup2(log, stream)
    said: dict[str, Measured | str] = {}
    with noting("", said):
        try:
            said[""] = measure(contender, task)
        except ModuleNotFoundError as error:
            said[""] = f"{error.name} {NOT_INSTALLED}"
    pipe.send(said[""])
