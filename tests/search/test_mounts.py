"""Which file systems a local study may lie on."""

from pathlib import Path

import pytest

from codesign.errors import InputError
from codesign.search import folder
from codesign.search.mounts import network_kind
from tests.search.studies import run_study, space_of

MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 22 0:50 / /home rw,relatime shared:1 - nfs4 server:/home rw,vers=4.2
31 30 254:1 / /home/me/scratch rw - xfs /dev/vdb rw
32 22 0:51 / /mnt/with\\040space rw - cifs //server/share rw
33 22 0:52 / /fast rw - lustre mds:/fast rw
34 22 0:53 / /far rw - fuse.sshfs me@host:/ rw
35 22 0:54 / /box rw - 9p none rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/reports", "nfs4"),
        ("/home/me/scratch/reports", None),
        ("/homes/me", None),
        ("/mnt/with space/x", "cifs"),
        ("/fast/x", "lustre"),
        ("/far", "fuse.sshfs"),
        ("/box/x", None),
        ("/", None),
    ],
)
def test_a_network_file_system_is_known_by_the_mount_that_holds_the_path(
    tmp_path: Path, path: str, kind: str | None
) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)

    assert network_kind(Path(path), tmp_path / "mountinfo") == kind


def test_a_local_study_on_a_network_file_system_is_refused_with_the_ways_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "network_kind", lambda path: "nfs4")

    with pytest.raises(InputError, match=r"nfs4.*--out.*--storage postgresql"):
        run_study(tmp_path, space_of(tmp_path))
