"""What commands refuse by their settings alone, before they are imported: InputError each."""

from pathlib import Path

from rankpo_fast.config import (
    AnnotateConfig,
    ClicksConfig,
    ComputeConfig,
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    DeviceConfig,
    EncodeConfig,
    EncoderConfig,
    EvaluatedConfig,
    EvaluateOutputConfig,
    EvaluationConfig,
    JudgeConfig,
    LabelConfig,
    MergeConfig,
    MineConfig,
    MineOutputConfig,
    ModelConfig,
    PairsConfig,
    PeopleConfig,
    PlanConfig,
    RoundsConfig,
    ScoreConfig,
    TrainingConfig,
)
from rankpo_fast.errors import InputError
from rankpo_fast.extras import require_extra
from rankpo_fast.paths import check_new_directory, check_output, check_writable, lies_in, same_file


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


def check_rounds(
    model: ModelConfig,
    data: ContrastiveDataConfig,
    loss: ContrastiveLossConfig,
    training: TrainingConfig,
    evaluation: EvaluationConfig,
    compute: ComputeConfig,
    rounds: RoundsConfig,
) -> None:
    if rounds.mine_first and model.from_scratch:
        raise InputError("--mine_first: random weights find no hard negatives, leave it out")
    if model.trim_vocabulary:
        raise InputError("--trim_vocabulary: what is mined may need the tokens that are dropped; "
                         "train on the last round's rows with it")  # fmt: skip
    if data.train_data_weights is not None:
        raise InputError("--train_data_weights: mined rows are those of one file; leave it out")
    if training.resume not in (None, "newest"):
        raise InputError(f"--resume {training.resume}: rounds go on where they were, give --resume "
                         f"alone")  # fmt: skip
    if "-" in (*data.train_data, rounds.mining_corpus):
        raise InputError("-: standard input can be read once, but each round reads the rows: give "
                         "a file")  # fmt: skip
    check_writable("--output_dir", training.output_dir, directory=True)
    if rounds.index_dir is not None:
        check_writable("--index_dir", rounds.index_dir, directory=True)


def check_merge(config: MergeConfig) -> None:
    check_new_directory("--output_dir", config.output_dir, config)


def check_clicks(config: ClicksConfig) -> None:
    check_output("--output_file", config.output_file, config)
    if same_file(config.output_file, config.propensity):
        raise InputError(f"--output_file {config.output_file} is also read (--propensity "
                         f"{config.propensity}): choose another name")  # fmt: skip


def check_label(config: LabelConfig) -> None:
    from rankpo_fast.label.write import outputs

    require_extra("label", "label")
    if config.engine == "spark":
        require_extra("--engine spark", "spark")
    check_writable("--output_dir", config.output_dir, directory=True)
    for path in outputs(Path(config.output_dir)):
        check_output("--output_dir", path, config)
        if path.exists() and not config.overwrite_output_dir:
            raise InputError(f"{path} is there already: choose another --output_dir, or give "
                             f"--overwrite_output_dir")  # fmt: skip


def check_pairs(model: EncoderConfig, config: PairsConfig, compute: ComputeConfig) -> None:
    _check_cache(compute)
    check_output("--output_file", config.output_file, model, config)


OF_PEOPLE = {"pairs", "output", "prompt", "consensus", "ties_file", "journal", "report"}


def check_annotate(judging: JudgeConfig, people: PeopleConfig, config: AnnotateConfig) -> None:
    if people.people:
        for name in [*judging.changed(), *config.changed()]:
            if name not in OF_PEOPLE:
                raise InputError(f"--{name} is not of --people: leave out one of them")
    if config.write_prompt is not None:
        check_output("--write_prompt", config.write_prompt, judging, config)
        return
    outputs: dict[str, str | Path | None] = {
        "--report": config.report_path,
        "--report's picture": config.picture_path,
    }
    if config.report_on is None:
        require_extra("annotate", "judge")
        outputs |= {
            "--output": config.output, "--journal": config.journal_path,
            "--ties_file": config.ties_file, "--batch_out": config.batch_out,
            "--journal's token": f"{config.journal_path}.token" if people.people else None,
        }  # fmt: skip
    given = {flag: path for flag, path in outputs.items() if path is not None}
    for flag, path in given.items():
        check_output(flag, path, judging, config)
        for other, used in given.items():
            if other != flag and same_file(path, used):
                raise InputError(f"{flag} and {other} are both {path}: give two names")


def check_score(config: ScoreConfig, compute: DeviceConfig) -> None:
    check_output("--output_file", config.output_file, config)


def check_plan(model: ModelConfig, config: PlanConfig) -> None:
    if config.picture is not None:
        require_extra("--picture", "plots")
        check_output("--picture", config.picture, model, config)


def _check_cache(compute: ComputeConfig) -> None:
    from rankpo_fast.data.cache import check_cache  # imports torch

    check_cache(compute)
