"""Where metrics go besides metrics.jsonl: tensorboard, wandb, trackio, mlflow, any of them at once.

Each has a thread of its own, so that a slow network delays no step; what one does not take is
counted and said, and the run goes on, since metrics.jsonl has every line.
"""

import importlib.util
import os
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from rankpo_fast.errors import InputError, without_secrets

PATIENCE = 60.0  # seconds that the end of a run waits for what is still to be sent


@dataclass(frozen=True)
class About:
    """The run that is reported."""

    directory: Path
    project: str
    run_name: str | None  # None: that of the directory
    settings: Mapping[str, Any]
    first_step: int = 0  # that it goes on from

    @property
    def name(self) -> str:
        return self.run_name or self.directory.resolve().name


class Reporter(Protocol):
    def __init__(self, about: About): ...

    def write(self, step: int, line: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def chosen(report_to: Sequence[str]) -> list[str]:
    """The reporters that --report_to means; InputError for one that is not installed."""
    if "none" in report_to:
        return []
    if "all" in report_to:
        return [name for name in REPORTERS if _installed(name)]
    for name in report_to:
        if not _installed(name):
            raise InputError(f"--report_to {name}: it is not installed (pip install {name})")
    return list(report_to)


def _installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # which a folder of that name has not


class Reporters:
    """A context manager that starts reporters by name; `write` sends a line to all of them.

    Raises:
        InputError: one does not start, for want of a login, say; the message names it.
    """

    def __init__(self, names: Sequence[str], about: About):
        self._names, self._about = names, about
        self._senders: list[_Sender] = []

    def __enter__(self) -> "Reporters":
        try:
            for name in self._names:
                self._senders.append(_Sender(name, self._about))
        except BaseException:
            self.__exit__()
            raise
        return self

    def write(self, step: int, line: Mapping[str, float]) -> None:
        for sender in self._senders:
            sender.write(step, line)

    def __exit__(self, *_: object) -> None:
        end = time.monotonic() + PATIENCE
        for sender in self._senders:
            sender.close(end)


class _Sender:
    """One reporter and its thread, which no process waits for at its end."""

    def __init__(self, name: str, about: About):
        self._name, self._given, self._taken = name, 0, 0
        self._failure: Exception | None = None
        self._said = False
        self._lines: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        try:
            self._reporter = REPORTERS[name](about)
        except Exception as error:  # each raises kinds of its own
            reason = " ".join(str(error).split())
            raise InputError(f"--report_to {name}: it does not start: {reason}") from error
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def write(self, step: int, line: Mapping[str, float]) -> None:
        self._say_failure()
        self._given += 1
        self._lines.put((step, dict(line)))

    def close(self, end: float) -> None:
        """end: when to give up what is not sent, by time.monotonic()."""
        self._lines.put(None)
        self._thread.join(max(0.0, end - time.monotonic()))
        self._say_failure()
        if self._taken < self._given or self._thread.is_alive():
            warnings.warn(
                f"{self._name} took {self._taken} of {self._given} lines; metrics.jsonl has all "
                f"of them",
                stacklevel=4,
            )

    def _send(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._reporter.write(*line)
                self._taken += 1
            except Exception as error:
                self._failure = self._failure or error
        try:
            self._reporter.close()
        except Exception as error:
            self._failure = self._failure or error

    def _say_failure(self) -> None:
        """Of several the first."""
        if self._failure is not None and not self._said:
            self._said = True
            warnings.warn(
                f"--report_to {self._name} failed, and the run goes on: "
                f"{type(self._failure).__name__}: "
                f"{without_secrets(' '.join(str(self._failure).split()))}",
                stacklevel=4,
            )


# --- the reporters ---


class TensorBoard:
    """In tensorboard/ of the output directory, with a --run_name in a folder of that name."""

    def __init__(self, about: About):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(about.directory / "tensorboard" / (about.run_name or "")),
            purge_step=about.first_step + 1 if about.first_step else None,
        )

    def write(self, step: int, line: Mapping[str, float]) -> None:
        for name, value in line.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Its files are in wandb/ of the output directory."""

    def __init__(self, about: About):
        import wandb

        self._run = wandb.init(
            project=about.project, name=about.name, dir=str(about.directory),
            config=dict(about.settings),
        )  # fmt: skip

    def write(self, step: int, line: Mapping[str, float]) -> None:
        self._run.log(dict(line), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Where TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL say, else in the Hugging Face
    home, where its dashboard looks."""

    def __init__(self, about: About):
        import trackio

        self._run = trackio.init(
            project=about.project, name=about.name, config=dict(about.settings)
        )

    def write(self, step: int, line: Mapping[str, float]) -> None:
        self._run.log(dict(line), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """To the server of MLFLOW_TRACKING_URI, else a database in mlflow/ of the output directory."""

    def __init__(self, about: About):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if uri is None:
            folder = (about.directory / "mlflow").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            uri, artifacts = f"sqlite:///{folder}/mlflow.db", (folder / "artifacts").as_uri()
        self._client, self._metric = MlflowClient(tracking_uri=uri), Metric
        experiment = self._client.get_experiment_by_name(about.project)
        if experiment is None:
            experiment_id = self._client.create_experiment(about.project, artifacts)
        else:
            experiment_id = experiment.experiment_id
        self._run = self._client.create_run(experiment_id, run_name=about.name).info.run_id
        params = [Param(name, str(value)[:500]) for name, value in about.settings.items()]
        self._client.log_batch(self._run, params=params)

    def write(self, step: int, line: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        names = {name: name.replace("@", "_at_") for name in line}  # which it allows no @
        metrics = [self._metric(names[name], value, now, step) for name, value in line.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)


REPORTERS: dict[str, type[Reporter]] = {
    "tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio, "mlflow": MLflow,
}  # fmt: skip
