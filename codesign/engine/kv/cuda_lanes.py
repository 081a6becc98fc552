"""Copies beside the computation on a CUDA device: one stream in, one out, ordered by events."""

from collections.abc import Iterable, Sequence

import torch

from codesign.engine.kv.stream import Lanes, Mark, Pair


def cuda_lanes(device: torch.device) -> Lanes:
    def computed() -> Mark:
        return _mark(torch.cuda.current_stream(device))

    return Lanes(_CudaLane(device), _CudaLane(device), computed)


class _CudaLane:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, pairs: Iterable[Pair], after: Sequence[Mark]) -> Mark:
        with torch.cuda.stream(self._stream):
            for mark in after:
                mark.wait()
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                if source.is_cuda:
                    source.record_stream(self._stream)  # the allocator gives its memory to nobody before this is done
        return _mark(self._stream)


def _mark(stream: torch.cuda.Stream) -> Mark:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
