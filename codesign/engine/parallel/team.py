"""Team: how the ranks of one engine come together, on one machine or over torchrun's rendezvous.

one machine      rank 0 starts the others; they meet in a store that listens on the loopback address
several nodes    torchrun has started everybody and holds the store (`node.py`)
"""

import dataclasses
import os
import socket
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__
from torch.distributed.distributed_c10d import Store

from codesign.engine.parallel import node, processes
from codesign.engine.parallel.links import Links
from codesign.engine.parallel.part import Layout
from codesign.engine.parallel.processes import Processes
from codesign.errors import Unsupported
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec

_LOOPBACK = "127.0.0.1"
_MEET = timedelta(minutes=5)


@dataclasses.dataclass
class Team:
    """Attributes:
    device: of this rank.
    others: the processes that rank 0 has started; none on other ranks and with torchrun.
    before: cores and threads that this process had.
    """

    links: Links
    device: torch.device
    others: Processes
    before: tuple[set[int], int]

    def close(self) -> None:
        """Ends the others at once where they have not ended, and takes back all cores."""
        self.others.close()
        self.links.close()
        cores, num_threads = self.before
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(num_threads)


def lead(
    model: ModelSpec,
    config: EngineConfig,
    *,
    device: str,
    num_threads: int | None,
    run: Callable[[Mapping[str, Any]], None],
) -> Team:
    """Brings everybody together, as rank 0.

    Args:
        run: what the others do with the job; it calls `follow`.
    Raises:
        Unsupported: more ranks than CUDA devices, or a torch without NCCL.
    """
    layout = layout_of(config)
    job: dict[str, Any] = {
        "model": dataclasses.asdict(model),
        "config": config.to_dict(),
        "device": device,
        "num_threads": num_threads,
    }
    if node.is_several():
        return _join(node.publish(job, layout), job, rank=0, layout=layout, is_local=False)
    _check_devices(device, layout)
    listener = socket.create_server((_LOOPBACK, 0))
    with listener:
        port = listener.getsockname()[1]
        others = processes.start({**job, "port": port}, range(1, layout.num_ranks), run)
        try:
            # After the forks: it starts a thread. Left to itself it would listen on every interface.
            store = TCPStore(
                _LOOPBACK, port, None, True, _MEET, wait_for_workers=False, master_listen_fd=os.dup(listener.fileno())
            )
            team = _join(store, job, rank=0, layout=layout, is_local=True)
        except RuntimeError:
            others.raise_failure()
            others.close()
            raise
        except BaseException:
            others.close()
            raise
    team.others = others
    return team


def follow(job: Mapping[str, Any]) -> Team:
    """Joins rank 0, as the rank that the job says."""
    layout = layout_of(EngineConfig.from_dict(job["config"]))
    is_local = "port" in job
    store = TCPStore(_LOOPBACK, job["port"], None, False, _MEET) if is_local else node.store_of(job)
    return _join(store, job, rank=job["rank"], layout=layout, is_local=is_local)


def layout_of(config: EngineConfig) -> Layout:
    return Layout(tensor_size=config.parallel.tensor_parallel_size, num_stages=config.parallel.pipeline_parallel_size)


def _join(store: Store, job: Mapping[str, Any], *, rank: int, layout: Layout, is_local: bool) -> Team:
    before = os.sched_getaffinity(0), torch.get_num_threads()
    local_rank, num_here = (rank, layout.num_ranks) if is_local else node.local_rank()
    device = processes.device_of(job["device"], local_rank)
    if device.type == "cpu":
        cores = processes.cores_of(local_rank, num_here, num_threads=job["num_threads"])
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
    else:
        torch.cuda.set_device(device)
    links = Links(store, rank=rank, layout=layout, device=device, is_local=is_local)
    return Team(links, device, Processes([]), before)


def _check_devices(device: str, layout: Layout) -> None:
    if device == "cpu":
        return
    asked, first = layout.num_ranks, int(device.partition(":")[2] or 0)
    found = torch.cuda.device_count() - first
    if found < asked:
        raise Unsupported(
            f"parallel: {asked} ranks need {asked} CUDA devices from {device} on, this machine has {found}"
        )
    if not dist.is_nccl_available():
        raise Unsupported("parallel on cuda: this build of torch has no NCCL; use parallel sizes of 1")
