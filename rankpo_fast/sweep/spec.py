"""A sweep's file -> the trainings that it asks for.

    command: rankpo                    what trains: rankpo or contrastive
    start: out/stage1-<seed>           the model every training starts from
    settings: {train_data: ...}        flags of all trainings
    methods:                           by name, what makes each: settings, and maybe a command, a
      SimRankPO: {}                    grid or alphas of its own
      RankPO: {reference_free: false, grid: {beta: [1, 2]}, alphas: [1]}
    grid: {learning_rate: [1e-4, 3e-4]}      each value with each other one's
    draws: 8                           so many of a method's grid, drawn; without it all
    seeds: [0, 1, 2]                   of --seed; <seed> in other values becomes it
    alphas: [0.5, 1]                   how much of the change of weights is taken, each measured
    validation: {query_data: ..., preference_data: ...}      by which settings are chosen
    test: {...}                        read once, for those chosen
    choose: {ndcg@20: 1, alignment: 1}       weights of the figures by which one is chosen

Flags are those of the commands, checked before anything is trained.
"""

import hashlib
import json
import math
import random
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankpo_fast.config import (
    STAGES,
    ComputeConfig,
    EncoderConfig,
    EvaluationConfig,
)
from rankpo_fast.errors import InputError
from rankpo_fast.flags import closest, parse
from rankpo_fast.yaml_files import read_yaml

START = "start"  # the name, among methods, of the model that is trained on
MEASURED = [EncoderConfig, EvaluationConfig, ComputeConfig]
KEYS = (
    "command", "start", "settings", "methods", "grid", "draws", "seeds", "alphas", "validation",
    "test", "choose",
)  # fmt: skip
OF_METHODS = ("command", "grid", "alphas")
OWN = ("model_name_or_path", "output_dir", "seed", "resume", "overwrite_output_dir")
MOST_POINTS, MOST_JOBS = 10**9, 10_000  # of a method: a grid that is drawn from; trainings
Settings = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What a training is made by, beside the seed."""

    method: str
    settings: tuple[tuple[str, Any], ...]  # of the grid

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {_text(value)}" for name, value in self.settings)
        return f"{self.method} ({chosen})" if chosen else self.method


@dataclass(frozen=True)
class Job:
    """One training, to be measured on validation with each alpha."""

    setup: Setup
    seed: int
    command: str
    alphas: tuple[float, ...]
    folder: str  # under the output directory; other settings have another one
    flags: tuple[str, ...]  # without those of `OWN`, but for the start and the seed


@dataclass(frozen=True)
class Sweep:
    """All that a file asks for."""

    start: str
    seeds: tuple[int, ...]
    choose: dict[str, float]
    validation: Settings
    test: Settings | None
    jobs: tuple[Job, ...]

    def flags_of(self, split: Settings, model: str, seed: int) -> list[str]:
        """Of an evaluation."""
        return [f"--model_name_or_path={model}", *_flags(split, seed)]


def read_sweep(path: Path) -> Sweep:
    """InputError names the file and the key of what cannot be used."""
    given = read_yaml(path, f"--sweep {path}: ")
    try:
        return _sweep(given)
    except InputError as error:
        raise InputError(f"--sweep {path}: {error}") from None


def _sweep(given: Any) -> Sweep:
    if not isinstance(given, dict):
        raise InputError("keys with values are expected")
    for key in given:
        if key not in KEYS:
            raise InputError(f"unknown key {key}{closest(str(key), KEYS)}; there are "
                             f"{', '.join(KEYS)}")  # fmt: skip
    start, validation = given.get("start"), _mapping(given, "validation")
    if not isinstance(start, str) or not validation:
        raise InputError("start, a model, and validation, data to choose by, must be given")
    seeds = tuple(_whole("seeds", x, 0) for x in _numbers(given, "seeds", ["42"]))
    alphas = tuple(sorted(_numbers(given, "alphas", ["1"])))
    if not all(alpha > 0 for alpha in alphas):
        raise InputError("alphas must be > 0; the start itself, 0, is measured anyway")
    weights = {k: _number("choose", v) for k, v in _mapping(given, "choose").items()}
    sweep = Sweep(
        start=start,
        seeds=seeds,
        choose=weights or {"ndcg@20": 1.0, "alignment": 1.0},
        validation=validation,
        test=_mapping(given, "test") or None,
        jobs=tuple(_jobs(given, start, seeds)),
    )
    _check(sweep)
    return sweep


def _jobs(given: Settings, start: str, seeds: tuple[int, ...]) -> list[Job]:
    shared, grid = _mapping(given, "settings"), _mapping(given, "grid")
    methods = _mapping(given, "methods") or {_command(given): {}}
    jobs = []
    for method in map(str, methods):
        own = _mapping(methods, method)
        if method == START:
            raise InputError(f"methods: {START} is the name of the model that is trained on")
        command, alphas = _command(given | own), _alphas(given | own)
        settings = {name: value for name, value in own.items() if name not in OF_METHODS}
        axes = {name: values for name, values in grid.items() if name not in settings}
        grid_of_method = _checked(axes | _mapping(own, "grid"))
        count = math.prod(map(len, grid_of_method.values()))
        draws = min(_whole("draws", given.get("draws", count), 1), count)
        if count > MOST_POINTS or draws * len(seeds) > MOST_JOBS:
            raise InputError(f"{method}: {draws:,} of {count:,} settings, with {len(seeds)} seeds "
                             f"each: a method is trained {MOST_JOBS:,} times at most")  # fmt: skip
        drawn = random.Random(method).sample(range(count), draws)
        for point in (_point(grid_of_method, i) for i in sorted(drawn)):
            of_run = shared | settings | point
            for name in OWN:
                if name in of_run:
                    raise InputError(f"{method}: {name} is the sweep's to give")
            for seed in seeds:
                model = start.replace("<seed>", str(seed))
                flags = [f"--model_name_or_path={model}", f"--seed={seed}", *_flags(of_run, seed)]
                digest = hashlib.sha256(json.dumps([command, flags]).encode()).hexdigest()[:12]
                setup = Setup(method, tuple(point.items()))
                jobs.append(Job(setup, seed, command, alphas, f"runs/{digest}", tuple(flags)))
    return jobs


def _command(given: Settings) -> str:
    command = given.get("command", "rankpo")
    if command not in STAGES:
        raise InputError(f"command must be one of {', '.join(STAGES)}, got {command}")
    return command


def _alphas(given: Settings) -> tuple[float, ...]:
    alphas = tuple(sorted(_numbers(given, "alphas", ["1"])))
    if not all(alpha > 0 for alpha in alphas):
        raise InputError("alphas must be > 0; the start itself, 0, is measured anyway")
    return alphas


def _checked(axes: Settings) -> dict[str, list[Any]]:
    """Lists of values, by the names of their settings."""
    for name, values in axes.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"grid: {name} must be a list of values, got {reprlib.repr(values)}")
    return axes


def _point(axes: dict[str, list[Any]], number: int) -> Settings:
    """Of each value of each axis with each of the others, the last axis the first to change."""
    point = {}
    for name, values in reversed(axes.items()):
        number, place = divmod(number, len(values))
        point[name] = values[place]
    return dict(reversed(point.items()))


def _check(sweep: Sweep) -> None:
    """Flags of all runs and evaluations, as the commands would check them."""
    for job in sweep.jobs:
        try:
            flags = [*job.flags, "--output_dir=x"]
            parse(job.command, "a training", STAGES[job.command], flags)
        except InputError as error:
            raise InputError(f"{job.setup}, seed {job.seed}: {error}") from None
    for name, split in (("validation", sweep.validation), ("test", sweep.test)):
        if split is not None:
            try:
                _, evaluation, _ = parse("evaluate", "an evaluation", MEASURED,
                                         sweep.flags_of(split, "x", sweep.seeds[0]))  # fmt: skip
                evaluation.check_asked()
            except InputError as error:
                raise InputError(f"{name}: {error}") from None


def _flags(settings: Settings, seed: int) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        if any(isinstance(item, dict | list) for item in _listed(value)):
            raise InputError(f"{name} holds keys or lists itself; settings are not nested")
        values = [_text(item).replace("<seed>", str(seed)) for item in _listed(value)]
        flags += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
    return flags


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _mapping(given: Settings, key: str) -> Settings:
    value = given.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{key} must hold keys with values, got {reprlib.repr(value)}")
    return dict(value)


def _numbers(given: Settings, key: str, default: list[str]) -> list[float]:
    values = _listed(given.get(key, default))
    if not values:
        raise InputError(f"{key} must be numbers, got none")
    return [_number(key, value) for value in values]


def _number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{key} must be finite numbers, got {reprlib.repr(value)}")
    return number


def _whole(key: str, value: Any, least: int) -> int:
    number = _number(key, value)
    if number != int(number) or number < least:
        raise InputError(f"{key} must be whole numbers >= {least}, got {reprlib.repr(value)}")
    return int(number)
