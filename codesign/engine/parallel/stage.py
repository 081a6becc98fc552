"""Stage: the layers of one rank, between what comes from the stage before and what goes to the next.

first     embedding                   each rank looks up its tokens, the sums are everyone's rows
layers    as in a Decoder             `output` and `down` give sums over the ranks
last      final norm, head            each rank's own columns of the logits
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codesign.engine.batch import Batch
from codesign.engine.models.assemble import Assembler, TensorSource, outer_shapes
from codesign.engine.models.decoder import AttentionFn, Decoder, DecoderLayer, RMSNorm
from codesign.engine.parallel.links import Links
from codesign.engine.parallel.part import Part
from codesign.engine.quantize import half_packed
from codesign.engine.quantize.formats.native import Native
from codesign.engine.quantize.half_packed import HalfPackedLinear
from codesign.engine.quantize.linear import Linear
from codesign.engine.quantize.prepacked import PrepackedLinear

_ROW_SPLIT = ("output", "down")


class SummedLinear(Linear):
    """A linear whose inputs are split over the ranks of a stage: each multiplies its own, and all have the sum.

    On a CPU sums are in fp32 and rounded once, as on one rank: 16-bit parts would double the rounding error, enough to
    make an eviction policy keep other rows. That is 4 bytes to send for each value, whatever the activations are. With
    our bf16 kernel two ranks give one rank's result to the last bit.
    """

    def __init__(self, own: Linear, links: Links) -> None:
        super().__init__()
        if isinstance(own, PrepackedLinear):  # its kernel only gives 16 bits
            dense = own.dequantize().to(own.dtype)
            own = HalfPackedLinear(dense, own.bias) if half_packed.holds(dense) else own
        self.own, self.kernel = own, own.kernel
        self.in_features, self.out_features = own.in_features, own.out_features
        self._links = links

    def forward(self, x: Tensor) -> Tensor:
        return self._links.sum(self.own.wide(x)).to(x.dtype)

    def dequantize(self) -> Tensor:
        """[out_features, in_features]: of this rank's inputs."""
        return self.own.dequantize()


class Stage(Decoder):
    """A Decoder of which other ranks hold the rest.

    Args:
        embedding: [len(part.vocabulary), hidden_size] on the first stage.
        norm, head: on the last stage.
        links: None where the part stands alone, to be timed.
    """

    def __init__(
        self,
        part: Part,
        *,
        embedding: Tensor | None,
        layers: list[DecoderLayer],
        norm: RMSNorm | None,
        head: Linear | None,
        links: Links | None,
    ) -> None:
        nn.Module.__init__(self)
        self.shape, self.part = part.whole, part
        self.register_buffer("embedding", embedding)
        self.layers, self.layer_list = nn.ModuleList(layers), layers
        self.norm, self.head = norm, head  # type: ignore[assignment]  # absent before the last stage
        self._links = links

    def embed(self, token_ids: Tensor) -> Tensor:
        """[N, hidden_size]; on the first stage only."""
        if self.part.tensor_size == 1:
            return F.embedding(token_ids, self.embedding)
        own = self.part.vocabulary
        is_elsewhere = (token_ids < own.start) | (token_ids >= own.stop)
        x = F.embedding((token_ids - own.start).masked_fill_(is_elsewhere, 0), self.embedding)
        x.masked_fill_(is_elsewhere[:, None], 0.0)
        return x if self._links is None else self._links.sum(x)

    def run(self, batch: Batch, attention: AttentionFn, x: Tensor) -> Tensor:
        """[N, hidden_size] after this rank's layers, from the same before them."""
        change: Tensor | None = None
        for index, layer in enumerate(self.layer_list):
            x, normed = (x, layer.input_norm(x)) if change is None else layer.input_norm.add(x, change)
            x, change = layer.halves(x, normed, index, attention, batch)
        assert change is not None, "a stage has layers"
        return x + change

    def logits(self, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        """[len(rows), len(part.vocabulary)] of these rows of x; on the last stage only."""
        if len(rows) < x.shape[0]:
            x = x[torch.tensor(rows, dtype=torch.int64, device=x.device)]
        found: Tensor = self.head(self.norm(x))
        return found

    def forward(self, batch: Batch, attention: AttentionFn) -> Tensor:
        raise TypeError("a stage is run between others")


def build_stage(assembler: Assembler, source: TensorSource, part: Part, links: Links | None) -> Stage:
    """What a rank holds, from a source that shows its part. Raises as `Assembler.build` does."""
    layers = assembler.build_layers(source)
    if part.tensor_size > 1 and links is not None:
        for layer in layers:
            for name in _ROW_SPLIT:
                setattr(layer, name, SummedLinear(getattr(layer, name), links))
    shapes = outer_shapes(part.shape)
    table, norm, head = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    is_tied = part.whole.ties_embeddings
    wanted = ([table] if part.is_first else []) + ([norm, table if is_tied else head] if part.is_last else [])
    tensors = source.read({name: shapes[name] for name in dict.fromkeys(wanted)})
    embedding, last_norm, last_head = assembler.own(tensors[table]) if part.is_first else None, None, None
    if part.is_last:
        last_norm = assembler.norm(tensors[norm])
        if is_tied:
            own = assembler.own(tensors[table]) if embedding is None else embedding
            last_head = Native().wrap(own, None, workspace=assembler.workspace)
        else:
            last_head = assembler.pack(Native(), head, assembler.own(tensors[head]), None)
    source.finish({})
    return Stage(part, embedding=embedding, layers=layers, norm=last_norm, head=last_head, links=links).requires_grad_(
        False
    )
