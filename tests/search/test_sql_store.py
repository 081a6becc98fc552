"""A study in a real PostgreSQL: leases, late results, restarts, several searches, and what must never be written."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from codesign.errors import InputError, WorkError
from codesign.results.ledger import read_records
from codesign.results.record import TrialIdentity, TrialRecord
from codesign.search.database import Database, redacted
from codesign.search.folder import open_study
from codesign.search.interrupt import Interrupt
from codesign.search.lease import running_in
from codesign.search.limits import Limits
from codesign.search.objective import told
from codesign.search.pool import InlinePool
from codesign.search.sql_store import SharedStudies, SqlStore
from codesign.search.study import Study, StudyResult
from codesign.search.suggest import Points
from codesign.spec.engine_config import EngineConfig
from tests.search.fake_measure import OBJECTIVES, FakeMeasure, OnPhase, record_of
from tests.search.postgres import PASSWORD, Server
from tests.search.searches import Search, check_ledger, found
from tests.search.shared_runner import GRID
from tests.search.studies import Heard, inputs_of, run_study, space_of

SMALL_GRID = "max_batch_size: [1, 2, 4, 8]\nmax_step_tokens: [128, 256, 512]\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def url(server: Server) -> str:
    server.empty()
    return server.url


@contextlib.contextmanager
def opened(
    out: Path, url: str, heard: Heard | None = None, lease_s: float = 60.0, **named: object
) -> Iterator[SqlStore]:
    heard, space = heard or Heard(), space_of(out, GRID)
    database = Database(url, say=heard.say, **named)  # type: ignore[arg-type]
    with contextlib.closing(database), open_study(out, "study", inputs_of(space), SharedStudies(database)) as folder:
        points = Points(space, max_model_len=512)
        store = SqlStore(database, folder, points=points, objectives=OBJECTIVES, say=heard.say, lease_s=lease_s)
        with contextlib.closing(store):
            yield store


def search(
    out: Path,
    url: str,
    measure: Callable[..., TrialRecord] | None = None,
    *,
    trials: int = 6,
    heard: Heard | None = None,
    interrupt: Interrupt | None = None,
) -> StudyResult:
    """One run of a study, measured in this process."""
    heard, interrupt = heard or Heard(), interrupt or Interrupt()
    with opened(out, url, heard, is_interrupted=lambda: bool(interrupt.signal_number)) as store:
        study = Study(
            store._folder,
            store=store,
            pool=InlinePool(measure or FakeMeasure(), interrupt),
            points=store._points,
            objectives=OBJECTIVES,
            progress=heard,
            interrupt=interrupt,
            write_report=lambda: None,
        )
        return study.run(Limits(trials=trials))


POINTS = [EngineConfig(max_batch_size=size, max_model_len=512).resolve() for size in (1, 2, 4)]


def test_a_shared_study_draws_and_finds_what_a_local_one_does(tmp_path: Path, server: Server, url: str) -> None:
    local = run_study(tmp_path / "a", space_of(tmp_path, GRID), limits=Limits(trials=12))
    search(tmp_path, url, trials=5)
    shared = search(tmp_path, url, trials=12)

    assert [r.config_digest for r in shared.records] == [r.config_digest for r in local.records]
    records = check_ledger(server, {record.uid for record in shared.records}, 12)
    mirrored, _ = read_records(tmp_path / "study" / "trials")
    assert mirrored == records
    assert not (tmp_path / "study" / "study.db").exists()


def test_another_machine_gets_every_record_into_its_own_folder(tmp_path: Path, url: str) -> None:
    (tmp_path / "b").mkdir()
    first = search(tmp_path, url, trials=4)
    second = search(tmp_path / "b", url, trials=4)

    assert second.records == first.records
    assert read_records(tmp_path / "b" / "study" / "trials")[0] == list(first.records)


def test_of_two_searches_that_want_one_trial_one_gets_it(tmp_path: Path, url: str) -> None:
    with opened(tmp_path, url) as one, opened(tmp_path, url) as other:
        first, second = (one._points.located(config) for config in POINTS[:2])
        claim = one.claim(first, 0, 0, "here")

        assert claim is not None
        assert other.claim(second, 0, 0, "there") is None
        other.refresh()
        assert [(lease.number, lease.place) for lease in other.running] == [(0, "here")]


def test_a_lease_that_is_kept_alive_is_not_given_up(tmp_path: Path, url: str) -> None:
    with opened(tmp_path, url, lease_s=0.6) as one, opened(tmp_path, url, lease_s=0.6) as other:
        claim = one.claim(one._points.located(POINTS[0]), 0, 0, "")
        assert claim is not None
        for _ in range(5):
            time.sleep(0.3)
            one.refresh()
            assert other.refresh() == []

        assert one.finish(claim, record_of(claim.identity, POINTS[0]), None)


def test_a_result_after_its_lease_was_given_up_is_late_kept_and_not_told(
    tmp_path: Path, server: Server, url: str
) -> None:
    with opened(tmp_path, url, lease_s=0.3) as paused, opened(tmp_path, url, lease_s=0.3) as other:
        claim = paused.claim(paused._points.located(POINTS[0]), 0, 0, "")
        assert claim is not None
        time.sleep(0.5)
        (lost,) = other.refresh()
        again = other.claim(claim.point, 0, 1, "")
        assert again is not None

        late = record_of(claim.identity, POINTS[0])
        assert not paused.finish(claim, late, told(late, OBJECTIVES, []))
        good = record_of(again.identity, POINTS[0])
        assert other.finish(again, good, told(good, OBJECTIVES, []))

        assert (lost.uid, lost.outcome.kind) == (claim.identity.uid, "harness")
        assert "has not been heard of" in lost.outcome.detail
        assert sorted(record.uid for record in paused.refresh()) == sorted([lost.uid, good.uid])
    check_ledger(server, {lost.uid, good.uid}, 1)
    (kept,) = read_records(tmp_path / "study" / "trials" / "late")[0]
    assert kept.uid == f"{late.uid}-{claim.token}"
    assert kept.metrics == late.metrics


def test_handing_in_twice_because_the_answer_was_lost_changes_nothing(tmp_path: Path, server: Server, url: str) -> None:
    with opened(tmp_path, url) as store:
        claim = store.claim(store._points.located(POINTS[0]), 0, 0, "")
        assert claim is not None
        record = record_of(claim.identity, POINTS[0])

        assert [store.finish(claim, record, told(record, OBJECTIVES, [])) for _ in range(2)] == [True, True]
    check_ledger(server, {record.uid}, 1)


def test_a_search_that_is_gone_from_this_machine_is_buried_at_once(tmp_path: Path, url: str) -> None:
    with opened(tmp_path, url) as dead, opened(tmp_path, url) as living:
        dead._me = dataclasses.replace(dead._me, pid=2**22 + 1)
        claim = dead.claim(dead._points.located(POINTS[0]), 0, 0, "")
        assert claim is not None

        (record,) = living.refresh()
        assert record.outcome.detail.endswith("is gone")
        assert record.uid == claim.identity.uid


def test_an_index_that_somebody_deleted_is_made_again(tmp_path: Path, server: Server, url: str) -> None:
    import optuna

    result = search(tmp_path, url, trials=4)
    storage = optuna.storages.RDBStorage(url.replace("postgresql", "postgresql+psycopg"))
    optuna.delete_study(study_name="study", storage=storage)
    storage.remove_session()
    storage.engine.dispose()
    search(tmp_path, url, trials=5)

    check_ledger(server, {record.uid for record in result.records}, 5)


def index_of(server: Server) -> list[tuple[object, ...]]:
    """(number, uid of its record) of each trial in Optuna's index."""
    return server.query(
        "SELECT number, value_json FROM trials JOIN trial_user_attributes USING (trial_id) WHERE key = 'uid' "
        "ORDER BY number"
    )


def finish(store: SqlStore, config: EngineConfig, number: int) -> TrialRecord:
    claim = store.claim(store._points.located(config), number, 0, "")
    assert claim is not None
    record = record_of(claim.identity, config)
    assert store.finish(claim, record, told(record, OBJECTIVES, []))
    return record


def test_an_index_that_somebody_deletes_meanwhile_is_made_again_by_the_next_trial_to_end(
    tmp_path: Path, server: Server, url: str
) -> None:
    import optuna

    with opened(tmp_path, url) as store:
        first = finish(store, POINTS[0], 0)
        storage = optuna.storages.RDBStorage(url.replace("postgresql", "postgresql+psycopg"))
        optuna.delete_study(study_name="study", storage=storage)
        storage.remove_session()
        storage.engine.dispose()
        others = [finish(store, config, number) for number, config in enumerate(POINTS[1:], 1)]

    uids = [record.uid for record in (first, *others)]
    assert index_of(server) == [(number, f'"{uid}"') for number, uid in enumerate(uids)]
    check_ledger(server, set(uids), 3)


def test_the_number_of_a_trial_in_the_index_is_its_place_in_the_ledger_and_late_results_leave_no_gap(
    tmp_path: Path, server: Server, url: str
) -> None:
    with opened(tmp_path, url, lease_s=0.3) as paused, opened(tmp_path, url, lease_s=0.3) as other:
        claim = paused.claim(paused._points.located(POINTS[0]), 0, 0, "")
        assert claim is not None
        time.sleep(0.5)
        (lost,) = other.refresh()
        late = record_of(claim.identity, POINTS[0])
        assert not paused.finish(claim, late, told(late, OBJECTIVES, []))
        told_after = [finish(other, config, number) for number, config in enumerate(POINTS[1:], 1)]

    uids = [lost.uid, *(record.uid for record in told_after)]
    assert index_of(server) == [(number, f'"{uid}"') for number, uid in enumerate(uids)]
    places = "SELECT place - 1, json::json->'uid' FROM codesign_ledger WHERE kind = 'done' ORDER BY place"
    assert [(number, f'"{uid}"') for number, uid in server.query(places)] == index_of(server)


def test_each_record_is_handed_over_once_and_ours_not_at_all(tmp_path: Path, url: str) -> None:
    (tmp_path / "b").mkdir()
    with opened(tmp_path, url) as one, opened(tmp_path / "b", url) as other:
        first = finish(one, POINTS[0], 0)
        second = finish(other, POINTS[1], 1)

        assert list(one.refresh()) == [second]
        assert list(other.refresh()) == [first]
        third = finish(one, POINTS[2], 2)
        assert (list(one.refresh()), list(one.refresh())) == ([], [])
        assert list(other.refresh()) == [third]


def test_leases_in_the_folder_are_those_that_run_anywhere(tmp_path: Path, url: str) -> None:
    def shown(folder: Path) -> list[tuple[int, str]]:
        return [(lease.number, lease.place) for lease in running_in(folder / "study" / "leases")]

    there = tmp_path / "b"
    there.mkdir()
    with opened(tmp_path, url, lease_s=0.4) as one, opened(there, url) as other:
        claim = one.claim(one._points.located(POINTS[0]), 0, 0, "cores 0")
        assert claim is not None
        (tmp_path / "study" / "leases" / "left.json").write_text("of a search that died")
        other.refresh()
        assert shown(tmp_path) == shown(there) == [(0, "cores 0")]

        claim = one.moved(claim, "cores 1")
        other.refresh()
        assert shown(tmp_path) == shown(there) == [(0, "cores 1")]

        time.sleep(0.2)
        one.refresh()
        assert not (tmp_path / "study" / "leases" / "left.json").exists()

        one.abandon(claim)
        other.refresh()
        assert shown(tmp_path) == shown(there) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT], ids=["restart", "crash"])
def test_a_database_that_goes_away_is_waited_for_said_and_loses_nothing(
    tmp_path: Path, server: Server, url: str, number: signal.Signals
) -> None:
    heard, restarts = Heard(), []

    def measure(identity: TrialIdentity, config: EngineConfig, on_phase: OnPhase) -> TrialRecord:
        if identity.number == 2:
            server.stop(number)
            restarts.append(threading.Timer(1.5, server.start))
            restarts[-1].start()
        return FakeMeasure()(identity, config, on_phase)

    result = search(tmp_path, url, measure, trials=5, heard=heard)
    restarts[0].join()

    assert [record.number for record in result.records] == list(range(5))
    check_ledger(server, {record.uid for record in result.records}, 5)
    assert any("does not answer" in text for text in heard.said)
    assert any("answers again" in text for text in heard.said)


def test_a_result_that_could_not_be_handed_in_before_ctrl_c_is_handed_in_by_the_next_search(
    tmp_path: Path, server: Server, url: str
) -> None:
    interrupt = Interrupt()

    def measure(identity: TrialIdentity, config: EngineConfig, on_phase: OnPhase) -> TrialRecord:
        record = FakeMeasure()(identity, config, on_phase)
        if identity.number == 2:
            server.stop()
            interrupt.signal_number = signal.SIGINT
        return record

    try:
        with pytest.raises(WorkError, match="has not answered"):
            search(tmp_path, url, measure, interrupt=interrupt)
    finally:
        server.start()
    heard, again = Heard(), FakeMeasure()
    result = search(tmp_path, url, again, trials=4, heard=heard)

    assert [identity.number for identity, _ in again.calls] == [3]
    assert any("trial 2" in text and "handed in" in text for text in heard.said)
    check_ledger(server, {record.uid for record in result.records}, 4)


def test_searches_and_workers_killed_and_a_restart_lose_double_and_leave_nothing(
    tmp_path: Path, server: Server, url: str
) -> None:
    """Two searches of two workers each; the long version with Ray is tests/benchmarks/chaos.py."""
    alone = run_study(tmp_path / "alone", space_of(tmp_path, SMALL_GRID), limits=Limits(trials=12))
    rng, acked = random.Random(6), set()
    options = {"trials": 12, "workers": 2, "seconds": 0.3, "lease_s": 5.0, "space": SMALL_GRID}
    running = {name: Search(tmp_path / name, url, **options) for name in "ab"}
    began_s, strikes, restarted = time.monotonic(), 0, False
    while any(search.is_running for search in running.values()):
        assert time.monotonic() - began_s < 120
        time.sleep(0.5)
        num_acked = len(set().union(*(search.acked for search in running.values())) | acked)
        if num_acked > 4 and not restarted:
            server.restart(away_s=0.5)
            restarted = True
        name = rng.choice("ab")
        victim = running[name]
        if strikes < 4 and victim.is_running and victim.acked:
            workers = psutil.Process(victim.process.pid).children()
            with contextlib.suppress(psutil.NoSuchProcess):
                (rng.choice(workers) if workers and strikes % 3 else victim.process).kill()
            strikes += 1
        if not victim.is_running and victim.process.returncode == -signal.SIGKILL:
            victim.wait(10)
            acked |= set(victim.acked)
            running[name] = Search(tmp_path / name, url, **options)
    statuses = [search.wait(10) for search in running.values()]

    assert statuses == [0, 0], [search.said for search in running.values()]
    assert restarted and strikes >= 2
    acked |= set().union(*(search.acked for search in running.values()))
    records = check_ledger(server, acked, 12)
    assert found(records) == found(list(alone.records))
    for search_ in running.values():
        assert found(search_.records) == found(records)


@pytest.fixture
def two_networks() -> Iterator[tuple[tuple[str, ...], tuple[str, ...], str, str]]:
    """Commands that run in either of two network namespaces, and their addresses; a cable between them."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    tag = f"{os.getpid() % 10000}"
    one, two, left, right = f"cs-{tag}-1", f"cs-{tag}-2", f"cs{tag}l", f"cs{tag}r"

    def ip(*arguments: str) -> bool:
        return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0

    if not ip("netns", "add", one):
        pytest.skip("network namespaces are not permitted here")
    try:
        works = ip("netns", "add", two) and ip("link", "add", left, "type", "veth", "peer", "name", right)
        for space, end, address in ((one, left, "10.231.7.1/30"), (two, right, "10.231.7.2/30")):
            works = works and ip("link", "set", end, "netns", space)
            works = works and ip("-n", space, "addr", "add", address, "dev", end)
            works = works and ip("-n", space, "link", "set", end, "up") and ip("-n", space, "link", "set", "lo", "up")
        if not works:
            pytest.skip("a virtual cable between two network namespaces is not permitted here")
        yield ("ip", "netns", "exec", one), ("ip", "netns", "exec", two), "10.231.7.1", "10.231.7.2"
    finally:
        ip("netns", "del", one)
        ip("netns", "del", two)


def test_two_searches_in_two_networks_share_a_study_and_agree_on_the_front(
    tmp_path: Path, two_networks: tuple[tuple[str, ...], tuple[str, ...], str, str]
) -> None:
    here, there, address, _ = two_networks
    server = Server(host=address, prefix=here)
    try:
        url = server.url
        searches = [
            Search(tmp_path / name, url, prefix=prefix, trials=16, seconds=0.25)
            for name, prefix in (("here", here), ("there", there))
        ]
        assert [search.wait(90) for search in searches] == [0, 0], [search.said for search in searches]

        records = check_ledger(server, {uid for search in searches for uid in search.acked}, 16)
    finally:
        server.close()
    assert found(searches[0].records) == found(searches[1].records) == found(records)
    assert [search.stopped for search in searches] == ["all 16 trials are done"] * 2
    assert len({record.provenance["placement"]["worker"] for record in records}) == 2


# Refusals and secrets.


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("sqlite:///x.db", "SQLite"),
        ("mysql://u:canary@h/d", "no other database"),
        ("postgresql://u:canary@h", "names no database"),
        ("postgresql://h/d?password=canary", "PGPASSWORD"),
        ("canary", "postgresql://USER@HOST"),
        ("postgresql://u:canary@h:port/d", "postgresql://USER@HOST"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_and_not_repeated(text: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint) as caught:
        Database(text)

    assert "canary" not in str(caught.value)


def test_the_password_is_written_nowhere(tmp_path: Path, server: Server, url: str) -> None:
    heard = Heard()
    search(tmp_path, url, heard=heard)
    wrong = url.replace(PASSWORD, "canary-wrong")
    with pytest.raises(WorkError) as caught:
        Database(wrong).check()

    assert "canary" not in " ".join([str(caught.value), *heard.said, Database(url).address])
    for path in (tmp_path / "study").rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path
    dump = server.query("SELECT string_agg(codesign_ledger::text, ' ') FROM codesign_ledger")
    assert PASSWORD not in str(dump)
    assert redacted(["search", "p.yaml", "--storage", url, f"--storage={url}"]) == [
        "search", "p.yaml", "--storage", url.replace(PASSWORD, "***"), f"--storage={url.replace(PASSWORD, '***')}",
    ]  # fmt: skip


def test_a_study_goes_on_only_where_it_was_started(tmp_path: Path, url: str) -> None:
    search(tmp_path, url, trials=1)
    with pytest.raises(InputError, match="is kept in postgresql://127"):
        run_study(tmp_path, space_of(tmp_path, GRID))

    (tmp_path / "b").mkdir()
    run_study(tmp_path / "b", space_of(tmp_path / "b", GRID), limits=Limits(trials=1))
    with pytest.raises(InputError, match="was started without --storage"):
        search(tmp_path / "b", url)


def test_another_profile_under_the_name_of_a_shared_study_is_refused(tmp_path: Path, url: str) -> None:
    search(tmp_path, url, trials=1)
    space = space_of(tmp_path, GRID)
    database = Database(url)
    (tmp_path / "b").mkdir()
    with (
        contextlib.closing(database),
        pytest.raises(InputError, match="another profile"),
        open_study(tmp_path / "b", "study", inputs_of(space, profile="other"), SharedStudies(database)),
    ):
        pass
