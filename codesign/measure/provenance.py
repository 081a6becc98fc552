"""Provenance: where a number comes from, gathered once per study by the parent and kept in every record."""

import hashlib
import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import codesign
from codesign.measure.monitor import gpus
from codesign.spec.model import ModelSpec

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "optuna", "triton")
_WHOLE_BYTES = 2**30
_SAMPLE_BYTES = 2**20


def provenance(model: ModelSpec, device: str, cores: int | None = None) -> dict[str, Any]:
    """Machine, versions, code and model, as plain data. Reads every weight file of a model of up to 1 GiB.

    Args:
        cores: how many a trial uses at the most; None for all that this process may.
    """
    found: dict[str, Any] = {
        "machine": machine(),
        "device": device,
        "versions": {"codesign": codesign.__version__, "python": platform.python_version(), **_versions()},
        "code": code_state(),
        "model": {"name": model.name, "digest": model_digest(model)},
        "placement": placement(device, cores),
    }
    if model.draft is not None:
        found["draft"] = {"name": model.draft.name, "digest": model_digest(model.draft)}
    if device == "cuda":
        found["gpus"] = gpus()
    return found


def placement(device: str, most: int | None = None) -> dict[str, Any]:
    """Where this process measures: host, process id, device, and how many cores a trial uses."""
    cores = sorted(os.sched_getaffinity(0))
    names = [str(gpu["uuid"]) for gpu in gpus()] if device == "cuda" else [f"cpu, cores {core_ranges(cores)}"]
    used = min(len(cores), most or len(cores))
    return {"host": socket.gethostname(), "worker": os.getpid(), "device": ", ".join(names), "cores": used}


def core_ranges(cores: Sequence[int]) -> str:
    """`0-3,8` for 0, 1, 2, 3, 8."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][-1] + 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


@cache
def machine() -> Mapping[str, Any]:
    """This computer: processor, instruction sets that matter here, cores, memory, operating system."""
    info = cpu_info()
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "isa": isa(info),
        "cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()}",
        "boot_id": _read("/proc/sys/kernel/random/boot_id"),
    }


def cpu_info() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    found: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").split("\n\n")[0].splitlines():
        name, _, value = line.partition(":")
        found[name.strip()] = value.strip()
    return found


def isa(info: Mapping[str, str]) -> list[str]:
    """Instruction sets that decide which kernels pay: avx2, avx512, avx512_bf16, avx512_vnni, amx_bf16, amx_int8."""
    flags = set(info.get("flags", "").split())
    names = {
        "avx2": "avx2",
        "avx512": "avx512f",
        "avx512_bf16": "avx512_bf16",
        "avx512_vnni": "avx512_vnni",
        "amx_bf16": "amx_bf16",
        "amx_int8": "amx_int8",
    }
    return [name for name, flag in names.items() if flag in flags]


def code_state() -> dict[str, Any]:
    """Commit of a checkout and whether it has uncommitted changes; {"commit": None} for an installed package."""
    root = Path(codesign.__file__).parents[1]
    if not (root / ".git").exists():
        return {"commit": None}

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "codesign"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None}


def model_digest(model: ModelSpec) -> str:
    """Names the weights by content: "sha256:" over everything, or "sampled:" over sizes and ends above 1 GiB."""
    if model.path is None:
        text = json.dumps([model.architecture, model.seed], sort_keys=True, default=str)
        return f"random:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    files = sorted([*Path(model.path).glob("*.safetensors"), *Path(model.path).glob("config.json")])
    whole = sum(path.stat().st_size for path in files) <= _WHOLE_BYTES
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if whole:
                for block in iter(lambda: file.read(_SAMPLE_BYTES), b""):
                    digest.update(block)
            else:
                digest.update(file.read(_SAMPLE_BYTES))
                file.seek(max(0, size - _SAMPLE_BYTES))
                digest.update(file.read(_SAMPLE_BYTES))
    return f"{'sha256' if whole else 'sampled'}:{digest.hexdigest()[:32]}"


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
