"""What Python callers do with an encoder besides training it, as the commands of that name do."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rankpo_fast.config import (
    ComputeConfig,
    EncoderConfig,
    EvaluationConfig,
    MergeConfig,
    MineConfig,
)
from rankpo_fast.data.rows import ContrastiveRow, read_contrastive
from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.merge import merge
from rankpo_fast.model.texts import check_lengths
from rankpo_fast.paths import check_new_directory, texts_located
from rankpo_fast.ranks import ALONE, Ranks
from rankpo_fast.retrieval.draw import Drawing
from rankpo_fast.retrieval.evaluate import (
    Evaluation,
    EvaluationData,
    measure,
    read_evaluation_data,
    tokens_of_ranks,
)
from rankpo_fast.retrieval.mining import Limits, Mined, mine, searched_passages
from rankpo_fast.retrieval.reranked import RerankerFilter
from rankpo_fast.settings import gathered

Model = str | os.PathLike[str] | Encoder
Load = Callable[[], Encoder]


def evaluate(
    model: Model, *settings: Config, progress: bool = False, **keywords: Any
) -> Evaluation:
    """Measure retrieval, agreement with preferences, or both.

        print(evaluate(encoder, query_data=queries, corpus_data=corpus))

    Args:
        model: an Encoder, or the name of one on the Hub, or its directory.
        settings: objects of `EvaluationConfig`, `ComputeConfig` and, of a model that is named,
            `EncoderConfig`.
        progress: show bars.
        keywords: single fields of these, `query_data`, `corpus_data`, `preference_data` and
            `cutoffs` among them. Data are paths, rows or a datasets.Dataset.

    Raises:
        InputError: nothing to measure was given, or something that cannot be used.
    """
    config, compute, load = _opened("evaluate", EvaluationConfig, model, settings, keywords)
    config.check_asked()
    with texts_located(config):
        return measured(load, read_evaluation_data(config), config, compute, progress=progress)


def measured(
    load: Load, data: EvaluationData, config: EvaluationConfig, compute: ComputeConfig, *,
    ranks: Ranks = ALONE, progress: bool = False,
) -> Evaluation:  # fmt: skip
    """`evaluate` of data that have been read, by the ranks that read: the first has the figures."""
    with ranks.first_ahead():
        encoder = load()
        check_lengths(encoder)
    tokens = tokens_of_ranks(encoder, data, compute.cache_path, ranks)
    return measure(
        encoder, retrieval=data.retrieval, preferences=data.preferences, cutoffs=config.cutoffs,
        max_tokens=compute.max_tokens_per_micro_batch, legacy=config.legacy_metrics,
        cache_dir=compute.cache_path, progress=progress, tokens=tokens, ranks=ranks,
    )  # fmt: skip


def mine_hard_negatives(
    model: Model, train_data: Any, corpus_data: Any = None, *settings: Config,
    progress: bool = False, **keywords: Any,
) -> Mined:  # fmt: skip
    """Find passages that the model ranks high for a query though none of its positives.

        mined = mine_hard_negatives(encoder, rows, corpus, num_negatives=5)
        ContrastiveTrainer(encoder, mined.rows, output_dir="stage1").train()

    Args:
        model: an Encoder, or the name of one on the Hub, or its directory.
        train_data: rows of stage 1, or where they are.
        corpus_data: rows of {"text"} to search, or where they are; None: all passages of the rows.
        settings: objects of `MineConfig`, `ComputeConfig` and, of a model that is named,
            `EncoderConfig`.
        progress: show bars.
        keywords: single fields of these, `num_negatives`, `method` and `search_range` among them.

    Returns:
        `Mined`: rows to train on, and a summary of what was searched and left out.

    Raises:
        InputError: rows or settings that cannot be used, or no row gets a negative.
    """
    if isinstance(corpus_data, Config):  # settings that follow the rows
        settings, corpus_data = (corpus_data, *settings), None
    keywords = {"train_data": train_data, "corpus_data": corpus_data} | keywords
    if isinstance(ranks := keywords.get("search_range"), tuple | list):  # a pair of numbers
        keywords["search_range"] = "-".join(map(str, ranks))
    config, compute, load = _opened("mine_hard_negatives", MineConfig, model, settings, keywords)
    with texts_located(config):
        return mined(load, config, compute, progress=progress)


def mined(
    load: Load,
    config: MineConfig,
    compute: ComputeConfig,
    *,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> Mined:
    """`mine_hard_negatives` by its settings; of several ranks, all of which encode, the first has
    the rows."""
    rows: list[ContrastiveRow] = []
    corpus: list[str] = []
    with ranks.first_ahead():
        if config.reranker is not None and ranks.size > 1:
            raise InputError("--reranker scores in one process: leave out torchrun")
        if ranks.reads:
            rows = read_contrastive(config.train_data)
            corpus = searched_passages(rows, config.corpus_data)
        encoder = load()
        reranker = RerankerFilter.asked(config, compute, encoder.device)
        check_lengths(encoder)
    return mine(
        encoder,
        rows,
        corpus,
        search_range=config.ranks,
        num_negatives=config.num_negatives,
        drawing=Drawing(config.method, config.seed, config.clusters, config.decay),
        limits=Limits(config.max_score, config.absolute_margin, config.relative_margin),
        reranker=reranker,
        keep=config.combine,
        max_tokens=compute.max_tokens_per_micro_batch,
        cache_dir=compute.cache_path,
        index_dir=None if config.index_dir is None else Path(config.index_dir).expanduser(),
        progress=progress,
        ranks=ranks,
    )


def merge_models(
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *settings: Config,
    **keywords: Any,
) -> list[Path]:
    """Write models whose weights lie between a base and what was tuned from it.

        merge_models("out/rankpo", "out/merged", base_model_name_or_path="out/stage1", alpha=0.75)

    Args:
        models: the tuned model, several of them, or one adapter.
        output_dir: of the merged model; of a grid, the directory for those of each alpha.
        settings: an object of `MergeConfig`.
        keywords: single fields of it, `base_model_name_or_path`, `alpha` and `method` among them.

    Returns:
        The directories of the models, in the order of the alphas.

    Raises:
        InputError: settings that cannot be used, or models that do not go together.
    """
    keywords = {"model_name_or_path": models, "output_dir": output_dir} | keywords
    if "alpha" in keywords:  # numbers, or grids as on the command line
        alpha = keywords["alpha"]
        several = isinstance(alpha, Iterable) and not isinstance(alpha, str)
        keywords["alpha"] = [str(value) for value in (alpha if several else [alpha])]
    [config] = gathered("merge_models", [MergeConfig], settings, keywords)
    check_new_directory("--output_dir", config.output_dir, config)
    return merge(config)


def _opened(
    caller: str,
    of_caller: type[Config],
    model: Model,
    settings: Sequence[Config],
    keywords: dict[str, Any],
) -> tuple[Any, ComputeConfig, Load]:
    """Its settings, where to compute, and what gives the encoder, loading one that is named."""
    if isinstance(model, Encoder):
        if "device" in keywords:
            raise InputError(
                f"{caller}: the Encoder is on {model.device}: load it elsewhere", "device"
            )
        config, compute = gathered(caller, [of_caller, ComputeConfig], settings, keywords)
        return config, compute, lambda: model
    keywords = {**keywords, "model_name_or_path": model}
    classes = [of_caller, ComputeConfig, EncoderConfig]
    config, compute, own = gathered(caller, classes, settings, keywords)
    return config, compute, partial(load_encoder, own, device=compute.torch_device())
