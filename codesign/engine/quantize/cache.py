"""WeightCache: packed weights on disk, named after everything that they depend on, mapped into memory when used.

    <key>/index.json        {"layers": [{"sha256": ..., "tensors": {name: [dtype, shape, offset]}}, ...],
                             "notes": [...]}
    <key>/layer-000.bin     the layer's tensors one after the other, each at a multiple of 64 bytes

A second build with the same weights reads nothing but pages, and processes that use them at once share these pages. An
entry appears whole (a folder is renamed), is checked against its hashes when it is opened, and is dropped when it is
damaged. When entries take more than `max_bytes`, those not used for longest go.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_BYTES = 32 * 2**30
_ALIGNMENT = 64
_INDEX, _SCRATCH = "index.json", ".new-"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.float8_e4m3fn)
}

Tensors = dict[str, Tensor]


class Entry:
    """Layers of one packed model that are on disk.

    Attributes:
        notes: what was said while they were packed.

    Raises:
        ValueError, OSError: it is damaged or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = json.loads((folder / _INDEX).read_text())
        self._layers: list[dict[str, Any]] = index["layers"]
        self.notes = [str(note) for note in index["notes"]]
        for number, layer in enumerate(self._layers):
            if _digest(_layer_file(folder, number)) != layer["sha256"]:
                raise ValueError(f"{_layer_file(folder, number)} is damaged")

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def layer(self, number: int) -> Tensors:
        """Tensors on pages of the file; what is written to them stays private."""
        return _mapped(_layer_file(self._folder, number), self._layers[number]["tensors"])


class NewEntry:
    """An entry in the making.

    Attributes:
        problem: why there will be none, such as a full disk; "" while all is well.
        notes: what later builds should hear about how the layers were packed.
    """

    def __init__(self, folder: Path, problem: str = "") -> None:
        self._folder, self.problem = folder, problem
        self.layers: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def keep(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Writes the next layer and gives it back mapped; after a problem, as it came."""
        if not self.problem:
            try:
                return self._write(tensors)
            except OSError as error:
                self.problem = error.strerror or str(error)
        return dict(tensors)

    def _write(self, tensors: Mapping[str, Tensor]) -> Tensors:
        file, places, offset = _layer_file(self._folder, len(self.layers)), {}, 0
        digest = hashlib.sha256()
        with file.open("wb") as out:
            for name, tensor in tensors.items():
                data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
                padding = bytes(-len(data) % _ALIGNMENT)
                for part in (data, padding):
                    out.write(part)
                    digest.update(part)
                places[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset]
                offset += len(data) + len(padding)
        self.layers.append({"sha256": digest.hexdigest(), "tensors": places})
        return _mapped(file, places)


class WeightCache:
    """Args:
    folder: of all entries.
    max_bytes: entries not used for longest are removed beyond it.
    """

    def __init__(self, folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self._folder, self._max_bytes = folder, max_bytes

    def find(self, key: str) -> Entry | None:
        """The entry of this key; None when there is none or it was damaged (it is removed then)."""
        folder = self._folder / key
        if not folder.exists():
            return None
        try:
            entry = Entry(folder)
            os.utime(folder)
        except (OSError, ValueError, KeyError, TypeError):  # ValueError: not JSON, or another hash
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return entry

    @contextlib.contextmanager
    def making(self, key: str) -> Iterator[NewEntry]:
        """A new entry, in its place when the block ends well and everything could be written."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self._folder))
        except OSError as error:
            yield NewEntry(self._folder, error.strerror or str(error))
            return
        try:
            new = NewEntry(scratch)
            yield new
            if not new.problem:
                self._publish(new, scratch, key)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _publish(self, new: NewEntry, scratch: Path, key: str) -> None:
        try:
            (scratch / _INDEX).write_text(json.dumps({"layers": new.layers, "notes": new.notes}))
        except OSError as error:
            new.problem = error.strerror or str(error)
            return
        # When another process was faster, its folder is not empty and stays. Maps of ours outlive their names.
        with contextlib.suppress(OSError):
            scratch.rename(self._folder / key)
        with contextlib.suppress(OSError):
            self._shrink(keep=key)

    def _shrink(self, *, keep: str) -> None:
        finished = [entry for entry in self._folder.iterdir() if not entry.name.startswith(_SCRATCH)]
        entries = sorted(finished, key=lambda entry: (entry.name != keep, entry.stat().st_mtime))
        sizes = {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}
        total = sum(sizes.values())
        for entry in entries[1:]:
            if total <= self._max_bytes:
                break
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]


def file_digest(path: Path, memo: Path) -> str:
    """SHA-256 of a file, in hex, remembered below `memo` by its name, size and times: checkpoints are large."""
    stat = path.stat()
    identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    note = memo / hashlib.sha256(identity.encode()).hexdigest()[:32]
    with contextlib.suppress(OSError):
        return note.read_text()
    found = _digest(path)
    with contextlib.suppress(OSError):
        memo.mkdir(parents=True, exist_ok=True)
        part = memo / f".{note.name}.{os.getpid()}"
        part.write_text(found)
        part.replace(note)
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _layer_file(folder: Path, number: int) -> Path:
    return folder / f"layer-{number:03}.bin"


def _mapped(file: Path, places: Mapping[str, Any]) -> Tensors:
    if not places or not file.stat().st_size:
        return {}
    pages = np.memmap(file, dtype=np.uint8, mode="c")
    found = {}
    for name, (kind, shape, offset) in places.items():
        dtype = _DTYPES[kind]
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        found[name] = torch.from_numpy(pages[offset : offset + count]).view(dtype).view(shape)
    return found
