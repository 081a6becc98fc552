"""The dense decoder that Llama, Mistral, Qwen2 and Qwen3 share.

    x = embed(token_ids)                                        [N, hidden], sequences packed one after the other
    per layer:  x += o(attention(layer, q, k, v));  x += down(silu(gate) * up)      each after an RMSNorm
    logits = head(norm(x[plan.logits_rows]))                    only the rows somebody wants

Attention is handed in and keeps the cache; this file never rotates and never sees a row of it. q, k, v come out of one
product, and so do gate and up: fewer launches, and exact for group-wise formats, whose groups run along the input.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codesign.engine.batch import Batch
from codesign.engine.models.shape import ModelShape
from codesign.engine.quantize.linear import Linear


class AttentionFn(Protocol):
    """What a layer calls: q [N, H, D], k and v [N, H_kv, D], not yet rotated -> [N, H, D]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor: ...


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; fp32 inside, cast to the dtype of x, then weighted:
    the order of transformers, without which a quarter of the 16-bit results differ in their last bit."""

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self._eps, self._shape, self._per_value = eps, tuple(weight.shape), 1.0 / weight.numel()

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":  # one fused kernel there
            normed = F.rms_norm(x.float(), self._shape, None, self._eps)
            return normed.to(x.dtype) * self.weight
        # torch's CPU kernel makes a temporary per operation. Zen 3, one thread, us: [8, 256] bf16 28 instead of 36,
        # [1024, 896] fp32 400 instead of 5600.
        wide = x.float()
        norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().mul_(self._per_value).add_(self._eps).rsqrt_()
        if x.dtype == torch.float32:
            return (wide * scale).mul_(self.weight)  # wide is x itself
        return wide.mul_(scale).to(x.dtype).mul_(self.weight)


class DecoderLayer(nn.Module):
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
        self._num_heads, self._num_kv_heads, self._head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim

    def forward(self, x: Tensor, layer: int, attention: AttentionFn, batch: Batch) -> Tensor:
        x = x + self.attend(self.input_norm(x), layer, attention, batch)
        return x + self.feed_forward(self.mlp_norm(x))

    def attend(self, x: Tensor, layer: int, attention: AttentionFn, batch: Batch) -> Tensor:
        """What the attention half adds to the residual stream, from its normalised input."""
        result: Tensor = self.output(attention(layer, *self.project(x), batch).flatten(1))
        return result

    def feed_forward(self, x: Tensor) -> Tensor:
        """What the feed-forward half adds to the residual stream, from its normalised input."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        result: Tensor = self.down(F.silu(gate).mul_(up))
        return result

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, H, D], k and v [N, H_kv, D], with qk-norm where the model has it."""
        heads = self.qkv(x).unflatten(-1, (-1, self._head_dim))
        q, k, v = heads.split((self._num_heads, self._num_kv_heads, self._num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v


class Decoder(nn.Module):
    """Attributes:
    layer_list: the decoder layers.
    embedding: [vocab_size, hidden_size] in the model's dtype; tied models share its storage with the head.
    """

    embedding: Tensor

    def __init__(
        self, shape: ModelShape, *, embedding: Tensor, layers: list[DecoderLayer], norm: RMSNorm, head: Linear
    ) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("embedding", embedding)
        self.layers, self.norm, self.head = nn.ModuleList(layers), norm, head
        self.layer_list = layers  # a plain list: ModuleList costs a lookup per layer and step

    def forward(self, batch: Batch, attention: AttentionFn) -> Tensor:
        """Logits [len(plan.logits_rows), vocab_size] fp32."""
        x = F.embedding(batch.token_ids, self.embedding)
        for index, layer in enumerate(self.layer_list):
            x = layer(x, index, attention, batch)
        rows = batch.plan.logits_rows
        if len(rows) < x.shape[0]:
            x = x[torch.tensor(rows, dtype=torch.int64, device=x.device)]
        logits: Tensor = self.head(self.norm(x))
        return logits.float()

    @property
    def num_bytes(self) -> int:
        """Bytes held: the unique untyped storages of all tensors, and weights that kernel libraries keep packed."""
        tensors = [*self.buffers(), *self.parameters()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        opaque = sum(module.opaque_bytes for module in self.modules() if isinstance(module, Linear))
        return sum(storages.values()) + opaque
