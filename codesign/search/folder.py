"""A study is one folder: where everything lies, what it was started with, and who may write to it.

reports/NAME/
  study.json       what the study was started with; decides whether the same command may go on in it
  profile.yaml     the resolved inputs, for people
  space.yaml
  trials/          <uid>.json, one immutable record per finished trial: the truth; unreadable ones in damaged/
  study.db         Optuna's index over the records
  configs/         trial-N.yaml, what `codesign measure --config` takes
  leases/          what runs now, and who holds it
  index.html trials.csv front.json      written by the report

A study with `--storage` has its truth in a database: trials/ is then a mirror, there is no study.db, and several
searches may have the folder open. Such a folder may lie on a network file system, since every file in it is written
whole, under a name of its own or with the same content. A study without `--storage` may not: its lock and study.db need
a local disk.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from codesign.errors import InputError, WorkError
from codesign.results.files import write_file
from codesign.results.record import TrialIdentity
from codesign.search.disk import explained
from codesign.search.inputs import Inputs, identity_hash, profile_document
from codesign.search.mounts import network_kind
from codesign.spec.yaml import dump_yaml

SCHEMA_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
NOT_STUDIES = ("benchmarks", "example", "measured")


@dataclasses.dataclass(frozen=True)
class StudyFolder:
    """An opened study.

    Attributes:
        uid: of the study, new for each folder that is created; part of every record's uid.
    """

    path: Path
    uid: str

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    @property
    def leases(self) -> Path:
        return self.path / "leases"

    @property
    def index(self) -> Path:
        return self.path / "study.db"

    def config(self, number: int) -> Path:
        return self.path / "configs" / f"trial-{number}.yaml"

    def identity(self, number: int, attempt: int, config_digest: str) -> TrialIdentity:
        """The trial's identity; the same four values always give the same uid."""
        uid = identity_hash(self.uid, number, attempt, config_digest)
        return TrialIdentity(study=self.name, number=number, uid=uid, attempt=attempt)


class Shared(Protocol):
    """Where the searches of several machines agree what a study is."""

    @property
    def address(self) -> str:
        """For people, without user and password."""
        ...

    def agree(self, name: str, description: str) -> str:
        """The description of the study of this name, as the first search gave it: `description` where this is it."""
        ...


@contextlib.contextmanager
def open_study(out: Path, name: str | None, inputs: Inputs, shared: Shared | None = None) -> Iterator[StudyFolder]:
    """The study of these inputs, created or resumed; while the block runs every other search is kept out of it, unless
    it is shared.

    Raises:
        InputError: a bad name, or a folder that holds another study or something else, or that a lock cannot protect.
        WorkError: another search runs in it, or the disk is full, then or while the block runs.
    """
    name = f"{inputs.stem}-{inputs.digest[:6]}" if name is None else name
    if not _NAME.fullmatch(name) or name in NOT_STUDIES:
        raise InputError(
            f"{name!r} cannot name a study: letters, digits and . _ + - (at most 100, not one of "
            f"{', '.join(NOT_STUDIES)})",
            key="--name",
        )
    path = out / name
    with explained(path):
        try:
            for folder in (path, *(path / part for part in ("trials", "leases", "configs"))):
                folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(
                "a file stands where the study's folder should be; choose another --name or --out", file=path
            ) from None
        if shared is not None:
            yield _mirror(path, inputs, shared)
            return
        _refuse_network(path)
        with _lock(path):
            yield _matching(path, inputs) if (path / "study.json").exists() else _create(path, inputs)


def _refuse_network(path: Path) -> None:
    kind = network_kind(path)
    if kind is not None:
        raise InputError(
            f"lies on a network file system ({kind}), where locks and study.db are not safe; choose a local disk with "
            "--out, or share the study through a database with --storage postgresql://USER@HOST/DATABASE",
            file=path,
            key="--out",
        )


# A search that was killed lets go of its lock only when the last process that it forked has followed it.
LOCK_WAIT_S = 3.0


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    # The lock is the kernel's, so it ends with the process, however that ends.
    descriptor = os.open(path / "leases" / "search.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline_s = time.monotonic() + LOCK_WAIT_S
        while not _take(descriptor):
            if time.monotonic() > deadline_s:
                raise WorkError(
                    f"{path}: another search is running in this study; wait for it, or give this one its own --name"
                )
            time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _matching(path: Path, inputs: Inputs, address: str | None = None) -> StudyFolder:
    known = read_study(path)
    if known.get("storage") != address:
        there = "was started without --storage" if known.get("storage") is None else f"is kept in {known['storage']}"
        raise InputError(f"{there}; go on with it there, or choose another --name", file=path, key="--storage")
    _check(path, known, inputs)
    return StudyFolder(path, known["uid"])


def _check(path: Path, known: Mapping[str, Any], inputs: Inputs) -> None:
    """Raises InputError unless `known` describes a study of these inputs."""
    if not isinstance(known.get("uid"), str):
        raise InputError("is not a study's description; choose another --name", file=path / "study.json")
    if known.get("inputs_digest") != inputs.digest:
        plain = json.loads(json.dumps(inputs.parts))
        changed = [part for part in plain if plain[part] != known.get(part)]
        raise InputError(
            f"{path.name!r} is a study with another {' and '.join(changed) or 'description'}; choose another --name, "
            "or leave --name out to get one of its own",
            file=path,
            key="--name",
        )


def _mirror(path: Path, inputs: Inputs, shared: Shared) -> StudyFolder:
    """The folder of a study that a database holds."""
    if (path / "study.json").exists():
        _matching(path, inputs, shared.address)
    text = shared.agree(path.name, json.dumps(_description(path, inputs, shared.address), allow_nan=False))
    known = json.loads(text)
    _check(path, known, inputs)
    if not (path / "study.json").exists():
        _refuse_trials(path)
        _write(path, inputs, known)
    elif read_study(path)["uid"] != known["uid"]:
        raise InputError(
            f"is a mirror of another study of this name than the one in {shared.address}; choose another --name or "
            "--out",
            file=path,
            key="--storage",
        )
    return StudyFolder(path, known["uid"])


def _refuse_trials(path: Path) -> None:
    if any((path / "trials").glob("*.json")):
        raise InputError(
            "holds trials but no study.json, so nobody can tell what they are trials of; choose another --name",
            file=path,
        )


def _create(path: Path, inputs: Inputs) -> StudyFolder:
    _refuse_trials(path)
    plain = _description(path, inputs)
    _write(path, inputs, plain)
    return StudyFolder(path, plain["uid"])


def _description(path: Path, inputs: Inputs, address: str | None = None) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "study": path.name,
        "uid": uuid.uuid4().hex,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs_digest": inputs.digest,
        "model": inputs.model,
        "objectives": [dataclasses.asdict(objective) for objective in inputs.objectives],
        "seed": inputs.seed,
        **({} if address is None else {"storage": address}),
        **inputs.parts,
    }


def _write(path: Path, inputs: Inputs, plain: Mapping[str, Any]) -> None:
    write_file(path / "profile.yaml", dump_yaml(profile_document(inputs.parts["profile"])).encode())
    write_file(path / "space.yaml", dump_yaml(inputs.parts["space"]).encode())
    write_file(path / "study.json", json.dumps(plain, indent=1, allow_nan=False).encode())


def find_study(text: str | Path) -> Path:
    """The folder of an existing study, given its path.

    Raises:
        InputError: there is no study there; names the nearest study beside it.
    """
    path = Path(text)
    candidates = [path, Path("reports") / path] if len(path.parts) == 1 else [path]
    for candidate in candidates:
        if (candidate / "study.json").is_file():
            return candidate
    siblings = candidates[-1].parent
    known = [item.parent.name for item in siblings.glob("*/study.json")] if siblings.is_dir() else []
    raise InputError("there is no study here (a folder with study.json)", file=path, got=path.name, known=known)


def read_study(path: Path) -> Mapping[str, Any]:
    """The description in study.json.

    Raises:
        InputError: it is not readable as one.
    """
    document = path / "study.json"
    try:
        plain = json.loads(document.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", file=document) from None
    if not isinstance(plain, dict):
        raise InputError("is not a study's description", file=document)
    return plain
