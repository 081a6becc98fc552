import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from relatives import entry_of, family, family_of

from codesign.measure import nursery_process
from codesign.measure.nursery import Fork, Nursery
from codesign.measure.session import TrialFailed
from codesign.measure.taxonomy import Exit

HERE = Path(__file__).parent


@pytest.fixture
def light_nursery() -> Iterator[Nursery]:
    """Without torch, so that it starts in a moment."""
    with Nursery(preload=()) as nursery:
        yield nursery


def fork(nursery: Nursery) -> tuple[Fork, socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs, open(os.devnull, "wb") as sink:
        try:
            return nursery.fork(theirs.fileno(), sink.fileno(), data_limit_bytes=None), ours
        except TrialFailed:
            ours.close()
            raise


def wait_for_exit(child: Fork) -> Exit:
    end = time.monotonic() + 20
    while child.exit is None and time.monotonic() < end:
        child.pump()
        time.sleep(0.005)
    assert child.exit is not None
    return child.exit


def wait_until_gone(entry: bytes, seconds: float) -> set[int]:
    end = time.monotonic() + seconds
    while (left := family_of(entry)) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def test_a_fork_is_a_group_of_its_own_that_the_kernel_would_kill_first(light_nursery: Nursery) -> None:
    child, ours = fork(light_nursery)
    with ours:
        assert ours.recv(100) == b'{"event":"ready"}\n'
        assert os.getpgid(child.pid) == child.pid
        assert os.getsid(child.pid) != os.getsid(0)
        assert Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip() == "1000"
        limits = Path(f"/proc/{child.pid}/limits").read_text()
        assert next(line for line in limits.splitlines() if line.startswith("Max core file size")).split()[4] == "0"

    assert wait_for_exit(child) == Exit(status=0, signal=None, peak_rss_bytes=child.exit.peak_rss_bytes)  # type: ignore[union-attr]
    child.close()


def test_a_child_holds_nothing_of_the_nursery(light_nursery: Nursery) -> None:
    """One socket, its own: with the nursery's control socket it could give orders."""
    first, first_end = fork(light_nursery)
    second, second_end = fork(light_nursery)
    with first_end, second_end:
        assert first_end.recv(100)
        assert second_end.recv(100)
        for child in (first, second):
            folder = Path(f"/proc/{child.pid}/fd")
            targets = {int(link.name): os.readlink(link) for link in folder.iterdir()}
            sockets = [target for target in targets.values() if target.startswith("socket:")]
            assert len(sockets) == 1
            assert targets.keys() - {0, 1, 2} == {fd for fd, target in targets.items() if target in sockets}
    for child in (first, second):
        wait_for_exit(child)
        child.close()


def test_the_exit_of_each_child_is_told_apart(light_nursery: Nursery) -> None:
    children = [fork(light_nursery) for _ in range(3)]
    for _, ours in children:
        assert ours.recv(100)
    (_, its_end), (terminated, _), (killed, _) = children

    its_end.close()
    terminated.send_signal(signal.SIGTERM)
    killed.kill()
    ends = [wait_for_exit(child) for child, _ in children]

    assert [(end.status, end.signal) for end in ends] == [(0, None), (0, None), (None, signal.SIGKILL)]
    assert all(end.peak_rss_bytes > 2**20 for end in ends)
    for child, ours in children:
        ours.close()
        child.close()


def test_a_nursery_with_two_threads_refuses_to_fork() -> None:
    with Nursery(preload=["thread_starter"]) as nursery:
        with pytest.raises(TrialFailed, match="harness: the nursery has 2 threads"):
            fork(nursery)

        assert nursery.pid is not None
        assert family(nursery.pid) == {nursery.pid}


def test_a_process_that_holds_a_device_is_not_forked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("codesign.measure.linux.num_threads", lambda: 1)
    assert nursery_process.unsafe_to_fork() is None
    monkeypatch.setattr("codesign.measure.linux.has_device_open", lambda: True)

    reason = nursery_process.unsafe_to_fork()

    assert reason is not None
    assert "CUDA context" in reason


def test_importing_torch_and_numpy_leaves_one_thread() -> None:
    with Nursery(preload=["numpy", "torch"]) as nursery:
        child, ours = fork(nursery)
        ours.close()
        wait_for_exit(child)
        child.close()


def test_a_module_that_cannot_be_imported_is_named() -> None:
    with Nursery(preload=["no_such_module"]) as nursery, pytest.raises(TrialFailed) as failure:
        nursery.start()

    assert failure.value.outcome.kind == "harness"
    assert "No module named 'no_such_module'" in failure.value.outcome.detail


def test_a_killed_nursery_is_started_again(light_nursery: Nursery) -> None:
    light_nursery.start()
    assert light_nursery.pid is not None
    lost = light_nursery.pid
    os.kill(lost, signal.SIGKILL)

    child, ours = fork(light_nursery)

    ours.close()
    wait_for_exit(child)
    child.close()
    assert light_nursery.pid not in (lost, None)


def test_closing_takes_everything_along(light_nursery: Nursery) -> None:
    child, ours = fork(light_nursery)
    assert light_nursery.pid is not None
    entry = entry_of(light_nursery.pid)
    assert len(family_of(entry)) == 2

    light_nursery.close()

    assert family_of(entry) == set()
    assert light_nursery.pid is None
    ours.close()
    child.close()


def _hear_interrupts() -> None:
    """A shell that starts the tests in the background has them, and all that they start, ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def search_process() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """One that has a nursery, two children and a daemon of one of them; and the pid of its nursery."""
    path = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    command = [sys.executable, str(HERE / "parent_script.py")]
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=environment, text=True, preexec_fn=_hear_interrupts
    ) as parent:
        assert parent.stdout is not None
        nursery_pid = int(parent.stdout.readline())
        assert len(family(nursery_pid)) == 4
        yield parent, nursery_pid
        parent.kill()


def test_nothing_outlives_a_killed_search_process() -> None:
    with search_process() as (parent, nursery_pid):
        entry = entry_of(nursery_pid)

        parent.kill()

        assert wait_until_gone(entry, 2.0) == set()


def test_nothing_outlives_a_search_process_that_is_interrupted() -> None:
    with search_process() as (parent, nursery_pid):
        entry = entry_of(nursery_pid)

        parent.send_signal(signal.SIGINT)

        assert wait_until_gone(entry, 2.0) == set()


def test_what_outlives_search_and_nursery_killed_at_once_is_found_by_the_next_nursery(light_nursery: Nursery) -> None:
    with search_process() as (parent, nursery_pid):
        entry = entry_of(nursery_pid)
        os.kill(nursery_pid, signal.SIGSTOP)  # so that it cannot clean up in between
        parent.kill()
        os.kill(nursery_pid, signal.SIGKILL)
    with search_process() as (_, other_nursery_pid):  # a search that goes on is let be
        end = time.monotonic() + 2.0
        while len(left := family_of(entry)) > 1 and time.monotonic() < end:
            time.sleep(0.02)
        daemons = len(left)

        light_nursery.start()

        assert (
            daemons <= 1
        )  # the children died with the nursery; the detached one may be gone too: the other one looked
        assert family_of(entry) == set()
        assert len(family(other_nursery_pid)) == 4
