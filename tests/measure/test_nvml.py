"""Figures of a trial are those of all its GPUs, played by a driver that is a script."""

import types
from typing import Any

import pytest

from codesign.measure import monitor, nvml
from codesign.measure.nvml import NvmlProbe, throttle_names

CHILD, RANK, STRANGER = 10, 11, 99


class FakeDriver:
    """GPUs whose every reading is the next of its list, then the last one again."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
    NVMLError = RuntimeError

    def __init__(self, gpus: dict[str, dict[str, list[Any]]]) -> None:
        self._gpus = {uuid: {name: list(values) for name, values in own.items()} for uuid, own in gpus.items()}

    def _next(self, uuid: str, name: str) -> Any:
        values = self._gpus[uuid][name]
        return values.pop(0) if len(values) > 1 else values[0]

    def nvmlInit(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetCount(self) -> int:
        return len(self._gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return list(self._gpus)[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetName(self, uuid: str) -> str:
        return "NVIDIA H100"

    def nvmlDeviceGetCudaComputeCapability(self, uuid: str) -> tuple[int, int]:
        return 9, 0

    def nvmlDeviceGetMemoryInfo(self, uuid: str) -> Any:
        return types.SimpleNamespace(total=80)

    def nvmlDeviceGetEnforcedPowerLimit(self, uuid: str) -> int:
        return 700_000

    def nvmlDeviceGetPowerUsage(self, uuid: str) -> int:
        return int(self._next(uuid, "power_w") * 1000)

    def nvmlDeviceGetClockInfo(self, uuid: str, kind: int) -> Any:
        return self._next(uuid, "sm_mhz")

    def nvmlDeviceGetTemperature(self, uuid: str, kind: int) -> Any:
        return self._next(uuid, "temperature_c")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, uuid: str) -> Any:
        return self._next(uuid, "throttle")

    def nvmlDeviceGetComputeRunningProcesses(self, uuid: str) -> list[Any]:
        used = self._next(uuid, "used")
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=memory) for pid, memory in used.items()]

    def nvmlDeviceGetTotalEnergyConsumption(self, uuid: str) -> Any:
        energy_mj = self._next(uuid, "energy_mj")
        if energy_mj is None:
            raise self.NVMLError("not supported")
        return energy_mj


# Read at the beginning and at the end.
TWO: dict[str, dict[str, list[Any]]] = {
    "GPU-a": {
        "power_w": [100, 300],
        "sm_mhz": [1900, 1800],
        "temperature_c": [40, 50],
        "throttle": [0x1, 0x4],
        "used": [{CHILD: 30}, {CHILD: 20}],
        "energy_mj": [5_000, 25_000],
    },
    "GPU-b": {
        "power_w": [200, 150],
        "sm_mhz": [1700, 1950],
        "temperature_c": [45, 60],
        "throttle": [0x40, 0x1],
        "used": [{RANK: 7}, {RANK: 9, STRANGER: 50}],
        "energy_mj": [1_000, 7_000],
    },
}


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(TWO)
    for module in (nvml, monitor):
        monkeypatch.setattr(module, "nvml", lambda: driver)
    monkeypatch.setattr(monitor.linux, "children_of", lambda pid: {RANK} if pid == CHILD else set())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def reading(num_ranks: int, *, device: str = "cuda", wall_s: float = 10.0) -> dict[str, Any]:
    probe = monitor.make_probe(device, CHILD, num_ranks=num_ranks)
    assert isinstance(probe, NvmlProbe)
    probe.begin()
    return dict(probe.end(wall_s))


@pytest.mark.usefixtures("two")
def test_energy_power_and_memory_are_the_sums_of_all_ranks_gpus() -> None:
    found = reading(2)

    assert found["gpu_uuids"] == ["GPU-a", "GPU-b"]
    assert (found["energy_j"], found["energy_scope"]) == (20 + 6, "2 gpu boards (NVML)")
    assert found["process_memory_bytes"] == 30 + 9  # each at its own peak, the stranger's left out
    assert found["power_w_mean"] == (300 + 450) / 2
    assert found["power_w_max"] == 450  # at one moment, not 300 + 200
    assert found["power_limit_w"] == 1400


@pytest.mark.usefixtures("two")
def test_of_clocks_temperatures_and_throttling_the_worst_gpu_counts() -> None:
    found = reading(2)

    assert (found["sm_mhz_min"], found["sm_mhz_median"]) == (1700, 1900)
    assert (found["temperature_c_before"], found["temperature_c_after"]) == (45, 60)
    assert found["throttle_reasons"] == ["sw_power_cap", "hw_thermal"]
    assert found["foreign_pids"] == [STRANGER]


@pytest.mark.usefixtures("two")
def test_each_gpu_is_told_too_where_there_are_several() -> None:
    found = reading(2)

    assert [gpu["energy_j"] for gpu in found["gpus"]] == [20, 6]
    assert [gpu["throttle_reasons"] for gpu in found["gpus"]] == [["sw_power_cap"], ["hw_thermal"]]
    assert "gpus" not in reading(1)


@pytest.mark.usefixtures("two")
def test_a_single_rank_has_the_gpu_of_its_device_alone() -> None:
    found = reading(1, device="cuda:1")

    assert found["gpu_uuids"] == ["GPU-b"]
    assert (found["energy_j"], found["energy_scope"]) == (6, "gpu board (NVML)")


@pytest.mark.usefixtures("two")
def test_without_the_gpus_of_other_machines_there_is_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun: four ranks, two of them here."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    found = reading(4)

    assert found["gpu_uuids"] == ["GPU-a", "GPU-b"]
    assert "energy_j" not in found


@pytest.mark.usefixtures("two")
def test_a_window_too_short_for_the_counters_gives_no_energy() -> None:
    assert "energy_j" not in reading(2, wall_s=9.9)


def test_one_gpu_without_a_counter_leaves_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver({**TWO, "GPU-b": {**TWO["GPU-b"], "energy_mj": [None]}})
    monkeypatch.setattr(nvml, "nvml", lambda: driver)
    probe = NvmlProbe(["GPU-a", "GPU-b"], {CHILD, RANK})
    probe.begin()

    assert "energy_j" not in probe.end(10.0)


def test_throttle_reasons_are_named_and_idle_is_none() -> None:
    assert throttle_names(0x1) == []
    assert throttle_names(0x4 | 0x40) == ["sw_power_cap", "hw_thermal"]
