"""What the study loop asks of its records, against the plain way to find it."""

import dataclasses
import random

from codesign.results.record import TrialIdentity
from codesign.search.history import History, was_built
from codesign.search.retry import is_settled, latest, to_retry
from codesign.spec.engine_config import EngineConfig
from tests.search.fake_measure import record_of

KINDS = ("ok", "ok", "oom", "harness", "hang")


def test_records_in_any_order_are_counted_as_by_looking_at_all_of_them() -> None:
    rng = random.Random(4)
    config = EngineConfig().resolve()
    for _ in range(30):
        numbers = [(number, attempt) for number in range(6) for attempt in range(rng.randint(1, 3))]
        rng.shuffle(numbers)
        history, added = History(), []
        for number, attempt in numbers[:9]:
            identity = TrialIdentity(study="s", number=number, uid=f"{number}-{attempt}", attempt=attempt)
            record = record_of(identity, config, rng.choice(KINDS))
            predicted = rng.random() < 0.2
            record = dataclasses.replace(record, trust={"predicted": True} if predicted else {})
            history.add(record)
            added.append(record)
            last = latest(added)

            assert list(history.records) == sorted(added, key=lambda item: (item.number, item.attempt))
            assert history.num_done == sum(was_built(item) and is_settled(item) for item in last)
            assert history.next_number == max(item.number for item in added) + 1
            assert to_retry(history.unsettled, {}, ()) == to_retry(added, {}, ())
    assert History().next_number == History().num_done == 0
