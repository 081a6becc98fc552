"""Layers through two buffers: the schedule as plain logic, and the same results as rows that lie where they are read.

Two lanes stand for the two extremes of what a device may do: copies that are made at once, and copies that are made at
the last moment, when somebody waits for them.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from random_plans import random_plans
from replay import MAX_MODEL_LEN, MAX_QUERY_LEN, NUM_LAYERS, NUM_SLOTS, draw, make_attention

from codesign.engine.attention.layer import Attention
from codesign.engine.batch import Batch
from codesign.engine.kv.place import KVPlace
from codesign.engine.kv.stream import Lane, Lanes, LayerStream, Mark, Pair, joined
from codesign.errors import Unsupported
from codesign.registry import KV_CODECS, KV_POLICIES

CPU = torch.device("cpu")


class Done:
    def wait(self) -> None: ...

    def synchronize(self) -> None: ...


class EagerLane:
    def copy(self, pairs: Iterable[Pair], after: Sequence[Mark]) -> Mark:
        for target, source in pairs:
            target.copy_(source)
        return Done()


class Later:
    def __init__(self, run: Callable[[], None]) -> None:
        self._run: Callable[[], None] | None = run

    def wait(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run()

    synchronize = wait


class LastMomentLane:
    def __init__(self) -> None:
        self._last: Mark = Done()

    def copy(self, pairs: Iterable[Pair], after: Sequence[Mark]) -> Mark:
        own, before = list(pairs), [self._last, *after]

        def run() -> None:
            for mark in before:
                mark.wait()
            for target, source in own:
                target.copy_(source)

        self._last = Later(run)
        return self._last


LANES: list[Callable[[], Lane]] = [EagerLane, LastMomentLane]


@dataclasses.dataclass(frozen=True)
class Streamed(KVPlace):
    """Rows on the CPU that are read and written in two buffers only."""

    lane: Callable[[], Lane]

    def lanes(self, device: torch.device) -> Lanes | None:
        return Lanes(self.lane(), self.lane(), Done)


def outputs(attention: Attention, seed: int) -> list[torch.Tensor]:
    generator, found = torch.Generator().manual_seed(seed), []
    plans = random_plans(
        seed, num_steps=60, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, max_query_len=MAX_QUERY_LEN
    )
    for plan in plans:
        batch = Batch.of(plan, CPU)
        attention.begin(batch)
        for layer in range(NUM_LAYERS):
            found.append(attention(layer, *draw(generator, len(plan.token_ids)), batch))
        attention.end(batch)
    return found


POLICIES: dict[str, dict[str, Any]] = {
    "full": {},
    "streaming_llm": {"kv_budget": 9, "num_sink_tokens": 4},
    "h2o": {"kv_budget": 12, "num_sink_tokens": 2},
    "snapkv": {"kv_budget": 16, "window_tokens": 4, "num_sink_tokens": 2, "kernel_size": 3},
    "pyramidkv": {"kv_budget": 16, "window_tokens": 4, "num_sink_tokens": 2, "kernel_size": 3, "beta": 4},
    "ada_kv": {"kv_budget": 16, "window_tokens": 4, "num_sink_tokens": 2, "kernel_size": 3},
}


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("codec", [name for name in KV_CODECS.names() if KV_CODECS.create(name).rows_mutable])
@pytest.mark.parametrize("policy", POLICIES)
def test_streamed_layers_give_the_same_bits(policy: str, codec: str, lane: Callable[[], Lane]) -> None:
    member = KV_POLICIES.create(policy, **POLICIES[policy])
    near = outputs(make_attention(member, codec=codec), seed=1)
    streamed = outputs(make_attention(member, codec=codec, place=Streamed(lane)), seed=1)

    assert all(torch.equal(one, other) for one, other in zip(near, streamed, strict=True))
    assert sum(len(one) for one in near) > 500


def test_policies_here_are_all_that_go_with_it() -> None:
    left = {"r_kv", "dynamic"}  # refused below; classes of slots, each one of the others

    assert set(POLICIES) | left == set(KV_POLICIES.names())


@pytest.mark.parametrize("codec", ["int4", "low_rank"])
def test_a_codec_of_groups_is_refused_by_name(codec: str) -> None:
    with pytest.raises(Unsupported, match=rf"kv.place .* kv.codec '{codec}' encodes groups .* use kv.codec 'native'"):
        make_attention(KV_POLICIES.create("full"), codec=codec, place=Streamed(EagerLane))


def test_a_policy_that_scores_the_keys_of_all_layers_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"kv.place .* kv.policy 'r_kv' scores the keys of all layers"):
        make_attention(KV_POLICIES.create("r_kv", kv_budget=16), place=Streamed(EagerLane))


def test_the_cache_counts_the_same_and_buffers_hold_two_layers() -> None:
    policy = KV_POLICIES.create("full")
    near, streamed = make_attention(policy), make_attention(policy, place=Streamed(EagerLane))
    layer = near.kv_bytes // NUM_LAYERS

    assert streamed.kv_bytes == near.kv_bytes
    assert near.kv_place == {"cpu memory": near.kv_bytes}
    assert streamed.store.stream is not None
    assert sum(buffer.numel() * buffer.itemsize for buffer in streamed.store.stream.buffers) == 2 * layer


class Log:
    """Lanes that note what is asked of them, and do it at once."""

    def __init__(self, num_layers: int, rows: int) -> None:
        self.lines: list[str] = []
        far = (torch.arange(num_layers * rows * 1.0)[:, None],)
        strip = (torch.zeros(num_layers, 1, 1),)
        lanes = Lanes(_LogLane(self, "in"), _LogLane(self, "out"), lambda: _LogMark(self, "compute"))
        self.far = far[0]
        self.stream = LayerStream(
            far, [range(rows * own, rows * (own + 1)) for own in range(num_layers)], strip, lanes, device=CPU
        )


@dataclasses.dataclass
class _LogMark:
    log: Log
    name: str

    def wait(self) -> None:
        self.log.lines.append(f"wait {self.name}")

    def synchronize(self) -> None:
        self.log.lines.append(f"synchronize {self.name}")


@dataclasses.dataclass
class _LogLane:
    log: Log
    name: str
    count: int = 0

    def copy(self, pairs: Iterable[Pair], after: Sequence[Mark]) -> Mark:
        name = f"{self.name}{self.count}"
        self.count += 1
        names = [mark.name for mark in after if isinstance(mark, _LogMark)]
        self.log.lines.append(f"{name} after {', '.join(names)}")
        EagerLane().copy(pairs, after)
        return _LogMark(self.log, name)


def test_a_layer_is_fetched_while_the_one_before_it_computes_and_never_over_one_in_use() -> None:
    """Each line: what is queued, after what. Layer 1's rows are under way before layer 0 is entered, and so on."""
    log = Log(num_layers=4, rows=3)
    log.stream.begin([[range(0, 3)]] * 4)
    for layer in range(4):
        log.stream.enter(layer)
        log.stream.write(layer, torch.tensor([3 * layer + 2]), (torch.tensor([[-1.0]]),))
        log.stream.leave(layer)
    log.stream.drain()

    assert log.lines == [
        *("in0 after compute", "in1 after compute"),
        *("wait in0", "out0 after compute", "in2 after compute, out0"),
        *("wait in1", "out1 after compute", "in3 after compute, out1"),
        *("wait in2", "out2 after compute"),
        *("wait in3", "out3 after compute"),
        "synchronize out3",
    ]
    assert log.far.flatten().tolist() == [0, 1, -1, 3, 4, -1, 6, 7, -1, 9, 10, -1]


def test_only_what_a_step_reads_is_fetched() -> None:
    log = Log(num_layers=1, rows=100_000)
    log.stream.begin([[range(10, 20), range(99_000, 99_001)]])
    log.stream.enter(0)
    there = log.stream.near[0][0].flatten().nonzero().flatten().tolist()

    assert there == [*range(10, 20), 99_000]


def test_stretches_with_a_small_gap_are_one_copy() -> None:
    assert joined([range(0, 4), range(6, 8), range(20, 21)], 2) == [range(0, 8), range(20, 21)]
    assert joined([range(3, 3), range(5, 6), range(8, 8)], 9) == [range(5, 6)]
    rng = random.Random(0)
    for _ in range(50):
        edges = sorted(rng.sample(range(200), 20))
        stretches = [range(*edges[index : index + 2]) for index in range(0, 20, 2)]
        found = joined(stretches, rng.randrange(20))
        assert {row for own in stretches for row in own} <= {row for own in found for row in own}
        assert all(one.stop < other.start for one, other in itertools.pairwise(found))
