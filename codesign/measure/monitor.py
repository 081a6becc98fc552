"""Device monitor: what the machine did while a window was measured, read by the parent and never by the trial.

CUDA devices are read through NVML (`nvml.py`): the total-energy counter, power, clocks, temperature, throttle reasons,
memory by process. A CPU is read through psutil, with RAPL energy where the counters are readable. What cannot be read
is absent, not guessed. Energy is given for windows of at least 10 s, because counters step.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import psutil

from codesign.errors import Unsupported
from codesign.measure import linux
from codesign.measure.nvml import MIN_ENERGY_WINDOW_S, NvmlProbe, nvml

_RAPL = Path("/sys/class/powercap")


class Probe(Protocol):
    """One source of readings. `sample` is called about ten times a second between `begin` and `end`."""

    def begin(self) -> None: ...

    def sample(self) -> None: ...

    def end(self, wall_s: float) -> Mapping[str, Any]: ...


class CpuProbe:
    """psutil readings of the child's process and of everything else on the machine.

    `foreign_cpu` is the share of the machine's CPU time used by processes other than ours (the child, other ranks of
    its engine, and this one); a window with much of it is disturbed.

    Args:
        cores: on which others count; None for all of the machine.
    """

    def __init__(self, pid: int, cores: Collection[int] | None = None) -> None:
        self._cores = sorted(cores or range(os.cpu_count() or 1))
        self._child = psutil.Process(pid)
        self._self = psutil.Process()
        self._rapl = RaplCounter.open()

    def begin(self) -> None:
        self._busy = _busy_s(self._cores)
        self._ours = self._own_cpu_s()
        self._energy = self._rapl.read_j() if self._rapl else None

    def sample(self) -> None:
        if self._rapl:
            self._rapl.read_j()  # follows the counter across its wrap-around

    def end(self, wall_s: float) -> Mapping[str, Any]:
        ours = self._own_cpu_s() - self._ours
        foreign = max(0.0, _busy_s(self._cores) - self._busy - ours)
        cores = len(self._cores)
        reading: dict[str, Any] = {
            "source": "psutil",
            "own_cpu": round(ours / (wall_s * cores), 4),
            "foreign_cpu": round(foreign / (wall_s * cores), 4),
            "load_average_1min": os.getloadavg()[0],
        }
        frequency = psutil.cpu_freq()
        if frequency and frequency.current:
            reading["cpu_mhz"] = round(frequency.current)
        if self._rapl and self._energy is not None and wall_s >= MIN_ENERGY_WINDOW_S:
            reading["energy_j"] = self._rapl.read_j() - self._energy
            reading["energy_scope"] = "cpu package (RAPL)"
        return reading

    def _own_cpu_s(self) -> float:
        total = 0.0
        for process in (self._child, *self._ranks(), self._self):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def _ranks(self) -> list[psutil.Process]:
        try:
            return self._child.children()
        except psutil.NoSuchProcess:
            return []


class RaplCounter:
    """Sum of the package energy counters, in joules, unwrapped."""

    def __init__(self, zones: list[tuple[Path, float]]) -> None:
        self._zones = [(path, limit_uj) for path, limit_uj in zones]
        self._last = [self._read_uj(path) for path, _ in self._zones]
        self._total_uj = 0.0

    @classmethod
    def open(cls) -> "RaplCounter | None":
        """None where there is no readable counter."""
        zones = []
        for folder in sorted(_RAPL.glob("intel-rapl:[0-9]*")):
            if folder.name.count(":") != 1:
                continue  # a part of a package; its energy is in the package's already
            try:
                limit = float((folder / "max_energy_range_uj").read_text())
                cls._read_uj(folder / "energy_uj")
            except (OSError, ValueError):
                continue
            zones.append((folder / "energy_uj", limit))
        return cls(zones) if zones else None

    @staticmethod
    def _read_uj(path: Path) -> float:
        return float(path.read_text())

    def read_j(self) -> float:
        for index, (path, limit_uj) in enumerate(self._zones):
            now = self._read_uj(path)
            step = now - self._last[index]
            self._total_uj += step if step >= 0 else step + limit_uj
            self._last[index] = now
        return self._total_uj / 1e6


class Monitor:
    """Samples a probe in a thread for the length of a `with` block; afterwards `reading` holds what the probe says, and
    `window_s`.
    """

    def __init__(self, probe: Probe, *, interval_s: float = 0.1) -> None:
        self._probe = probe
        self._interval_s = interval_s
        self._stop = threading.Event()
        self.reading: Mapping[str, Any] = {}

    def __enter__(self) -> Self:
        self._probe.begin()
        self._start_s = time.perf_counter()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        wall_s = time.perf_counter() - self._start_s
        self.reading = {**self._probe.end(wall_s), "window_s": wall_s}

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._probe.sample()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergySource:
    """Attributes:
    scope: what the counter covers, e.g. "gpu board (NVML)"; "" when there is none.
    reason: why there is none.
    """

    scope: str
    reason: str = ""


def energy_source(device: str) -> EnergySource:
    """Which energy counter this machine offers for `device` ("cpu" or "cuda")."""
    if device == "cpu":
        if RaplCounter.open():
            return EnergySource(scope="cpu package (RAPL)")
        return EnergySource(scope="", reason="no readable RAPL counter below /sys/class/powercap")
    module = nvml()
    try:
        module.nvmlDeviceGetTotalEnergyConsumption(module.nvmlDeviceGetHandleByIndex(0))
    except module.NVMLError as error:
        return EnergySource(scope="", reason=f"NVML has no energy counter here ({error})")
    return EnergySource(scope="gpu board (NVML)")


def gpus() -> list[dict[str, Any]]:
    """Name, UUID, memory and compute capability of every NVIDIA GPU here; an empty list where there is none.

    CUDA_VISIBLE_DEVICES counts: a worker that was given one of eight GPUs has one.
    """
    try:
        module = nvml()
    except Unsupported:
        return []
    found = []
    for index in range(module.nvmlDeviceGetCount()):
        handle = module.nvmlDeviceGetHandleByIndex(index)
        major, minor = module.nvmlDeviceGetCudaComputeCapability(handle)
        found.append(
            {
                "name": module.nvmlDeviceGetName(handle),
                "uuid": module.nvmlDeviceGetUUID(handle),
                "memory_bytes": module.nvmlDeviceGetMemoryInfo(handle).total,
                "compute_capability": f"{major}.{minor}",
                "max_power_w": module.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
            }
        )
    return visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(found: list[dict[str, Any]], wanted: str | None) -> list[dict[str, Any]]:
    """Those of the GPUs that CUDA shows, in its order: numbers or UUIDs (or their beginnings), up to a bad one."""
    if wanted is None:
        return found
    chosen: list[dict[str, Any]] = []
    for name in (part.strip() for part in wanted.split(",")):
        if name.isdigit():
            matches = found[int(name) : int(name) + 1]
        else:
            matches = [gpu for gpu in found if name and str(gpu["uuid"]).startswith(name)]
        if len(matches) != 1:
            break
        chosen += matches
    return chosen


def make_probe(device: str, pid: int, *, num_ranks: int = 1, cores: Collection[int] | None = None) -> Probe:
    """The probe for a child that runs on `device`, with all ranks of its engine.

    Args:
        device: "cpu", "cuda" or "cuda:N": the first one, where there are several.
        num_ranks: each has a device of its own on CUDA.
        cores: of a processor, on which the work of others counts; None for all.
    """
    if device == "cpu":
        return CpuProbe(pid, cores)
    first = int(device.partition(":")[2] or 0)
    num_here = min(num_ranks, int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks)))  # torchrun: on this machine
    uuids = [gpu["uuid"] for gpu in gpus()[first : first + num_here]]
    return NvmlProbe(uuids, {pid, *linux.children_of(pid)}, is_whole=num_here == num_ranks)


def _busy_s(cores: Sequence[int]) -> float:
    """Seconds that these cores have worked since boot."""
    found = psutil.cpu_times(percpu=True)
    return sum(_worked_s(found[core]) for core in cores if core < len(found))


def _worked_s(times: Any) -> float:
    idle: float = times.idle + getattr(times, "iowait", 0.0)
    counted_twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times)) - idle - counted_twice
