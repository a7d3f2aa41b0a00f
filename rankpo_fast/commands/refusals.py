"""What commands refuse by their settings alone, before they are imported: InputError each."""

from rankpo_fast.config import (
    ComputeConfig,
    DeviceConfig,
    EncodeConfig,
    EncoderConfig,
    EvaluateOutputConfig,
    EvaluationConfig,
    MineConfig,
    MineOutputConfig,
    ModelConfig,
    PlanConfig,
    ScoreConfig,
)
from rankpo_fast.extras import require_extra
from rankpo_fast.paths import check_output


def check_evaluate(
    model: EncoderConfig,
    evaluation: EvaluationConfig,
    output: EvaluateOutputConfig,
    compute: ComputeConfig,
) -> None:
    evaluation.check_asked()
    _check_cache(compute)
    for flag, path in (("--output", output.output), ("--output_run", output.output_run)):
        if path is not None:
            check_output(flag, path, model, evaluation)


def check_encode(model: EncoderConfig, config: EncodeConfig, compute: ComputeConfig) -> None:
    _check_cache(compute)
    check_output("--output", config.output, model, config)


def check_mine(
    model: EncoderConfig, config: MineConfig, output: MineOutputConfig, compute: ComputeConfig
) -> None:
    _check_cache(compute)
    check_output("--output_file", output.output_file, model, config)


def check_score(config: ScoreConfig, compute: DeviceConfig) -> None:
    check_output("--output_file", config.output_file, config)


def check_plan(model: ModelConfig, config: PlanConfig) -> None:
    if config.picture is not None:
        require_extra("--picture", "plots")
        check_output("--picture", config.picture, model, config)


def _check_cache(compute: ComputeConfig) -> None:
    from rankpo_fast.data.cache import check_cache  # imports torch

    check_cache(compute)
