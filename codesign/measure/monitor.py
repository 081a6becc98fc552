"""Device monitor: what the machine did while a window was measured, read by the parent and never by the trial.

A CUDA device is read through NVML: the total-energy counter, power, clocks, temperature, throttle reasons, memory by
process. A CPU is read through psutil, with RAPL energy where the counters are readable. What cannot be read is absent,
not guessed. The energy counter of NVML steps about every 100 ms, so an energy figure needs a window of at least 10 s.
"""

import dataclasses
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import psutil

from codesign.errors import Unsupported

MIN_ENERGY_WINDOW_S = 10.0
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
    """

    def __init__(self, pid: int) -> None:
        self._child = psutil.Process(pid)
        self._self = psutil.Process()
        self._rapl = RaplCounter.open()

    def begin(self) -> None:
        self._busy = _machine_busy_s()
        self._ours = self._own_cpu_s()
        self._energy = self._rapl.read_j() if self._rapl else None

    def sample(self) -> None:
        if self._rapl:
            self._rapl.read_j()  # follows the counter across its wrap-around

    def end(self, wall_s: float) -> Mapping[str, Any]:
        ours = self._own_cpu_s() - self._ours
        foreign = max(0.0, _machine_busy_s() - self._busy - ours)
        cores = os.cpu_count() or 1
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


class NvmlProbe:
    """NVML readings of one GPU, found by its UUID so that CUDA_VISIBLE_DEVICES cannot mislead it."""

    def __init__(self, uuid: str, pid: int) -> None:
        self._nvml = _nvml()
        self._handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._pid = pid
        self._uuid = uuid

    def begin(self) -> None:
        self._power_w: list[float] = []
        self._sm_mhz: list[int] = []
        self._temperature_c: list[int] = []
        self._throttle = 0
        self._foreign: set[int] = set()
        self._peak_used = 0
        self._energy_mj = self._energy()
        self.sample()

    def sample(self) -> None:
        nvml, handle = self._nvml, self._handle
        self._power_w.append(nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        self._sm_mhz.append(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        self._temperature_c.append(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        self._throttle |= nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == self._pid:
                self._peak_used = max(self._peak_used, process.usedGpuMemory or 0)
            else:
                self._foreign.add(process.pid)

    def end(self, wall_s: float) -> Mapping[str, Any]:
        nvml = self._nvml
        self.sample()
        reading: dict[str, Any] = {
            "source": "nvml",
            "gpu_uuid": self._uuid,
            "gpu_name": nvml.nvmlDeviceGetName(self._handle),
            "driver": nvml.nvmlSystemGetDriverVersion(),
            "power_w_mean": sum(self._power_w) / len(self._power_w),
            "power_w_max": max(self._power_w),
            "power_limit_w": nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000,
            "sm_mhz_min": min(self._sm_mhz),
            "sm_mhz_median": sorted(self._sm_mhz)[len(self._sm_mhz) // 2],
            "temperature_c_before": self._temperature_c[0],
            "temperature_c_after": self._temperature_c[-1],
            "throttle_reasons": throttle_names(self._throttle),
            "process_memory_bytes": self._peak_used,
            "foreign_pids": sorted(self._foreign),
            "num_samples": len(self._power_w),
        }
        energy = self._energy()
        if self._energy_mj is not None and energy is not None and wall_s >= MIN_ENERGY_WINDOW_S:
            reading["energy_j"] = (energy - self._energy_mj) / 1000
            reading["energy_scope"] = "gpu board (NVML)"
        return reading

    def _energy(self) -> int | None:
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError:
            return None  # parts before Volta have no counter


_THROTTLE = {
    0x2: "applications_clocks",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
    0x100: "display_clocks",
}


def throttle_names(bits: int) -> list[str]:
    """Names of NVML clock-event reason bits; an idle GPU (bit 1) is no reason."""
    return [name for bit, name in _THROTTLE.items() if bits & bit]


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
    nvml = _nvml()
    try:
        nvml.nvmlDeviceGetTotalEnergyConsumption(nvml.nvmlDeviceGetHandleByIndex(0))
    except nvml.NVMLError as error:
        return EnergySource(scope="", reason=f"NVML has no energy counter here ({error})")
    return EnergySource(scope="gpu board (NVML)")


def gpus() -> list[dict[str, Any]]:
    """Name, UUID, memory and compute capability of every NVIDIA GPU here; an empty list where there is none.

    CUDA_VISIBLE_DEVICES counts: a worker that was given one of eight GPUs has one.
    """
    try:
        nvml = _nvml()
    except Unsupported:
        return []
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        found.append(
            {
                "name": nvml.nvmlDeviceGetName(handle),
                "uuid": nvml.nvmlDeviceGetUUID(handle),
                "memory_bytes": nvml.nvmlDeviceGetMemoryInfo(handle).total,
                "compute_capability": f"{major}.{minor}",
                "max_power_w": nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
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


def make_probe(device: str, pid: int) -> Probe:
    """The probe for a child that runs on `device`."""
    if device == "cpu":
        return CpuProbe(pid)
    return NvmlProbe(gpus()[0]["uuid"], pid)


def _machine_busy_s() -> float:
    times = psutil.cpu_times()
    idle: float = times.idle + getattr(times, "iowait", 0.0)
    counted_twice = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times)) - idle - counted_twice


def _nvml() -> Any:
    """The initialised pynvml module.

    Raises:
        Unsupported: no NVIDIA driver here.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Unsupported(f"no NVIDIA driver answers here ({error})") from error
    return pynvml
