"""Keys and lives of recordings, with a device that is a stand-in: to replay is to run what was recorded again."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from codesign.engine import graphs as module
from codesign.engine.attention.calls import Call, Span, cut
from codesign.engine.attention.fixed import FixedStep
from codesign.engine.batch import Batch
from codesign.engine.graphs import Graphs, Work, plain
from codesign.engine.quantize.linear import Workspace
from codesign.engine.runner import SingleRunner
from codesign.engine.step import StepPlan, decode_plan
from tests.engine.driving import tiny_engine

CPU = torch.device("cpu")
DECODER = tiny_engine().parts.model


@dataclasses.dataclass(frozen=True)
class Facts:
    shift: Tensor
    kind: str


class Shifted:
    """Attention that keeps no rows: what it gives of a step is q, moved by a number that the step has in a tensor."""

    def __init__(self) -> None:
        self.kind = ""
        self._step: Facts | None = None

    def begin(self, batch: Batch) -> None:
        self._step = Facts(batch.positions.float(), self.kind)

    def fixed(self) -> FixedStep | None:
        facts = self._step
        if self.kind == "never":
            return None

        def resume() -> None:
            self._step = facts

        return FixedStep(facts, resume)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        assert self._step is not None
        return q + self._step.shift[:, None, None]

    def end(self, batch: Batch) -> None:
        self._step = None


class Device:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, work: Work) -> Work:
        self.num_recorded += 1

        def replay() -> None:
            self.num_replayed += 1
            work()

        return replay


class Bench:
    def __init__(self, **limits: Any) -> None:
        self.device, self.attention, self.workspace = Device(), Shifted(), Workspace()
        self.graphs = Graphs(self.device, self.workspace, **limits)
        self._replaying = SingleRunner(DECODER, self.attention, CPU, self.graphs)
        self._plain = SingleRunner(DECODER, self.attention, CPU)

    def step(self, num_tokens: int, seed: int, *, kind: str = "", rows: tuple[int, ...] | None = None) -> Tensor:
        """Logits, of which it is sure that they are those of a step that is run."""
        numbers = torch.Generator().manual_seed(seed)
        token_ids, positions = torch.randint(0, 128, (2, num_tokens), generator=numbers).tolist()
        plan = decode_plan(range(num_tokens), token_ids, positions)
        if rows is not None:
            plan = dataclasses.replace(plan, logits_rows=rows)
        self.attention.kind = kind
        found = self._replaying.run(plan)
        torch.testing.assert_close(found, self._plain.run(plan), rtol=0, atol=1e-5)
        return found

    @property
    def counts(self) -> tuple[int, int]:
        return self.device.num_recorded, self.device.num_replayed


def test_a_step_is_run_then_recorded_then_replayed() -> None:
    bench, seen = Bench(), []
    for seed in range(4):
        bench.step(3, seed)
        seen.append(bench.counts)

    assert seen == [(0, 0), (1, 1), (1, 2), (1, 3)]
    assert bench.graphs.stats() == {"graphs_captured": 1, "steps_replayed": 3, "steps_not_replayed": 1}
    assert bench.graphs.kernel.endswith("; so far 1 captured, 3 steps replayed, 1 not")
    assert Bench().graphs.kernel == "steps of output tokens, equally many of each sequence (at most 64 graphs)"


def test_what_attention_does_not_fix_is_run() -> None:
    bench = Bench()
    for seed in range(4):
        bench.step(3, seed, kind="never")

    assert bench.counts == (0, 0) and bench.graphs.stats()["steps_not_replayed"] == 4


def test_steps_that_differ_in_a_plain_value_share_no_recording() -> None:
    bench = Bench()
    for seed in range(3):
        for num_tokens, kind in ((1, ""), (2, ""), (1, "other")):
            bench.step(num_tokens, seed, kind=kind)

    assert bench.counts == (3, 6)


def test_logits_of_some_rows_come_from_the_recording_of_all() -> None:
    bench = Bench()
    for seed in range(3):
        bench.step(4, seed)
    for rows in ((1,), (0, 3), ()):
        assert bench.step(4, 9, rows=rows).shape == (len(rows), 128)

    assert bench.counts == (1, 5)


def test_logits_stay_as_they_are_when_other_steps_are_replayed() -> None:
    bench = Bench()
    found = [bench.step(num_tokens, seed) for seed in range(4) for num_tokens in (1, 3, 2)]
    kept = [logits.clone() for logits in found]
    for seed in range(4, 6):
        for num_tokens in (1, 3, 2):
            bench.step(num_tokens, seed)

    assert all(map(torch.equal, found, kept))


def test_a_recording_makes_room_only_when_it_was_idle_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_STEPS", 6)
    bench = Bench(max_graphs=2)
    for num_tokens in (1, 1, 2, 2, 3, 3, 3):  # no room for three tokens
        bench.step(num_tokens, num_tokens)
    assert bench.device.num_recorded == 2
    for seed in range(4):  # until that of one token was idle for six steps
        bench.step(2, seed)
    bench.step(3, 0)
    assert bench.device.num_recorded == 3
    bench.step(2, 0)
    assert bench.device.num_recorded == 3

    bench.step(1, 0)  # and now there is none for that

    assert bench.counts[0] == 3


def test_a_recording_keeps_the_buffer_that_it_was_made_with() -> None:
    """Which a larger product makes the workspace give up; a device would go on writing there."""
    bench = Bench()
    first = bench.workspace.take((8,), torch.float32, CPU)
    for seed in range(2):
        bench.step(2, seed)
    bench.workspace.take((4096,), torch.float32, CPU)

    (graph,) = bench.graphs._graphs.values()
    assert graph.held is not None and graph.held.data_ptr() == first.data_ptr() != bench.workspace.buffer.data_ptr()  # type: ignore[union-attr]


def decode_call(rows: list[int], slots: list[int], num_queries: int = 1) -> Call:
    spans = [
        Span(slot, index * num_queries, num_queries, count - num_queries, False, False)
        for index, (slot, count) in enumerate(zip(slots, rows, strict=True))
    ]
    kinds = {"has_tables": True, "is_ragged": True, "is_indexed": True}
    (call,) = cut(spans, num_groups=2, dtype=torch.float32, device=CPU, **kinds)
    return call


def key(call: Call, most: int = 4096) -> Any:
    return plain(call.fixed(most), [])


def test_calls_share_a_key_whatever_their_slots_and_rows_up_to_the_next_power_of_two() -> None:
    first = key(decode_call([3, 200, 256], [0, 1, 2]))

    assert first == key(decode_call([100, 9, 1], [7, 0, 3]))
    assert first != key(decode_call([3, 200, 257], [0, 1, 2]))
    assert key(decode_call([257], [0])) == key(decode_call([512], [4])) != key(decode_call([513], [0]))
    assert key(decode_call([600], [0]), most=700) == key(decode_call([700], [0]), most=700)
    assert key(decode_call([600], [0]), most=700) != key(decode_call([600], [0]), most=800)


def test_calls_of_other_sizes_share_none() -> None:
    calls = [decode_call([9] * count, list(range(count)), queries) for count in range(1, 6) for queries in (1, 2, 3)]

    assert len({key(call) for call in calls}) == len(calls)


def test_a_fixed_call_says_where_rows_are_in_tensors_alone() -> None:
    call = decode_call([100, 9, 1], [7, 0, 3]).fixed(4096)

    assert call.counts.tolist() == [100, 9, 1] and call.slot_ids.tolist() == [7, 0, 3]
    assert call.where is call.slot_ids and call.num_rows == 256 and call.mask is None
    assert call.tokens == slice(0, 3) and len(call.spans) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"mask": torch.zeros(3)},
        {"mask": torch.zeros(2, dtype=torch.float16)},
        {"mask": torch.zeros(4)[::2]},
        {"num_rows": 5},
        {"is_causal": True},
        {"spans": ()},
        {"device": torch.device("meta")},
    ],
)
def test_everything_but_the_content_of_tensors_is_in_the_key(change: dict[str, Any]) -> None:
    call = Call(spans=(Span(0, 0, 1, 2, False, False),), num_rows=4, mask=torch.zeros(2), is_causal=False, device=CPU)

    assert plain(call, []) == plain(dataclasses.replace(call, mask=torch.ones(2)), [])
    assert plain(call, []) != plain(dataclasses.replace(call, **change), [])


def test_tensors_are_found_wherever_they_are() -> None:
    one, two, three = torch.zeros(3, 2).unbind()
    found: list[Tensor] = []

    assert hash(plain((StepPlan(), {"a": [one]}, Facts(two, "x"), (three,)), found))
    assert [tensor is own for tensor, own in zip(found, (one, two, three), strict=True)] == [True] * 3


def test_what_does_not_hash_is_no_fact() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(plain(Facts(torch.zeros(1), bytearray(b"x")), []))  # type: ignore[arg-type]


def test_a_tensor_that_is_expanded_is_copied_into_where_it_lies() -> None:
    own, new = torch.zeros(2, 1, 3).expand(-1, 4, -1), torch.arange(6.0).view(2, 1, 3).expand(-1, 4, -1)

    module._each_place(own).copy_(module._each_place(new))

    assert torch.equal(own, new)
