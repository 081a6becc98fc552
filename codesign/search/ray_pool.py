"""Trials as Ray tasks: Ray finds a node with free GPUs or cores, everything else stays ours.

A task is one trial. It yields where it runs, then its record, both as JSON text. `max_retries` is 0, because Ray would
run a finished trial again when its answer is lost; a lost task comes back as a lost trial, which the study tries again.

`local` starts Ray on this machine, with a token of its own and every port on loopback; that is checked after the start.
A cluster (HOST:PORT) must have token authentication: without it everybody who reaches its ports runs code on it
(CVE-2023-48022). Every node needs this version of codesign, and the model at the same path.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Self

import psutil

from codesign.errors import InputError, Unsupported, WorkError
from codesign.results.record import TrialIdentity, TrialRecord
from codesign.search.measurer import Order, measurer
from codesign.search.pool import Listener, lost
from codesign.search.seat import ordered_cores
from codesign.search.worker import job, read_job
from codesign.spec.engine_config import EngineConfig

LOCAL = "local"
# A task that no node has taken for so long is given back: the node that had room for it has gone.
PLACE_S = 120.0
TRIAL_S = 4 * 3600.0
_LOOK_EVERY_S = 1.0
_OBJECT_STORE_BYTES = 80 * 2**20  # the least that Ray takes; a record is a few hundred kilobytes


class RayPool:
    """Args:
    order: what the tasks measure.
    address: `local`, or HOST:PORT of a cluster of which this machine is a node.
    num_cores, num_gpus: what a trial reserves.

    Raises:
        InputError: the address, or a cluster without token authentication.
        Unsupported: Ray is not installed.
        WorkError: the cluster cannot be reached.
    """

    def __init__(self, order: Order, *, address: str, num_cores: int, num_gpus: int = 0) -> None:
        self._order = order.to_json()
        self._ray = _connected(address)
        self._needs = {"GPU": float(num_gpus)} if num_gpus else {"CPU": float(num_cores)}
        options = {"num_cpus": 1 if num_gpus else num_cores, "num_gpus": num_gpus}
        self._task = self._ray.remote(max_retries=0, num_returns="streaming", **options)(run_trial)
        self._jobs: dict[Any, _Job] = {}
        self._capacity = 0
        self._looked_s = 0.0

    def free_place(self) -> str | None:
        return "Ray" if len(self._jobs) < self._room() else None

    def _room(self) -> int:
        """How many trials fit on the nodes that are there now."""
        if time.monotonic() - self._looked_s > _LOOK_EVERY_S:
            ((name, need),) = self._needs.items()
            nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self._capacity = sum(int(resources.get(name, 0.0) // need) for resources in nodes)
            self._looked_s = time.monotonic()
        return self._capacity

    def start(self, identity: TrialIdentity, config: EngineConfig) -> None:
        self._jobs[self._task.remote(self._order, job(identity, config))] = _Job(identity, config)

    def wait(self, timeout_s: float, listener: Listener) -> Sequence[TrialRecord]:
        if not self._jobs:
            time.sleep(timeout_s)
            return ()
        ready, _ = self._ray.wait([*self._jobs], num_returns=1, timeout=timeout_s)
        found = [self._hear(task, listener) for task in ready]
        for task, waiting in [*self._jobs.items()]:
            silent_s = time.monotonic() - waiting.heard_s
            if silent_s > (TRIAL_S if waiting.place else PLACE_S):
                found.append(self._lose(task, f"was silent for {silent_s:.0f} s"))
        return [record for record in found if record is not None]

    def _hear(self, task: Any, listener: Listener) -> TrialRecord | None:
        waiting = self._jobs[task]
        try:
            text = self._ray.get(next(task))
        except StopIteration:
            return self._lose(task, "ended without a record")
        except self._ray.exceptions.RayError as error:
            return self._lose(task, f"is lost ({_first_line(error)})")
        if not waiting.place:
            waiting.place, waiting.heard_s = str(json.loads(text)["place"]), time.monotonic()
            listener.placed(waiting.identity.uid, waiting.place)
            return None
        del self._jobs[task]
        return TrialRecord.from_json(text)

    def _lose(self, task: Any, why: str) -> TrialRecord:
        waiting = self._jobs.pop(task)
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.cancel(task, force=True)
        return lost(
            waiting.identity, waiting.config, f"its Ray task ({waiting.place or 'not placed'}) {why}", waiting.since
        )

    def cancel(self) -> None:
        for task in [*self._jobs]:
            self._lose(task, "was cancelled")

    def close(self) -> None:
        self.cancel()
        self._ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Job:
    def __init__(self, identity: TrialIdentity, config: EngineConfig) -> None:
        self.identity, self.config = identity, config
        self.heard_s = time.monotonic()
        self.since = datetime.now(UTC).isoformat(timespec="seconds")
        self.place = ""


def run_trial(order: str, line: str) -> Iterator[str]:
    """The task: runs in a process of Ray's."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    place = f"Ray node {socket.gethostname()}, worker {os.getpid()}" + (f", GPU {devices}" if devices else "")
    yield json.dumps({"place": place})
    identity, config = read_job(line)
    with measurer(Order.from_json(order)) as measure:
        yield measure(identity, config, lambda name, fraction: None).to_json()


def check_address(address: str) -> None:
    """Raises InputError for what is no address, or one of a cluster that would let anybody in."""
    if address == LOCAL:
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise InputError(f"must be {LOCAL}, or HOST:PORT of a cluster that this machine is a node of", key="--ray")
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise InputError(
            "a cluster needs token authentication, since whoever reaches its ports runs code on it: start it with "
            "RAY_AUTH_MODE=token, and set that and RAY_AUTH_TOKEN (or ~/.ray/auth_token) here",
            key="--ray",
        )


def _connected(address: str) -> Any:
    """The module ray, connected. Its handlers of signals are taken back: an interrupt is the study's to handle."""
    check_address(address)
    if importlib.util.find_spec("ray") is None:
        raise Unsupported("--ray needs Ray: pip install --editable '.[distributed]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "configure_logging": False}
    if address == LOCAL:
        # Ray's switch for machines that are no node of a cluster (made for macOS and Windows): it binds to loopback.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        options |= {"num_cpus": len(ordered_cores()), "object_store_memory": _OBJECT_STORE_BYTES}
        options |= {"include_dashboard": False}
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    import ray

    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise WorkError(f"Ray at {address}: {_first_line(error)}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if address == LOCAL and (open_ports := listening_off_loopback()):
        ray.shutdown()
        raise WorkError(f"Ray listens beyond this machine ({', '.join(open_ports)}), which codesign does not allow")
    return ray


def listening_off_loopback() -> list[str]:
    """Ports on which this process or one below it listens for other machines."""
    found = []
    here = psutil.Process()
    for process in [here, *here.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            for connection in process.net_connections(kind="inet"):
                address = connection.laddr[0].removeprefix("::ffff:") if connection.laddr else ""
                if connection.status == psutil.CONN_LISTEN and not (address.startswith("127.") or address == "::1"):
                    found.append(f"{process.name()} on {address}:{connection.laddr[1]}")
    return found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
