"""One search of a shared study, as a process of its own: `python -m tests.search.shared_runner '{...}'`.

{"out", "url", "trials", "seconds", "workers" | "ray", "num_cores", "lease_s", "space", "seed"}
->  "acked UID" per trial that the study has taken in, whoever measured it, then "stopped REASON"
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import optuna

from codesign.results.record import TrialRecord
from codesign.search.database import Database
from codesign.search.folder import open_study
from codesign.search.interrupt import Interrupt
from codesign.search.limits import Limits
from codesign.search.local_pool import LocalPool
from codesign.search.measurer import Order
from codesign.search.pool import Pool
from codesign.search.ray_pool import RayPool
from codesign.search.seat import Seat
from codesign.search.sql_store import SharedStudies, SqlStore
from codesign.search.study import Study, StudyResult
from codesign.search.suggest import Points
from tests.search.fake_measure import OBJECTIVES
from tests.search.studies import Heard, inputs_of, space_of

GRID = "max_batch_size: [1, 2, 4, 8, 16]\nmax_step_tokens: [128, 256, 512, 1024]\n"


class Telling(Heard):
    def say(self, text: str) -> None:
        print(f"said {text}", file=sys.stderr, flush=True)

    def finished(self, record: TrialRecord) -> None:
        os.write(1, f"acked {record.uid}\n".encode())


def search(
    *,
    out: str,
    url: str,
    trials: int,
    seconds: float = 0.05,
    workers: int = 1,
    ray: str | None = None,
    num_cores: int = 1,
    lease_s: float = 60.0,
    space: str = GRID,
    seed: int = 0,
) -> StudyResult:
    folder_of_all = Path(out)
    folder_of_all.mkdir(parents=True, exist_ok=True)
    searched = space_of(folder_of_all, space)
    points, told, interrupt = Points(searched, max_model_len=512), Telling(), Interrupt()
    database = Database(url, say=told.say, is_interrupted=lambda: bool(interrupt.signal_number))
    order = Order("tests.search.replay:replay", {"seconds": seconds})
    with contextlib.ExitStack() as stack:
        stack.enter_context(interrupt.installed())
        stack.callback(database.close)
        folder = stack.enter_context(open_study(folder_of_all, "study", inputs_of(searched), SharedStudies(database)))
        store = SqlStore(database, folder, points=points, objectives=OBJECTIVES, say=told.say, lease_s=lease_s)
        stack.callback(store.close)
        pool: Pool
        if ray is None:
            cores = tuple(sorted(os.sched_getaffinity(0)))
            pool = stack.enter_context(LocalPool(order, [Seat(cores)] * workers))
        else:
            pool = stack.enter_context(RayPool(order, address=ray, num_cores=num_cores))
        study = Study(
            folder,
            store=store,
            pool=pool,
            points=points,
            objectives=OBJECTIVES,
            progress=told,
            interrupt=interrupt,
            write_report=lambda: None,
            seed=seed,
        )
        return study.run(Limits(trials=trials))


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    result = search(**json.loads(sys.argv[1]))
    print(f"stopped {result.stopped}", flush=True)


if __name__ == "__main__":
    main()
