"""A search process for tests that kill it: opens two sessions, one with a detached grandchild, says so and waits."""

import threading
import time

from codesign.measure.child_session import ChildSession, Limits
from codesign.measure.nursery import Nursery
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams


def main() -> None:
    nursery = Nursery(preload=())
    # The nursery is started by a thread that ends: it must not take that for the end of the process.
    starter = threading.Thread(target=nursery.start)
    starter.start()
    starter.join()
    model = ModelSpec(name="none", architecture={"hidden_size": 1})
    sessions = []
    for engine in ("hostile_engines:daemon", "hostile_engines:hang"):
        session = ChildSession(
            nursery, model=model, engine=engine, quality="fake_engine:run_suite", limits=Limits(progress_s=600)
        )
        session.build(EngineConfig())
        sessions.append(session)
    sampling = SamplingParams(max_tokens=5)
    sessions[1].submit(Request(request_id="r", prompt_token_ids=(1,), sampling=sampling))
    print(nursery.pid, flush=True)
    while True:
        time.sleep(1000)


if __name__ == "__main__":
    main()
