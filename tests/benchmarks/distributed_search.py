"""What several workers gain, what a store costs, and how much two timing windows disturb each other.

    python -m tests.benchmarks.distributed_search [throughput] [overhead] [interference] [--trials 5000]

throughput      a replayed grid whose device wait is a sleep of the recorded time: trials per minute with 1, 2 and 4
                workers, in a folder and in PostgreSQL; wanted: at least 0.9 W times that of one worker
overhead        seconds per trial that the store itself takes (claim, finish, refresh) when it holds so many trials;
                wanted: below 20 ms at 5,000
interference    whether timing windows of two workers on this processor may overlap, and the figures behind it

Writes reports/benchmarks/distributed_search.json, keeping the parts that were not asked for; exits 1 when what is
wanted does not hold. The PostgreSQL parts need its binaries and psycopg.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna

from codesign.measure.provenance import code_state, machine
from codesign.search import overlap
from codesign.search.database import Database
from codesign.search.folder import open_study
from codesign.search.folder_store import FolderStore
from codesign.search.interrupt import Interrupt
from codesign.search.limits import Limits
from codesign.search.local_pool import LocalPool
from codesign.search.measurer import Order
from codesign.search.objective import told
from codesign.search.seat import Seat, ordered_cores
from codesign.search.sql_store import SharedStudies, SqlStore
from codesign.search.store import Store
from codesign.search.study import Study
from codesign.search.suggest import Points
from tests.search.fake_measure import OBJECTIVES, record_of
from tests.search.postgres import Server
from tests.search.studies import Heard, inputs_of, space_of

OUT = Path(__file__).parents[2] / "reports" / "benchmarks" / "distributed_search.json"
SPACE = "max_batch_size: {low: 1, high: 64}\nmax_step_tokens: {low: 128, high: 2048, step: 8}\n"
WORKERS = (1, 2, 4)
TRIALS_PER_WORKER = 12
RECORDED_S = 2.0  # a short trial of the bundled model on two cores


@contextlib.contextmanager
def opened(out: Path, server: Server | None) -> Iterator[tuple[Any, Points, Store]]:
    """A new study in a folder, or in the server's emptied database."""
    space = space_of(out, SPACE)
    points, heard = Points(space, max_model_len=512), Heard()
    with contextlib.ExitStack() as stack:
        shared = None
        if server is not None:
            server.empty()
            database = Database(server.url)
            stack.callback(database.close)
            shared = SharedStudies(database)
        folder = stack.enter_context(open_study(out, "study", inputs_of(space), shared))
        store: Store
        if shared is None:
            store = FolderStore(folder, points=points, objectives=OBJECTIVES, say=heard.say)
        else:
            store = SqlStore(shared.database, folder, points=points, objectives=OBJECTIVES, say=heard.say)
        stack.callback(store.close)
        yield folder, points, store


def throughput(server: Server | None) -> list[dict[str, Any]]:
    """Trials per minute by number of workers; the workers have started before the clock does.

    `search_cpu_ms` is what the search itself takes per trial, during which no other place of its pool is filled; a busy
    machine inflates it less than the wall time.
    """
    found = []
    for workers in WORKERS:
        order = Order("tests.search.replay:replay", {"seconds": RECORDED_S})
        seats = [Seat(tuple(ordered_cores()))] * workers
        with (
            tempfile.TemporaryDirectory() as out,
            opened(Path(out), server) as (folder, points, store),
            LocalPool(order, seats) as pool,
        ):
            study = Study(
                folder, store=store, pool=pool, points=points, objectives=OBJECTIVES, progress=Heard(),
                interrupt=Interrupt(), write_report=lambda: None,
            )  # fmt: skip
            warm = study.run(Limits(trials=workers))
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            whole = study.run(Limits(trials=workers * (1 + TRIALS_PER_WORKER)))
            wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
            trials = len(whole.records) - len(warm.records)
        per_minute = 60 * trials / wall_s
        alone = found[0]["trials_per_minute"] if found else per_minute
        ideal = 60 * workers / RECORDED_S
        found.append(
            {"workers": workers, "trials": trials, "wall_s": wall_s, "trials_per_minute": per_minute,
             "of_one_worker": per_minute / alone, "of_ideal": per_minute / ideal,
             "search_cpu_ms": 1000 * cpu_s / trials}
        )  # fmt: skip
        print(f"{workers} workers: {per_minute:.1f} trials/min, {per_minute / alone:.2f} of one worker's")
    return found


def overhead(server: Server | None, trials: int) -> dict[str, Any]:
    """Milliseconds per trial in the store, for the first hundred and the last hundred of so many trials.

    `cpu` is this process's own share, which a busy machine inflates less than the wall time.
    """
    rng, seen, costs, cpu = random.Random(0), set(), [], []
    with tempfile.TemporaryDirectory() as out, opened(Path(out), server) as (_, points, store):
        store.refresh()
        for number in itertools.count():
            if len(costs) == trials:
                break
            point = points.drawn(rng)
            if point.config.digest in seen:
                continue
            seen.add(point.config.digest)
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            claim = store.claim(point, number, 0, "")
            between_s, between_cpu_s = time.perf_counter(), time.process_time()
            assert claim is not None
            record = record_of(claim.identity, point.config)
            result = told(record, OBJECTIVES, [])
            again_s, again_cpu_s = time.perf_counter(), time.process_time()
            store.finish(claim, record, result)
            store.refresh()
            costs.append(1000 * (between_s - began_s + time.perf_counter() - again_s))
            cpu.append(1000 * (between_cpu_s - began_cpu_s + time.process_time() - again_cpu_s))
    first, last = costs[:100], costs[-100:]
    found = {
        "trials": trials,
        "first_100_median_ms": statistics.median(first),
        "last_100_median_ms": statistics.median(last),
        "last_100_mean_ms": statistics.mean(last),
        "last_100_median_cpu_ms": statistics.median(cpu[-100:]),
    }
    print(found)
    return found


def interference() -> dict[str, Any]:
    """What a search with two workers measures at its start, each on half of the cores."""
    cores = ordered_cores()
    halves = [Seat(tuple(cores[: len(cores) // 2])), Seat(tuple(cores[len(cores) // 2 :]))]
    found = {"cores_each": len(halves[0].cores), **overlap.measure(halves).to_dict()}
    print(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", choices=["throughput", "overhead", "interference", []])
    parser.add_argument("--trials", type=int, default=5000, help="how many trials the stores hold")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parts = arguments.parts or ["throughput", "overhead", "interference"]
    document = json.loads(OUT.read_text()) if OUT.exists() else {}
    server = Server()
    is_good = True
    try:
        for part in parts:
            found: Any
            if part == "throughput":
                found = {"folder": throughput(None), "postgresql": throughput(server)}
                is_good &= all(row["of_one_worker"] >= 0.9 * row["workers"] for rows in found.values() for row in rows)
            elif part == "overhead":
                found = {"folder": overhead(None, arguments.trials), "postgresql": overhead(server, arguments.trials)}
                is_good &= all(row["last_100_median_ms"] < 20 for row in found.values())
            else:
                found = interference()
            document[part] = {
                "measured": found,
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": dict(machine()),
                "code": code_state(),
                "load_average_1min": os.getloadavg()[0],
            }
    finally:
        server.close()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
