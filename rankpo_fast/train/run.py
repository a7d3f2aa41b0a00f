"""A run as a whole: what is settled before a model is loaded, and what is left on disk."""

import hashlib
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from rankpo_fast.data.rows import PreferenceRow, RetrievalSet, read_preferences, read_retrieval
from rankpo_fast.data.tokens import TokenTable, joined
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.load import load_encoder
from rankpo_fast.paths import check_writable, lies_in
from rankpo_fast.retrieval.evaluate import evaluate, evaluation_texts
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train import output
from rankpo_fast.train.checkpoint import Checkpoint
from rankpo_fast.train.log import check_report_to
from rankpo_fast.train.memory import Memory
from rankpo_fast.train.texts import Texts
from rankpo_kernels import native

# What a run that goes on may change: none of it touches the weights.
FREE_TO_CHANGE = {
    "output_dir", "resume", "overwrite_output_dir", "logging_steps", "eval_steps", "save_steps",
    "save_total_limit", "report_to", "cache_dir", "train_data", "device",
}  # fmt: skip
READ = {
    "model_name_or_path", "tokenizer_name", "reference_model_name_or_path", "train_data",
    "query_data", "corpus_data", "preference_data",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Run:
    """Made by `prepare`, which refuses what can be refused without a model."""

    stage: str
    model: ModelConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    compute: ComputeConfig
    device: torch.device
    retrieval: RetrievalSet | None
    preferences: list[PreferenceRow] | None
    settings: dict[str, Any]  # what a resumed run must share
    checkpoint: Checkpoint | None

    @classmethod
    def prepare(
        cls,
        stage: str,
        model: ModelConfig,
        data: ContrastiveDataConfig | RankPODataConfig,
        loss: ContrastiveLossConfig | RankPOLossConfig,
        training: TrainingConfig,
        evaluation: EvaluationConfig,
        compute: ComputeConfig,
    ) -> "Run":
        """Evaluation data, output directory and checkpoint; InputError if one will not do."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise InputError(
                "training runs in one process, but WORLD_SIZE is > 1: start it without torchrun"
            )
        check_report_to(training.report_to)
        device = compute.torch_device()
        retrieval, preferences = read_evaluation_data(evaluation)
        path, cache = Path(training.output_dir), compute.cache_path
        inputs = _inputs(model, data, loss, evaluation)
        resume, overwrite = training.resume is not None, training.overwrite_output_dir
        output.check(path, inputs, resume=resume, overwrite=overwrite)
        check_writable("--cache_dir", cache, directory=True)
        if lies_in(cache, path):
            raise InputError(f"--cache_dir {cache} lies in --output_dir {path}: choose another")
        configs = (model, data, loss, training, compute)
        settings = _settings(stage, configs, data.train_data, device)
        checkpoint = _find_checkpoint(training, settings)
        return cls(
            stage, model, training, evaluation, compute, device, retrieval, preferences, settings,
            checkpoint,
        )  # fmt: skip

    @property
    def path(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def finished(self) -> bool:
        """Nothing is left to resume; says so."""
        done = self.training.resume is not None and output.finished(self.path)
        if done:
            _say(f"{self.path}: this run is finished, nothing to resume")
        return done

    def load_encoder(self) -> Encoder:
        """Also checks the evaluation's texts; InputError if one does not fit a micro-batch."""
        encoder = load_encoder(self.model, device=self.device, seed=self.training.seed)
        if self.evaluation.asked:  # which will find these token ids in the cache
            texts = evaluation_texts(self.retrieval, self.preferences or [])
            Texts.tokenize(encoder, *texts, self.compute)
        return encoder

    def measure_memory(self, encoder: Encoder, tables: list[TokenTable]) -> Memory:
        gigabytes = self.compute.activation_memory_gb
        room = None if gigabytes is None else gigabytes * 2**30
        table, _ = joined(*tables)
        return Memory.measure(encoder, table, self.compute.max_tokens_per_micro_batch, room)

    def introduce(self, encoder: Encoder, about: dict[str, str]) -> None:
        """Say what is going to happen, once and visibly."""
        settings = encoder.settings
        parameters = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
        lengths = f"{settings.max_query_length:,} and {settings.max_passage_length:,}"
        lines = {
            **about,
            "model": f"{self.model.model_name_or_path}, {parameters:,} parameters, "
            f"{settings.pooling} pooling, up to {lengths} tokens",
            "device": f"{_name(self.device)}, {'bf16' if encoder.bf16 else 'fp32'}",
            "losses": _backend(self.device),
        }
        if self.checkpoint is not None:
            lines["resume"] = f"{self.checkpoint.path}, after step {self.checkpoint.step:,}"
        _say(f"rankpo-fast {self.stage}")
        for name, text in lines.items():
            _say(f"  {name:7} {text}")

    def open_output(self) -> None:
        record = {"stage": self.stage, "settings": self.settings}
        output.start(self.path, record, overwrite=self.training.overwrite_output_dir)

    def save_checkpoint(
        self, step: int, encoder: Encoder, optimizer: torch.optim.Optimizer
    ) -> None:
        directory, keep = self.path / output.CHECKPOINTS, self.training.save_total_limit
        checkpoints.save(directory, step, encoder, optimizer, self.settings, keep=keep)

    def evaluate(self, encoder: Encoder) -> dict[str, float]:
        return evaluate(
            encoder,
            retrieval=self.retrieval,
            preferences=self.preferences,
            cutoffs=self.evaluation.cutoffs,
            max_tokens=self.compute.max_tokens_per_micro_batch,
            legacy=self.evaluation.legacy_metrics,
            cache_dir=self.compute.cache_path,
        )

    def save_model(self, encoder: Encoder) -> None:
        output.save_model(self.path, encoder)


def read_evaluation_data(
    config: EvaluationConfig,
) -> tuple[RetrievalSet | None, list[PreferenceRow] | None]:
    """What `evaluate` is to measure; InputError names the file and line of what cannot be read."""
    retrieval = preferences = None
    if config.query_data is not None:
        retrieval = read_retrieval(config.query_data, config.corpus_data)
    if config.preference_data is not None:
        preferences = read_preferences(config.preference_data)
    return retrieval, preferences


def _inputs(*configs: Any) -> list[tuple[str, str]]:
    """Flag and value of each path, or name of a model, that is read."""
    inputs = []
    for config in configs:
        for name in sorted(READ & asdict(config).keys()):
            value = getattr(config, name)
            paths = value if isinstance(value, list) else [value]
            inputs += [(f"--{name}", path) for path in paths if path is not None]
    return inputs


def _settings(
    stage: str, configs: tuple, train_data: list[str], device: torch.device
) -> dict[str, Any]:
    settings = {"stage": stage, "device": device.type, "processes": 1}
    for config in configs:
        values = asdict(config).items()
        settings |= {f"--{name}": value for name, value in values if name not in FREE_TO_CHANGE}
    digests = []
    for path in train_data:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return {**settings, "content of --train_data": digests}


def _find_checkpoint(training: TrainingConfig, settings: dict[str, Any]) -> Checkpoint | None:
    """The one to go on from; InputError if it, or the run there, was made under other settings."""
    if training.resume is None:
        return None
    path = Path(training.output_dir)
    record = output.read_record(path) or {}
    _check_same(path, record.get("settings", settings), settings)
    if output.finished(path):
        return None
    if training.resume == "newest":
        directory = path / output.CHECKPOINTS
        checkpoint = checkpoints.newest(directory)
        if checkpoint is None:
            _say(f"--resume: no complete checkpoint in {directory}, starting from the beginning")
            return None
    else:
        checkpoint = checkpoints.read(Path(training.resume))
    _check_same(checkpoint.path, checkpoint.settings, settings)
    return checkpoint


def _check_same(path: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    names = dict.fromkeys([*was, *now])
    changed = [
        f"  {name} was {was.get(name)}, is {now.get(name)}"
        for name in names
        if was.get(name) != now.get(name)
    ]
    if changed:
        lines = "\n".join(changed)
        raise InputError(f"--resume: {path} was made with other settings:\n{lines}")


def _backend(device: torch.device) -> str:
    if device.type == "cuda":
        return "in chunks by cuBLAS"
    library = native.library()
    return (
        "in torch" if library is None else f"native ({library.rankpo_instruction_set().decode()})"
    )


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
