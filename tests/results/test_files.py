import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from codesign.errors import WorkError
from codesign.results import files
from codesign.results.files import read_file, write_file

CALLS = ("open", "write", "fsync", "close", "rename", "unlink")


class FaultOs:
    """The real `os`, whose n-th file operation fails: once (transient), or from then on (persistent).

    A short write puts half of the bytes on the disk and says so, as the kernel may.
    """

    def __init__(self, fail_at: int, error: int | None, *, persistent: bool) -> None:
        self._fail_at, self._error, self._persistent = fail_at, error, persistent
        self.count = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._counted(name, real) if name in CALLS else real

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.count += 1
            if self.count == self._fail_at or (self._persistent and self.count > self._fail_at):
                if self._error is not None:
                    if name == "close":
                        real(*arguments)  # the descriptor is gone even when close reports an error
                    raise OSError(self._error, os.strerror(self._error))
                if name == "write":
                    return real(arguments[0], bytes(arguments[1])[: max(1, len(arguments[1]) // 2)])
            return real(*arguments, **keywords)

        return call


def every_fault() -> Iterator[tuple[int | None, bool]]:
    for error in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, None):
        for persistent in (False, True):
            yield error, persistent


def with_fault(monkeypatch: pytest.MonkeyPatch, fault: FaultOs, work: Callable[[], None]) -> WorkError | None:
    """Runs `work` on the failing file system; its WorkError, if any. Nothing else may come out."""
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", fault)
        try:
            work()
        except WorkError as error:
            return error
    return None


@pytest.mark.parametrize(("error", "persistent"), list(every_fault()))
def test_whatever_fails_the_old_content_or_the_new_is_there_whole(
    error: int | None, persistent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "front.json"
    descriptors = len(os.listdir("/proc/self/fd"))
    for fail_at in range(1, 100):
        path.write_bytes(b"old")
        fault = FaultOs(fail_at, error, persistent=persistent)
        failure = with_fault(monkeypatch, fault, lambda: write_file(path, b"new content" * 100))

        content = path.read_bytes()
        assert content in (b"old", b"new content" * 100)
        assert failure is not None or content != b"old"
        if failure is not None:
            assert str(tmp_path) in str(failure) and failure.exit_status == 1
        if fault.count < fail_at:
            break  # this time nothing was left to fail
    else:
        pytest.fail("the loop of failures never ended")

    assert fail_at > 8
    assert len(os.listdir("/proc/self/fd")) == descriptors
    write_file(path, b"afterwards")
    assert path.read_bytes() == b"afterwards"


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_transient_fault_leaves_no_temporary_file(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fail_at in range(1, 6):
        with_fault(
            monkeypatch, FaultOs(fail_at, error, persistent=False), lambda: write_file(tmp_path / "a.json", b"x" * 99)
        )

        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = with_fault(
        monkeypatch, FaultOs(2, errno.ENOSPC, persistent=True), lambda: write_file(tmp_path / "a.json", b"x")
    )

    assert failure is not None
    assert str(failure) == (
        f"cannot write {tmp_path / 'a.json'}: No space left on device; "
        "the disk is full: free some space and run the same command again"
    )


def test_a_file_size_limit_at_any_byte_leaves_the_old_file(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, as an unprivileged full disk: the kernel cuts the write at that very byte."""
    script = """
import resource, signal, sys
from pathlib import Path
from codesign.errors import WorkError
from codesign.results.files import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
data = b"n" * 400
for limit in range(0, 401, 7):
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        write_file(path, data)
        raise SystemExit(f"{limit} bytes were enough for 400")
    except WorkError as error:
        assert "ulimit" in str(error), error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old", limit
    assert len(list(path.parent.iterdir())) == 1, limit
write_file(path, data)
assert path.read_bytes() == data
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.json")], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr


def test_a_symbolic_link_is_replaced_and_its_target_untouched(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link.json").symlink_to(tmp_path / "target")

    write_file(tmp_path / "link.json", b"new")

    assert (tmp_path / "target").read_bytes() == b"precious"
    assert not (tmp_path / "link.json").is_symlink()


def test_a_planted_temporary_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / f".a.json.{os.getpid()}.tmp").symlink_to(tmp_path / "target")

    write_file(tmp_path / "a.json", b"new")

    assert (tmp_path / "target").read_bytes() == b"precious"
    assert (tmp_path / "a.json").read_bytes() == b"new"


@pytest.mark.parametrize("kind", ["link", "directory", "pipe", "device", "large", "missing"])
def test_only_regular_files_of_bounded_size_are_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "link":
        (tmp_path / "target").write_bytes(b"secret")
        path.symlink_to(tmp_path / "target")
    elif kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "large":
        path.write_bytes(b"x" * 101)

    with pytest.raises(WorkError):
        read_file(path, max_bytes=100)


def test_a_folder_without_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = with_fault(
        monkeypatch, FaultOs(1, errno.EACCES, persistent=True), lambda: write_file(tmp_path / "a", b"x")
    )

    assert failure is not None and "--out" in str(failure)
