import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codesign.engine.parallel.balance import measure, split_layers, stage_costs
from codesign.engine.parallel.stage import Stage


def cost(sizes: list[int], layer: float, head: float) -> float:
    return max([size * layer for size in sizes[:-1]] + [sizes[-1] * layer + head])


@given(
    num_layers=st.integers(1, 12),
    num_stages=st.integers(1, 4),
    layer=st.floats(0.1, 10),
    head=st.floats(0, 30),
)
def test_no_other_split_has_a_cheaper_costliest_stage(
    num_layers: int, num_stages: int, layer: float, head: float
) -> None:
    num_stages = min(num_stages, num_layers)
    found = split_layers(num_layers, num_stages, layer_cost=layer, head_cost=head)

    assert [layer for own in found for layer in own] == list(range(num_layers))
    cuts = itertools.combinations(range(1, num_layers), num_stages - 1)
    sizes = [[b - a for a, b in itertools.pairwise((0, *own, num_layers))] for own in cuts]
    best = min(cost(own, layer, head) for own in sizes)
    assert cost([len(own) for own in found], layer, head) == pytest.approx(best)


@pytest.mark.parametrize(
    ("head", "sizes"), [(0.0, [5, 5]), (1.0, [5, 5]), (3.0, [6, 4]), (100.0, [9, 1])], ids=lambda value: str(value)
)
def test_a_costly_head_leaves_the_last_stage_fewer_layers(head: float, sizes: list[int]) -> None:
    found = split_layers(10, 2, layer_cost=1.0, head_cost=head)

    assert [len(own) for own in found] == sizes


def test_costs_are_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built: list[Stage] = []

    def build() -> Stage:
        built.append(one_layer_stage())
        return built[-1]

    first = stage_costs("key", build, num_rows=4)

    assert stage_costs("key", build, num_rows=4) == first
    assert len(built) == 1
    (tmp_path / "codesign" / "stage_costs" / "key.json").write_text("torn")
    stage_costs("key", build, num_rows=4)
    assert len(built) == 2


def test_what_is_measured_follows_the_sizes() -> None:
    """A head of 64 times the vocabulary costs more than one layer; without it, less."""
    small, large = (measure(one_layer_stage(vocab_size=size), num_rows=16) for size in (64, 64 * 1024))

    assert small[1] < small[0]
    assert large[1] > large[0]


def one_layer_stage(vocab_size: int = 128) -> Stage:
    from codesign.engine.models.assemble import Assembler
    from codesign.engine.models.random import RandomWeights
    from codesign.engine.models.shape import read_shape
    from codesign.engine.models.tiny import tiny_config
    from codesign.engine.parallel.part import Part
    from codesign.engine.parallel.sharded import Sharded
    from codesign.engine.parallel.stage import build_stage
    from codesign.engine.quantize.formats.native import Native
    from codesign.engine.quantize.linear import Workspace

    whole = read_shape(tiny_config(vocab_size=vocab_size))
    part = Part(whole=whole, tensor_rank=0, tensor_size=1, layers=range(1, 2))
    assembler = Assembler(
        shape=part.shape,
        weight_format=Native(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        workspace=Workspace(),
    )
    source = RandomWeights(whole, seed=0, dtype=torch.float32)
    return build_stage(assembler, Sharded(source, part), part, None)
