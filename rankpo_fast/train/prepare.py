"""What comes before a training: whatever can be refused without a model, then the model."""

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from rankpo_fast.config import (
    ComputeConfig,
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    EvaluationConfig,
    ModelConfig,
    RankPODataConfig,
    RankPOLossConfig,
    TrainingConfig,
)
from rankpo_fast.data.batches import ContrastiveData
from rankpo_fast.data.cache import check_cache
from rankpo_fast.data.order import BatchData
from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config
from rankpo_fast.model.directories import MODEL_FLAG
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.load import META, load_encoder
from rankpo_fast.model.precision import Precision
from rankpo_fast.model.texts import Texts
from rankpo_fast.model.trainable import check_offload, fit_to_train, set_offload
from rankpo_fast.model.vocabulary import trim_vocabulary
from rankpo_fast.paths import all_inputs, inputs, lies_in
from rankpo_fast.ranks import Ranks
from rankpo_fast.retrieval.evaluate import (
    EvaluationData,
    evaluation_texts,
    read_evaluation_data,
)
from rankpo_fast.train import output
from rankpo_fast.train.choice import check_choice
from rankpo_fast.train.engine import check_shard
from rankpo_fast.train.reporters import chosen
from rankpo_fast.train.resume import (
    find_checkpoint,
    settings_of,
    settings_of_choice,
    stamps_of,
)
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
    *more: Config,
    encoder: Encoder | None = None,
) -> Run:
    """Evaluation data, output directory and checkpoint; InputError if one will not do.

    Args:
        precision: what all ranks compute in, of `shared_precision`.
        more: settings of further rows.
        encoder: the one to train, where it is not loaded: its name is no directory that is read.
    """
    model = replace(model, bf16=precision.bf16)
    check_shard(training, model, ranks, lent=encoder is not None)
    check_offload(training.offload, model, ranks.device)
    chosen(training.report_to)
    check_choice(training, evaluation)
    evaluation_data = EvaluationData()
    if ranks.reads or model.trim_vocabulary:
        evaluation_data = read_evaluation_data(evaluation)
    path, cache = Path(training.output_dir), compute.cache_path
    configs: tuple[Config, ...] = (model, data, *more, loss, training, compute)
    resume, overwrite = training.resume is not None, training.overwrite_output_dir
    read = [one for one in inputs(*configs, evaluation) if encoder is None or one[0] != MODEL_FLAG]
    output.check(path, read, resume=resume, overwrite=overwrite)
    check_cache(compute)
    if cache is not None and lies_in(cache, path):
        raise InputError(f"--cache_dir {cache} lies in --output_dir {path}: choose another")
    stamps = stamps_of(configs, encoder)
    settings = settings_of(stage, ranks, configs, encoder)
    if training.metric_for_best_model:
        settings |= settings_of_choice(training, evaluation)
    if model.trim_vocabulary:
        _check_trimming(model)
        settings |= _trimming_settings(evaluation_data)
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
        stamps=stamps,
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


def prepare_encoder(run: Run, encoder: Encoder | None, *read: BatchData) -> Encoder:
    """Loaded, or the one given; InputError if a text of the evaluation does not fit into a
    micro-batch.

    Args:
        read: all rows that it will be trained on.
    """
    if encoder is None:
        encoder = load_encoder(
            run.model, device=run.device, seed=run.training.seed, weights=_place_of_weights(run)
        )
    else:
        encoder = fit_to_train(encoder, run.model, run.device)
    set_offload(encoder, run.training.offload, run.device)
    if run.model.trim_vocabulary:
        _trim(run, encoder, read)
    if run.evaluation.asked and run.ranks.reads:  # which will find these token ids in the cache
        data = run.evaluation_data
        queries, passages = evaluation_texts(data.retrieval, data.preferences)
        Texts.tokenize(encoder, queries, passages, run.compute)
    return encoder


def _place_of_weights(run: Run) -> torch.device | None:
    """Where they are loaded, if not where they compute: see train/engine.py of those in parts."""
    if not run.sharded or run.model.weights_dtype == "nf4":  # which stay whole on every rank
        return None
    return torch.device("cpu") if run.ranks.first else META


def _trim(run: Run, encoder: Encoder, read: Iterable[BatchData]) -> None:
    """Leave the encoder the tokens of all texts that it will meet."""
    data = run.evaluation_data
    of_queries, of_passages = evaluation_texts(data.retrieval, data.preferences)
    queries, passages = [*of_queries], [*of_passages]
    for rows in read:
        queries += rows.query_texts
        passages += rows.passage_texts
        if isinstance(rows, ContrastiveData):  # which compares them: a passage may be the query
            passages += rows.query_texts
    trimmed = trim_vocabulary(encoder, queries, passages, run.compute.cache_path)
    encoder.trimmed = str(trimmed)


def _check_trimming(model: ModelConfig) -> None:
    if model.lora_rank is not None:
        raise InputError("--trim_vocabulary: an adapter (--lora_rank) is saved for its base as "
                         "that is, with all of its tokens; leave out one of the two")  # fmt: skip


def _trimming_settings(evaluation: EvaluationData) -> dict[str, str]:
    """What else decides which tokens are kept, and so what a checkpoint's embedding means."""
    digest = hashlib.sha256()
    for texts in evaluation_texts(evaluation.retrieval, evaluation.preferences):
        for text in texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        digest.update(b"passages follow")
    return {
        "evaluation's texts, whose tokens --trim_vocabulary keeps,": digest.hexdigest()[:16],
        "version of tokenizers": version("tokenizers"),
    }
