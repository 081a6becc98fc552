import os
from pathlib import Path

import pytest

from codesign.measure.memory import available_bytes, kernel_oom_kills, process_memory
from codesign.units import MIB


def test_the_peak_remembers_what_was_given_back() -> None:
    before = process_memory(os.getpid())
    held = bytearray(200 * MIB)
    during = process_memory(os.getpid())
    del held
    after = process_memory(os.getpid())

    assert before is not None and during is not None and after is not None
    assert during.data_bytes - before.data_bytes >= 199 * MIB
    assert during.peak_rss_bytes >= during.rss_bytes >= before.rss_bytes + 150 * MIB
    assert after.rss_bytes < during.rss_bytes - 150 * MIB
    assert after.peak_rss_bytes >= during.rss_bytes - MIB  # the kernel counts per core and adds up lazily


def test_an_ended_process_has_no_memory() -> None:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    assert process_memory(pid) is None  # a zombie
    os.waitpid(pid, 0)
    assert process_memory(pid) is None  # nothing


def test_available_memory_is_some_of_the_machines() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024

    assert 0 < available_bytes() <= total


def test_a_control_group_bounds_what_is_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files as both versions of control groups write them: limit, usage, and what of that is only cache."""
    for version, (line, folder, limit, usage) in {
        "2": ("0::/job", "job", "memory.max", "memory.current"),
        "1": ("4:cpu,memory:/job", "memory/job", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    }.items():
        root = tmp_path / version
        (root / folder).mkdir(parents=True)
        (root / folder / limit).write_text(f"{100 * MIB}\n")
        (root / folder / usage).write_text(f"{90 * MIB}\n")
        (root / folder / "memory.stat").write_text(
            f"anon {60 * MIB}\ninactive_file {20 * MIB}\nactive_file {5 * MIB}\n"
        )
        (root / "cgroup").write_text(line + "\n")
        monkeypatch.setattr("codesign.measure.memory.CGROUP_ROOT", root)
        monkeypatch.setattr("codesign.measure.memory.OWN_CGROUPS", root / "cgroup")

        assert available_bytes() == 35 * MIB

        (root / folder / limit).write_text("max\n" if version == "2" else f"{2**63 - 4096}\n")
        assert available_bytes() > 35 * MIB


def test_the_kernels_count_of_oom_kills_never_falls() -> None:
    first = kernel_oom_kills()

    assert 0 <= first <= kernel_oom_kills()
