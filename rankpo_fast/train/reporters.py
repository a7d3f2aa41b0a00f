"""Where metrics go besides metrics.jsonl: tensorboard, wandb, trackio, mlflow, any of them at once.

Each has a thread of its own, so that a slow network delays no step; what one does not take is
counted and said, and the run goes on, since metrics.jsonl has every line.
"""

import importlib.util
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rankpo_fast.errors import InputError

PATIENCE = 60.0  # seconds that the end of a run waits for what is still to be sent


@dataclass(frozen=True)
class About:
    """The run that is reported."""

    directory: Path
    project: str
    run_name: str | None  # None: that of the directory
    settings: Mapping[str, Any]

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
    """One reporter and its thread."""

    def __init__(self, name: str, about: About):
        self._name, self._sent, self._lost = name, 0, 0
        self._waiting: list[Future] = []
        try:
            self._reporter = REPORTERS[name](about)
        except Exception as error:  # each raises kinds of its own
            reason = " ".join(str(error).split())
            raise InputError(f"--report_to {name}: it does not start: {reason}") from error
        self._thread = ThreadPoolExecutor(1)

    def write(self, step: int, line: Mapping[str, float]) -> None:
        self._look()
        self._sent += 1
        self._waiting.append(self._thread.submit(self._reporter.write, step, dict(line)))

    def close(self, end: float) -> None:
        self._waiting.append(self._thread.submit(self._reporter.close))
        wait(self._waiting, max(0.0, end - time.monotonic()))
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._look()
        late = len(self._waiting)
        if self._lost or late:
            warnings.warn(
                f"{self._name} took {self._sent - self._lost - max(0, late - 1)} of {self._sent} "
                f"lines; metrics.jsonl has all of them",
                stacklevel=4,
            )

    def _look(self) -> None:
        """Count what failed, and say the first of it."""
        done = [future for future in self._waiting if future.done()]
        self._waiting = [future for future in self._waiting if not future.done()]
        for future in done:
            error = None if future.cancelled() else future.exception()
            if error is not None and not self._lost:
                warnings.warn(
                    f"--report_to {self._name} failed, and the run goes on: "
                    f"{type(error).__name__}: {' '.join(str(error).split())}",
                    stacklevel=4,
                )
            self._lost += error is not None or future.cancelled()


# --- the reporters ---


class TensorBoard:
    """In tensorboard/ of the output directory, with a --run_name in a folder of that name."""

    def __init__(self, about: About):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(about.directory / "tensorboard" / (about.run_name or "")))

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
