"""The dense decoder that Llama, Mistral, Qwen2 and Qwen3 share.

    x = embed(token_ids)                                        [N, hidden], sequences packed one after the other
    per layer:  x += o(attention(layer, q, k, v));  x += down(silu(gate) * up)      each after an RMSNorm
    logits = head(norm(x[plan.logits_rows]))                    only the rows somebody wants

A half hands on what it adds to x instead of adding it, so that the sum and the norm that comes next are one piece
(`kernels/pieces.py`).

Attention is handed in and keeps the cache; this file never rotates and never sees a row of it. q, k, v come out of one
product, and so do gate and up: fewer launches, and exact for group-wise formats, whose groups run along the input.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codesign.engine.batch import Batch
from codesign.engine.kernels.pieces import Pieces
from codesign.engine.kernels.plain import PLAIN
from codesign.engine.models.shape import ModelShape
from codesign.engine.quantize.linear import Linear


class AttentionFn(Protocol):
    """What a layer calls: q [N, H, D], k and v [N, H_kv, D], not yet rotated -> [N, H, D]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor: ...


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    weight: Tensor
    pieces: Pieces = PLAIN

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.pieces.norm(x, self.weight, self.eps)

    def add(self, x: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """x + change and the norm of that; both [M, D]."""
        return self.pieces.add_norm(x, change, self.weight, self.eps)


class DecoderLayer(nn.Module):
    pieces: Pieces = PLAIN

    def __init__(
        self,
        shape: ModelShape,
        *,
        input_norm: RMSNorm,
        qkv: Linear,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        output: Linear,
        mlp_norm: RMSNorm,
        gate_up: Linear,
        down: Linear,
    ) -> None:
        super().__init__()
        self.input_norm, self.qkv, self.q_norm, self.k_norm, self.output = input_norm, qkv, q_norm, k_norm, output
        self.mlp_norm, self.gate_up, self.down = mlp_norm, gate_up, down
        self._heads, self._head_dim = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), shape.head_dim

    def forward(self, x: Tensor, layer: int, attention: AttentionFn, batch: Batch) -> Tensor:
        """The residual stream after the layer."""
        x, change = self.halves(x, self.input_norm(x), layer, attention, batch)
        return x + change

    def halves(
        self, x: Tensor, normed: Tensor, layer: int, attention: AttentionFn, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """From the residual stream and its input norm: the stream after attention, and what the feed-forward adds."""
        x, normed = self.mlp_norm.add(x, self.attend(normed, layer, attention, batch))
        return x, self.feed_forward(normed)

    def attend(self, x: Tensor, layer: int, attention: AttentionFn, batch: Batch) -> Tensor:
        """What the attention half adds to the residual stream, from its normalised input."""
        result: Tensor = self.output(attention(layer, *self.project(x), batch).flatten(1))
        return result

    def feed_forward(self, x: Tensor) -> Tensor:
        """What the feed-forward half adds to the residual stream, from its normalised input."""
        result: Tensor = self.down(self.pieces.silu_mul(self.gate_up(x)))
        return result

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, H, D], k and v [N, H_kv, D], with qk-norm where the model has it."""
        heads = self.qkv(x).view(len(x), sum(self._heads), self._head_dim)
        q, k, v = heads.split_with_sizes(self._heads, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.pieces.norm_heads(q, k, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        return q, k, v


class Decoder(nn.Module):
    """Attributes:
    layer_list: the decoder layers.
    pieces: the small operations that it runs.
    embedding: [vocab_size, hidden_size] in the model's dtype; tied models share its storage with the head.
    """

    embedding: Tensor
    pieces: Pieces = PLAIN

    def __init__(
        self, shape: ModelShape, *, embedding: Tensor, layers: list[DecoderLayer], norm: RMSNorm, head: Linear
    ) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("embedding", embedding)
        self.layers, self.norm, self.head = nn.ModuleList(layers), norm, head
        self.layer_list = layers  # a plain list: ModuleList costs a lookup per layer and step

    def use(self, pieces: Pieces) -> None:
        """Runs these pieces from now on. A new decoder runs the plain ones: what packing sees of it should not depend
        on which kernels a machine has."""
        for module in self.modules():
            if isinstance(module, RMSNorm | DecoderLayer | Decoder):
                module.pieces = pieces

    def forward(self, batch: Batch, attention: AttentionFn) -> Tensor:
        """Logits [len(plan.logits_rows), vocab_size] fp32."""
        x = F.embedding(batch.token_ids, self.embedding)
        change: Tensor | None = None
        for index, layer in enumerate(self.layer_list):
            x, normed = (x, layer.input_norm(x)) if change is None else layer.input_norm.add(x, change)
            x, change = layer.halves(x, normed, index, attention, batch)
        assert change is not None, "a model has layers"
        rows = batch.plan.logits_rows
        if len(rows) < x.shape[0]:
            wanted = torch.tensor(rows, dtype=torch.int64, device=x.device)
            x, change = x[wanted], change[wanted]
        _, normed = self.norm.add(x, change)
        logits: Tensor = self.head(normed)
        return logits.float()

    @property
    def num_bytes(self) -> int:
        """Bytes held: the unique untyped storages of all tensors, and weights that kernel libraries keep packed."""
        tensors = [*self.buffers(), *self.parameters()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        opaque = sum(module.opaque_bytes for module in self.modules() if isinstance(module, Linear))
        return sum(storages.values()) + opaque
