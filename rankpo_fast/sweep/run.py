"""Runs a sweep: trainings and their measurements, one after the other or several at once.

    runs/DIGEST/            a training's output directory
    runs/DIGEST.log         what it printed
    figures/SPLIT/DIGEST-alpha-A.json     what was measured; a part that is there is not done again
    figures/SPLIT/start-SEED.json         of the model that was trained on

A training is a process of its own, so that one that fails, or runs out of memory, ends no other;
measurements on test data share one, since its start takes longer than some of them.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rankpo_fast.signals import not_ignored
from rankpo_fast.sweep.spec import Job, Sweep

ALPHA = "{alpha}"  # of a file's name
VALIDATION, TEST = "validation", "test"
Figures = dict[str, float]


AT_ONCE = 16  # measurements of a process, at most: what is done is said after each


@dataclass(frozen=True)
class Part:
    """What is done, said and kept as one."""

    name: str
    job: dict[str, Any]
    log: Path

    @property
    def done(self) -> bool:
        """Whether all that it is to measure has been."""
        figures = self.job["figures"]
        return all(
            Path(figures.replace(ALPHA, format(alpha, "g"))).exists()
            for alpha in self.job["alphas"]
        )


class Runner:
    """Of one sweep in one directory.

    Args:
        parallel: how many processes at once; each has a GPU of its own, where there are any.
        say: takes a line on what has been done.
    """

    def __init__(self, sweep: Sweep, path: Path, parallel: int, say: Callable[[str], None]):
        self.sweep, self.path, self.parallel, self._say = sweep, path, parallel, say
        self._processes: set[subprocess.Popen] = set()
        self._stopped: int | None = None
        self._lock = threading.Lock()

    def train(self) -> list[str]:
        """Every training that is not done, and the start, measured on validation; returns the
        names of those that failed."""
        starts = self._starts(VALIDATION)
        alphas: dict[str, set[float]] = {}  # methods of equal settings are one training
        for job in self.sweep.jobs:
            alphas.setdefault(job.folder, set()).update(job.alphas)
        jobs = {job.folder: job for job in self.sweep.jobs}.values()
        return self._all([*starts, *(self._training(j, sorted(alphas[j.folder])) for j in jobs)])

    def test(self, chosen: Mapping[Job, Sequence[float]]) -> list[str]:
        """Measure the start and those alphas of trainings on the test data; as `train`."""
        starts = self._starts(TEST)
        return self._all([*starts, *(self._tested(*each) for each in chosen.items())], AT_ONCE)

    def figures(self, split: str, job: Job | None, alpha: float, seed: int) -> Figures | None:
        """What was measured; None where it was not. No job: of the start."""
        path = Path(self._figures(split, job, seed).replace(ALPHA, format(alpha, "g")))
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    # --- parts ---

    def _figures(self, split: str, job: Job | None, seed: int) -> str:
        if job is None:
            name = f"start-{self._first_like(seed, split)}"
        else:
            name = f"{Path(job.folder).name}-alpha-{ALPHA}"
        return str(self.path / "figures" / split / f"{name}.json")

    def _first_like(self, seed: int, split: str) -> int:
        """The first seed with that start, measured alike: of paths without <seed> there is one."""
        return next(one for one in self.sweep.seeds
                    if self._measured(split, one) == self._measured(split, seed))  # fmt: skip

    def _starts(self, split: str) -> list[Part | None]:
        firsts = dict.fromkeys(self._first_like(seed, split) for seed in self.sweep.seeds)
        return [self._start(seed, split) for seed in firsts]

    def _start(self, seed: int, split: str) -> Part | None:
        if self.figures(split, None, 0, seed) is not None:
            return None
        return Part(f"start, seed {seed}: {split}", self._measure(split, None, seed, [0.0]),
                    self.path / "runs" / f"start-{seed}.log")  # fmt: skip

    def _training(self, job: Job, alphas: Sequence[float]) -> Part | None:
        missing = self._missing(VALIDATION, job, alphas)
        if not missing:
            return None
        folder = self.path / job.folder
        training = {"command": job.command, "flags": list(job.flags)}
        return Part(f"{job.setup}, seed {job.seed}",
                    training | self._measure(VALIDATION, job, job.seed, missing),
                    folder.with_suffix(".log"))  # fmt: skip

    def _tested(self, job: Job, alphas: Sequence[float]) -> Part | None:
        missing = self._missing(TEST, job, alphas)
        if not missing:
            return None
        return Part(f"{job.setup}, seed {job.seed}: {TEST}",
                    self._measure(TEST, job, job.seed, missing),
                    (self.path / job.folder).with_suffix(".log"))  # fmt: skip

    def _missing(self, split: str, job: Job, alphas: Sequence[float]) -> list[float]:
        return [alpha for alpha in alphas if self.figures(split, job, alpha, job.seed) is None]

    def _measure(
        self, split: str, job: Job | None, seed: int, alphas: list[float]
    ) -> dict[str, Any]:
        start, evaluation = self._measured(split, seed)
        return {
            "start": start,
            "output_dir": start if job is None else str(self.path / job.folder),
            "alphas": alphas,
            "evaluation": evaluation,
            "figures": self._figures(split, job, seed),
        }

    def _measured(self, split: str, seed: int) -> tuple[str, list[str]]:
        """The start, and how it and what is trained from it are measured."""
        data = self.sweep.validation if split == VALIDATION else self.sweep.test
        assert data is not None
        start = self.sweep.start.replace("<seed>", str(seed))
        _, *evaluation = self.sweep.flags_of(data, start, seed)
        return start, evaluation

    # --- processes ---

    def _all(self, parts: Iterable[Part | None], at_once: int = 1) -> list[str]:
        """`at_once`: parts of a process, at most."""
        waiting = [part for part in parts if part is not None]
        size = max(1, min(at_once, math.ceil(len(waiting) / self.parallel)))
        batches = [waiting[start : start + size] for start in range(0, len(waiting), size)]
        failed: list[str] = []
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(self.parallel):
            slots.put(slot)
        done = 0
        with ThreadPoolExecutor(self.parallel) as pool, self._signals():
            running = {pool.submit(self._run, batch, slots): batch for batch in batches}
            while running:
                ended, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in ended:
                    batch, seconds = running.pop(future), future.result()
                    if self._stopped is not None:
                        continue
                    for part in batch:
                        done += 1
                        if not part.done:
                            failed.append(part.name)
                        took = f"{seconds:.0f} s" if len(batch) == 1 else "done"
                        said = took if part.done else f"failed, see {batch[0].log}"
                        self._say(f"[{done}/{len(waiting)}] {part.name}: {said}")
        if self._stopped is not None:
            self._say("stopped: the same command goes on")
            raise SystemExit(128 + self._stopped)
        return failed

    def _run(self, batch: Sequence[Part], slots: "SimpleQueue[int]") -> float:
        """Seconds that it took."""
        slot, began = slots.get(), time.monotonic()
        try:
            with self._lock:
                if self._stopped is not None:
                    return 0.0
                process = self._process(batch, slot)
                self._processes.add(process)
            process.wait()
            self._processes.discard(process)
            return time.monotonic() - began
        finally:
            slots.put(slot)

    def _process(self, batch: Sequence[Part], slot: int) -> subprocess.Popen:
        """All that it prints is in the log of the first part."""
        command = [sys.executable, "-m", "rankpo_fast.sweep.worker"]
        for part in batch:
            job = part.log.with_suffix(".json")
            for file in (job, Path(part.job["figures"])):
                file.parent.mkdir(parents=True, exist_ok=True)
            job.write_text(json.dumps(part.job), encoding="utf-8")
            command.append(str(job))
        with batch[0].log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=self._environment(slot),
                                    start_new_session=True)  # fmt: skip

    def _environment(self, slot: int) -> dict[str, str]:
        """One GPU, or a share of the processors, for each process; what is set already is kept."""
        environment = dict(os.environ)
        gpus = environment.get("CUDA_VISIBLE_DEVICES", "")
        listed = [gpu for gpu in gpus.split(",") if gpu] or [str(slot)]
        environment["CUDA_VISIBLE_DEVICES"] = listed[slot % len(listed)]
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.parallel)))
        return environment

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside, signals reach the trainings, which save and end."""

        def stop(number: int, _: object) -> None:
            self._stopped = number
            for process in list(self._processes):
                process.send_signal(signal.SIGTERM)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, stop) for number in not_ignored()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
