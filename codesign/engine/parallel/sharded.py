"""Sharded: a source of weights that shows one rank's part of another source, under the names of a model of that size.

So that everything behind it, packing included, is as if the part were a whole model. Weights are cut before they are
packed; groups of inputs stay whole, so the codes are those of the whole model. Where a row has one scale, whole rows
are shown and cut afterwards (`whole_rows.py`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from codesign.engine.models.assemble import Shapes, TensorSource, all_shapes
from codesign.engine.parallel.part import Part

ROW_SPLIT = ("o_proj.weight", "down_proj.weight")


class Sharded:
    """Args:
    whole_rows: whether `output` and `down` keep all their inputs.
    """

    def __init__(self, source: TensorSource, part: Part, *, whole_rows: bool = False) -> None:
        self._source, self._part, self._whole_rows = source, part, whole_rows
        self._shapes = dict(all_shapes(part.whole))

    def read(self, shapes: Shapes) -> dict[str, Tensor]:
        names = {name: self._whole_name(name) for name in shapes}
        found = self._source.read({whole: self._shapes[whole] for whole in names.values()})
        return {
            name: found[whole] if self._whole_rows and name.endswith(ROW_SPLIT) else cut(found[whole], name, self._part)
            for name, whole in names.items()
        }

    def finish(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        self._source.finish(self._shapes)

    def _whole_name(self, name: str) -> str:
        head, index, rest = "model.layers.", *name.removeprefix("model.layers.").partition(".")[::2]
        return f"{head}{int(index) + self._part.layers.start}.{rest}" if name.startswith(head) else name


def cut(tensor: Tensor, name: str, part: Part) -> Tensor:
    """The part of a whole tensor of this name; a view where the part is one stretch of it."""
    if part.tensor_size == 1:
        return tensor
    dim, kind = part.whole.head_dim, name.rpartition(".")[2]
    heads = slice(part.heads.start * dim, part.heads.stop * dim)
    inner = slice(part.inner.start, part.inner.stop)
    match name.split(".")[-2]:
        case "q_proj":
            return tensor[heads]
        case "k_proj" | "v_proj":
            return torch.cat([tensor[head * dim : (head + 1) * dim] for head in part.kv_heads])
        case "gate_proj" | "up_proj":
            return tensor[inner]
        case "o_proj" | "down_proj" if kind == "bias":  # added up over the ranks, so it is there once
            return tensor if part.tensor_rank == 0 else torch.zeros_like(tensor)
        case "o_proj":
            return tensor[:, heads]
        case "down_proj":
            return tensor[:, inner]
        case "embed_tokens" | "lm_head":
            own = tensor[part.vocabulary.start : part.vocabulary.stop]
            missing = len(part.vocabulary) - len(own)
            return torch.cat([own, own.new_zeros(missing, own.shape[1])]) if missing else own
        case _:  # norms
            return tensor
