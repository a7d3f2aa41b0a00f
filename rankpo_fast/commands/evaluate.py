"""`rankpo-fast evaluate`: an encoder's figures and what they were taken of, printed and written."""

import json
from functools import partial

from rankpo_fast.config import (
    ComputeConfig,
    EncoderConfig,
    EvaluateOutputConfig,
    EvaluationConfig,
)
from rankpo_fast.data.files import whole_file
from rankpo_fast.data.retrieval import RetrievalSet
from rankpo_fast.errors import InputError
from rankpo_fast.functions import measured
from rankpo_fast.model.load import load_encoder
from rankpo_fast.ranks import Ranks
from rankpo_fast.retrieval.evaluate import Evaluation, read_evaluation_data
from rankpo_fast.retrieval.ranking import write_run


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
        load = partial(load_encoder, model, device=ranks.device)
        found = measured(load, data, evaluation, compute, ranks=ranks, progress=True)
        if ranks.first:
            print(found)
            _write(found, data.retrieval, output)
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


def _write(found: Evaluation, retrieval: RetrievalSet | None, output: EvaluateOutputConfig) -> None:
    if output.output is not None:
        with whole_file(output.output) as temporary:
            text = json.dumps({**found.figures, **found.counts}, indent=2)
            temporary.write_text(text + "\n", encoding="utf-8")
    if output.output_run is not None:
        assert retrieval is not None  # of `_check_ids`
        write_run(output.output_run, found.rankings, retrieval.query_ids, retrieval.document_ids)
