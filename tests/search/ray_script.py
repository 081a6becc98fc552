"""Runs in a process of its own, because Ray reads its settings when it is imported: `ray_script.py local|cluster OUT`.

local     a study on a Ray of this machine; one task's worker is killed
cluster   a study on a cluster of two local nodes; one of them is removed on the way

Prints one JSON document.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import optuna

from codesign.results.record import TrialRecord
from codesign.search.limits import Limits
from codesign.search.measurer import Order
from codesign.search.ray_pool import RayPool, listening_off_loopback
from tests.search.studies import Heard, run_study, space_of

GRID = "max_batch_size: [1, 2, 4, 8]\nmax_step_tokens: [128, 256, 512]\n"
SIZES = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False}


class Watching(Heard):
    """Strikes once, when the fourth trial has found its place."""

    def __init__(self, strike: Any) -> None:
        super().__init__()
        self._strike = strike
        self.places: list[str] = []
        self.open_ports: list[str] = []

    def moved(self, uid: str, place: str) -> None:
        self.places.append(place)
        if len(self.places) == 4:
            self._strike(place)

    def finished(self, record: TrialRecord) -> None:
        super().finished(record)
        self.open_ports += listening_off_loopback()


def kill_worker(place: str) -> None:
    os.kill(int(place.rpartition(" ")[2]), signal.SIGKILL)


def main() -> None:
    kind, out = sys.argv[1], Path(sys.argv[2])
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    order = Order("tests.search.replay:replay", {"seconds": 0.5})
    address = "local"
    heard = Watching(kill_worker)
    if kind == "cluster":
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args=SIZES)
        second = cluster.add_node(**SIZES)
        cluster.wait_for_nodes()
        address = cluster.address
        heard = Watching(lambda place: cluster.remove_node(second))
    out.mkdir(parents=True, exist_ok=True)
    with RayPool(order, address=address, num_cores=1) as pool:
        room = pool._room()
        result = run_study(out, space_of(out, GRID), pool=pool, heard=heard, limits=Limits(trials=50))
        left = pool._room()
    found = {
        "room": [room, left],
        "open_ports": heard.open_ports,
        "places": heard.places,
        "stopped": result.stopped,
        "handlers": [signal.getsignal(number) is before for number, before in HANDLERS.items()],
    }
    print(json.dumps(found), flush=True)
    if kind == "cluster":
        cluster.shutdown()


HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

if __name__ == "__main__":
    main()
