"""A real PostgreSQL server for a test, from the distribution's binaries, in a folder of its own."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

PASSWORD = "canary-4f0e1d"


def binary(name: str) -> Path | None:
    """Debian keeps the server's programs out of PATH."""
    found = shutil.which(name)
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    return next(
        (path for path in [Path(found)] * bool(found) + [folder / name for folder in folders] if path.exists()), None
    )


class Server:
    """Listens on loopback (or `host`) with password authentication; its database is empty at first.

    Raises pytest's skip where PostgreSQL, or a user to run it as, is missing.
    """

    def __init__(self, host: str = "127.0.0.1", prefix: tuple[str, ...] = ()) -> None:
        pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
        initdb, postgres = binary("initdb"), binary("postgres")
        if initdb is None or postgres is None:
            pytest.skip("PostgreSQL is not installed (Debian package postgresql)")
        self._postgres, self._prefix = postgres, prefix
        self._user: list[str] = []
        self.host, self.port = host, free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="codesign-pg-"))
        if os.getuid() == 0:  # the server refuses to run as root
            try:
                account = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("PostgreSQL does not run as root, and there is no user postgres to run it as")
            os.chown(self.folder, account.pw_uid, account.pw_gid)
            self._user = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        subprocess.run(
            [*self._user, str(initdb), "-D", str(self.folder / "data"), "-U", "codesign", "-A", "scram-sha-256",
             "--pwfile", str(secret), "--no-sync", "--no-locale", "-E", "UTF8"],
            check=True, capture_output=True, cwd=self.folder,
        )  # fmt: skip
        with (self.folder / "data" / "pg_hba.conf").open("a") as file:
            file.write("host all all 0.0.0.0/0 scram-sha-256\n")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        settings = {"listen_addresses": self.host, "port": self.port, "unix_socket_directories": self.folder}
        # The machine does not crash in a test, only processes do, so nothing needs to reach the disk.
        settings |= {"shared_buffers": "16MB", "max_connections": 60, "fsync": "off", "full_page_writes": "off"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, *self._user, str(self._postgres), "-D", str(self.folder / "data"), *options],
                stdout=log, stderr=log, cwd=self.folder, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, "PostgreSQL did not come up"
            time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """SIGINT breaks every connection off; SIGQUIT is a crash, from which the next start recovers."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(60)

    def restart(self, away_s: float = 0.0, number: signal.Signals = signal.SIGINT) -> None:
        self.stop(number)
        time.sleep(away_s)
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://codesign:{PASSWORD}@{self.host}:{self.port}/postgres"

    def empty(self) -> None:
        """Takes the rows of all tables out, but those that say which version the tables are of."""
        kept = "('alembic_version', 'version_info')"
        names = self.query(f"SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename NOT IN {kept}")
        if names:
            self.query(f"TRUNCATE {', '.join(str(name) for (name,) in names)}")

    def query(self, text: str) -> list[tuple[object, ...]]:
        import psycopg

        where = f"host={self.folder} port={self.port} user=codesign password={PASSWORD} dbname=postgres"
        with psycopg.connect(where, autocommit=True) as connection:
            cursor = connection.execute(text)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def _answers(self) -> bool:
        import psycopg

        try:
            self.query("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            below = psutil.Process(self._process.pid).children(recursive=True)
            self.stop(signal.SIGQUIT)
            psutil.wait_procs(below, timeout=10)
        shutil.rmtree(self.folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
