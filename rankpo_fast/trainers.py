"""Both stages for Python callers.

    trainer = ContrastiveTrainer("BAAI/bge-small-en-v1.5", rows, output_dir="outputs/stage1")
    trainer.train()
    RankPOTrainer(trainer.encoder, preferences, output_dir="outputs/stage2").train()

The commands of the command line are these.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from rankpo_fast.config import (
    ComputeConfig,
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    EncoderConfig,
    EvaluationConfig,
    GradedConfig,
    ModelConfig,
    RankPODataConfig,
    RankPOLossConfig,
    ReplayConfig,
    RetentionConfig,
    TeacherConfig,
    TrainingConfig,
)
from rankpo_fast.errors import InputError
from rankpo_fast.fields import Config
from rankpo_fast.functions import evaluate
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.trainable import lent
from rankpo_fast.paths import texts_located
from rankpo_fast.retrieval.evaluate import Evaluation
from rankpo_fast.settings import gathered
from rankpo_fast.train.callbacks import Callback
from rankpo_fast.train.contrastive import train_contrastive
from rankpo_fast.train.frozen import COMPUTING
from rankpo_fast.train.rankpo import train_rankpo
from rankpo_fast.train.result import TrainingResult

# What may be said of an Encoder that is given; the rest was said when it was loaded.
OF_TRAINING = (
    "bf16", "save_dtype", "gradient_checkpointing", "mlp_chunk", "torch_compile",
    "use_liger_kernel",
)  # fmt: skip


class Trainer:
    """What the trainers of both stages share."""

    settings: ClassVar[Sequence[type[Config]]]  # in the order in which `_train` takes them

    def __init__(
        self,
        model: str | os.PathLike[str] | Encoder,
        train_data: Any = (),
        *settings: Config,
        callbacks: Callback | Sequence[Callback] = (),
        **keywords: Any,
    ):
        """
        Args:
            model: an Encoder, which is trained in place, or the name of one on the Hub, or its
                directory.
            train_data: rows, as a list of dicts or a datasets.Dataset; a path or several, as the
                command line takes them; or a list of paths and data sets. Stage 2 does without
                where it has `graded_data` or `teacher_data`.
            settings: objects of the classes of `rankpo_fast.config`, at most one of each.
            callbacks: called while it trains, on the first rank.
            keywords: single settings by their names, which are the flags of the command; they go
                before `settings`.

        Raises:
            InputError: a setting that is unknown, is missing or cannot be used; `name` tells which.
                What only data and model can tell is raised by `train`.
        """
        caller = type(self).__name__
        if isinstance(train_data, Config):  # settings that follow the model
            settings, train_data = (train_data, *settings), ()
        given = model if isinstance(model, Encoder) else None
        own = {"train_data": train_data, "model_name_or_path": model}
        if given is not None:
            _check_encoder(caller, given, settings, keywords)
            alone = os.environ.get("WORLD_SIZE", "1") == "1"
            device = str(given.device) if alone else given.device.type
            own |= {"model_name_or_path": given.name, "device": device}
        callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
        for number, callback in enumerate(callbacks):
            if not isinstance(callback, Callback):
                kind = type(callback).__name__
                raise InputError(f"callbacks[{number}] must be a Callback, got {kind}", "callbacks")
        gathered_settings = gathered(caller, self.settings, settings, own | keywords)
        self._configs: dict[type, Any] = dict(zip(self.settings, gathered_settings, strict=True))
        self._callbacks = callbacks
        self._given, self._loaded = given, given  # the latter also where `encoder` has loaded it
        self._trained = False  # whether the loaded one has been
        self._lost = False  # whether a training that was not finished has taken it

    @property
    def encoder(self) -> Encoder:
        """The one that is trained: until then as it starts, loaded now if need be.

        Raises:
            InputError: a training has ended before its end, and the encoder was not given.
        """
        if self._loaded is None and self._lost:
            raise InputError(
                "the training has not ended, so there is no trained encoder: a trainer with "
                'resume="newest" goes on with it'
            )
        if self._loaded is None:
            self._loaded = load_encoder(
                self._configs[ModelConfig],
                device=self._device,
                seed=self._configs[TrainingConfig].seed,
            )
        return self._loaded

    @property
    def _device(self) -> torch.device:
        return self._configs[ComputeConfig].torch_device()

    def train(self) -> TrainingResult:
        """Train, and leave the model in `output_dir`.

        Under torchrun all ranks must call it.

        Raises:
            InputError: rows, model or settings that cannot be used, before the first step.
            FloatingPointError: loss or gradient is not finite; the weights are as before that step.
            TrainingStopped: by SIGTERM or Ctrl-C, once the step is finished and saved; another
                trainer with `resume="newest"` goes on from there, with an Encoder as it was at the
                start.
        """
        configs = self._configs.values()
        again = self._trained and self._given is None  # from the start, as its settings say
        try:
            with lent(self._given), texts_located(*configs):
                result = self._train(
                    *configs, encoder=None if again else self._loaded, named=self._given is None,
                    callbacks=self._callbacks,
                )  # fmt: skip
        except BaseException as error:
            if self._given is None and not isinstance(error, InputError):  # which comes before
                self._loaded, self._lost = None, True
            raise
        self._trained, self._lost = True, False
        self._loaded = result.encoder or self._finished(result.output_dir)
        return result

    def _finished(self, directory: Path) -> Encoder:
        """That of a run that had been finished before, in the place of one that was given."""
        model = self._configs[ModelConfig]
        computing = {name: getattr(model, name) for name in COMPUTING}
        config = EncoderConfig(str(directory), **computing)
        encoder = load_encoder(config, device=self._device)
        if self._given is None:
            return encoder
        self._given.backbone.load_state_dict(encoder.backbone.state_dict())
        return self._given

    def _train(self, *configs: Any, **more: Any) -> TrainingResult:
        raise NotImplementedError

    def evaluate(self, **keywords: Any) -> Evaluation:
        """Measure the encoder, as it is now.

        Args:
            keywords: fields of `EvaluationConfig` that are to differ from those of the trainer.

        Raises:
            InputError: there is nothing to measure, or something that cannot be used.
        """
        given = [self._configs[EvaluationConfig]]
        [config] = gathered("evaluate", [EvaluationConfig], given, keywords)
        return evaluate(self.encoder, config, self._configs[ComputeConfig])

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the encoder where transformers and sentence-transformers load it; `train` has done
        so in `output_dir`. Of several ranks the first one writes."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            self.encoder.save(Path(directory).expanduser())


class ContrastiveTrainer(Trainer):
    """Stage 1: InfoNCE of each query against all passages of its batch.

    `rankpo-fast contrastive --help` lists the settings.
    """

    settings = (
        ModelConfig, ContrastiveDataConfig, ContrastiveLossConfig, TrainingConfig,
        EvaluationConfig, ComputeConfig,
    )  # fmt: skip

    def _train(self, *configs: Any, **more: Any) -> TrainingResult:
        return train_contrastive(*configs, **more)


class RankPOTrainer(Trainer):
    """Stage 2: RankPO, SimRankPO or SFT of pairs of passages of which one was preferred, of graded
    passages, and distillation of a teacher's scores.

    `rankpo-fast rankpo --help` lists the settings.
    """

    settings = (
        ModelConfig, RankPODataConfig, RankPOLossConfig, TrainingConfig, EvaluationConfig,
        ComputeConfig, ReplayConfig, GradedConfig, TeacherConfig, RetentionConfig,
    )  # fmt: skip

    def _train(self, *configs: Any, **more: Any) -> TrainingResult:
        return train_rankpo(*configs, **more)


def _check_encoder(
    caller: str, encoder: Encoder, settings: Sequence[Config], keywords: dict[str, Any]
) -> None:
    """InputError for settings that an encoder has been loaded with."""
    if any(isinstance(one, ModelConfig) for one in settings):
        raise InputError(f"{caller}: the model is an Encoder, so ModelConfig has no say: give "
                         f"{', '.join(OF_TRAINING)} as keywords")  # fmt: skip
    devices = [one.device for one in settings if isinstance(one, ComputeConfig)]
    for device in [*devices, keywords.get("device", "auto")]:
        if device not in ("auto", str(encoder.device), encoder.device.type):
            raise InputError(f"{caller}: device {device}, but the Encoder is on {encoder.device}: "
                             f"load it there", "device")  # fmt: skip
    for name in keywords:
        if name in EncoderConfig.__dataclass_fields__ and name not in OF_TRAINING:
            raise InputError(
                f"{caller}: {name} was settled when the Encoder was loaded: give it to "
                f"Encoder.from_pretrained, or the model by its name",
                name,
            )
        if name in ModelConfig.__dataclass_fields__ and name not in OF_TRAINING:
            raise InputError(f"{caller}: {name} needs the model by its name, not an Encoder", name)
