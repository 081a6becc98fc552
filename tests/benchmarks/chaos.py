"""The long version of the kill tests: a study on PostgreSQL and Ray under constant fire.

    python -m tests.benchmarks.chaos [--trials 60] [--every 3]

Two searches work on one study of a replayed grid: one with two worker processes, one that sends its trials to a Ray
cluster of two local nodes (two places each, so four and more trials at a time). Every few seconds something is killed
with -9: mostly a worker, now and then a whole search, which is started again. Once the database crashes and comes back,
once a Ray node leaves. Then the ledger is compared with what was acknowledged and with a single process's study.

Prints one JSON document; exits 1 when a completed trial was lost or doubled, one is left running, the study does not
finish or its front is another. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN; it sets them where they are missing.
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}

from ray.cluster_utils import Cluster  # reads the settings above when it is imported

from codesign.results.record import TrialRecord
from codesign.search.limits import Limits
from tests.search.postgres import Server
from tests.search.searches import Search, check_ledger, found
from tests.search.studies import run_study, space_of

GRID = "max_batch_size: [1, 2, 4, 8, 16, 32]\nmax_step_tokens: [128, 256, 384, 512, 640, 768, 896, 1024, 1536, 2048]\n"
NODE = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False}


class Fire:
    """What is done to a study, and how often.

    Attributes:
        done: what was struck -> how often.
    """

    def __init__(self, server: Server, cluster: Any, second: Any, searches: dict[str, Any], every_s: float) -> None:
        self._server, self._cluster, self._second = server, cluster, second
        self._searches, self._every_s = searches, every_s
        self._rng = random.Random(60)
        self._next_s = time.monotonic() + every_s
        self.done = {"worker": 0, "Ray task": 0, "search": 0, "database": 0, "Ray node": 0}

    def strike(self, num_acked: int) -> None:
        """Does what is due after so many acknowledged trials."""
        if num_acked >= 15 and not self.done["Ray node"]:
            self._cluster.remove_node(self._second)
            self.done["Ray node"] += 1
        if num_acked >= 30 and not self.done["database"]:
            self._server.restart(away_s=3.0, number=signal.SIGQUIT)
            self.done["database"] += 1
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + self._every_s
        kind = self._rng.choice(["worker", "worker", "Ray task", "Ray task", "search"])
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            self._rng.choice(self._victims(kind)).kill()
            self.done[kind] += 1

    def _victims(self, kind: str) -> list[psutil.Process]:
        if kind == "Ray task":
            below = psutil.Process().children(recursive=True)
            return [process for process in below if "ray::run_trial" in " ".join(process.cmdline())]
        name = "local" if kind == "worker" else self._rng.choice([*self._searches])
        search = psutil.Process(self._searches[name].process.pid)
        return search.children() if kind == "worker" else [search]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=60, help="the size of the grid, at most 60")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two kills")
    arguments = parser.parse_args()
    out, server = Path(tempfile.mkdtemp(prefix="codesign-chaos-")), Server()
    (out / "alone").mkdir()
    alone = run_study(out / "alone", space_of(out / "alone", GRID), limits=Limits(trials=arguments.trials))
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    second = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    options: dict[str, Any] = {"trials": arguments.trials, "seconds": 1.5, "lease_s": 8.0, "space": GRID}
    kinds = {"local": {"workers": 2}, "ray": {"ray": cluster.address}}

    def start(name: str) -> Search:
        return Search(out / name, server.url, **options, **kinds[name])

    searches = {name: start(name) for name in kinds}
    fire = Fire(server, cluster, second, searches, arguments.every)
    acked: set[str] = set()
    began_s = time.monotonic()
    try:
        while any(search.is_running for search in searches.values()):
            assert time.monotonic() - began_s < 900, "the study does not finish"
            time.sleep(0.2)
            fire.strike(len(acked.union(*(search.acked for search in searches.values()))))
            for name, search in searches.items():
                if search.process.poll() == -signal.SIGKILL:
                    search.wait(10)
                    acked |= set(search.acked)
                    searches[name] = start(name)
        statuses = {name: search.wait(30) for name, search in searches.items()}
        assert set(statuses.values()) == {0}, [search.said for search in searches.values()]
        acked |= {uid for search in searches.values() for uid in search.acked}
        records = check_ledger(server, acked, arguments.trials)
        assert found(records) == found(list(alone.records)), "the front is another than a single process's"
        assert all(found(search.records) == found(records) for search in searches.values())
    finally:
        cluster.shutdown()
        server.close()
    print(json.dumps({"wall_s": round(time.monotonic() - began_s), **summary(records, acked), "struck": fire.done}))


def summary(records: list[TrialRecord], acked: set[str]) -> dict[str, Any]:
    lost = [record for record in records if record.outcome.kind != "ok"]
    workers = {record.provenance["placement"]["worker"] for record in records if record.provenance}
    return {"good": len(records) - len(lost), "attempts_lost": len(lost), "acked": len(acked), "workers": len(workers)}


if __name__ == "__main__":
    sys.exit(main())
