"""What commands refuse by their settings alone, before they are imported: InputError each."""

from pathlib import Path

from rankpo_fast.config import (
    ComputeConfig,
    EncodeConfig,
    EncoderConfig,
    EvaluatedConfig,
    EvaluateOutputConfig,
    EvaluationConfig,
    MergeConfig,
    MineConfig,
    MineOutputConfig,
    ModelConfig,
    PlanConfig,
)
from rankpo_fast.errors import InputError
from rankpo_fast.extras import require_extra
from rankpo_fast.paths import check_new_directory, check_output, check_writable, lies_in


def check_evaluate(
    model: EvaluatedConfig,
    evaluation: EvaluationConfig,
    output: EvaluateOutputConfig,
    compute: ComputeConfig,
) -> None:
    evaluation.check_asked()
    _check_cache(compute)
    for flag, path in (("--output", output.output), ("--output_run", output.output_run)):
        if path is not None:
            check_output(flag, path, model, evaluation)
    if output.report is not None:
        require_extra("--report", "plots")
        check_new_directory("--report", output.report, model, evaluation)
        for flag, path in (("--output", output.output), ("--output_run", output.output_run)):
            if path is not None and lies_in(path, output.report):
                raise InputError(f"{flag} {path} lies in --report {output.report}: choose another")
    if output.output_run is not None and len(model.systems) > 1:
        raise InputError("--output_run holds the rankings of one model: leave it out to compare")
    if model.run_files and evaluation.preference_data is not None:
        raise InputError("--run_files ranks documents: leave out --preference_data")
    if model.run_files and evaluation.query_data is None:
        raise InputError("--run_files needs --query_data, which says what is relevant")
    if output.group_key is not None and evaluation.query_data is None:
        raise InputError("--group_key needs --query_data")
    for path in model.run_files:
        if not Path(path).is_file():
            raise InputError(f"--run_files {path}: no such file")


def check_encode(model: EncoderConfig, config: EncodeConfig, compute: ComputeConfig) -> None:
    _check_cache(compute)
    check_output("--output", config.output, model, config)


def check_mine(
    model: EncoderConfig, config: MineConfig, output: MineOutputConfig, compute: ComputeConfig
) -> None:
    _check_cache(compute)
    check_output("--output_file", output.output_file, model, config)
    if config.index_dir is not None:
        check_writable("--index_dir", config.index_dir, directory=True)


def check_merge(config: MergeConfig) -> None:
    check_new_directory("--output_dir", config.output_dir, config)


def check_plan(model: ModelConfig, config: PlanConfig) -> None:
    if config.picture is not None:
        require_extra("--picture", "plots")
        check_output("--picture", config.picture, model, config)


def _check_cache(compute: ComputeConfig) -> None:
    from rankpo_fast.data.cache import check_cache  # imports torch

    check_cache(compute)
