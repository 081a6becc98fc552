"""Part: what one rank holds of a model.

    tensor     qkv, gate and up: some of the outputs (whole heads)       output, down: the inputs that belong to them
               embedding and head: some of the vocabulary, padded to equal sizes
    pipeline   some of the layers; the first stage has the embedding, the last one the final norm and the head

Two ranks add up what `output` and `down` give them, and go on with the same residual stream (Megatron-LM, Shoeybi et
al., 2019, https://arxiv.org/abs/1909.08053).

A KV head lies on every rank with a query head of its group, so degrees need not divide the KV heads: with 4 heads on 2
KV heads and 4 ranks each KV head is there twice.
"""

import dataclasses
import math

from codesign.engine.models.shape import ModelShape
from codesign.errors import Unsupported


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which rank stands where. Rank 0 plans and samples, so it is one of the last stage: logits never travel back.

    ranks of 2 x 2      stage 0: 2 3      stage 1: 0 1
    """

    tensor_size: int
    num_stages: int

    @property
    def num_ranks(self) -> int:
        return self.tensor_size * self.num_stages

    def stage_of(self, rank: int) -> int:
        return self.num_stages - 1 - rank // self.tensor_size

    def tensor_rank_of(self, rank: int) -> int:
        return rank % self.tensor_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Args:
    whole: the model.
    layers: those of this rank's stage.
    """

    whole: ModelShape
    tensor_rank: int
    tensor_size: int
    layers: range

    @property
    def name(self) -> str:
        """Tells it from other parts of the same model."""
        return f"{self.tensor_rank}of{self.tensor_size}-layers{self.layers.start}to{self.layers.stop}"

    @property
    def is_first(self) -> bool:
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        return self.layers.stop == self.whole.num_layers

    @property
    def heads(self) -> range:
        """Query heads."""
        return _share(self.whole.num_heads, self.tensor_rank, self.tensor_size)

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """KV heads, one for each equal run of the query heads; the same may come twice."""
        per_kv_head = self.whole.num_heads // self.whole.num_kv_heads
        step = math.gcd(per_kv_head, len(self.heads))
        return tuple(head // per_kv_head for head in self.heads[::step])

    @property
    def inner(self) -> range:
        """Outputs of gate and of up, inputs of down."""
        return _share(self.whole.intermediate_size, self.tensor_rank, self.tensor_size)

    @property
    def vocabulary(self) -> range:
        """Tokens; those past the vocabulary's end are padding."""
        return _share(
            self.tensor_size * -(-self.whole.vocab_size // self.tensor_size), self.tensor_rank, self.tensor_size
        )

    @property
    def shape(self) -> ModelShape:
        """Sizes of what this rank holds."""
        return dataclasses.replace(
            self.whole,
            num_layers=len(self.layers),
            num_heads=len(self.heads),
            num_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.inner),
            vocab_size=len(self.vocabulary),
        )


def _share(count: int, rank: int, size: int) -> range:
    return range(rank * count // size, (rank + 1) * count // size)


def check_split(shape: ModelShape, layout: Layout) -> None:
    """Raises Unsupported where a model has too few layers, or heads or sizes that do not divide."""
    if layout.num_stages > shape.num_layers:
        raise Unsupported(
            f"parallel.pipeline_parallel_size {layout.num_stages}: the model has {shape.num_layers} layers; "
            "a stage needs one"
        )
    for name, size in (("attention heads", shape.num_heads), ("feed-forward width", shape.intermediate_size)):
        if size % layout.tensor_size:
            fitting = [str(degree) for degree in range(1, layout.tensor_size) if size % degree == 0]
            raise Unsupported(
                f"parallel.tensor_parallel_size {layout.tensor_size} does not divide the model's {name}, {size}; "
                f"use {' or '.join(fitting)}"
            )
