"""SingleRunner: runs one StepPlan on one device. Timed steps, scoring and, later, drafts all go through here."""

from collections.abc import Mapping
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from codesign.engine.attention.fixed import FixedStep
from codesign.engine.batch import Batch
from codesign.engine.graphs import Graphs
from codesign.engine.models.decoder import Decoder
from codesign.engine.step import StepPlan

Figures = Literal["bytes", "device_memory"]
"""What every rank can tell about itself (`Engine.own`)."""
FIGURES: tuple[Figures, ...] = get_args(Figures)


class CachedAttention(Protocol):
    """Attention that keeps the cache: `begin` commits and frees, `end` lets the policy act where a prompt ended;
    between them `fixed` gives what a recording of the step would read."""

    def begin(self, batch: Batch) -> None: ...

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor: ...

    def fixed(self) -> FixedStep | None: ...

    def end(self, batch: Batch) -> None: ...


class SingleRunner:
    """On a CUDA device each step lies between two events, so that the share of time the device was busy is known:
    a small model is often bound by launches, and no weight format can help it then.

    Attributes:
        graphs: what replays steps instead of launching them; None launches all.
    """

    def __init__(
        self, model: Decoder, attention: CachedAttention, device: torch.device, graphs: Graphs | None = None
    ) -> None:
        self._model, self._attention, self._device = model, attention, device
        self.graphs = graphs
        self._steps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Tensor:
        """Logits [len(plan.logits_rows), vocab_size] fp32."""
        begin = self._event()
        batch = Batch.of(plan, self._device)
        self._attention.begin(batch)
        logits: Tensor
        if self.graphs is None:
            logits = self._model(batch, self._attention)
        else:
            logits = self.graphs.run(self._model, self._attention, batch)
        self._attention.end(batch)
        end = self._event()
        if begin is not None and end is not None:
            self._steps.append((begin, end))
        return logits

    def device_busy_us(self) -> int:
        """Microseconds between the events of all steps since the last call; 0 on a CPU. Waits for the device."""
        if not self._steps:
            return 0
        torch.cuda.synchronize(self._device)
        steps, self._steps = self._steps, []
        return round(sum(float(begin.elapsed_time(end)) for begin, end in steps) * 1e3)

    def of_ranks(self, figures: Figures, own: Mapping[str, int]) -> list[dict[str, int]]:
        """These figures of each rank, from this one's own; rank 0 first."""
        return [dict(own)]

    def close(self) -> None:
        """Ends what runs beside it; nothing here."""

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
