"""Mines, trains, mines again: stage 1 in rounds.

    round-0/model/        trained on the rows as they are, unless the model given mines at once
    round-K/rows.jsonl    rows with what the model of the round before mined
    round-K/model/        that model, trained on them: a training's output directory
    rounds.json           what is done, and what it was made from
    training.json, and at the end the files of the last round's model

    combined       rows of round K = those of round K - 1, and what is mined for them
    incremental    rows of round K = queries and positives, and what is mined for them

A step that is recorded is not done again. One that was cut short is: a training goes on from its
checkpoint, and mining gives the same rows each time. So a run that was stopped ends as one that was
not, bit by bit.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rankpo_fast.config import (
    ComputeConfig,
    ContrastiveDataConfig,
    ContrastiveLossConfig,
    EncoderConfig,
    EvaluationConfig,
    MineConfig,
    MiningConfig,
    ModelConfig,
    RoundsConfig,
    TrainingConfig,
)
from rankpo_fast.data.cache import check_cache
from rankpo_fast.data.files import sha256_of, whole_file
from rankpo_fast.data.rows import read_contrastive, write_jsonl
from rankpo_fast.errors import InputError
from rankpo_fast.functions import measured, mined
from rankpo_fast.model.directories import MODEL_FLAG
from rankpo_fast.model.encoder import Encoder
from rankpo_fast.model.load import load_encoder
from rankpo_fast.paths import inputs
from rankpo_fast.ranks import Ranks
from rankpo_fast.retrieval.evaluate import read_evaluation_data
from rankpo_fast.retrieval.mining import searched_passages
from rankpo_fast.retrieval.reranked import RerankerFilter
from rankpo_fast.train import output
from rankpo_fast.train.contrastive import train_contrastive
from rankpo_fast.train.resume import (
    ARITHMETIC,
    check_same,
    data_content,
    model_content,
    settings_of,
    shared_precision,
)

STATE, ROWS, MODEL, START = "rounds.json", "rows.jsonl", "model", "start"
REPORT, FIGURE = "report.md", "rounds.png"
CONTENT, RANK = "content of ", "lora_rank"
Steps = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """Of the trainings and of what lies between."""

    model: ModelConfig
    data: ContrastiveDataConfig
    loss: ContrastiveLossConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    compute: ComputeConfig
    rounds: RoundsConfig

    @property
    def path(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def numbers(self) -> range:
        return range(1 if self.rounds.mine_first else 0, self.rounds.rounds + 1)

    def decisive(self, ranks: Ranks) -> dict[str, Any]:
        """All that decides rows, weights and figures; but more rounds may be asked for later."""
        configs = (self.model, self.data, self.loss, self.training, self.compute, self.rounds)
        found = settings_of("rounds", ranks, configs)
        found |= {f"--{name}": value for name, value in asdict(self.evaluation).items()}
        del found["--rounds"]
        found["--index_dir"] = self.rounds.index_dir is not None  # which rounds vectors to fp16
        for config, name in [
            (self.rounds, "mining_corpus"), (self.evaluation, "query_data"),
            (self.evaluation, "corpus_data"), (self.evaluation, "preference_data"),
        ]:  # fmt: skip
            del found[f"--{name}"]
            given = getattr(config, name)
            listed = given if isinstance(given, list) else [] if given is None else [given]
            found[f"{CONTENT}--{name}"] = [data_content(source) for source in listed]
        return found


def run_rounds(settings: Settings) -> tuple[Settings, Steps]:
    """All rounds, or those that are left; the output directory holds the last round's model.

    Returns the settings as they were used, and what each step left.

    Raises:
        InputError: what the user can put right, most of it before anything is mined or trained.
        TrainingStopped: SIGTERM or Ctrl-C in a training.
    """
    with Ranks.joined(settings.compute) as ranks, output.claimed(settings.training, ranks):
        if ranks.size > 1:
            raise InputError("rounds runs in one process: leave out torchrun")
        _check_data(settings, ranks.device)
        precision = shared_precision(settings.model, settings.training, ranks)
        settings = replace(settings, model=replace(settings.model, bf16=precision.bf16))
        decisive = settings.decisive(ranks)
        steps = _Steps.opened(settings, decisive)
        first = Made(
            settings.model.model_name_or_path, _hash(decisive[f"{CONTENT}{MODEL_FLAG}"]),
            None, _hash(decisive[f"{CONTENT}--train_data"]),
        )  # fmt: skip
        rounds = _Rounds(settings, steps, ranks, first)
        if settings.evaluation.asked and not settings.model.from_scratch:
            steps.done(START, {"model": first.model_hash}, lambda: first.model_hash,
                       lambda: {"figures": rounds.figures(first.model)})  # fmt: skip
        last = first
        for number in settings.numbers:
            last = rounds.done(number, last)
        if not output.finished(settings.path) or _model_hash(settings.path) != last.model_hash:
            output.adopt_model(settings.path, Path(last.model))
    return settings, steps.known


def _check_data(settings: Settings, device: torch.device) -> None:
    """InputError for data or a reranker that cannot be used; nothing of them is kept."""
    read_contrastive(settings.data.train_data)
    if settings.rounds.mining_corpus is not None:
        searched_passages([], settings.rounds.mining_corpus)
    read_evaluation_data(settings.evaluation)
    RerankerFilter.asked(settings.rounds, settings.compute, device)
    check_cache(settings.compute)


@dataclass(frozen=True)
class Made:
    """What a round leaves to the next one; before the first, what was given."""

    model: str
    model_hash: str
    rows: Path | None  # None: those of --train_data
    rows_hash: str


class _Rounds:
    def __init__(self, settings: Settings, steps: "_Steps", ranks: Ranks, first: Made):
        self.settings, self.steps, self.ranks, self.first = settings, steps, ranks, first

    def done(self, number: int, last: Made) -> Made:
        """The round of that number, of which nothing is made that is there already."""
        folder = self.settings.path / f"round-{number}"
        rows, rows_hash = last.rows, last.rows_hash
        if number > 0:
            if self.settings.rounds.mode == "incremental":
                rows, rows_hash = self.first.rows, self.first.rows_hash
            of_rows = {"model": last.model_hash, "rows": rows_hash}
            made = folder / ROWS
            known = self.steps.done(
                f"{folder.name}/{ROWS}", of_rows, partial(sha256_of, made),
                partial(self._mine, number, last.model, rows, made),
            )  # fmt: skip
            rows, rows_hash = made, known["hash"]
        known = self.steps.done(
            f"{folder.name}/{MODEL}", {"model": last.model_hash, "rows": rows_hash},
            partial(_model_hash, folder / MODEL),
            partial(self._train, number, last.model, rows, folder / MODEL),
        )  # fmt: skip
        return Made(str(folder / MODEL), known["hash"], rows, rows_hash)

    def figures(self, model: str) -> dict[str, float]:
        """Of the evaluation's data."""
        evaluation = self.settings.evaluation
        data = read_evaluation_data(evaluation)
        return measured(
            self._load(model), data, evaluation, self.settings.compute, progress=True
        ).figures

    def _mine(self, number: int, model: str, rows: Path | None, made: Path) -> dict[str, Any]:
        config, data = self.settings.rounds, self.settings.data
        shared = {field.name: getattr(config, field.name) for field in fields(MiningConfig)}
        self.ranks.say(f"round {number}: mining with {model}")
        found = mined(
            self._load(model),
            MineConfig(
                data.train_data if rows is None else [str(rows)],
                config.mining_corpus,
                num_negatives=config.mined_negatives,
                combine=config.mode == "combined",
                seed=self.settings.training.seed + number,
                **shared,
            ),
            self.settings.compute,
            progress=True,
        )
        write_jsonl(made, found.rows)
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()  # of the model that mined: trainings plan with what is free
        self.ranks.say(found.summary())
        return {
            "rows": len(found.examples),
            "negatives": sum(len(row.negatives) for row in found.examples),
            "mined": sum(len(origin.ranks) for origin in found.origins),
            "summary": found.summary(),
        }

    def _train(self, number: int, model: str, rows: Path | None, made: Path) -> dict[str, Any]:
        given = self.settings
        if made.exists() and output.read_record(made) is None:
            shutil.rmtree(made)  # of a run that was killed as it began: there is nothing in it
        training = replace(
            given.training,
            output_dir=str(made),
            seed=given.training.seed + number,
            resume="newest" if made.exists() else None,
            overwrite_output_dir=False,
        )
        data = given.data if rows is None else replace(given.data, train_data=[str(rows)])
        self.ranks.say(f"round {number}: training {model}")
        result = train_contrastive(
            self._trained_on(model), data, given.loss, training, given.evaluation, given.compute
        )
        if not given.evaluation.asked:
            return {}
        # A run that was killed after its last step has no figures of that.
        whole = output.evaluated(made)
        return {"figures": result.figures if whole else self.figures(str(made))}

    def _trained_on(self, model: str) -> ModelConfig:
        """The settings of the model, of which those that make one act the first time only."""
        given = self.settings.model
        if model == given.model_name_or_path:
            return given
        names = [field.name for field in fields(given)]
        once = ["from_scratch", "tokenizer_name"]
        once += [name for name in names if name.startswith("lora_") and name != RANK]
        usual = ModelConfig(model)
        changed: dict[str, Any] = {name: getattr(usual, name) for name in once}
        return replace(given, model_name_or_path=model, **changed)

    def _load(self, model: str) -> Callable[[], Encoder]:
        config = self._trained_on(model)
        of_encoder = {field.name: getattr(config, field.name) for field in fields(EncoderConfig)}
        return partial(load_encoder, EncoderConfig(**of_encoder), device=self.ranks.device)


class _Steps:
    """What is done, in rounds.json: of each step what it was made from, its hash, and more."""

    def __init__(self, path: Path):
        self._path, self.known = path, Steps()
        if path.exists():
            try:
                self.known = json.loads(path.read_text(encoding="utf-8"))["steps"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(f"{path} is damaged ({error}): start anew with "
                                 f"--overwrite_output_dir") from None  # fmt: skip

    @classmethod
    def opened(cls, settings: Settings, decisive: dict[str, Any]) -> "_Steps":
        """Of a new run, or of the one that goes on; InputError where the directory is not to be
        used, or other settings were."""
        path, training = settings.path, settings.training
        overwrite = training.overwrite_output_dir
        configs = (settings.model, settings.data, settings.rounds, settings.evaluation)
        output.check(path, inputs(*configs), resume=training.resume is not None,
                     overwrite=overwrite)  # fmt: skip
        record = output.read_record(path)
        if record is None or overwrite:
            _clear(path, record)
            output.start(path, {"stage": "rounds", "settings": decisive}, overwrite=overwrite)
        else:
            check_same(f"--resume: {path}", record["settings"], decisive)
            before, now = record["settings"].get(ARITHMETIC), decisive[ARITHMETIC]
            if before != now:
                warnings.warn(f"--resume: was computed by {before}, is by {now}: sums are rounded "
                              f"otherwise, so the run goes on, but not bit by bit",
                              stacklevel=2)  # fmt: skip
        steps = cls(path / STATE)
        furthest = max((int(n) for key in steps.known for n in re.findall(r"^round-(\d+)/", key)),
                       default=0)  # fmt: skip
        if furthest > settings.rounds.rounds:
            raise InputError(f"--rounds {settings.rounds.rounds}: {path} has gone on to round "
                             f"{furthest}: give that or more")  # fmt: skip
        return steps

    def done(
        self, name: str, made_from: dict[str, str], now: Callable[[], str],
        do: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:  # fmt: skip
        """What is known of a step, which `do` takes unless it is recorded; InputError where what
        it left, of which `now` has the hash, is not there as it was."""
        known = self.known.get(name)
        if known is None:
            more = do()
            known = self.known[name] = {"from": made_from, "hash": now(), **more}
            with whole_file(self._path) as temporary:
                text = json.dumps({"steps": self.known}, indent=1)
                temporary.write_text(text + "\n", encoding="utf-8")
            return known
        try:
            same = known["from"] == made_from and known["hash"] == now()
        except (OSError, InputError):  # it is gone
            same = False
        if not same:
            raise InputError(f"--resume: {self._path.parent / name} is not as the run left it, and "
                             f"what follows was made from it: put it back, or start anew with "
                             f"--overwrite_output_dir")  # fmt: skip
        return known


def _clear(path: Path, record: dict[str, Any] | None) -> None:
    """Delete what earlier rounds left, but for the model; InputError for folders that are not of
    rounds."""
    folders = [p for p in path.glob("round-*") if re.fullmatch(r"round-\d+", p.name)]
    if (record or {}).get("stage") != "rounds":
        if folders:
            raise InputError(f"--output_dir {path} holds {folders[0].name}, which no rounds left "
                             f"there: choose another")  # fmt: skip
        return
    for name in (STATE, REPORT, FIGURE):
        (path / name).unlink(missing_ok=True)
    for folder in folders:
        shutil.rmtree(folder)


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _model_hash(path: Path) -> str:
    return _hash(model_content(MODEL_FLAG, str(path)))
