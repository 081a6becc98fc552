"""Calibration: hidden states of calibration text on their way through a model that is being packed, layer by layer.

Every layer sees what the packed layers before it give, and inside a layer every weight sees what the packed weights
before it give: qkv, output, gate and up, down ("true sequential"; Frantar et al., 2022). So later weights repair what
earlier ones lost, where their method can.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from codesign.engine.attention.rope import Rope, rotate
from codesign.engine.batch import Batch
from codesign.engine.models.decoder import DecoderLayer
from codesign.engine.models.shape import ModelShape
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.linear import Linear
from codesign.engine.step import StepPlan

LINEARS = ("qkv", "output", "gate_up", "down")
_MICRO_BATCH_TOKENS = 4096
_NO_PLAN = StepPlan()

Repack = Callable[[str, InputStats], Linear]
"""repack(name, inputs) -> the packed linear to put in the place of the dense one of this name."""


class _Seen(Exception):
    """Ends a forward pass early: what it was for has been seen."""


class Calibration:
    """Args:
    token_ids: [S, T] int64, texts of equal length.
    embedding: [vocab_size, hidden_size]; its dtype is that of the activations.
    """

    def __init__(self, shape: ModelShape, token_ids: Tensor, embedding: Tensor, rope: Rope) -> None:
        device = embedding.device
        self.num_sequences, self.num_tokens = token_ids.shape
        self.hidden = torch.nn.functional.embedding(token_ids.to(device), embedding)  # [S, T, hidden]
        cos, signed_sin = rope.tables(self.num_tokens, device)
        self._cos, self._signed_sin = cos[:, None], signed_sin[:, None]
        self._scale = shape.head_dim**-0.5
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        self.batch = Batch(_NO_PLAN, nothing, nothing)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Causal attention of whole sequences, packed one after the other; keeps no cache."""
        q, k, v = (heads.view(-1, self.num_tokens, *heads.shape[1:]) for heads in (q, k, v))
        q, k = rotate(q, self._cos, self._signed_sin), rotate(k, self._cos, self._signed_sin)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self._scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)

    @torch.no_grad()
    def pack(self, layer: DecoderLayer, repack: Repack, *, keeps_hessian: bool) -> None:
        """Replaces the four dense linears of `layer` in turn, then moves the hidden states through what came out."""
        for name in LINEARS:
            setattr(layer, name, repack(name, self.inputs(layer, name, keeps_hessian=keeps_hessian)))
        for hidden in self.micro_batches():
            hidden.copy_(self._run(layer, hidden))

    @torch.no_grad()
    def inputs(self, layer: DecoderLayer, name: str, *, keeps_hessian: bool) -> InputStats:
        """What the linear of this name sees as the layer is now."""
        linear: Linear = getattr(layer, name)
        found = InputStats(linear.in_features, keeps_hessian=keeps_hessian, device=self.hidden.device)
        with _seeing(linear, found.add):
            for hidden in self.micro_batches():
                with suppress(_Seen):
                    self._run(layer, hidden)
        return found

    def run(self, layer: DecoderLayer, hidden: Tensor) -> Tensor:
        """[S, T, hidden] after the layer."""
        return torch.cat([self._run(layer, part) for part in self._split(hidden)])

    def micro_batches(self) -> Iterator[Tensor]:
        """Views [s, T, hidden] of the hidden states."""
        return iter(self._split(self.hidden))

    def _split(self, hidden: Tensor) -> tuple[Tensor, ...]:
        return torch.split(hidden, max(1, _MICRO_BATCH_TOKENS // self.num_tokens))

    def _run(self, layer: DecoderLayer, hidden: Tensor) -> Tensor:
        out: Tensor = layer(hidden.flatten(0, 1), 0, self.attention, self.batch)
        return out.view(hidden.shape)


@contextmanager
def _seeing(linear: Linear, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Hands the linear's input to `see` and raises _Seen, whenever the linear is run inside."""

    def hook(_: Any, arguments: tuple[Tensor, ...]) -> None:
        see(arguments[0])
        raise _Seen

    handle = linear.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
