"""DenseLayer: the tensors of one decoder layer before they are packed, where scales may still be moved between them."""

from dataclasses import dataclass

from torch import Tensor

from codesign.engine.models.shape import ModelShape


@dataclass(kw_only=True)
class DenseLayer:
    """In the source's precision, or fp32 where something was changed.

    Attributes:
        weight: "qkv", "output", "gate_up", "down" -> [out, in]; query, key and value rows one after the other, gate
            rows before up rows.
        bias: the same names -> [out] or None.
    """

    shape: ModelShape
    input_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    mlp_norm: Tensor
    weight: dict[str, Tensor]
    bias: dict[str, Tensor | None]

    def can_absorb(self, name: str) -> bool:
        """Whether something right before this linear can take a scale per input.

        With grouped queries one value row feeds several inputs of `output`, which would need one scale between them.
        """
        return name != "output" or self.shape.num_heads == self.shape.num_kv_heads

    def absorb(self, name: str, scale: Tensor) -> None:
        """Multiplies the inputs (columns) of a linear by `scale` [in] and divides what feeds it, so that the layer
        computes the same function."""
        self.weight[name] = self.weight[name].float() * scale
        if name == "qkv":
            self.input_norm = self.input_norm.float() / scale
        elif name == "gate_up":
            self.mlp_norm = self.mlp_norm.float() / scale
        elif name == "down":
            self._divide_last_rows("gate_up", scale)
        else:
            self._divide_last_rows("qkv", scale)

    def _divide_last_rows(self, name: str, scale: Tensor) -> None:
        """The up rows of gate_up or the value rows of qkv, each feeding one input of the next linear."""
        for tensors in (self.weight, self.bias):
            tensor = tensors[name]
            if tensor is not None:
                changed = tensor.float().clone()
                changed[-len(scale) :] /= scale if tensor.dim() == 1 else scale[:, None]
                tensors[name] = changed
