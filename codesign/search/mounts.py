"""On what kind of file system a folder lies: a lock and SQLite need one of this machine.

Network file systems emulate locks or leave them out, and a client that loses its lock is not told; SQLite's own manual
says not to put a database there (https://www.sqlite.org/howtocorrupt.html, section 2.1).
"""

import os
import re
from pathlib import Path

_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|afs|ceph|lustre|gpfs|beegfs|ocfs2|gfs2|glusterfs|pvfs2|orangefs|"
    r"fuse\.(sshfs|glusterfs|ceph|s3fs|s3ql|gcsfuse|juicefs|rclone|cephfs|mfs|moosefs|goofys|mount-s3)"
)
_MOUNTS = Path("/proc/self/mountinfo")


def network_kind(path: Path, mounts: Path = _MOUNTS) -> str | None:
    """The type of the file system that holds `path` (or will) when other machines may write to it too, else None."""
    there = os.path.realpath(path)
    best, kind = "", ""
    for line in mounts.read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), before.split()[4])
        # Of two mounts on one point the later covers the earlier.
        if (there == point or there.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, after.split()[0]
    return kind if _NETWORK.fullmatch(kind) else None
