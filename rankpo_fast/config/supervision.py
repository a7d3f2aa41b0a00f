"""What stage 2 learns of several passages of a query at once: grades, and a teacher's scores."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from rankpo_fast.data.memory import Rows, Source
from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config, check_above, check_at_least, check_names, flag


@dataclass(frozen=True)
class GradedConfig(Config):
    """Passages with grades; their loss counts beside that of the preference pairs, or without any.

    It has --beta, --temperature, --gamma_beta_ratio, --loss_type, --label_smoothing and the
    reference of the pairs' loss.
    """

    _argument_group_name = "graded"

    graded_data: list[Source] = flag(
        'JSONL files of {"query", "passages": [str], "grades": [number]}, or BEIR directories.', []
    )
    graded_weight: float = flag("Of their loss, beside that of the pairs, which is 1.", 1.0)
    graded_form: Literal["pairs", "plackett_luce", "lambda"] = flag(
        "RankPO's mean over pairs of different grades; the likelihood of the whole ranking; or the "
        "pairs weighed by what nDCG would change if they swapped places (LiPO-lambda).", "pairs"
    )  # fmt: skip
    graded_batch_size: int | None = flag(
        "Queries of them per batch. [--per_device_train_batch_size]", None
    )
    graded_group_size: int = flag("Passages of a query, drawn anew every epoch.", 8)
    graded_split: str | None = flag(
        "Which qrels/SPLIT.tsv of a BEIR directory. [train, or the only one]", None
    )

    def check(self) -> None:
        check_names(self, "graded_data", "graded_split")
        check_above(self, 0, "graded_weight")
        check_at_least(self, 1, "graded_batch_size")
        check_at_least(self, 2, "graded_group_size")
        _check_alone(self, "graded_data", "rows of passages with grades")
        directories = (not isinstance(x, Rows) and Path(x).is_dir() for x in self.graded_data)
        if self.graded_split is not None and not any(directories):
            raise InputError("--graded_split needs --graded_data to be a BEIR directory")


@dataclass(frozen=True)
class TeacherConfig(Config):
    """Passages with the scores of a reranker, or of any other teacher, which similarities follow.

    The student's logits are cosines / student_temperature, the teacher's are scores /
    teacher_temperature.
    """

    _argument_group_name = "teacher"

    teacher_data: list[Source] = flag(
        'JSONL files of {"query", "passages": [str], "scores": [number]}, as `rankpo-fast score` '
        "writes them, or of pos, neg, pos_scores, neg_scores.", []
    )  # fmt: skip
    teacher_weight: float = flag("Of their loss, beside that of the pairs, which is 1.", 1.0)
    teacher_loss: Literal["margin_mse", "kl"] = flag(
        "Squared errors of margins between passages, or the divergence of softmaxes over them.",
        "kl",
    )
    teacher_pairs: Literal["all", "first"] = flag(
        "Of margin_mse: all pairs of passages, or the first with each other.", "all"
    )
    teacher_temperature: float = flag("The teacher's scores are divided by it.", 1.0)
    student_temperature: float = flag("Cosine similarities are divided by it.", 0.02)
    teacher_batch_size: int | None = flag(
        "Queries of them per batch. [--per_device_train_batch_size]", None
    )
    teacher_group_size: int = flag(
        "Passages of a query: the first, and others drawn anew every epoch.", 8
    )

    def check(self) -> None:
        check_names(self, "teacher_data")
        check_above(self, 0, "teacher_weight", "teacher_temperature", "student_temperature")
        check_at_least(self, 1, "teacher_batch_size")
        check_at_least(self, 2, "teacher_group_size")
        _check_alone(self, "teacher_data", "rows of passages with scores")
        if self.teacher_pairs != "all" and self.teacher_loss != "margin_mse":
            raise InputError("--teacher_pairs needs --teacher_loss margin_mse")


def _check_alone(config: Any, data: str, what: str) -> None:
    """InputError for a setting of rows that are not given."""
    for name, default in ((f.name, f.default) for f in fields(config) if f.name != data):
        if not getattr(config, data) and getattr(config, name) != default:
            raise InputError(f"--{name} needs --{data}, {what}")


NO_GRADES, NO_TEACHER = GradedConfig(), TeacherConfig()
