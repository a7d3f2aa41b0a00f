"""`rankpo-fast evaluate`: figures of encoders and what they were taken of, printed and written."""

import dataclasses
import json
from functools import partial
from pathlib import Path

from rankpo_fast.config import (
    ComputeConfig,
    EvaluatedConfig,
    EvaluateOutputConfig,
    EvaluationConfig,
)
from rankpo_fast.data.files import whole_directory, whole_file
from rankpo_fast.data.retrieval import RetrievalSet
from rankpo_fast.errors import InputError
from rankpo_fast.functions import measured
from rankpo_fast.model.load import load_encoder
from rankpo_fast.ranks import Ranks
from rankpo_fast.retrieval.evaluate import (
    Evaluation,
    EvaluationData,
    measure_run,
    read_evaluation_data,
)
from rankpo_fast.retrieval.ranking import write_run
from rankpo_fast.retrieval.report import Report, comparison


def run(
    model: EvaluatedConfig,
    evaluation: EvaluationConfig,
    output: EvaluateOutputConfig,
    compute: ComputeConfig,
) -> None:
    """Raises InputError for what the user can put right, most of it before the model is loaded."""
    with Ranks.joined(compute) as ranks:
        data = EvaluationData()
        with ranks.first_ahead():
            if ranks.reads:
                data = read_evaluation_data(evaluation, output.group_key)
            if ranks.first and output.output_run is not None:
                _check_ids(output.output_run, data.retrieval)
        systems = {}
        for name, is_model in reversed(model.systems):  # run files first: they can be refused
            systems[name] = _measured(name, is_model, model, data, evaluation, compute, ranks)
        if ranks.first:
            _tell({name: systems[name] for name, _ in model.systems}, data.retrieval, output)
        ranks.meet()


def _measured(
    name: str, is_model: bool, model: EvaluatedConfig, data: EvaluationData,
    evaluation: EvaluationConfig, compute: ComputeConfig, ranks: Ranks,
) -> Evaluation:  # fmt: skip
    if not is_model:
        with ranks.first_ahead():
            if not ranks.first:
                return Evaluation()
            assert data.retrieval is not None, "check_evaluate"
            return measure_run(
                Path(name), data.retrieval, evaluation.cutoffs, legacy=evaluation.legacy_metrics
            )
    one = dataclasses.replace(model, model_name_or_path=name, compare=[], run_files=[])
    load = partial(load_encoder, one, device=ranks.device)
    return measured(load, data, evaluation, compute, ranks=ranks, progress=True)


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


def _tell(
    systems: dict[str, Evaluation], retrieval: RetrievalSet | None, output: EvaluateOutputConfig
) -> None:
    """Print what was found and write what is asked for."""
    several = len(systems) > 1
    for name, found in systems.items():
        print(f"{name}:\n{found}" if several else found)
    if several:
        print(comparison(systems))
    if output.output_run is not None:
        assert retrieval is not None  # of `_check_ids`
        [found] = systems.values()
        write_run(output.output_run, found.rankings, retrieval.query_ids, retrieval.document_ids)
    if output.output is None and output.report is None:
        return
    report = Report.of(systems, retrieval, output.margin_scale)
    if output.output is not None:
        with whole_file(output.output) as temporary:
            text = json.dumps(report.as_json(), indent=2)
            temporary.write_text(text + "\n", encoding="utf-8")
    if output.report is not None:
        from rankpo_fast.retrieval.picture import png

        with whole_directory(output.report) as folder:
            (folder / "report.md").write_text(report.as_markdown("report.png"), encoding="utf-8")
            (folder / "report.png").write_bytes(png(report))
            _write_queries(folder / "per_query.jsonl", systems, retrieval)


def _write_queries(
    path: Path, systems: dict[str, Evaluation], retrieval: RetrievalSet | None
) -> None:
    """Figures of each query, {name: value}, of two models one under the other's name."""
    if retrieval is None:
        return
    with path.open("w", encoding="utf-8") as file:
        for number in range(len(retrieval.queries)):
            row = {"query": str(number) if retrieval.query_ids is None else
                   retrieval.query_ids[number]}  # fmt: skip
            if retrieval.groups is not None:
                row["group"] = retrieval.groups[number]
            figures = {
                system: {name: float(values[number]) for name, values in found.by_query.items()}
                for system, found in systems.items()
            }
            whole = figures if len(figures) > 1 else next(iter(figures.values()))
            file.write(json.dumps({**row, **whole}, ensure_ascii=False) + "\n")
