"""What NVML says of the GPUs of one trial while a window is measured.

A trial on several ranks has several GPUs, and its figures are those of all of them:

    sums           energy, power, limits, memory of the trial's processes (each process at its own peak)
    the worst      lowest clocks, highest temperatures, reasons of any GPU to throttle
    by GPU         the same, one by one, under `gpus`, where there are several
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from codesign.errors import Unsupported

MIN_ENERGY_WINDOW_S = 10.0  # the energy counter steps about every 100 ms


def nvml() -> Any:
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


class NvmlProbe:
    """Readings of some GPUs, found by their UUIDs so that CUDA_VISIBLE_DEVICES cannot mislead it.

    Args:
        pids: of the trial's processes; any other one is foreign.
        is_whole: whether these are all GPUs of the trial; without those of other machines there is no energy.
    """

    def __init__(self, uuids: Sequence[str], pids: Collection[int], *, is_whole: bool = True) -> None:
        self._nvml = nvml()
        self._gpus = [_Gpu(self._nvml, uuid, pids) for uuid in uuids]
        self._is_whole = is_whole

    def begin(self) -> None:
        for gpu in self._gpus:
            gpu.begin()

    def sample(self) -> None:
        for gpu in self._gpus:
            gpu.sample()

    def end(self, wall_s: float) -> Mapping[str, Any]:
        gpus = [gpu.end() for gpu in self._gpus]
        throttled = {name for gpu in gpus for name in gpu["throttle_reasons"]}
        # Of the sums at one moment, not the sum of the highest.
        powers = [sum(moment) for moment in zip(*(gpu.power_w for gpu in self._gpus), strict=True)]
        reading: dict[str, Any] = {
            "source": "nvml",
            "gpu_uuids": [gpu["uuid"] for gpu in gpus],
            "gpu_name": ", ".join(dict.fromkeys(gpu["name"] for gpu in gpus)),
            "driver": self._nvml.nvmlSystemGetDriverVersion(),
            "power_w_mean": sum(powers) / len(powers),
            "power_w_max": max(powers),
            "power_limit_w": sum(gpu["power_limit_w"] for gpu in gpus),
            "sm_mhz_min": min(gpu["sm_mhz_min"] for gpu in gpus),
            "sm_mhz_median": min(gpu["sm_mhz_median"] for gpu in gpus),
            "temperature_c_before": max(gpu["temperature_c_before"] for gpu in gpus),
            "temperature_c_after": max(gpu["temperature_c_after"] for gpu in gpus),
            "throttle_reasons": [name for name in _THROTTLE.values() if name in throttled],
            "process_memory_bytes": sum(gpu["process_memory_bytes"] for gpu in gpus),
            "foreign_pids": sorted({pid for gpu in gpus for pid in gpu["foreign_pids"]}),
            "num_samples": len(powers),
        }
        energies = [gpu["energy_j"] for gpu in gpus]
        if len(gpus) > 1:
            reading["gpus"] = gpus
        if self._is_whole and None not in energies and wall_s >= MIN_ENERGY_WINDOW_S:
            reading["energy_j"] = sum(energies)
            reading["energy_scope"] = "gpu board (NVML)" if len(gpus) == 1 else f"{len(gpus)} gpu boards (NVML)"
        return reading


class _Gpu:
    """One GPU. Attributes: power_w: at each sample."""

    def __init__(self, module: Any, uuid: str, pids: Collection[int]) -> None:
        self._nvml, self._uuid, self._pids = module, uuid, pids
        self._handle = module.nvmlDeviceGetHandleByUUID(uuid)

    def begin(self) -> None:
        self.power_w: list[float] = []
        self._sm_mhz: list[int] = []
        self._temperature_c: list[int] = []
        self._throttle = 0
        self._foreign: set[int] = set()
        self._peak_used: dict[int, int] = {}  # by process
        self._energy_mj = self._energy()
        self.sample()

    def sample(self) -> None:
        nvml, handle = self._nvml, self._handle
        self.power_w.append(nvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        self._sm_mhz.append(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
        self._temperature_c.append(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        self._throttle |= nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid in self._pids:
                used = process.usedGpuMemory or 0
                self._peak_used[process.pid] = max(self._peak_used.get(process.pid, 0), used)
            else:
                self._foreign.add(process.pid)

    def end(self) -> dict[str, Any]:
        self.sample()
        energy_mj = self._energy()
        return {
            "uuid": self._uuid,
            "name": self._nvml.nvmlDeviceGetName(self._handle),
            "power_w_mean": sum(self.power_w) / len(self.power_w),
            "power_limit_w": self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000,
            "sm_mhz_min": min(self._sm_mhz),
            "sm_mhz_median": sorted(self._sm_mhz)[len(self._sm_mhz) // 2],
            "temperature_c_before": self._temperature_c[0],
            "temperature_c_after": self._temperature_c[-1],
            "throttle_reasons": throttle_names(self._throttle),
            "process_memory_bytes": sum(self._peak_used.values()),
            "foreign_pids": sorted(self._foreign),
            "energy_j": None if self._energy_mj is None or energy_mj is None else (energy_mj - self._energy_mj) / 1000,
        }

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
