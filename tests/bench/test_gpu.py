"""What a GPU or a CPU tells of a measurement is read right, and what it does not tell is named."""

import sys
import threading
import time
from itertools import cycle, islice
from types import SimpleNamespace

import pytest
import torch

from bench import gpu
from bench.gpu import COUNTER, INTEGRAL, limits, watching

MINE, OTHER = "GPU-mine", "GPU-other"
PLACE = "00000000:3b:00.0"
REASONS = [0x01, 0x04 | 0x08, 0x02, 0x04, 0x20 | 0x40]  # sample by sample, over and over


class Played:
    """NVML of two GPUs: `forbidden` queries raise, those it `lacks` are no names of it."""

    class NVMLError(Exception):
        pass

    def __init__(self, forbidden=(), lacks=(), step=100, slice_of=None, known=(MINE, OTHER)):
        self.forbidden, self.lacks, self.known = set(forbidden), set(lacks), known
        self.step, self.slice_of = step, slice_of
        self.samples = self.opened = 0
        self.asked = set()

    def __getattr__(self, name):
        if not name.startswith("nvml") or name in self.lacks:
            raise AttributeError(f"no {name}")

        def answer(handle=None, *arguments):
            if name in self.forbidden:
                raise self.NVMLError("Not Supported")
            if isinstance(handle, str):
                self.asked.add(handle)
            return getattr(self, f"_{name[4:]}")(handle, *arguments)

        return answer

    def _Init(self, _):
        self.opened += 1

    def _Shutdown(self, _):
        self.opened -= 1

    def _SystemGetDriverVersion(self, _):
        return "580.65"

    def _DeviceGetHandleByUUID(self, key):
        if key not in self.known:
            raise self.NVMLError("Not Found")
        return key

    def _DeviceGetHandleByPciBusId(self, key):
        if key != PLACE:
            raise self.NVMLError("Not Found")
        return MINE

    def _DeviceGetDeviceHandleFromMigDeviceHandle(self, handle):
        if self.slice_of is None:
            raise self.NVMLError("Invalid Argument")
        return self.slice_of

    def _DeviceGetMigMode(self, handle):
        return [int(self.slice_of is not None)] * 2

    def _DeviceGetPowerUsage(self, handle):
        return 600_000 if handle == MINE else 70_000

    def _DeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def _DeviceGetTotalEnergyConsumption(self, handle):
        return 5_000_000 + self.samples * self.step

    def _DeviceGetClockInfo(self, handle, kind):
        return {1: 1980 - 100 * (self.samples == 1), 2: 2619}[kind]

    def _DeviceGetMaxClockInfo(self, handle, kind):
        return {1: 1980, 2: 2619}[kind]

    def _DeviceGetTemperatureV(self, handle, sensor):
        return 60 + self.samples % 5

    _DeviceGetTemperature = _DeviceGetTemperatureV

    def _DeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=2**30)

    def _DeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=90)

    def _DeviceGetCurrentClocksEventReasons(self, handle):
        self.samples += 1  # the last figure of a sample
        return REASONS[(self.samples - 1) % len(REASONS)]

    _DeviceGetCurrentClocksThrottleReasons = _DeviceGetCurrentClocksEventReasons


@pytest.fixture
def play(monkeypatch):
    def start(**how):
        played = Played(**how)
        monkeypatch.setitem(sys.modules, "pynvml", played)
        properties = SimpleNamespace(uuid="mine", pci_domain_id=0, pci_bus_id=0x3B, pci_device_id=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return played

    return start


def watched(played, samples=11):
    """So many at least."""
    with watching("cuda", every=1e-3) as readings:
        until = time.monotonic() + 10
        while played.samples < samples and time.monotonic() < until:
            time.sleep(1e-3)
    return readings


def test_figures_are_those_of_the_samples(play):
    readings = watched(play())
    assert (
        readings.joules == pytest.approx(0.1 * readings.samples) and readings.joules_from == COUNTER
    )
    assert readings.peak_watts == 600 and 0 < readings.watts < 1400
    assert (readings.sm_mhz, readings.sm_mhz_min, readings.memory_mhz) == (1980, 1880, 2619)
    assert (readings.celsius, readings.memory_mib) == (64, 1024)
    assert readings.busy == pytest.approx(0.9) and readings.note == ""


def test_slowing_down_is_told_from_being_idle_and_from_clocks_that_were_set(play):
    readings = watched(play())
    seen = list(islice(cycle(REASONS), 1, 1 + readings.samples))
    capped = sum(bool(mask & 4) for mask in seen)
    assert readings.reasons["power cap"] == pytest.approx(capped / readings.samples)
    assert readings.reasons["thermal slowdown"] == pytest.approx(
        seen.count(0x60) / readings.samples
    )
    assert set(readings.reasons) == {"power cap", "hardware slowdown", "thermal slowdown"}
    assert readings.throttled.startswith(f"power cap in {capped} of {readings.samples} samples, ")


def test_a_gpu_that_kept_its_clocks_is_not_throttled(play, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "REASONS", [0, 1, 2])
    readings = watched(play())
    assert readings.reasons == {} and readings.throttled is None


def test_older_names_answer_where_newer_ones_are_missing_or_refused(play):
    readings = watched(
        play(
            lacks=["nvmlDeviceGetCurrentClocksEventReasons"],
            forbidden=["nvmlDeviceGetTemperatureV"],
        )
    )
    assert readings.throttled is not None and readings.celsius == 64 and readings.note == ""


def test_a_forbidden_query_is_named_and_the_others_answer(play):
    readings = watched(play(forbidden=["nvmlDeviceGetClockInfo", "nvmlDeviceGetMemoryInfo"]))
    assert (readings.sm_mhz, readings.memory_mhz_min, readings.memory_mib) == (None, None, None)
    assert readings.joules_from == COUNTER and readings.celsius is not None
    times = readings.samples + 1
    assert f"nvmlDeviceGetMemoryInfo: Not Supported ({times} times)" in readings.note
    assert f"nvmlDeviceGetClockInfo: Not Supported ({2 * times} times)" in readings.note


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"forbidden": ["nvmlDeviceGetTotalEnergyConsumption"]}, "EnergyConsumption: Not Supp"),
        ({"step": 0}, "energy counter stood still"),
        ({"step": -1}, "energy counter ran backwards"),
        ({"step": 10**9}, "W of a 700 W GPU"),
    ],
    ids=["no-counter", "still", "backwards", "impossible"],
)
def test_energy_is_power_over_time_where_the_counter_is_wrong(play, how, why):
    readings = watched(play(**how))
    assert readings.joules_from == INTEGRAL and why in readings.note
    assert readings.watts == pytest.approx(600)


def test_a_samples_power_stands_for_the_time_since_the_one_before():
    seen = [(10.0, {"watts": 1.0}), (10.5, {"watts": 100.0}), (12.0, {"watts": 300.0})]
    assert gpu._energy(seen, 2.0, None, {}) == (0.5 * 100 + 1.5 * 300, INTEGRAL)


def test_without_energy_and_power_energy_is_unknown(play):
    names = ["nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"]
    readings = watched(play(forbidden=names))
    assert (readings.joules, readings.joules_from, readings.watts, readings.peak_watts) == (
        None,
    ) * 4
    assert all(name in readings.note for name in names)


@pytest.mark.parametrize(
    ("how", "figures", "note"),
    [
        ({"known": [OTHER, MINE]}, True, ""),
        ({"known": [OTHER]}, True, ""),
        ({"known": [OTHER, "MIG-mine"], "slice_of": MINE}, True, "MIG: figures are the whole"),
        ({"known": [OTHER], "forbidden": ["nvmlDeviceGetHandleByPciBusId"]}, False,
         "GPU-mine): Not Found"),
    ],
    ids=["uuid", "place-on-the-bus", "slice", "unknown"],
)  # fmt: skip
def test_the_gpu_is_the_one_torch_means(play, how, figures, note):
    played = play(**how)
    readings = watched(played, samples=3 if figures else 0)
    assert readings.peak_watts == (600 if figures else None)
    assert note in readings.note and bool(note) == bool(readings.note)


def test_a_machine_without_nvml_is_said_and_runs_on(play, monkeypatch):
    play(forbidden=["nvmlInit"])
    with watching("cuda") as readings:
        pass
    assert readings.note == "nvmlInit: Not Supported" and readings.joules is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its import fails
    with watching("cuda") as readings:
        pass
    assert readings.note == "nvidia-ml-py not installed" and readings.throttled is None


def test_the_thread_and_nvml_end_with_the_context_even_if_its_body_raises(play):
    played = play()
    with pytest.raises(KeyError), watching("cuda", every=60):
        (thread,) = (t for t in threading.enumerate() if t.name == "watching")
        assert thread.daemon and played.opened == 1
        raise KeyError
    assert not thread.is_alive() and played.opened == 0


def test_a_short_measurement_has_a_sample(play):
    play()
    with watching("cuda", every=60) as readings:
        pass
    assert (readings.samples, readings.peak_watts, readings.sm_mhz) == (1, 600, 1880)


def test_limits_of_the_gpu_are_words_and_what_is_unknown_says_why(play):
    play()
    assert limits("cuda") == {
        "driver": "580.65", "power limit": "700 W",
        "highest clocks": "SM 1980 MHz, memory 2619 MHz",
    }  # fmt: skip
    play(forbidden=["nvmlDeviceGetEnforcedPowerLimit"])
    said = limits("cuda")
    assert said["driver"] == "580.65"
    assert said["power limit"] == "unknown (nvmlDeviceGetEnforcedPowerLimit: Not Supported)"


# --- a CPU ---


@pytest.fixture
def zone(tmp_path, monkeypatch):
    """Writes a counter of a played /sys/class/powercap."""
    monkeypatch.setattr(gpu, "POWERCAP", tmp_path)

    def write(place: str, microjoules: int, name: str):
        folder = tmp_path / f"intel-rapl:{place}"
        folder.mkdir(exist_ok=True)
        for file, text in [
            ("energy_uj", microjoules), ("name", name), ("max_energy_range_uj", 10_000_000),
        ]:  # fmt: skip
            (folder / file).write_text(f"{text}\n")

    return write


def test_energy_of_a_cpu_is_that_of_its_packages_across_a_wrap_around(zone):
    zone("0", 9_000_000, "package-0")
    zone("1", 0, "package-1")
    with watching("cpu", every=60) as readings:
        zone("0", 1_500_000, "package-0")
        zone("1", 4_000_000, "package-1")
        zone("0:0", 7_000_000, "core")
        zone("2", 9_000_000, "psys")
    assert readings.joules == pytest.approx(2.5 + 4) and readings.joules_from == COUNTER
    assert readings.watts > 0 and readings.note == "" and readings.throttled is None


def test_parts_and_the_whole_system_are_not_counted_twice(zone):
    for place, name in [("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("1", "psys")]:
        zone(place, 0, name)
    with watching("cpu", every=60) as readings:
        for place, name in [("0", "package-0"), ("0:0", "core"), ("0:1", "dram"), ("1", "psys")]:
            zone(place, 3_000_000, name)
    assert readings.joules == pytest.approx(3)


def test_a_cpu_without_a_readable_counter_says_so(zone, tmp_path):
    with watching("cpu", every=60) as readings:
        pass
    assert readings.note == "no energy counter" and readings.joules is None
    zone("0", 0, "package-0")
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    with watching("cpu", every=60) as readings:
        pass
    assert readings.note.startswith("no energy counter: ") and "energy_uj" in readings.note
    assert readings.joules is None
