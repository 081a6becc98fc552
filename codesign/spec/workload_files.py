"""The files that a workload names: read once when the workload is, so that what is wrong in them is said first.

Observed lengths take the place of their file. A trace stays a file; its path is made absolute and what decides about it
is written beside it: the longest prompt and output, and a digest of the requests.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from codesign.errors import InputError, shown
from codesign.spec.lengths import MAX_OBSERVED, Empirical, Lengths
from codesign.spec.regular_file import open_regular
from codesign.spec.section import validate
from codesign.spec.trace import Trace, read_trace, requests_digest
from codesign.spec.traces.request import lines, parsed_whole
from codesign.spec.workload import Workload
from codesign.spec.yaml import Document, Key


def read_workload(document: Document, key: Key = ()) -> Workload:
    """The workload that stands at `key` of a document, with all it names; paths are relative to the file they stand in.

    Raises:
        InputError: the first thing that is wrong, in the document or in a file.
    """
    workload = validate(Workload, document, key)
    changes: dict[str, object] = {}
    for name in ("prompt_tokens", "output_tokens"):
        lengths = getattr(workload, name)
        if lengths is not None:
            changes[name] = _with_lengths(lengths, document, (*key, name))
    talk = workload.conversation
    if talk is not None:
        user_tokens = _with_lengths(talk.user_tokens, document, (*key, "conversation", "user_tokens"))
        changes["conversation"] = talk.model_copy(update={"user_tokens": user_tokens})
    if workload.trace is not None:
        changes["trace"] = _resolved_trace(workload.trace, document, (*key, "trace"))
    return workload.model_copy(update=changes)


def _folder(document: Document, key: Key) -> Path:
    """The folder of the file in which a key stands; an included file's keys stand in that file."""
    return Path(document.place(key).rpartition(":")[0] or document.file).parent


@contextmanager
def _said_at(document: Document, key: Key, path: Path) -> Iterator[None]:
    """An error about a file as a whole is told where the file is named; one inside it names its own line."""
    try:
        yield
    except InputError as error:
        if error.key is not None or (error.file or "").startswith(f"{path}:"):
            raise
        raise document.error(f"{shown(str(path))}: {error.message}", key) from None


def _with_lengths(lengths: Lengths, document: Document, key: Key) -> Lengths:
    empirical = lengths.empirical
    if empirical is None or empirical.file is None:
        return lengths
    path = _folder(document, (*key, "empirical")) / empirical.file
    with _said_at(document, (*key, "empirical"), path), open_regular(path, wanted="a list of lengths") as stream:
        found: list[int] = []
        for place, text in lines(stream, str(path)):
            if len(found) == MAX_OBSERVED:
                raise InputError(f"is more than {MAX_OBSERVED} lengths; draw a sample of them", file=place)
            found.append(parsed_whole(text, place, None, low=1))
        if not found:
            raise InputError("holds no length; one whole number a line is needed", file=path)
    read = Empirical(lengths=tuple(found), in_order=empirical.in_order)
    return lengths.model_copy(update={"empirical": read})


def _resolved_trace(trace: Trace, document: Document, key: Key) -> Trace:
    folder = _folder(document, key)
    path = folder / trace.file
    with _said_at(document, key, path):
        requests = read_trace(trace, folder)
    changes: dict[str, object] = {"file": str(path.resolve()), "digest": requests_digest(requests)}
    for name in ("prompt_tokens", "output_tokens"):
        cap = getattr(trace, f"max_{name}")
        if trace.has_times:
            longest = max(1, max(getattr(request, name) or 0 for request in requests))
            changes[f"max_{name}"] = longest if cap is None else min(cap, longest)
    return trace.model_copy(update=changes)
