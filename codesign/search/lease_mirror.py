"""leases/ in the folder of a study that a database holds: what runs now, wherever it runs, for people to see."""

from collections.abc import Mapping
from pathlib import Path

from codesign.search import lease as leases
from codesign.search.lease import Lease


class LeaseMirror:
    """Several searches may mirror into one folder: a file holds the same, whichever of them wrote it.

    Args:
        folder: the study's leases/.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.running: Mapping[str, Lease] = {}  # by record uid, as last shown

    def show(self, running: Mapping[str, Lease]) -> None:
        """Writes what is new or has changed, and removes what has ended."""
        for uid in self.running.keys() - running.keys():
            leases.drop(self._folder, self.running[uid])
        for uid, lease in running.items():
            if lease != self.running.get(uid):
                leases.write(self._folder, lease)
        self.running = dict(running)

    def begin(self, lease: Lease) -> None:
        """A trial runs, or runs elsewhere than was thought."""
        self.show({**self.running, lease.uid: lease})

    def end(self, uid: str) -> None:
        self.show({other: lease for other, lease in self.running.items() if other != uid})

    def tidy(self) -> None:
        """Says that what runs was heard of now, and removes what searches that died left behind."""
        for lease in self.running.values():
            leases.touch(self._folder, lease)
        now = {lease.worker for lease in self.running.values()}
        for path in self._folder.glob("*.json"):
            if path.stem not in now:
                path.unlink(missing_ok=True)
