"""The test's side of `kill_runner`: starts searches in it and strikes at them."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]


class Runner:
    """The process that forks searches."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.search.kill_runner"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.acked: list[str] = []

    def run(self, out: Path, *, strike: "Strike | None" = None, **order: Any) -> int:
        """One search to its end, or its death. Returns its exit status, or minus the signal that strikeed it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"out": str(out), "seconds": 0.02, **order}) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline().split()[1])
        if strike is not None:
            strike.start(pid)
        for line in self._process.stdout:
            word, value = line.split()
            if word == "exit":
                if strike is not None:
                    strike.join()
                return int(value)
            self.acked.append(value)
        raise AssertionError("the runner died")

    @property
    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self._process.pid).children(recursive=True)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


class Strike:
    """Sends signals to a member of a search's family ("search", "nursery", "child") after a while."""

    def __init__(self, victim: str, after_s: float, *signals: signal.Signals) -> None:
        self._victim, self._after_s, self._signals = victim, after_s, signals or (signal.SIGKILL,)
        self._thread: threading.Thread | None = None

    def start(self, pid: int) -> None:
        self._thread = threading.Thread(target=self._run, args=(pid,))
        self._thread.start()

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join()

    def _run(self, pid: int) -> None:
        time.sleep(self._after_s)
        try:
            search = psutil.Process(pid)
            descendants = search.children(recursive=True)
            depth = {"search": 0, "nursery": 1, "child": 2}[self._victim]
            family = [search, *descendants]
            for number in self._signals:
                family[min(depth, len(family) - 1)].send_signal(number)
                time.sleep(0.2 if len(self._signals) > 1 else 0)
        except psutil.NoSuchProcess:
            pass  # it was done before
