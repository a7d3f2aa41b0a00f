"""`rankpo-fast evaluate`: an encoder's figures and what they were taken of, printed and written."""

import json
from collections.abc import Sequence
from typing import Any

from rankpo_fast.commands.config import EvaluateOutputConfig
from rankpo_fast.config import ComputeConfig, EncoderConfig, EvaluationConfig
from rankpo_fast.data.files import whole_file
from rankpo_fast.data.retrieval import RetrievalSet
from rankpo_fast.errors import InputError
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.texts import check_lengths
from rankpo_fast.ranks import Ranks
from rankpo_fast.retrieval.evaluate import (
    EvaluationData,
    Measured,
    evaluation_texts,
    measure,
    read_evaluation_data,
)
from rankpo_fast.retrieval.ranking import write_run

ROWS = {"nDCG": "ndcg", "MRR": "mrr", "recall": "recall"}


def run(
    model: EncoderConfig,
    evaluation: EvaluationConfig,
    output: EvaluateOutputConfig,
    compute: ComputeConfig,
) -> None:
    """Raises InputError for what the user can put right, most of it before the model is loaded."""
    with Ranks.joined(compute) as ranks:
        with ranks.first_ahead():
            data = read_evaluation_data(evaluation)
            if output.output_run is not None:
                _check_ids(output.output_run, data.retrieval)
            encoder = load_encoder(model, device=ranks.device)
            check_lengths(encoder)
            if ranks.size > 1:  # so that the others find them in the cache
                queries, passages = evaluation_texts(data.retrieval, data.preferences)
                encoder.tokenize_queries(queries, compute.cache_path)
                encoder.tokenize_passages(passages, compute.cache_path)
        measured = measure(
            encoder, data.retrieval, data.preferences, evaluation.cutoffs,
            max_tokens=compute.max_tokens_per_micro_batch, legacy=evaluation.legacy_metrics,
            cache_dir=compute.cache_path, progress=True, ranks=ranks,
        )  # fmt: skip
        if ranks.first:
            about = _about(measured, data)
            print(_table(measured.figures, evaluation.cutoffs, about))
            _write(measured, data.retrieval, about, output)
        ranks.meet()


def _check_ids(path: str, retrieval: RetrievalSet | None) -> None:
    """InputError if there is no ranking to write, or an id that a run file cannot hold."""
    if retrieval is None:
        raise InputError(f"--output_run {path} needs --query_data: without, nothing is ranked")
    for key in [*(retrieval.query_ids or []), *(retrieval.document_ids or [])]:
        if len(key.split()) != 1:
            raise InputError(
                f"--output_run {path}: the columns of a run file are told apart by spaces, but "
                f"there is an id {key!r}"
            )


def _about(measured: Measured, data: EvaluationData) -> dict[str, dict[str, Any]]:
    """What the figures were taken of, as in the JSON file."""
    about: dict[str, dict[str, Any]] = {}
    retrieval, preferences = data.retrieval, data.preferences
    if retrieval is not None:
        about["retrieval"] = dict(retrieval.counts)
        if retrieval.split is not None:
            about["retrieval"] |= {"split": retrieval.split, "splits": list(retrieval.splits)}
    if preferences:
        about["preferences"] = {"pairs": len(preferences), "ties": measured.ties}
    return about


def _write(
    measured: Measured,
    retrieval: RetrievalSet | None,
    about: dict[str, dict[str, Any]],
    output: EvaluateOutputConfig,
) -> None:
    if output.output is not None:
        with whole_file(output.output) as temporary:
            text = json.dumps({**measured.figures, **about}, indent=2)
            temporary.write_text(text + "\n", encoding="utf-8")
    if output.output_run is not None:
        assert retrieval is not None  # of `_check_ids`
        write_run(output.output_run, measured.rankings, retrieval.query_ids, retrieval.document_ids)


def _table(
    figures: dict[str, float], cutoffs: Sequence[int], about: dict[str, dict[str, Any]]
) -> str:
    lines = []
    if "retrieval" in about:
        lines.append(" " * 9 + "".join(f"{f'@{cutoff}':>9}" for cutoff in cutoffs))
        for title, key in ROWS.items():
            values = "".join(f"{figures[f'{key}@{cutoff}']:>9.4f}" for cutoff in cutoffs)
            lines.append(f"{title:9}{values}")
        lines += [f"{title:9}  {text}" for title, text in _taken_of(about["retrieval"]).items()]
    if "preferences" in about:
        pairs = about["preferences"]
        lines.append(f"alignment{figures['alignment']:>9.4f}")
        if pairs["ties"]:
            lines[-1] += f"  ({pairs['ties']:,} of {pairs['pairs']:,} pairs are ties: not aligned)"
    return "\n".join(lines)


def _taken_of(counts: dict[str, Any]) -> dict[str, str]:
    lines = {}
    if "split" in counts:
        lines["split"] = f"{counts['split']}, of {', '.join(counts['splits'])}"
    lines["queries"] = f"{counts['queries']:,}" + _details(counts, {
        "absent_queries": "more are absent and skipped",
        "queries_without_relevant": "more have no relevant document and are skipped",
    })  # fmt: skip
    lines["documents"] = f"{counts['documents']:,}" + _details(counts, {
        "empty_documents": "without text, ranked last",
        "absent_documents": "more are judged but absent",
        "own_documents": "left out of the ranking of the query with their id",
    })  # fmt: skip
    judged = f"{counts['judged_pairs']:,} judged, " if "judged_pairs" in counts else ""
    lines["pairs"] = f"{judged}{counts['relevant_pairs']:,} relevant"
    return lines


def _details(counts: dict[str, Any], words: dict[str, str]) -> str:
    return "".join(f"; {counts[k]:,} {text}" for k, text in words.items() if counts.get(k))
