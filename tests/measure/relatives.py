"""Which processes came from a nursery, told by what they inherited, whoever their parent is now."""

import contextlib
from pathlib import Path


def family(nursery_pid: int) -> set[int]:
    """Every live process that came from that nursery, itself included."""
    return family_of(entry_of(nursery_pid))


def entry_of(nursery_pid: int) -> bytes:
    """What all that came from a nursery has inherited from it."""
    (entry,) = [
        item
        for item in Path(f"/proc/{nursery_pid}/environ").read_bytes().split(b"\0")
        if item.startswith(b"CODESIGN_NURSERY=")
    ]
    return entry


def family_of(entry: bytes) -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry in (folder / "environ").read_bytes():
                found.add(int(folder.name))
    return found
