"""What comes before a training: whatever can be refused without a model, then the model."""

from dataclasses import replace
from pathlib import Path

from rankpo_fast.config import (
    ComputeConfig,
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    EvaluationConfig,
    ModelConfig,
    RankPODataConfig,
    RankPOLossConfig,
    ReplayConfig,
    TrainingConfig,
)
from rankpo_fast.data.cache import check_cache
from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config
from rankpo_fast.model.directories import MODEL_FLAG
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.precision import Precision
from rankpo_fast.model.texts import Texts
from rankpo_fast.model.trainable import fit_to_train
from rankpo_fast.paths import all_inputs, inputs, lies_in
from rankpo_fast.ranks import Ranks
from rankpo_fast.retrieval.evaluate import evaluation_texts, read_evaluation_data
from rankpo_fast.train import output
from rankpo_fast.train.engine import check_shard
from rankpo_fast.train.reporters import chosen
from rankpo_fast.train.resume import find_checkpoint, settings_of
from rankpo_fast.train.run import Run


def prepare_run(
    stage: str,
    ranks: Ranks,
    precision: Precision,
    model: ModelConfig,
    data: ContrastiveDataConfig | RankPODataConfig,
    loss: ContrastiveLossConfig | RankPOLossConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    compute: ComputeConfig,
    *replay: ReplayConfig,
    encoder: Encoder | None = None,
) -> Run:
    """Evaluation data, output directory and checkpoint; InputError if one will not do.

    Args:
        precision: what all ranks compute in, of `shared_precision`.
        encoder: the one to train, where it is not loaded: its name is no directory that is read.
    """
    model = replace(model, bf16=precision.bf16)
    check_shard(training, ranks, lent=encoder is not None)
    chosen(training.report_to)
    evaluation_data = read_evaluation_data(evaluation)
    path, cache = Path(training.output_dir), compute.cache_path
    configs: tuple[Config, ...] = (model, data, *replay, loss, training, compute)
    resume, overwrite = training.resume is not None, training.overwrite_output_dir
    read = [one for one in inputs(*configs, evaluation) if encoder is None or one[0] != MODEL_FLAG]
    output.check(path, read, resume=resume, overwrite=overwrite)
    check_cache(compute)
    if cache is not None and lies_in(cache, path):
        raise InputError(f"--cache_dir {cache} lies in --output_dir {path}: choose another")
    settings = settings_of(stage, ranks, configs, encoder)
    return Run(
        stage=stage,
        model=model,
        training=training,
        evaluation=evaluation,
        compute=compute,
        ranks=ranks,
        evaluation_data=evaluation_data,
        settings=settings,
        checkpoint=find_checkpoint(training, settings, ranks),
        precision=precision,
        inputs=[(flag, str(source)) for flag, source in all_inputs(*configs, evaluation)],
    )


def nothing_left(run: Run) -> bool:
    """Whether the run that was to be resumed is finished; says so."""
    done = run.training.resume is not None and output.finished(run.path)
    if done:
        said = f"{run.path}: this run is finished, nothing to resume"
        if run.evaluation.asked and not output.evaluated(run.path):
            said += " but for its evaluation, which `rankpo-fast evaluate` makes"
        run.ranks.say(said)
    return done


def prepare_encoder(run: Run, encoder: Encoder | None = None) -> Encoder:
    """Loaded, or the one given; InputError if a text of the evaluation does not fit into a
    micro-batch."""
    if encoder is None:
        encoder = load_encoder(run.model, device=run.device, seed=run.training.seed)
    else:
        encoder = fit_to_train(encoder, run.model, run.device)
    if run.evaluation.asked:  # which will find these token ids in the cache
        data = run.evaluation_data
        queries, passages = evaluation_texts(data.retrieval, data.preferences)
        Texts.tokenize(encoder, queries, passages, run.compute)
    return encoder
