"""A real server process for tests: started, asked, ended."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNNER = Path(__file__).parent / "runner.py"
KEY = "a-key-of-the-tests"


class ServerProcess:
    """Args:
    config: text of the configuration.
    options: of the command line, `--model bundled` if no other.

    Attributes:
        url: of the server, without /v1.
    """

    def __init__(
        self,
        folder: Path,
        config: str,
        *options: str,
        runner: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        key: str | None = KEY,
    ) -> None:
        path = folder / "config.yaml"
        path.write_text(config)
        self.key = key
        model = () if "--model" in options or "--profile" in options else ("--model", "bundled")
        self._process = subprocess.Popen(
            [sys.executable, str(RUNNER), *runner, "serve", str(path), "--port", "0", *model, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                **({"CODESIGN_API_KEY": key} if key else {}),
                **(environment or {}),
            },
        )
        self._lines: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(120)
        found = re.search(r"^ready: (\S+)/v1", self.stderr, flags=re.MULTILINE)
        if found is None:
            self.kill()
            raise AssertionError(f"the server did not start:\n{self.stderr}")
        self.url = found[1]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stderr(self) -> str:
        """So far."""
        return "".join(self._lines)

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout_s: float = 60) -> int:
        """Waits for the end; the exit status."""
        status = self._process.wait(timeout_s)
        self._reader.join()
        return status

    def kill(self) -> None:
        self._process.kill()
        self.wait()

    def stop(self) -> None:
        """Ends it in order; fails the test when it did not."""
        self.signal(signal.SIGTERM)
        status = self.wait()
        assert status == 0, self.stderr

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._lines.append(line)
                if line.startswith("ready: "):
                    self._ready.set()
        self._ready.set()


def wait_until(condition: object, timeout_s: float = 30) -> None:
    """Polls a function until it is true."""
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.05)
