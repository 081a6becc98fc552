"""Rows in a mapped file: the same tokens, small private memory, and nothing left behind."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from codesign.engine.kv import mapped
from codesign.engine.kv.places.offload import Offload
from codesign.errors import Unsupported
from codesign.registry import KV_CODECS, KV_POLICIES
from tests.engine.driving import generate, request, tiny_engine

SCRIPT = Path(__file__).with_name("offload_script.py")
CPU = torch.device("cpu")
MIB = 2**20
MUTABLE = [name for name in KV_CODECS.names() if KV_CODECS.create(name).rows_mutable]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if mapped._filesystem(tmp_path) in mapped._IN_MEMORY:
        pytest.skip("temporary files lie in memory here, and offload refuses that")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("policy", "codec"),
    [(p, codec) for p in KV_POLICIES.names() for codec in (KV_CODECS.names() if p == "full" else MUTABLE)],
)
def test_tokens_are_those_of_the_device_with_every_policy_and_codec(policy: str, codec: str, scratch: Path) -> None:
    """Head size 32 so that every knob's default fits; five sequences through four slots, so that one is reused."""
    budget = {"kv_budget": 80} if policy != "full" else {}
    requests = [request(str(index), 60 + 20 * index, 24, ignore_eos=True, temperature=0.7) for index in range(5)]

    def tokens(place: str) -> dict[str, list[int]]:
        kv: dict[str, Any] = {"policy": {"name": policy, **budget}, "codec": codec, "place": place}
        return generate(tiny_engine(shape={"head_dim": 32}, kv=kv, max_step_tokens=48), *requests)

    assert tokens("offload") == tokens("device")
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("codec", KV_CODECS.names())
def test_facts_say_what_lies_where(codec: str) -> None:
    def facts(place: str) -> dict[str, Any]:
        return tiny_engine(shape={"head_dim": 32}, kv={"codec": codec, "place": place}, max_model_len=512).facts()

    device, offload = facts("device"), facts("offload")

    assert offload["bytes"]["kv"] == device["bytes"]["kv"]
    assert offload["bytes"]["workspace"] == device["bytes"]["workspace"]
    assert device["resolved"]["kv_place"] == {"cpu memory": device["bytes"]["kv"]}
    assert offload["resolved"]["kv_place"] == {"mapped file": offload["bytes"]["kv"], "cpu memory": 0}


def test_what_a_policy_keeps_beside_the_rows_stays_in_memory() -> None:
    kv = {"policy": {"name": "dynamic", "kv_budget": 64, "under_pressure": "h2o"}, "place": "offload"}
    facts = tiny_engine(kv=kv).facts()
    where = facts["resolved"]["kv_place"]

    assert sum(where.values()) == facts["bytes"]["kv"]
    assert 0 < where["cpu memory"] < 0.2 * where["mapped file"]


def test_kv_memory_bounds_the_number_of_slots_in_a_file_as_well() -> None:
    whole = tiny_engine().facts()["bytes"]["kv"]

    assert tiny_engine(kv_memory_bytes=whole // 2, kv={"place": "offload"}).num_slots == 2


class Child:
    """The script, stage after stage."""

    def __init__(self, place: str, scratch: Path) -> None:
        environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), place],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )

    def stage(self, name: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = json.loads(self.process.stdout.readline())
        assert line["stage"] == name
        return line

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def child(request: pytest.FixtureRequest, scratch: Path) -> Iterator[Child]:
    child = Child(request.param, scratch)
    yield child
    child.end()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("child", ["offload"], indirect=True)
def test_a_large_cache_is_file_memory_and_goes_with_the_engine(child: Child, scratch: Path) -> None:
    before, built, used = (child.stage(name) for name in ("before", "built", "used"))
    num_bytes = built["kv"]
    while_used = list(scratch.iterdir())
    child.go_on()
    closed = child.stage("closed")

    assert num_bytes >= 32 * MIB and built["kv_place"]["mapped file"] == num_bytes
    assert used["RssAnon"] - before["RssAnon"] < num_bytes / 4
    assert used["RssFile"] - before["RssFile"] >= num_bytes and used["RssShmem"] == before["RssShmem"]
    assert used["VmHWM"] - before["VmHWM"] >= num_bytes, "the peak must not hide what is mapped"
    assert used["mapped"] > 0 and not while_used, "a file that has no name while it is used"
    assert closed["mapped"] == 0 and closed["RssFile"] - before["RssFile"] < num_bytes / 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("child", ["device"], indirect=True)
def test_on_the_device_the_same_cache_is_private_memory(child: Child) -> None:
    """What the test above would see if nothing were offloaded."""
    before, built, used = (child.stage(name) for name in ("before", "built", "used"))

    assert used["RssAnon"] - before["RssAnon"] >= built["kv"] and used["mapped"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("child", ["offload"], indirect=True)
def test_a_killed_process_leaves_nothing_behind(child: Child, scratch: Path) -> None:
    for name in ("before", "built", "used"):
        mapped_files = child.stage(name)["mapped"]
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.communicate()

    assert mapped_files > 0 and child.process.returncode == -signal.SIGKILL
    assert not list(scratch.iterdir())


def test_a_file_that_cannot_be_so_large_is_refused_before_anything_runs(scratch: Path) -> None:
    """A real limit of the kernel, met by the same call as a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with pytest.raises(Unsupported, match=r"offload': .* has no room for .* free\); set TMPDIR .* or lower max_ba"):
            tiny_engine(kv={"place": "offload"}, max_model_len=512, max_batch_size=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(scratch.iterdir())


def test_a_full_disk_is_refused_before_anything_runs(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)

    with pytest.raises(Unsupported, match=f"{scratch} has no room for 256 KiB of KV rows"):
        tiny_engine(kv={"place": "offload"})
    assert not list(scratch.iterdir())


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs a filesystem in memory")
def test_a_folder_in_memory_saves_none_and_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/shm")

    with pytest.raises(Unsupported, match=r"/dev/shm is a tmpfs, whose files lie in memory; set TMPDIR"):
        tiny_engine(kv={"place": "offload"})


def test_a_folder_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere/at/all")

    with pytest.raises(Unsupported, match=r"no file can be mapped in /nowhere/at/all \(No such file or directory\)"):
        tiny_engine(kv={"place": "offload"})


def test_rows_are_zeros_and_independent() -> None:
    one, other = (Offload().zeros(5, 3, dtype=torch.bfloat16, device=CPU) for _ in range(2))
    one += 1

    assert one.sum() == 15 and other.sum() == 0
    assert Offload().zeros(0, 3, dtype=torch.int8, device=CPU).shape == (0, 3)
