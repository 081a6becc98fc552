"""What ranks hold is the model, each number where it belongs."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codesign.engine.models.assemble import all_shapes
from codesign.engine.models.random import RandomWeights
from codesign.engine.models.shape import ModelShape, read_shape
from codesign.engine.models.tiny import tiny_config
from codesign.engine.parallel.part import Layout, Part, check_split
from codesign.engine.parallel.sharded import Sharded
from codesign.errors import Unsupported


def shape(**changes: object) -> ModelShape:
    return read_shape(tiny_config(**changes))  # type: ignore[arg-type]


def parts(whole: ModelShape, tensor_size: int) -> list[Part]:
    layers = range(whole.num_layers)
    return [Part(whole=whole, tensor_rank=rank, tensor_size=tensor_size, layers=layers) for rank in range(tensor_size)]


@given(tensor_size=st.integers(1, 8), num_stages=st.integers(1, 8))
def test_every_place_has_one_rank_and_rank_0_samples(tensor_size: int, num_stages: int) -> None:
    layout = Layout(tensor_size=tensor_size, num_stages=num_stages)

    places = {(layout.stage_of(rank), layout.tensor_rank_of(rank)) for rank in range(layout.num_ranks)}

    assert len(places) == layout.num_ranks
    assert (layout.stage_of(0), layout.tensor_rank_of(0)) == (num_stages - 1, 0)


@given(
    kv_heads=st.integers(1, 6),
    per_kv_head=st.integers(1, 6),
    tensor_size=st.integers(1, 8),
)
def test_each_query_head_finds_its_kv_head(kv_heads: int, per_kv_head: int, tensor_size: int) -> None:
    heads = kv_heads * per_kv_head * tensor_size  # divides for sure
    whole = dataclasses.replace(shape(), num_heads=heads, num_kv_heads=kv_heads)

    for part in parts(whole, tensor_size):
        own = part.shape
        group = own.num_heads // own.num_kv_heads
        assert own.num_heads == group * own.num_kv_heads
        found = [part.kv_heads[index // group] for index in range(own.num_heads)]
        assert found == [head // (heads // kv_heads) for head in part.heads]


def test_kv_heads_are_split_where_they_divide_and_copied_where_not() -> None:
    split = [part.kv_heads for part in parts(shape(num_attention_heads=8, num_key_value_heads=4), 2)]
    copied = [part.kv_heads for part in parts(shape(num_attention_heads=8, num_key_value_heads=2), 4)]

    assert split == [(0, 1), (2, 3)]
    assert copied == [(0,), (0,), (1,), (1,)]


@pytest.mark.parametrize("tensor_size", [2, 4])
@pytest.mark.parametrize("layers", [range(0, 1), range(1, 2), range(0, 2)])
def test_parts_put_together_are_the_whole_weights(tensor_size: int, layers: range) -> None:
    whole = shape(vocab_size=131, num_key_value_heads=4, attention_bias=True, mlp_bias=True)
    source = RandomWeights(whole, seed=3, dtype=torch.float32)
    expected = source.read(dict(all_shapes(whole)))
    own = [dataclasses.replace(part, layers=layers) for part in parts(whole, tensor_size)]
    shards = [Sharded(source, part).read(dict(all_shapes(part.shape))) for part in own]

    for name in shards[0]:
        whole_name = name.replace("layers.0", f"layers.{layers.start}") if len(layers) == 1 else name
        cuts = [shard[name] for shard in shards]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            found = torch.cat(cuts, dim=1)
        elif name.endswith(("o_proj.bias", "down_proj.bias")):
            found = torch.stack(cuts).sum(0)
        elif "norm" in name:
            found = cuts[0]
        else:
            found = torch.cat(cuts)[: len(expected[whole_name])]
        assert torch.equal(found, expected[whole_name]), name


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Layout(tensor_size=3, num_stages=1), "tensor_parallel_size 3 does not divide the model's attention heads, 4"),
        (Layout(tensor_size=1, num_stages=3), "pipeline_parallel_size 3: the model has 2 layers"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(layout: Layout, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        check_split(shape(), layout)


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(Unsupported, match="feed-forward width, 161; use 1"):
        check_split(shape(intermediate_size=161), Layout(tensor_size=2, num_stages=1))
