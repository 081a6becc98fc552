"""Ranks on several machines, by torchrun:

    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \\
        -m codesign.engine.parallel.node measure profiles/h100.yaml --config tp8.yaml

Rank 0 runs the command; each engine that it builds with as many ranks as torchrun has started is a job that the others
take from torchrun's store, one after the other. torchrun's store and gloo listen on the network, without
authentication: use a private one (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface).
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__
from torch.distributed.distributed_c10d import PrefixStore, Store

from codesign.engine.parallel.part import Layout
from codesign.errors import Unsupported

_COUNT = "codesign/jobs"
_FOREVER = timedelta(days=30)
_POLL_S = 0.05


def is_several() -> bool:
    """Whether torchrun has started this process, or one that this one comes from."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def publish(job: Mapping[str, Any], layout: Layout) -> Store:
    """Hands the job to the other ranks; returns the store in which they meet.

    Raises:
        Unsupported: torchrun has started another number of ranks.
    """
    size = int(os.environ["WORLD_SIZE"])
    if layout.num_ranks != size:
        raise Unsupported(
            f"parallel: the configuration has {layout.num_ranks} ranks, torchrun has started {size}; they must be equal"
        )
    store = _store()
    number = store.add(_COUNT, 1)
    store.set(_job(number), json.dumps({**job, "number": number}))
    return store_of({"number": number}, store)


def store_of(job: Mapping[str, Any], store: Store | None = None) -> Store:
    """Where the ranks of this job meet."""
    return PrefixStore(f"codesign/{job['number']}", store or _store())


def local_rank() -> tuple[int, int]:
    """(rank on this machine, ranks on it)."""
    return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])


def _store() -> Store:
    """torchrun's own: its agent holds it, so it outlives every process that is measured."""
    store: Store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, _FOREVER)
    return store


def _job(number: int) -> str:
    return f"codesign/job/{number}"


def _lead(command: list[str]) -> int:
    """Rank 0: runs the command, then sends everybody home."""
    try:
        return subprocess.run([sys.executable, "-m", "codesign", *command]).returncode
    finally:
        send_home()


def send_home() -> None:
    """Tells the other ranks that there will be no more jobs."""
    store = _store()
    store.set(_job(store.add(_COUNT, 1)), json.dumps(None))


def work(rank: int) -> int:
    """What another rank than 0 does: job after job, until there is none. A job that fails is rank 0's to explain."""
    from codesign.engine.build import serve_rank  # builds engines, which come together by this file
    from codesign.engine.parallel.processes import start

    for number in itertools.count(1):
        # The connection is made anew for each job, so that a fork happens with one thread.
        job = json.loads(_store().get(_job(number)))
        if job is None:
            break
        (process,) = start(job, [rank], serve_rank).ranks
        while not process.has_ended():
            time.sleep(_POLL_S)
        process.close()
    return 0


def main() -> int:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rank = int(os.environ["RANK"])
    return _lead(sys.argv[1:]) if rank == 0 else work(rank)


if __name__ == "__main__":
    sys.exit(main())
