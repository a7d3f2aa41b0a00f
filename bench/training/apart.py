"""A process for each contender: the memory it takes is its own, and if it dies, only it does."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..measure import noting
from ..questions import OUT_OF_MEMORY

# Imported once, by the server that every process is forked from; those not installed are skipped.
IMPORTED = [
    f"{__package__}.end_to_end", "rankpo_fast.train.contrastive", "rankpo_fast.retrieval.evaluate",
    "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3", "datasets", "accelerate",
    "sentence_transformers.sentence_transformer.losses",
]  # fmt: skip
ANSWER_S, END_S = 1200, 20  # that a contender may take, and its end after its answer
# Whether there is a card is then asked without touching it: a process forked from one that has
# touched it could not use it.
UNTOUCHED = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns there, or a note, a str, of what stopped it."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what this process has of the card is not the other's
    os.environ.update(UNTOUCHED)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    here, there = context.Pipe()
    process = context.Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()  # so that the process's end is the pipe's
    try:
        if not here.poll(ANSWER_S):
            process.kill()
            return f"no answer within {ANSWER_S:g} s"
        return here.recv()
    except EOFError:
        process.join()
        return OUT_OF_MEMORY if process.exitcode == -9 else f"exit code {process.exitcode}"
    finally:
        process.join(END_S)
        process.kill()
        process.join()


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, it is this one's turn
    said: dict[str, Any] = {}
    with tempfile.TemporaryFile() as log:
        for stream in (1, 2):  # so that the table stays whole
            os.dup2(log.fileno(), stream)
        with noting("", said):
            said[""] = function(*arguments)
    pipe.send(said[""])
