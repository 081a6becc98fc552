"""SingleRunner: runs one StepPlan on one device. Timed steps, scoring and, later, drafts all go through here."""

from typing import Protocol

import torch
from torch import Tensor

from codesign.engine.batch import Batch
from codesign.engine.models.decoder import Decoder
from codesign.engine.step import StepPlan


class CachedAttention(Protocol):
    """Attention that keeps the cache: `begin` commits and frees, `end` lets the policy act where a prompt ended."""

    def begin(self, batch: Batch) -> None: ...

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor: ...

    def end(self, batch: Batch) -> None: ...


class SingleRunner:
    def __init__(self, model: Decoder, attention: CachedAttention, device: torch.device) -> None:
        self._model, self._attention, self._device = model, attention, device

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Tensor:
        """Logits [len(plan.logits_rows), vocab_size] fp32."""
        batch = Batch.of(plan, self._device)
        self._attention.begin(batch)
        logits = self._model(batch, self._attention)
        self._attention.end(batch)
        return logits  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
