"""The token budget of a run: asked for, found by measuring, or as the run had it that goes on.

It is the same on all ranks: it decides how sums are rounded and what dropout draws.
"""

import warnings
from collections.abc import Sequence

from rankpo_fast.data.tokens import TokenTable, joined
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.ranks import Ranks
from rankpo_fast.train.engine import ALONE, Engine
from rankpo_fast.train.memory import Memory, why_checkpointed
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
    spare = run.model.gradient_checkpointing == "auto" and encoder.layers.can_checkpoint
    reason = checkpoint_layers(run.ranks, encoder, table, tokens, engine) if spare else None
    memory = Memory.measure(encoder, table, tokens, room, engine)
    memory.checkpointed = reason
    memory.layers = encoder.layers if spare and reason is None else None
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
) -> str | None:
    """The encoder's layers, where any rank has to; says why."""
    reasons = [r for r in ranks.objects(why_checkpointed(encoder, table, tokens, engine)) if r]
    if reasons:
        encoder.layers.checkpoint()
    return next(iter(reasons), None)
