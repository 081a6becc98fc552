"""What the kernel says about memory: of one process, of this machine, and whether it had to kill for it."""

import dataclasses
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
_UNLIMITED = 2**60  # "no limit" is written as a huge number by version 1 of control groups


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """Attributes:
    rss_bytes: resident now.
    peak_rss_bytes: the most ever resident (VmHWM).
    data_bytes: private writable memory, resident or not (VmData); RLIMIT_DATA bounds this.
    """

    rss_bytes: int
    peak_rss_bytes: int
    data_bytes: int


def process_memory(pid: int) -> ProcessMemory | None:
    """Memory of a process, or None when it has ended (a zombie has none)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    kib = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines) if key in _FIELDS}
    if len(kib) < len(_FIELDS):
        return None
    rss, peak, data = (kib[field] * 1024 for field in _FIELDS)
    return ProcessMemory(rss_bytes=rss, peak_rss_bytes=max(peak, rss), data_bytes=data)


_FIELDS = ("VmRSS", "VmHWM", "VmData")


def available_bytes() -> int:
    """Memory that a new process can take before the kernel has to kill: the machine's, or less in a control group."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    for line in OWN_CGROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, limit, usage = CGROUP_ROOT / path.strip("/"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            folder = CGROUP_ROOT / "memory" / path.strip("/")
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        try:
            most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
            stat = dict(item.split() for item in (folder / "memory.stat").read_text().splitlines())
        except OSError:  # the root group has no limit, and a container may not see its own
            continue
        if most != "max" and int(most) < _UNLIMITED:
            reclaimable = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
            available = min(available, int(most) - used + reclaimable)
    return max(available, 0)


def kernel_oom_kills() -> int:
    """Processes that the kernel's OOM killer took since boot, for whichever limit; 0 where it does not say."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0
