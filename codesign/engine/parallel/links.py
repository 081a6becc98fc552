"""Links: how one rank talks to the others. torch.distributed without its global state; nothing is pickled.

    everyone     gloo: plans, as plain integers; facts, as JSON
    its stage    sums of activations, logits                gloo on CPU, NCCL on CUDA
    its pipe     activations from stage to stage            gloo on CPU, NCCL on CUDA

On one machine everything listens on the loopback address only. A wait has no clock of its own: a hanging rank is for
whoever watches the engine to end. A rank that dies closes its connections, and those who wait for it raise.

What is sent is counted, by operation: calls and payload bytes.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from codesign.engine.parallel.failure import Disconnected
from codesign.engine.parallel.part import Layout

_NO_CLOCK = timedelta(days=30)
_FRAME = 512  # integers of the first broadcast; a longer message needs a second one


class Links:
    """Connects at once; returns when everybody is there.

    Args:
        store: where ranks find each other.
        is_local: whether all ranks are on this machine.

    Attributes:
        counts: operation -> [calls, payload bytes] of this rank.
    """

    def __init__(self, store: Store, *, rank: int, layout: Layout, device: torch.device, is_local: bool) -> None:
        self.rank, self.layout, self.device = rank, layout, device
        self.stage, self.tensor_rank = layout.stage_of(rank), layout.tensor_rank_of(rank)
        self.counts: dict[str, list[int]] = {}
        self._store, self._is_local = store, is_local
        with _connections():
            self._everyone = self._gloo("everyone", rank, layout.num_ranks)
            self._ranks = self._group(f"stage-{self.stage}", self.tensor_rank, layout.tensor_size)
            self._stages = self._group(f"pipe-{self.tensor_rank}", self.stage, layout.num_stages)

    def _group(self, name: str, rank: int, size: int) -> Any:
        """None where there is nobody to talk to."""
        if size == 1:
            return None
        if self.device.type == "cpu":
            return self._gloo(name, rank, size)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _NO_CLOCK
        return dist.ProcessGroupNCCL(PrefixStore(name, self._store), rank, size, options)

    def _gloo(self, name: str, rank: int, size: int) -> Any:
        group: Any = ProcessGroupGloo  # the stubs know another spelling of its options
        options = group._Options()
        options._timeout = _NO_CLOCK
        options._devices = [
            group.create_device(hostname="127.0.0.1") if self._is_local else group.create_default_device()
        ]
        return group(PrefixStore(name, self._store), rank, size, options)

    def close(self) -> None:
        """Lets go of connections, listeners and their threads now, whoever still holds this object."""
        self._everyone = self._ranks = self._stages = None
        del self._store

    # Plans and facts, between everyone.

    def tell(self, numbers: Sequence[int]) -> None:
        """From rank 0 to everyone else, who `hear` it."""
        first = torch.zeros(_FRAME, dtype=torch.int64)
        message = torch.tensor([len(numbers), *numbers], dtype=torch.int64)
        first[: len(message)] = message[:_FRAME]
        self._broadcast(first)
        if len(message) > _FRAME:
            self._broadcast(message[_FRAME:].clone())

    def hear(self) -> list[int]:
        """The next message of rank 0; waits for it."""
        first = torch.empty(_FRAME, dtype=torch.int64)
        self._broadcast(first)
        num_rest = int(first[0]) + 1 - _FRAME
        if num_rest <= 0:
            return [int(number) for number in first[1 : int(first[0]) + 1].tolist()]
        rest = torch.empty(num_rest, dtype=torch.int64)
        self._broadcast(rest)
        return [int(number) for number in [*first[1:].tolist(), *rest.tolist()]]

    def share(self, numbers: Sequence[int]) -> Sequence[int]:
        """Rank 0's numbers, to everyone."""
        if self.rank:
            return self.hear()
        self.tell(numbers)
        return numbers

    def total(self, number: int) -> int:
        """The sum of everyone's number, to everyone."""
        found = torch.tensor([number], dtype=torch.int64)
        with _connections():
            self._everyone.allreduce([found]).wait()
        return int(found)

    def collect(self, own: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Everyone's mapping, rank after rank, on rank 0; nothing on the others."""
        if self.rank:
            data = bytearray(json.dumps(own).encode())
            with _connections():
                self._everyone.send([torch.tensor([len(data)], dtype=torch.int64)], 0, 0).wait()
                self._everyone.send([torch.frombuffer(data, dtype=torch.uint8)], 0, 0).wait()
            return []
        found = [json.loads(json.dumps(own))]
        for rank in range(1, self.layout.num_ranks):
            size = torch.empty(1, dtype=torch.int64)
            with _connections():
                self._everyone.recv([size], rank, 0).wait()
                text = torch.empty(int(size), dtype=torch.uint8)
                self._everyone.recv([text], rank, 0).wait()
            found.append(json.loads(bytes(text.tolist())))
        return found

    def _broadcast(self, numbers: Tensor) -> None:
        self._count("broadcast", numbers)
        with _connections():
            self._everyone.broadcast([numbers]).wait()

    # Activations, between the ranks of a stage.

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the stage's x, in place."""
        if self._ranks is None or not x.numel():
            return x
        x = x.contiguous()
        self._count("all_reduce", x)
        with _connections():
            self._ranks.allreduce([x]).wait()
        return x

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """[M, n · columns] from everyone's [M, columns], on the first rank of the stage; None on the others."""
        if self._ranks is None:
            return x
        parts = [torch.empty_like(x) for _ in range(self.layout.tensor_size)] if self.tensor_rank == 0 else []
        if x.numel():
            if self.tensor_rank:
                self._count("gather", x)
            options = dist.GatherOptions()
            options.rootRank = 0
            with _connections():
                self._ranks.gather([parts] if parts else [], [x.contiguous()], options).wait()
        return torch.cat(parts, dim=1) if parts else None

    # Activations, from stage to stage.

    def send(self, x: Tensor, tag: int) -> "Pending":
        """Begins to send to the next stage."""
        x = x.contiguous()
        self._count("send", x)
        with _connections():
            return Pending(self._stages.send([x], self.stage + 1, tag), x)

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype, tag: int) -> "Pending":
        """Begins to receive from the stage before."""
        x = torch.empty(shape, dtype=dtype, device=self.device)
        with _connections():
            return Pending(self._stages.recv([x], self.stage - 1, tag), x)

    def _count(self, operation: str, x: Tensor) -> None:
        count = self.counts.setdefault(operation, [0, 0])
        count[0] += 1
        count[1] += x.numel() * x.element_size()


class Pending:
    """A tensor on its way."""

    def __init__(self, work: Any, x: Tensor) -> None:
        self._work, self._x = work, x

    def wait(self) -> Tensor:
        with _connections():
            self._work.wait()
        return self._x


@contextlib.contextmanager
def _connections() -> Iterator[None]:
    """What goes wrong inside went wrong at the other end, or on the way there."""
    try:
        yield
    except RuntimeError as error:
        raise Disconnected(str(error)) from error
