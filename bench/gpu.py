"""What the device did during a measurement: power, energy, clocks, and why it slowed down.

    with watching("cuda") as readings:
        train()
    readings.joules, readings.throttled

A thread asks NVML (nvidia-ml-py) beside the measurement, of a CPU the counters of its packages
(RAPL). What is not known is None, and `note` says why: a figure beside a measurement is no reason
to end it.
"""

import contextlib
import statistics
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

EVERY_S = 0.05
POWERCAP = Path("/sys/class/powercap")
COUNTER, INTEGRAL = "energy counter", "power over time"
SLOWED = {  # NVML's bits. Being idle, clocks that were set, and sync boost slow nobody down here
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown",  # by the driver
    0x40: "thermal slowdown",  # by the GPU
    0x80: "power brake",
}
# A figure: what NVML calls it, newest name first; arguments after the device; how to read it.
FIGURES: dict[str, tuple[tuple[str, ...], tuple[int, ...], Callable[[Any], float]]] = {
    "watts": (("nvmlDeviceGetPowerUsage",), (), lambda milliwatts: milliwatts / 1e3),
    "joules": (("nvmlDeviceGetTotalEnergyConsumption",), (), lambda millijoules: millijoules / 1e3),
    "sm_mhz": (("nvmlDeviceGetClockInfo",), (1,), float),
    "memory_mhz": (("nvmlDeviceGetClockInfo",), (2,), float),
    "celsius": (("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"), (0,), float),
    "memory_mib": (("nvmlDeviceGetMemoryInfo",), (), lambda memory: memory.used / 2**20),
    "busy": (("nvmlDeviceGetUtilizationRates",), (), lambda rates: rates.gpu / 100),
    "reasons": (
        ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"),
        (),
        int,
    ),
}


@dataclass
class Readings:
    """Filled when the watch ends; None is what the device does not tell."""

    watts: float | None = None  # joules over the time watched
    peak_watts: float | None = None
    joules: float | None = None
    joules_from: str | None = None  # COUNTER or INTEGRAL
    sm_mhz: float | None = None  # the median
    sm_mhz_min: float | None = None
    memory_mhz: float | None = None
    memory_mhz_min: float | None = None
    celsius: float | None = None  # the most
    memory_mib: float | None = None  # the most in use on the whole device, by anybody
    busy: float | None = None  # mean share of time with a kernel on it
    reasons: dict[str, float] | None = None  # why it slowed down: the share of samples that say so
    throttled: str | None = None  # the same in words; None if it did not, or is not known
    samples: int = 0
    note: str = ""

    @property
    def said(self) -> dict[str, float]:
        """What is known of what it drew and how fast it was, for a reader."""
        known = {"W": self.watts, "SM MHz": self.sm_mhz, "at least": self.sm_mhz_min,
                 "C at most": self.celsius}  # fmt: skip
        return {name: round(value, 1) for name, value in known.items() if value is not None}


@contextlib.contextmanager
def watching(device: str, every: float = EVERY_S) -> Iterator[Readings]:
    """Samples `device` (cpu, cuda, cuda:1) every so many seconds until the context ends, however it
    does. Whoever measures a GPU waits for it inside."""
    readings = Readings()
    notes: Counter[str] = Counter()
    with _sampler(device, notes) as sample:
        stop = threading.Event()
        seen = [(perf_counter(), sample())]  # its energy and time are the start; the rest is idle

        def watch() -> None:
            ended = False
            while not ended:  # once more at the end, which may come before the first
                ended = stop.wait(every)
                seen.append((perf_counter(), sample()))

        thread = threading.Thread(target=watch, name="watching", daemon=True)
        thread.start()
        try:
            yield readings
        finally:
            stop.set()
            thread.join()
    _fill(readings, seen, notes)
    readings.note = "; ".join(f"{text} ({n} times)" if n > 1 else text for text, n in notes.items())


def limits(device: str) -> dict[str, str]:
    """Driver, power limit and highest clocks of a GPU, for a reader; what is unknown says why."""
    notes: Counter[str] = Counter()
    with _opened(device, notes) as ask:
        driver = ask(("nvmlSystemGetDriverVersion",), of_gpu=False)
        power = ask(("nvmlDeviceGetEnforcedPowerLimit",))
        clocks = [ask(("nvmlDeviceGetMaxClockInfo",), kind) for kind in (1, 2)]
    said = {
        "driver": driver,
        "power limit": None if power is None else f"{power / 1e3:.0f} W",
        "highest clocks": None if None in clocks else "SM {} MHz, memory {} MHz".format(*clocks),
    }
    unknown = f"unknown ({'; '.join(notes)})"
    return {key: unknown if text is None else text for key, text in said.items()}


# --- NVML ---


@contextlib.contextmanager
def _opened(device: str, notes: Counter[str]) -> Iterator[Callable[..., Any]]:
    """`ask(names, *arguments)` of the GPU that torch means: the first name that answers; None and
    a note if none does."""
    nvml = handle = None

    def ask(names: Sequence[str], *arguments: Any, of_gpu: bool = True) -> Any:
        if nvml is None or (of_gpu and handle is None):
            return None
        for name in names:
            try:
                return getattr(nvml, name)(*([handle] if of_gpu else []), *arguments)
            except Exception as error:  # NVMLError, or a name this version lacks
                failed = f"{name}: {error}"
        notes[failed] += 1
        return None

    with contextlib.ExitStack() as stack:
        try:
            import pynvml  # nvidia-ml-py

            pynvml.nvmlInit()
            stack.callback(ask, ("nvmlShutdown",), of_gpu=False)
            nvml = pynvml
        except ModuleNotFoundError:
            notes["nvidia-ml-py not installed"] += 1
        except Exception as error:
            notes[f"nvmlInit: {error}"] += 1
        if nvml is not None:
            handle = _handle(nvml, torch.device(device), notes)
        yield ask


def _handle(nvml: Any, device: torch.device, notes: Counter[str]) -> Any:
    """NVML counts all GPUs, torch those of CUDA_VISIBLE_DEVICES: they are matched by UUID, or else
    by place on the bus. Power and clocks of a MIG slice are those of its GPU."""
    gpu: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the bus
    bus = f"{gpu.pci_domain_id:08x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    tries = [
        ("nvmlDeviceGetHandleByUUID", f"GPU-{gpu.uuid}"),
        ("nvmlDeviceGetHandleByUUID", f"MIG-{gpu.uuid}"),
        ("nvmlDeviceGetHandleByPciBusId", bus),
    ]
    failed = []
    for name, key in tries:
        try:
            handle = getattr(nvml, name)(key)
            break
        except Exception as error:
            failed.append(f"{name}({key}): {error}")
    else:
        notes[f"NVML does not know {device}: {', '.join(failed)}"] += 1
        return None
    with contextlib.suppress(Exception):  # no slice, or a GPU that has none
        handle = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    with contextlib.suppress(Exception):
        if nvml.nvmlDeviceGetMigMode(handle)[0]:
            notes["MIG: figures are the whole GPU's, other slices included"] += 1
    return handle


# --- samples ---

Sample = dict[str, Any]  # of a figure; a CPU's joules are by package


@contextlib.contextmanager
def _sampler(device: str, notes: Counter[str]) -> Iterator[Callable[[], Sample]]:
    if torch.device(device).type == "cpu":
        yield _packages(notes)
        return
    with _opened(device, notes) as ask:
        limit = ask(("nvmlDeviceGetEnforcedPowerLimit",))

        def sample() -> Sample:
            found = {"limit": None if limit is None else limit / 1e3}
            for figure, (names, arguments, read) in FIGURES.items():
                value = ask(names, *arguments)
                found[figure] = None if value is None else read(value)
            return found

        yield sample


def _packages(notes: Counter[str]) -> Callable[[], Sample]:
    """Joules of a CPU's packages since the watch began; their counters wrap around."""
    zones = [zone for zone in sorted(POWERCAP.glob("intel-rapl:*")) if _is_package(zone)]
    total = 0.0
    last: dict[Path, int] = {}
    if not zones:
        notes["no energy counter"] += 1

    def sample() -> Sample:
        nonlocal total
        try:
            for zone in zones:
                now = int((zone / "energy_uj").read_text())
                gone = now - last.get(zone, now)
                if gone < 0:
                    gone += int((zone / "max_energy_range_uj").read_text())
                total, last[zone] = total + gone / 1e6, now
        except (OSError, ValueError) as error:  # root's alone, as a rule
            notes[f"no energy counter: {error}"] += 1
            return {}
        return {"joules": total} if zones else {}

    return sample


def _is_package(zone: Path) -> bool:
    """Not its cores or its memory, which are counted in it, nor psys, which counts it."""
    with contextlib.suppress(OSError):
        return (zone / "name").read_text().startswith("package")
    return False


def _fill(readings: Readings, seen: Sequence[tuple[float, Sample]], notes: Counter[str]) -> None:
    (start, first), *during = seen
    readings.samples = len(during)

    def of(figure: str) -> list[Any]:
        return [x for _, sample in during if (x := sample.get(figure)) is not None]

    seconds = seen[-1][0] - start
    readings.joules, readings.joules_from = _energy(seen, seconds, first.get("limit"), notes)
    readings.watts = None if readings.joules is None else readings.joules / seconds
    readings.peak_watts = max(of("watts"), default=None)
    for figure in ("sm_mhz", "memory_mhz"):
        if clocks := of(figure):
            setattr(readings, figure, statistics.median(clocks))
            setattr(readings, f"{figure}_min", min(clocks))
    readings.celsius = max(of("celsius"), default=None)
    readings.memory_mib = max(of("memory_mib"), default=None)
    readings.busy = statistics.mean(busy) if (busy := of("busy")) else None
    if reasons := of("reasons"):
        said = Counter(x for mask in reasons for x in {SLOWED[b] for b in SLOWED if mask & b})
        readings.reasons = {name: n / len(reasons) for name, n in said.most_common()}
        words = [f"{name} in {n} of {len(reasons)} samples" for name, n in said.most_common()]
        readings.throttled = ", ".join(words) or None


def _energy(
    seen: Sequence[tuple[float, Sample]], seconds: float, limit: float | None, notes: Counter[str]
) -> tuple[float | None, str | None]:
    """By the counter, unless it says what cannot be; then a sample's power stands for the time
    since the one before."""
    counts = [sample["joules"] for _, sample in seen if sample.get("joules") is not None]
    powers = [(at, sample["watts"]) for at, sample in seen if sample.get("watts") is not None]
    if len(counts) == len(seen):
        joules = counts[-1] - counts[0]
        if any(later < earlier for earlier, later in pairwise(counts)):
            notes["energy counter ran backwards"] += 1
        elif joules == 0:
            notes["energy counter stood still"] += 1
        elif limit is not None and joules > 2 * limit * seconds:
            notes[f"energy counter says {joules / seconds:.0f} W of a {limit:.0f} W GPU"] += 1
        else:
            return joules, COUNTER
    if len(powers) < 2:
        return None, None
    mean = sum((at - before) * watts for (before, _), (at, watts) in pairwise(powers))
    return mean / (powers[-1][0] - powers[0][0]) * seconds, INTEGRAL
