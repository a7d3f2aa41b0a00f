"""The training loop of both stages.

    for each step:  gradient = sum of tasks' weight * mean of d loss over the step's batches
                    clip, check, update;  log, save, evaluate when due

A task gives the batches and their loss; everything random in a batch follows from (seed, epoch,
index), so that a run can stop after any step and go on bit by bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from signal import Signals
from typing import Any

from rankpo_fast.config import NO_RETENTION, RetentionConfig
from rankpo_fast.data.packing import one_token
from rankpo_fast.errors import TrainingStopped
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.trainable import in_training
from rankpo_fast.retrieval.evaluate import measure, tokens_of_ranks
from rankpo_fast.signals import Interrupted
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train import output
from rankpo_fast.train.allocator import freed_memory_kept
from rankpo_fast.train.budget import measure_memory
from rankpo_fast.train.callbacks import Callback, Callbacks
from rankpo_fast.train.card import model_card
from rankpo_fast.train.checkpointer import Checkpointer
from rankpo_fast.train.choice import Best, Choice
from rankpo_fast.train.elastic import Elastic
from rankpo_fast.train.engine import Engine, engine_of
from rankpo_fast.train.log import MetricsLog
from rankpo_fast.train.optim import Optimizer, describe_optimizer, learning_rate, make_optimizer
from rankpo_fast.train.prefetch import Prefetcher, pack_step
from rankpo_fast.train.profile import Profile
from rankpo_fast.train.result import BEST, TrainingResult
from rankpo_fast.train.resume import check_unchanged, compare_ranks
from rankpo_fast.train.run import Run
from rankpo_fast.train.schedule import SaveSchedule, StepSchedule
from rankpo_fast.train.signals import StopSignal
from rankpo_fast.train.step import train_step
from rankpo_fast.train.summary import introduce
from rankpo_fast.train.task import TrainingTask


def train(
    run: Run,
    encoder: Encoder,
    tasks: Sequence[TrainingTask[Any]],
    about: dict[str, str],
    callbacks: Sequence[Callback] = (),
    retention: RetentionConfig = NO_RETENTION,
) -> TrainingResult:
    """Train `encoder` in place and save it in the run's output directory.

    Args:
        tasks: what is minimised, weighted; steps and epochs are counted in the first one's rows.
        about: what the stage says of its rows and its loss, for the user.
        callbacks: called on the first rank.
        retention: its elastic weights; all else of it is in the tasks.

    Raises:
        FloatingPointError: loss or gradient is not finite; the weights are as before that step,
            and saved.
        OSError: the model could not be saved; NotSaved: it was, but the last checkpoint could not.
        TrainingStopped: by a signal, once the step is finished and saved.
        RankLost: another rank is gone; the last checkpoint is there.
    """
    config, first = run.training, run.first_step
    done, measured_at = first, -1  # steps
    figures: dict[str, float] = {}  # of the last evaluation on the way
    schedule, saves = StepSchedule.of(config, tasks[0].data), SaveSchedule(config)
    total = schedule.total_steps
    profiled = config.profile_steps if run.ranks.first else 0
    profile = Profile(run.path / output.PROFILE, profiled, total - first)
    compare_ranks(run)
    tokens = None
    if run.evaluation.asked:
        tokens = tokens_of_ranks(encoder, run.evaluation_data, run.compute.cache_path, run.ranks)
    run = replace(run, ranks=replace(run.ranks, lockstep=run.sharded), evaluation_tokens=tokens)
    ranks = run.ranks
    engine = engine_of(encoder, ranks, config.shard, one_token(tasks[0].texts.table))
    introduce(run, encoder, about | _plans(run, tasks, schedule, saves))
    tasks = [task.ready(run, encoder) for task in tasks]
    check_unchanged(run)  # of models that have all been read now
    engine.settle()
    optimizer, elastic = _start(run, encoder, tasks, retention)
    memory = measure_memory(run, encoder, [task.texts.table for task in tasks], engine)
    if elastic is not None:  # of stage 1's rows, which come last
        elastic.weigh(tasks[-1], encoder, optimizer, memory, ranks, engine)
    choice = _restore(run, encoder, optimizer)
    pack = partial(pack_step, tasks, encoder, ranks)
    heard = Callbacks(callbacks if ranks.first else ())
    with (
        output.opened(run) as reporters,  # now that nothing else speaks against it
        freed_memory_kept(encoder.device),
        Prefetcher(pack, map(schedule.batches, range(first, total)), memory) as steps,
        MetricsLog(
            run.path, config, reporters, first, total, callbacks=heard, silent=not ranks.first
        ) as log,
        profile,
        in_training(encoder),
        _weights_kept(run, encoder, engine, log),
        StopSignal() as signals,
        Checkpointer(run, encoder, optimizer, memory, saves, log, heard, choice) as checkpointer,
    ):
        choose = partial(_choose, run, encoder, engine, log, choice, checkpointer)
        if choice.wanted and choice.evaluated != first and _is_candidate(run, first, total):
            choose(first)  # which the run that goes on was stopped before
        for done in range(first + 1, total + 1):
            if choice.over:
                log.say(f"step {done - 1} is the last: no gain since {choice}")
                done -= 1
                break
            rate, clip = learning_rate(done - 1, total, config), config.max_grad_norm
            pull = None if elastic is None else elastic.pull
            metrics = train_step(encoder, steps, optimizer, rate, clip, memory, ranks, engine, pull)
            checkpointer.look()
            log.step(done, schedule.epochs(done), metrics)
            if (table := profile.step(metrics.tokens)) is not None:
                log.say(table)
            due = saves.due(done, ends_epoch=schedule.ends_epoch(done), last=done == total)
            agreed = signals.agreed(ranks, save=due, end=heard.ended)
            last = agreed.end or done == total
            if choice.wanted and agreed.stop is None and _is_candidate(run, done, total, last):
                choose(done)
            if agreed.save:
                checkpointer.save(done)
            if choice.wanted:
                agreed = signals.agreed(ranks, end=heard.ended)
            elif agreed.stop is None and not last and _evaluation_is_due(run, done):
                log.settle()
                if (of_step := _evaluate(run, encoder, engine)) is not None:
                    figures, measured_at = of_step, done
                    log.evaluation(done, figures)
                agreed = signals.agreed(ranks, end=heard.ended)
            if agreed.stop is not None:
                checkpointer.save(done, last=True)
                said = f" after step {done}, which is saved; --resume continues"
                if checkpointer.trouble is not None:
                    said = f" after step {done}, which is not saved: {checkpointer.trouble}"
                raise _stopped(log, agreed.stop, done, said)
            if agreed.end:
                log.say(f"step {done} is the last: a callback asked for the end")
                break
        log.finish()
        checkpointer.wait(last=True)
        measured = figures if measured_at == done else None
        if choice.best is not None:
            measured = _take_best(run, encoder, log, choice.best, done)
        _finish(run, encoder, about, log, signals, done, measured, engine)
    checkpointer.check()
    encoder.name = str(run.path)
    return TrainingResult.of(run.path, None if ranks.lockstep else encoder)


def _plans(
    run: Run,
    tasks: Sequence[TrainingTask[Any]],
    schedule: StepSchedule,
    saves: SaveSchedule,
) -> dict[str, str]:
    """Of what the run is made, for the user."""
    texts = {f"{task.prefix}texts": task.texts.summary() for task in tasks}
    choice = Choice(run.training)
    chosen = {"result": choice.describe()} if choice.wanted else {}
    return {
        **texts,
        **chosen,
        "steps": schedule.summary(tasks[0].data.wanted_batch_size),
        "checkpoints": saves.summary(),
    }


def _start(
    run: Run, encoder: Encoder, tasks: Sequence[TrainingTask[Any]], retention: RetentionConfig
) -> tuple[Optimizer, Elastic | None]:
    """The optimizer, and what is kept of the weights as they start; random numbers begin."""
    checkpoints.seed_random(run.training.seed + run.ranks.rank)  # so that dropout differs
    rates = {name: rate for task in tasks for name, rate in task.rates.items()}
    optimizer = make_optimizer(encoder, run.training, rates)
    run.ranks.say(f"  optimizer: {describe_optimizer(optimizer, run.training)}")
    elastic = Elastic(encoder, retention) if retention.elastic_weight else None
    if elastic is not None:
        run.ranks.say(f"  elastic weights: {elastic}")
    return optimizer, elastic


def _restore(run: Run, encoder: Encoder, optimizer: Optimizer) -> Choice:
    """All as the run left it that goes on, what its evaluations had shown among it."""
    if run.checkpoint is None:
        return Choice(run.training)
    checkpoints.restore(run.checkpoint, encoder, optimizer, run.ranks)
    return Choice(run.training, run.checkpoint.choice)


def _is_candidate(run: Run, step: int, total: int, last: bool = False) -> bool:
    """Whether the model of this step may be the result."""
    return last or step == total or (step > 0 and _evaluation_is_due(run, step))


def _choose(
    run: Run, encoder: Encoder, engine: Engine, log: MetricsLog, choice: Choice,
    checkpointer: Checkpointer, step: int,
) -> None:  # fmt: skip
    """Evaluate, and keep the model on disk if it is the best so far. All ranks must call it."""
    log.settle()
    figures, *_ = run.ranks.objects(_evaluate(run, encoder, engine))
    if figures is None:
        return
    log.evaluation(step, figures)
    checkpointer.wait()  # which tells whether the best so far was kept
    if choice.consider(step, figures):
        checkpointer.save(step)


def _take_best(
    run: Run, encoder: Encoder, log: MetricsLog, best: Best, last: int
) -> dict[str, float]:
    """The encoder with the weights of the best step; returns its figures. All ranks must call."""
    if best.step != last:
        path = run.path / output.CHECKPOINTS / checkpoints.name_of(best.step)
        checkpoints.restore_weights(checkpoints.read(path), encoder, run.ranks)
    figures = {f"{BEST}{name}": value for name, value in best.figures.items()}
    log.write(last, {f"{BEST}step": best.step, f"{BEST}score": best.score, **figures})
    log.say(f"the result is the model of step {best.step}, of score {best.score:.4f}")
    return best.figures


@contextmanager
def _weights_kept(run: Run, encoder: Encoder, engine: Engine, log: MetricsLog) -> Iterator[None]:
    """What NaN ends inside, on all ranks, leaves the weights of the last good step as a model."""
    try:
        yield
    except FloatingPointError:
        with engine.whole(encoder):
            try:
                if run.ranks.first:
                    output.save_last_good(run.path, encoder)
                    log.say(f"the weights before that step are in {run.path / output.LAST_GOOD}")
            except OSError as error:
                log.say(f"the weights before that step could not be saved ({error})")
        raise


def _evaluation_is_due(run: Run, step: int) -> bool:
    every = run.training.eval_steps
    return run.evaluation.asked and every is not None and step % every == 0


def _evaluate(run: Run, encoder: Encoder, engine: Engine) -> dict[str, float] | None:
    """The first rank has the figures, the others an empty dict; all encode. None where a signal
    ended it, of which all ranks then hear from each other."""
    figures = None
    with suppress(Interrupted):
        figures = measure(
            encoder,
            retrieval=run.evaluation_data.retrieval,
            preferences=run.evaluation_data.preferences,
            cutoffs=run.evaluation.cutoffs,
            max_tokens=run.compute.max_tokens_per_micro_batch,
            legacy=run.evaluation.legacy_metrics,
            cache_dir=run.compute.cache_path,
            tokens=run.evaluation_tokens,
            ranks=run.ranks,
        ).figures
    engine.settle()
    run.ranks.meet()
    return figures


def _finish(
    run: Run,
    encoder: Encoder,
    about: dict[str, str],
    log: MetricsLog,
    signals: StopSignal,
    step: int,
    figures: dict[str, float] | None,
    engine: Engine,
) -> None:
    """Save the model, then measure it, unless `figures` are it: a failure there costs no training.
    TrainingStopped as `train`."""
    with engine.whole(encoder):
        if run.ranks.first:
            output.save_model(run.path, encoder, model_card(run, encoder, about))
    run.ranks.meet()
    log.say(f"model saved in {run.path}")
    stop = signals.agreed(run.ranks).stop
    if run.evaluation.asked and stop is None:
        if figures is None:
            figures = _evaluate(run, encoder, engine)
            if figures is not None:
                log.evaluation(step, figures)
        if run.ranks.first and figures is not None:
            output.write_card(run.path, model_card(run, encoder, about, figures))
        stop = signals.agreed(run.ranks).stop
    if stop is not None:
        raise _stopped(log, stop, step, "; the model is saved")


def _stopped(log: MetricsLog, stop: Signals, step: int, saved: str) -> TrainingStopped:
    """Says what is `saved` of the run."""
    said = f"stopped by {stop.name}{saved}"
    log.say(said)
    return TrainingStopped(said, stop, step)
