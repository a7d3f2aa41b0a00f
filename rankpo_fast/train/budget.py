"""The token budget of a run: asked for, found by measuring, or as the run had it that goes on.

It is the same on all ranks: it decides how sums are rounded and what dropout draws.
"""

import warnings
from collections.abc import Sequence
from functools import partial

from rankpo_fast.data.tokens import TokenTable, joined
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.layers import WAYS
from rankpo_fast.ranks import Ranks
from rankpo_fast.train.engine import ALONE, Engine
from rankpo_fast.train.memory import Choice, Memory, checkpoint_more, least_checkpointing
from rankpo_fast.train.run import Run


def measure_memory(
    run: Run, encoder: Encoder, tables: Sequence[TokenTable], engine: Engine = ALONE
) -> Memory:
    """For all texts of the tables, and say it. InputError if what was asked for does not fit."""
    asked, checkpoint = run.compute.max_tokens_per_micro_batch, run.checkpoint
    gigabytes = run.training.activation_memory_gb
    room = None if gigabytes is None else gigabytes * 2**30
    tokens = asked if checkpoint is None else checkpoint.max_tokens
    if len(tables) == 1:
        [table] = tables
    else:
        table, _ = joined(*tables)
    run.ranks.connect()
    choice = Choice(encoder.layers.checkpointed, "as asked")
    auto = run.model.gradient_checkpointing == "auto"
    if auto:
        choice = checkpoint_layers(run.ranks, encoder, table, tokens, engine)
    memory = Memory.measure(encoder, table, tokens, room, engine)
    memory.checkpointing = str(choice)
    memory.checkpoint_more = partial(checkpoint_more, encoder) if auto else None
    if tokens is not None and checkpoint is not None and memory.max_tokens < tokens:
        warnings.warn(
            f"--resume: micro-batches of {memory.max_tokens:,} tokens fit now, {tokens:,} did "
            f"before: sums are rounded otherwise, so the run goes on, but not bit by bit",
            stacklevel=2,
        )
    if checkpoint is None and asked is not None and memory.max_tokens < asked:
        raise InputError(f"--max_tokens_per_micro_batch {asked} does not fit into memory: "
                         f"{memory.max_tokens} does")  # fmt: skip
    [shortage] = run.ranks.highest([-memory.max_tokens])  # all have what the least has
    memory.max_tokens = -shortage
    run.ranks.say(f"  memory: {memory.summary()}")
    return memory


def checkpoint_layers(
    ranks: Ranks,
    encoder: Encoder,
    table: TokenTable,
    tokens: int | None,
    engine: Engine = ALONE,
) -> Choice:
    """The encoder's layers, as that rank has to which has the least room."""
    choices = ranks.objects(least_checkpointing(encoder, table, tokens, engine))
    choice = max(choices, key=lambda one: WAYS.index(one.way))
    if encoder.layers.checkpointed != choice.way:
        encoder.layers.checkpoint(choice.way)
    return choice
