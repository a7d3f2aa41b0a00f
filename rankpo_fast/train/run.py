"""A run as a whole: what is settled before a model is loaded, and what is left on disk."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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
    ReplayConfig,
    TrainingConfig,
)
from rankpo_fast.data.cache import check_cache
from rankpo_fast.data.files import whole_file
from rankpo_fast.data.retrieval import RetrievalSet, read_retrieval
from rankpo_fast.data.rows import PreferenceRow, read_preferences
from rankpo_fast.data.tokens import TokenTable, joined
from rankpo_fast.errors import InputError
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.load import load_encoder
from rankpo_fast.model.precision import Precision
from rankpo_fast.paths import inputs, lies_in
from rankpo_fast.retrieval.evaluate import evaluate, evaluation_texts
from rankpo_fast.threads import describe_threads
from rankpo_fast.train import checkpoint as checkpoints
from rankpo_fast.train import output
from rankpo_fast.train.checkpoint import Checkpoint
from rankpo_fast.train.memory import Memory, why_checkpointed
from rankpo_fast.train.ranks import Ranks
from rankpo_fast.train.reporters import About, Reporters, chosen
from rankpo_fast.train.resume import (
    check_same,
    find_checkpoint,
    native_backend,
    settings_before,
    settings_of,
)
from rankpo_fast.train.texts import Texts

MET_FOR = ("save_steps", "eval_steps")  # may differ from run to run, but not from rank to rank


@dataclass(frozen=True, eq=False)
class Run:
    """Made by `prepare`, which refuses what can be refused without a model."""

    stage: str
    model: ModelConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    compute: ComputeConfig
    ranks: Ranks
    retrieval: RetrievalSet | None
    preferences: list[PreferenceRow] | None
    settings: dict[str, Any]  # what a resumed run must share; complete when the output opens
    checkpoint: Checkpoint | None
    precision: Precision
    inputs: list[tuple[str, str]]  # flag and value of each path, or name of a model, that is read

    @classmethod
    def prepare(
        cls,
        stage: str,
        ranks: Ranks,
        precision: Precision,
        model: ModelConfig,
        data: ContrastiveDataConfig | RankPODataConfig,
        loss: ContrastiveLossConfig | RankPOLossConfig,
        training: TrainingConfig,
        evaluation: EvaluationConfig,
        compute: ComputeConfig,
        *replay: ReplayConfig,
    ) -> "Run":
        """Evaluation data, output directory and checkpoint; InputError if one will not do.

        Args:
            precision: what all ranks compute in, of `shared_precision`.
        """
        model = replace(model, bf16=precision.bf16)
        chosen(training.report_to)
        retrieval, preferences = read_evaluation_data(evaluation)
        path, cache = Path(training.output_dir), compute.cache_path
        configs = (model, data, *replay, loss, training, compute)
        resume, overwrite = training.resume is not None, training.overwrite_output_dir
        read = list(inputs(*configs, evaluation))
        output.check(path, read, resume=resume, overwrite=overwrite)
        check_cache(compute)
        if cache is not None and lies_in(cache, path):
            raise InputError(f"--cache_dir {cache} lies in --output_dir {path}: choose another")
        settings = settings_of(stage, ranks, configs)
        checkpoint = find_checkpoint(training, settings, ranks)
        return cls(
            stage, model, training, evaluation, compute, ranks, retrieval, preferences, settings,
            checkpoint, precision, read,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def path(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def finished(self) -> bool:
        """Nothing is left to resume; says so."""
        done = self.training.resume is not None and output.finished(self.path)
        if done:
            said = f"{self.path}: this run is finished, nothing to resume"
            if self.evaluation.asked and not output.evaluated(self.path):
                said += " but for its evaluation, which `rankpo-fast evaluate` makes"
            self.ranks.say(said)
        return done

    def load_encoder(self) -> Encoder:
        """Also checks the evaluation's texts; InputError if one does not fit a micro-batch."""
        encoder = load_encoder(self.model, device=self.device, seed=self.training.seed)
        if self.evaluation.asked:  # which will find these token ids in the cache
            texts = evaluation_texts(self.retrieval, self.preferences or [])
            Texts.tokenize(encoder, *texts, self.compute)
        return encoder

    def measure_memory(self, encoder: Encoder, tables: list[TokenTable]) -> Memory:
        """As asked for, or found, or as the run had it that goes on: it decides how sums are
        rounded and what dropout draws. InputError if what was asked for does not fit."""
        asked = self.compute.max_tokens_per_micro_batch
        gigabytes = self.training.activation_memory_gb
        room = None if gigabytes is None else gigabytes * 2**30
        tokens = asked if self.checkpoint is None else self.checkpoint.max_tokens
        table = tables[0] if len(tables) == 1 else joined(*tables)[0]
        self.ranks.connect()
        spare = self.model.gradient_checkpointing == "auto" and encoder.layers.can_checkpoint
        reason = self._checkpoint_layers(encoder, table, tokens) if spare else None
        memory = Memory.measure(encoder, table, tokens, room)
        memory.checkpointed = reason
        memory.layers = encoder.layers if spare and reason is None else None
        if tokens is not None and self.checkpoint is not None and memory.max_tokens < tokens:
            warnings.warn(
                f"--resume: micro-batches of {memory.max_tokens:,} tokens fit now, {tokens:,} did "
                f"before: sums are rounded otherwise, so the run goes on, but not bit by bit",
                stacklevel=2,
            )
        if self.checkpoint is None and asked is not None and memory.max_tokens < asked:
            raise InputError(f"--max_tokens_per_micro_batch {asked} does not fit into memory: "
                             f"{memory.max_tokens} does")  # fmt: skip
        [shortage] = self.ranks.highest([-memory.max_tokens])  # all have what the least has
        memory.max_tokens = -shortage
        return memory

    def _checkpoint_layers(
        self, encoder: Encoder, table: TokenTable, tokens: int | None
    ) -> str | None:
        """The encoder's layers, where any rank has to; says why."""
        reasons = [r for r in self.ranks.objects(why_checkpointed(encoder, table, tokens)) if r]
        if reasons:
            encoder.layers.checkpoint()
        return next(iter(reasons), None)

    def introduce(self, encoder: Encoder, about: dict[str, str]) -> None:
        """Say what is going to happen, once and visibly."""
        settings = encoder.settings
        parameters = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
        lengths = f"{settings.max_query_length:,} and {settings.max_passage_length:,}"
        lines = {
            **about,
            "model": f"{self.model.model_name_or_path}, {parameters:,} parameters, "
            f"{settings.pooling} pooling, up to {lengths} tokens",
            "device": f"{_name(self.device)}, {self.precision}"
            + (f", on each of {self.ranks.size} ranks" if self.ranks.size > 1 else ""),
            "losses": "Triton and cuBLAS" if self.device.type == "cuda" else native_backend(),
            "attention": f"{encoder.attention}, texts {'packed' if encoder.packed else 'padded'}",
        }
        if reporters := chosen(self.training.report_to):
            lines["reports"] = f"metrics.jsonl, {', '.join(reporters)}"
            if self.checkpoint is not None and {*reporters} - {"tensorboard"}:
                lines["reports"] += " (but for tensorboard as a new run there)"
        if self.checkpoint is not None:
            lines["resume"] = f"{self.checkpoint.path}, after step {self.checkpoint.step:,}"
        self.ranks.say(f"rankpo-fast {self.stage}")
        width = max(map(len, lines))
        for name, text in lines.items():
            self.ranks.say(f"  {name:{width}} {text}")

    def compare_ranks(self) -> None:
        """InputError where ranks were not told the same: some would wait for others for ever."""
        step = 0 if self.checkpoint is None else self.checkpoint.step
        meetings = {f"--{name}": getattr(self.training, name) for name in MET_FOR}
        told = self.ranks.objects({
            **self.settings, **meetings, "whether to evaluate": self.evaluation.asked,
            "step that --resume found": step,
        })  # fmt: skip
        if self.ranks.first:
            for rank, theirs in enumerate(told):
                check_same(f"rank {rank} of {len(told)}", theirs, told[0])
        self.ranks.meet()

    @contextmanager
    def output_opened(self, first_step: int) -> Iterator[Reporters]:
        """Reporters start, an earlier run is cleared where that was asked for, and the directory is
        ours. InputError for a reporter that does not start: the directory is then as it was."""
        config = self.training
        project = config.project or output.PROGRAM
        about = About(self.path, project, config.run_name, self.settings, first_step)
        with ExitStack() as stack:
            reporters = Reporters(chosen(config.report_to) if self.ranks.first else [], about)
            if self.ranks.first:
                with output.reports_aside(self.path, overwrite=config.overwrite_output_dir):
                    stack.enter_context(reporters)
                record = {"stage": self.stage, "settings": self.settings}
                output.start(self.path, record, overwrite=config.overwrite_output_dir)
            self.ranks.meet()
            yield reporters

    def save_checkpoint(
        self, step: int, encoder: Encoder, optimizer: torch.optim.Optimizer, memory: Memory
    ) -> None:
        directory, keep = self.path / output.CHECKPOINTS, self.training.save_total_limit
        checkpoints.save(
            directory, step, encoder, optimizer, self.settings, memory.max_tokens, keep=keep,
            ranks=self.ranks,
        )  # fmt: skip
        self.ranks.meet()

    def evaluate(self, encoder: Encoder) -> dict[str, float]:
        """The first rank has the figures, the others nothing; all encode."""
        figures = evaluate(
            encoder,
            retrieval=self.retrieval,
            preferences=self.preferences,
            cutoffs=self.evaluation.cutoffs,
            max_tokens=self.compute.max_tokens_per_micro_batch,
            legacy=self.evaluation.legacy_metrics,
            cache_dir=self.compute.cache_path,
            ranks=self.ranks,
        )
        self.ranks.meet()
        return figures

    def save_model(self, encoder: Encoder, card: str) -> None:
        if self.ranks.first:
            output.save_model(self.path, encoder, card)
        self.ranks.meet()

    def write_card(self, card: str) -> None:
        if self.ranks.first:
            with whole_file(self.path / output.CARD) as temporary:
                temporary.write_text(card, encoding="utf-8")


def shared_precision(model: ModelConfig, training: TrainingConfig, ranks: Ranks) -> Precision:
    """What --bf16 comes to, the same on all ranks and in a run that goes on as before; all must
    call it. InputError for a --resume CHECKPOINT that cannot be read."""
    precision = None
    if ranks.first:
        before = settings_before(training) if model.bf16 == "auto" else {}
        if isinstance(before.get("--bf16"), bool):
            precision = Precision(before["--bf16"], "as the run that goes on had it")
        else:
            precision = Precision.of(model.bf16, ranks.device)
    return ranks.objects(precision)[0]


def read_evaluation_data(
    config: EvaluationConfig,
) -> tuple[RetrievalSet | None, list[PreferenceRow] | None]:
    """What `evaluate` is to measure; InputError names the file and line of what cannot be read."""
    retrieval = preferences = None
    if config.query_data is not None:
        retrieval = read_retrieval(
            config.query_data,
            config.corpus_data,
            split=config.split,
            keep_same_id=config.keep_same_id,
        )
    if config.preference_data is not None:
        preferences = read_preferences(config.preference_data)
    return retrieval, preferences


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({describe_threads()})"
