"""Graphs: steps recorded on the device once and started again as a whole (`kernels.graphs`).

A decode step of a small batch is hundreds of kernels of a few microseconds each; telling the device of them takes
longer than running them. A recording is told at once, but it is what it was: every number that Python gave a kernel,
and every address. So what differs from step to step is copied into the tensors that the recording reads, and all else
is its key, whatever that is: two steps that differ in a single plain value never share a recording.

    step                            key                               copied
    slots 0 3 5, 300 rows     ->    3 sequences, 1 token, 512 rows    token ids, cos, sin, rows, counts, slots, table

The first step of a key runs as it is, which compiles kernels and finds out what libraries need; the second is recorded
and replayed; from then on they are replayed. Whatever attention says is not of this kind runs as ever (prompts above
all). CUDA graphs: https://developer.nvidia.com/blog/cuda-10-features-revealed/ (2018).
"""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from codesign.engine.attention.fixed import FixedStep
from codesign.engine.batch import Batch
from codesign.engine.models.decoder import AttentionFn, Decoder
from codesign.engine.quantize.linear import Workspace
from codesign.engine.step import StepPlan

MAX_GRAPHS = 64
"""Of one runner. Intermediate results of all of them share memory, which the CUDA allocator counts; what the driver
keeps of a graph's kernels, it does not."""
IDLE_STEPS = 1024
"""A graph that was not replayed in so many steps makes room for another one. With more keys than room, which turn would
come sooner than that, the others run as they are: recording costs more than such a step."""

Work = Callable[[], None]


class Recorder(Protocol):
    def __call__(self, work: Work) -> Work:
        """Records what `work` starts on the device, which does nothing yet; what is returned starts all of it."""


class CudaRecorder:
    """Each recording is a CUDA graph; they never run at the same time, so that one pool of memory serves them all."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch does not type it

    def __call__(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay


class Attention(AttentionFn, Protocol):
    def fixed(self) -> FixedStep | None: ...


@dataclasses.dataclass
class _Graph:
    """Attributes:
    inputs: tensors that it reads, at these addresses.
    logits: where it leaves them, until another graph runs.
    held: memory that it uses and others might give back.
    """

    inputs: list[Tensor]
    logits: Tensor
    replay: Work
    held: Tensor | None
    last_step: int = 0


class Graphs:
    """The recordings of one runner, of one model and attention.

    Args:
        workspace: of the model's linears; a recording keeps the buffer that it was made with.
    """

    def __init__(self, record: Recorder, workspace: Workspace, *, max_graphs: int = MAX_GRAPHS) -> None:
        self._record, self._workspace, self._max_graphs = record, workspace, max_graphs
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()  # the one that was not used for longest first
        self._seen: set[Hashable] = set()
        self._logits: Tensor | None = None
        self._num_captured = self._num_replayed = self._num_eager = 0

    def run(self, model: Decoder, attention: Attention, batch: Batch) -> Tensor:
        """Logits [len(plan.logits_rows), vocab_size] fp32 of the step that `attention` has begun. They stay as they
        are: no later step touches them."""
        step = attention.fixed()
        if step is None:
            self._num_eager += 1
            return model(batch, attention)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
        fixed = dataclasses.replace(batch, plan=_every_row(len(batch.plan.token_ids)))

        def logits() -> Tensor:
            step.resume()
            return model(fixed, attention)  # type: ignore[no-any-return]

        found = self._run(logits, (fixed, step.facts), vocab_size=model.shape.vocab_size)
        rows = batch.plan.logits_rows
        if rows == fixed.plan.logits_rows:
            return found
        return found[torch.tensor(rows, dtype=torch.int64, device=found.device)]

    def _run(self, logits: Callable[[], Tensor], facts: tuple[Batch, Any], *, vocab_size: int) -> Tensor:
        """What `logits` gives, which reads `facts` and what never moves."""
        inputs: list[Tensor] = []
        key = plain(facts, inputs)
        graph = self._graphs.get(key)
        if graph is not None:
            for own, new in zip(graph.inputs, inputs, strict=True):
                _each_place(own).copy_(_each_place(new))
        elif key in self._seen and self._has_room():
            graph = self._graphs[key] = self._captured(logits, inputs, self._room(facts[0].token_ids, vocab_size))
        if graph is None:
            self._seen.add(key)
            self._num_eager += 1
            return logits()
        self._num_replayed += 1
        self._graphs.move_to_end(key)
        graph.last_step = self._num_replayed + self._num_eager
        graph.replay()
        return graph.logits.clone()

    def _captured(self, logits: Callable[[], Tensor], inputs: list[Tensor], room: Tensor) -> _Graph:
        def work() -> None:
            room.copy_(logits())

        replay = self._record(work)
        self._num_captured += 1
        return _Graph(inputs, room, replay, self._workspace.buffer)

    def _has_room(self) -> bool:
        """After having made some, if that can be."""
        if len(self._graphs) < self._max_graphs:
            return True
        key, oldest = next(iter(self._graphs.items()))
        if self._num_replayed + self._num_eager - oldest.last_step < IDLE_STEPS:
            return False
        del self._graphs[key]
        return True

    def _room(self, token_ids: Tensor, vocab_size: int) -> Tensor:
        """[N, vocab_size] fp32, the same memory for all recordings; where it became too small, earlier ones keep it."""
        num_rows = len(token_ids)
        if self._logits is None or len(self._logits) < num_rows:
            self._logits = torch.empty(1 << (num_rows - 1).bit_length(), vocab_size, device=token_ids.device)
        return self._logits[:num_rows]

    @property
    def kernel(self) -> str:
        """What is replayed, for a record; and how much was, once there was any step."""
        words = f"steps of output tokens, equally many of each sequence (at most {self._max_graphs} graphs)"
        if self._num_replayed + self._num_eager:
            so_far = f"{self._num_captured} captured, {self._num_replayed} steps replayed, {self._num_eager} not"
            words += f"; so far {so_far}"
        return words

    def stats(self) -> dict[str, int]:
        """Since the engine was built: graphs that were captured, steps that one was replayed for, and all others."""
        return {
            "graphs_captured": self._num_captured,
            "steps_replayed": self._num_replayed,
            "steps_not_replayed": self._num_eager,
        }


def plain(facts: Any, tensors: list[Tensor]) -> Hashable:
    """All of `facts`, dataclasses and collections of whatever hashes, but for the content of tensors; these are
    appended to `tensors`, in an order that is the same for equal results."""
    if isinstance(facts, Tensor):
        tensors.append(facts)
        return facts.shape, facts.stride(), facts.dtype, facts.device
    if dataclasses.is_dataclass(facts):
        return type(facts), *(plain(getattr(facts, field.name), tensors) for field in dataclasses.fields(facts))
    if isinstance(facts, dict):
        return dict, *((name, plain(own, tensors)) for name, own in facts.items())
    if type(facts) in (list, tuple):
        return tuple(plain(own, tensors) for own in facts)
    return facts  # type: ignore[no-any-return]  # what does not hash cannot be looked up


def _each_place(tensor: Tensor) -> Tensor:
    """A view that names each place in memory once, of a tensor that may be expanded."""
    for dim, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


@functools.lru_cache(maxsize=1024)
def _every_row(num_tokens: int) -> StepPlan:
    """All that a model may know of a step's plan: that the logits of every token are wanted."""
    return StepPlan(logits_rows=tuple(range(num_tokens)))
