"""The classic mistakes of KV eviction, planted one at a time: the replay beside the oracle must notice each."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from random_plans import random_plans
from replay import MAX_MODEL_LEN, MAX_QUERY_LEN, NUM_SLOTS, make_attention, make_oracle, replay
from torch import Tensor
from torch.nn.functional import avg_pool1d

from codesign.engine.attention.layer import Attention
from codesign.engine.batch import Batch
from codesign.engine.kv.group import LayerGroup
from codesign.engine.kv.policies import r_kv, snapkv
from codesign.engine.kv.policies.ada_kv import AdaKV
from codesign.engine.kv.policies.h2o import H2O
from codesign.engine.kv.policies.pyramidkv import PyramidKV
from codesign.engine.kv.policies.r_kv import RKV
from codesign.engine.kv.policies.streaming_llm import StreamingLLM
from codesign.engine.kv.policy import KVPolicy, Prompt, Rows
from codesign.engine.kv.ragged import RaggedGroup
from codesign.engine.kv.recent import RecentQueries, VictimQueue
from codesign.engine.kv.redundancy import key_redundancy
from codesign.engine.kv.sinks import SinkKeys
from codesign.engine.kv.store import DenseStore

H2O_POLICY = H2O(kv_budget=12, num_sink_tokens=2)
DECAYED_POLICY = H2O(kv_budget=12, num_sink_tokens=2, score_norm="decayed", decay=0.7)
PYRAMID_POLICY = PyramidKV(kv_budget=16, window_tokens=4, num_sink_tokens=2, kernel_size=3, beta=4)
STREAMING_POLICY = StreamingLLM(kv_budget=9)
ADA_KV_POLICY = AdaKV(kv_budget=16, window_tokens=4, num_sink_tokens=2, kernel_size=3)
R_KV_POLICY = RKV(kv_budget=16, buffer_tokens=5, window_tokens=3, num_sink_tokens=2, kernel_size=3)


def traffic(
    policy: KVPolicy,
    name: str,
    *,
    oracle_policy: KVPolicy | None = None,
    codec: str = "native",
    cls: type[Attention] = Attention,
) -> None:
    plans = random_plans(0, num_steps=40, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, max_query_len=MAX_QUERY_LEN)
    replay(make_attention(policy, codec=codec, cls=cls), make_oracle(oracle_policy or policy, name), plans)


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (H2O_POLICY, "h2o"),
        (DECAYED_POLICY, "h2o"),
        (PYRAMID_POLICY, "pyramidkv"),
        (STREAMING_POLICY, "streaming_llm"),
        (R_KV_POLICY, "r_kv"),
        (ADA_KV_POLICY, "ada_kv"),
    ],
)
def test_without_a_planted_bug_the_replay_agrees(policy: KVPolicy, name: str) -> None:
    traffic(policy, name)


def test_positions_renumbered_after_eviction_are_noticed() -> None:
    class Renumbered(Attention):
        def begin(self, batch: Batch) -> None:
            positions = batch.positions.clone().clamp_(max=self.kv_budget_tokens[0])
            super().begin(dataclasses.replace(batch, positions=positions))

    with pytest.raises(AssertionError):
        traffic(H2O_POLICY, "h2o", cls=Renumbered)


def test_one_set_of_rows_for_all_heads_is_noticed() -> None:
    class Shared(H2O):
        def select(self, prompt: Prompt, num_rows: int) -> Tensor:
            return super().select(prompt, num_rows)[:1].expand(prompt.key.shape[0], -1)

    with pytest.raises(AssertionError):
        traffic(Shared(kv_budget=12, num_sink_tokens=2), "h2o")


def test_eviction_without_a_recent_window_is_noticed() -> None:
    class Unprotected(H2O):
        def recent_tokens(self, budget: int) -> int:
            return 0

    with pytest.raises(AssertionError):
        traffic(Unprotected(kv_budget=12, num_sink_tokens=2), "h2o", oracle_policy=H2O_POLICY)


def test_scores_of_rejected_queries_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    credit = LayerGroup.credit

    def credit_all(self: LayerGroup, slots: list[int], count: int) -> None:
        credit(self, slots, MAX_QUERY_LEN)

    monkeypatch.setattr(LayerGroup, "credit", credit_all)

    with pytest.raises(AssertionError):
        traffic(H2O_POLICY, "h2o")


def test_decay_by_steps_instead_of_accepted_queries_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    credit = LayerGroup.credit

    def credit_once(self: LayerGroup, slots: list[int], count: int) -> None:
        if self.column is not None and count > 1:
            self.column[:, slots] /= self.column_decay ** (count - 1)
        credit(self, slots, count)

    monkeypatch.setattr(LayerGroup, "credit", credit_once)

    with pytest.raises(AssertionError):
        traffic(DECAYED_POLICY, "h2o")


def test_pooling_before_the_softmax_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def pooled_first(window_query: Tensor, key: Tensor, *, scale: float, kernel_size: int) -> Tensor:
        pooled = avg_pool1d(key.mT, kernel_size, stride=1, padding=kernel_size // 2).mT
        return right(window_query, pooled, scale=scale, kernel_size=1)

    right = snapkv.snapkv_scores
    monkeypatch.setattr(snapkv, "snapkv_scores", pooled_first)

    with pytest.raises(AssertionError):
        traffic(PYRAMID_POLICY, "pyramidkv")


def test_sinks_at_their_true_distance_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SinkKeys, "turn", lambda *_: None)

    with pytest.raises(AssertionError):
        traffic(STREAMING_POLICY, "streaming_llm")


def test_rejected_queries_among_the_recent_ones_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RecentQueries.before

    def newest_written(self: RecentQueries, slot: Tensor, next_position: Tensor) -> Tensor:
        return right(self, slot, next_position + 1)

    monkeypatch.setattr(RecentQueries, "before", newest_written)

    with pytest.raises(AssertionError):
        traffic(R_KV_POLICY, "r_kv")


def test_victims_left_over_from_the_sequence_before_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VictimQueue, "clear", lambda *_: None)

    with pytest.raises(AssertionError):
        traffic(R_KV_POLICY, "r_kv")


def test_blame_on_the_newest_of_near_duplicates_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r_kv, "key_redundancy", lambda key, position, **_: key_redundancy(key, position, threshold=2.0))

    with pytest.raises(AssertionError):
        traffic(R_KV_POLICY, "r_kv")


def test_heads_left_ragged_by_the_sequence_before_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RaggedGroup, "release", LayerGroup.release)

    with pytest.raises(AssertionError):
        traffic(ADA_KV_POLICY, "ada_kv")


def test_victims_counted_from_the_start_of_a_ragged_head_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RaggedGroup._victims

    def from_the_start(self: RaggedGroup, policy: KVPolicy, slots: list[tuple[int, int]], num_new: int) -> Tensor:
        return right(self, policy, slots, num_new) - self.budget + policy.evictable(self.budget)

    monkeypatch.setattr(RaggedGroup, "_victims", from_the_start)

    with pytest.raises((AssertionError, IndexError)):
        traffic(ADA_KV_POLICY, "ada_kv")


def test_new_rows_as_victims_are_noticed() -> None:
    class Newest(StreamingLLM):
        def victims(self, rows: Rows, num_victims: int) -> Tensor:
            return rows.position.topk(num_victims).indices

    with pytest.raises(AssertionError):
        traffic(Newest(kv_budget=9), "streaming_llm")


def test_rows_encoded_again_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the codec's bound: the last bit of every scale flips, codes stay."""
    write = DenseStore.write

    def write_and_touch(self: DenseStore, layer: int, rows: Tensor, key: Tensor, value: Tensor) -> None:
        write(self, layer, rows, key, value)
        self.key[1].copy_((self.key[1].view(torch.int16) ^ 1).view(torch.bfloat16))

    monkeypatch.setattr(DenseStore, "write", write_and_touch)

    with pytest.raises(AssertionError, match="encoded twice"):
        traffic(H2O_POLICY, "h2o", codec="int8")


def test_codes_moved_without_their_scales_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = DenseStore.commit

    def commit_codes(self: DenseStore, commits: Sequence[tuple[int, int]]) -> None:
        scales = [parts[1].clone() for parts in (self.key, self.value)]
        commit(self, commits)
        for parts, scale in zip((self.key, self.value), scales, strict=True):
            parts[1].copy_(scale)

    monkeypatch.setattr(DenseStore, "commit", commit_codes)

    with pytest.raises(AssertionError):
        traffic(H2O_POLICY, "h2o", codec="int8")
