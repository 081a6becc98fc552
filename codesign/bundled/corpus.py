"""The text that the bundled models are trained and judged on: the Python standard library's own sources.

    stdlib .py files (tests included), pydoc topics -> split by hash of the name -> near-duplicates of held-out dropped

Every file's fate is written to `data/files.json` (name, sha256, bytes, split), so the training text can be rebuilt
from the same Python release and nothing else; the calibration and held-out texts ship beside it because users of
other releases need them too.

    python -m codesign.bundled.corpus        rewrites data/ from this interpreter's standard library
"""

import hashlib
import json
import platform
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from codesign.bundled import DATA, Document

NUM_HELDOUT, NUM_CALIBRATION = 60, 40
SHIPPED_BYTES = range(2_000, 24_000)
"""Size of a file that may be shipped: long enough to fill a window, short enough that sixty are a few hundred kB."""
SHINGLE_LINES = 5
MAX_OVERLAP = 0.2
SKIPPED = ("lib2to3/tests/data/", "_sysconfigdata")
TOPIC_PREFIX = "pydoc_data/topics.py#"


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One line of `data/files.json`. `split`: train, calibration, heldout, or dropped with the reason after a colon."""

    name: str
    sha256: str
    num_bytes: int
    split: str


def stdlib_documents(root: Path | None = None) -> list[Document]:
    """Every text of this interpreter's standard library, sorted by name: its files, and pydoc topics.

    Left out: installed packages, files that are not UTF-8 (the parser's own bad examples), the 8-bit codec tables of
    `encodings/` (a megabyte of hexadecimal), the inputs of lib2to3's tests (copies of other files), the build's own
    settings (they differ from machine to machine), and files under 200 bytes.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    return sorted([*_python_files(root), *_topics()], key=lambda document: document.name)


def _python_files(root: Path) -> Iterator[Document]:
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or name.startswith(SKIPPED) or name == "pydoc_data/topics.py":
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) < 200 or (name.startswith("encodings/") and "decoding_table" in text):
            continue
        yield Document(name=name, text=text)


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics  # type: ignore[import-untyped,unused-ignore]

    for topic, text in topics.items():
        yield Document(name=TOPIC_PREFIX + topic, text=text)


def shingles(text: str) -> set[int]:
    """Hashes of every run of `SHINGLE_LINES` non-blank lines, whitespace at either end ignored."""
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    runs = range(max(1, len(lines) - SHINGLE_LINES + 1))
    return {_hash("\n".join(lines[start : start + SHINGLE_LINES])) for start in runs}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def overlap(one: set[int], other: set[int]) -> float:
    """Share of the smaller set that the two have in common: 1 when a text contains the other."""
    return len(one & other) / max(1, min(len(one), len(other)))


def split(documents: list[Document]) -> dict[str, str]:
    """Name -> split. Held-out and calibration files are the first by hash of their name.

    What resembles a held-out file is dropped.
    """
    by_hash = sorted(documents, key=lambda d: hashlib.sha256(f"codesign:{d.name}".encode()).digest())
    splits: dict[str, str] = {}
    shipped: list[tuple[str, set[int]]] = []
    for split_name, count in (("heldout", NUM_HELDOUT), ("calibration", NUM_CALIBRATION)):
        for document in by_hash:
            if count == 0:
                break
            if document.name in splits or len(document.text.encode()) not in SHIPPED_BYTES:
                continue
            own = shingles(document.text)
            if any(overlap(own, other) > MAX_OVERLAP for _, other in shipped):
                continue
            splits[document.name] = split_name
            shipped.append((document.name, own))
            count -= 1
    heldout = [(name, own) for name, own in shipped if splits[name] == "heldout"]
    any_heldout = set().union(*(own for _, own in heldout))
    seen: dict[str, str] = {}
    for document in documents:
        if document.name in splits:
            continue
        own = shingles(document.text)
        near = [name for name, other in heldout if overlap(own, other) > MAX_OVERLAP]
        digest = hashlib.sha256(document.text.encode()).hexdigest()
        if near:
            splits[document.name] = f"dropped: near-duplicate of {near[0]}"
        elif len(own & any_heldout) > MAX_OVERLAP * len(own):
            splits[document.name] = "dropped: made of held-out lines"
        elif digest in seen:
            splits[document.name] = f"dropped: copy of {seen[digest]}"
        else:
            splits[document.name] = "train"
            seen[digest] = document.name
    return splits


def entries(documents: list[Document], splits: dict[str, str]) -> list[FileEntry]:
    """What `data/files.json` says of each document."""
    return [
        FileEntry(
            name=document.name,
            sha256=hashlib.sha256(document.text.encode()).hexdigest(),
            num_bytes=len(document.text.encode()),
            split=splits[document.name],
        )
        for document in documents
    ]


def read_entries() -> list[FileEntry]:
    """The committed list."""
    return [FileEntry(**entry) for entry in json.loads((DATA / "files.json").read_text())["files"]]


def train_texts(documents: Iterable[Document] | None = None) -> list[str]:
    """The training texts, in the committed order, rebuilt from this interpreter.

    Raises:
        LookupError: a training file is missing here or differs from the committed hash (another Python release).
    """
    here = {document.name: document.text for document in documents or stdlib_documents()}
    texts = []
    for entry in read_entries():
        if entry.split != "train":
            continue
        text = here.get(entry.name)
        if text is None or hashlib.sha256(text.encode()).hexdigest() != entry.sha256:
            trained_on = json.loads((DATA / "files.json").read_text())["python"]
            raise LookupError(
                f"{entry.name}: not the file that the bundled model was trained on; the training text needs the"
                f" standard library of Python {trained_on}, this is {platform.python_version()}"
            )
        texts.append(text)
    return texts


def main() -> None:
    documents = stdlib_documents()
    splits = split(documents)
    DATA.mkdir(exist_ok=True)
    listed = entries(documents, splits)
    rows = ",\n".join(json.dumps(vars(entry)) for entry in listed)
    (DATA / "files.json").write_text(f'{{"python": "{platform.python_version()}",\n"files": [\n{rows}\n]}}\n')
    for name in ("heldout", "calibration"):
        chosen = [document for document in documents if splits[document.name] == name]
        lines = [json.dumps(vars(document), ensure_ascii=False) for document in chosen]
        (DATA / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for kind in sorted({entry.split.split(":")[0] for entry in listed}):
        sizes = [entry.num_bytes for entry in listed if entry.split.split(":")[0] == kind]
        print(f"{kind:12} {len(sizes):5} files {sum(sizes) / 1e6:7.2f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
