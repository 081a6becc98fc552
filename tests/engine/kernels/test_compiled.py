import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codesign.engine.kernels import compiled, packed_matmul
from codesign.engine.kernels.compiled import Missing

needs_kernel = pytest.mark.skipif(isinstance(packed_matmul.load(), Missing), reason=str(packed_matmul.load()))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test asks anew and keeps libraries in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled, "load", compiled.load.__wrapped__)


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.so"))


@needs_kernel
def test_a_library_is_built_once_and_found_again(tmp_path: Path) -> None:
    first = compiled.load("packed_matmul")
    (library,) = kept(tmp_path)
    built_at = library.stat().st_mtime_ns

    second = compiled.load("packed_matmul")

    assert not isinstance(first, Missing)
    assert not isinstance(second, Missing)
    assert [path.stat().st_mtime_ns for path in kept(tmp_path)] == [built_at]
    assert [path.name for path in library.parent.iterdir()] == [library.name]


def test_without_a_compiler_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")

    assert compiled.load("packed_matmul") == Missing("no C compiler (gcc) on this machine")


def test_a_compiler_that_fails_gives_its_words_as_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "gcc"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho immintrin.h: no such file >&2\nexit 1\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")

    found = compiled.load("packed_matmul")

    assert isinstance(found, Missing)
    assert "immintrin.h: no such file" in found.reason
    assert kept(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_a_reason_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")

    assert isinstance(compiled.load("packed_matmul"), Missing)


def test_another_instruction_set_is_left_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "VSX")

    assert compiled.load("packed_matmul") == Missing("written for AVX2 and AVX512, ATen runs VSX")


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODESIGN_COMPILED_KERNELS", "0")

    assert isinstance(compiled.load("packed_matmul"), Missing)


@needs_kernel
def test_threads_are_those_of_torch_and_no_second_pool() -> None:
    """Two OpenMP runtimes in one process would spin against each other."""
    script = """
import threading, torch
from pathlib import Path
from codesign.engine.kernels import packed_matmul
torch.set_num_threads(2)
kernel = packed_matmul.load()
x = torch.randn(2, 1024)
codes = torch.randint(-127, 128, (2048, 1024), dtype=torch.int8)
for _ in range(3):
    kernel.int8(x, codes)
    torch.mm(x, codes.float().t())
runtimes = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line.split()[-1]}
threads = len(list(Path("/proc/self/task").iterdir()))
print(len(runtimes), threads)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    runtimes, threads = map(int, done.stdout.split())

    assert runtimes == 1
    assert threads <= 4
