"""The slow truth: every KV head of every slot is a dictionary position -> row, in float64, one query at a time.

Nothing here is shared with the engine but the knobs of the policies. A policy without its own law below is asked
itself, with float64 tensors, so that a new file is checked for everything else (rows, positions, causality, scores).

With a codec that rounds, the oracle attends to what the slots really hold, row by row, after it has checked it: each
row within the codec's bound of the true one, and the same bits as the first time it was seen.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from codesign.engine.kv.policy import KVPolicy, Prompt, Rows
from codesign.engine.step import StepPlan

Array = np.ndarray[Any, Any]


@dataclasses.dataclass
class Row:
    position: int
    key: Array  # [D] unrotated
    value: Array  # [D]
    column: float = 0.0
    seen: tuple[Array, Array] | None = None  # key, value that queries see, where the slot holds something else
    final_bits: bytes | None = None  # of what the slot holds, once it is never to be written again

    @property
    def seen_key(self) -> Array:
        return self.key if self.seen is None else self.seen[0]

    @property
    def seen_value(self) -> Array:
        return self.value if self.seen is None else self.seen[1]


@dataclasses.dataclass
class Held:
    """What a slot holds of R rows of one head.

    Attributes:
        position: [R]; bits [R, 2, D]: key and value as they are decoded; key [R, D]: turned back from where it stands.
        bound: [R] error allowed, as a share of the norm of the true row.
        is_final: [R] encoded, and never to be written again.
    """

    position: Array
    bits: Array
    key: Array
    bound: Array
    is_final: Array


def adopt(rows: list[Row], held: Held) -> None:
    """From now on queries see what is held: near the true row, and unchanged once it is final."""
    index = {int(position): number for number, position in enumerate(held.position)}
    order = [index[row.position] for row in rows]
    for row, number in zip(rows, order, strict=True):
        bits = held.bits[number].tobytes()
        assert row.final_bits in (None, bits), f"row {row.position} was encoded twice"
        row.seen = held.key[number], held.bits[number, 1]
        row.final_bits = bits if held.is_final[number] else None
    for part, seen in (("key", held.key[order]), ("value", held.bits[order, 1])):
        true = np.stack([getattr(row, part) for row in rows])
        error, norm = np.linalg.norm(seen - true, axis=1), np.linalg.norm(true, axis=1)
        assert (error <= held.bound[order] * norm + 1e-6).all(), f"{part}: error {error} of {norm}"


@dataclasses.dataclass
class Head:
    """One (layer, slot, KV head)."""

    rows: dict[int, Row] = dataclasses.field(default_factory=dict)
    pending: list[Row] = dataclasses.field(default_factory=list)
    pending_mass: list[dict[int, float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Ended:
    """A prompt that has ended, one layer: key [H_kv, T, D] rotated, query [H, T, D] rotated, column [H_kv, T]."""

    key: Array
    value: Array
    query: Array
    column: Array
    scale: float


Read = Callable[[int, int], Held]


def softmax(score: Array) -> Array:
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


class Oracle:
    def __init__(
        self,
        *,
        policy: KVPolicy,
        name: str,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        num_slots: int,
        scale: float,
        inv_freq: Array,
        max_model_len: int,
    ) -> None:
        self.policy, self.scale, self.inv_freq = policy, scale, inv_freq
        self.budgets = policy.budgets(num_layers=num_layers, max_model_len=max_model_len)
        self.select, self.victims = LAWS.get(name, (ask_select, ask_victims))
        self.num_groups, self.num_kv_heads = num_heads // num_kv_heads, num_kv_heads
        self.heads = [[[Head() for _ in range(num_kv_heads)] for _ in range(num_slots)] for _ in range(num_layers)]
        self.queries: dict[tuple[int, int], list[Array]] = {}

    def rotate(self, x: Array, position: Array) -> Array:
        """x [..., D], position broadcasts against x without D."""
        half = x.shape[-1] // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position[..., None] * self.inv_freq)
        return np.concatenate((turned.real, turned.imag), axis=-1)

    def begin(self, plan: StepPlan) -> None:
        for layer, slots in enumerate(self.heads):
            for slot, count in plan.commits:
                for head in slots[slot]:
                    self.commit(head, count, self.budgets[layer])
            for slot in plan.frees:
                slots[slot] = [Head() for _ in range(self.num_kv_heads)]
                self.queries.pop((layer, slot), None)

    def commit(self, head: Head, count: int, budget: int) -> None:
        accepted, mass = head.pending[:count], head.pending_mass[:count]
        head.pending, head.pending_mass = [], []
        everyone = {**head.rows, **{row.position: row for row in accepted}}
        for seen in mass:
            for position, weight in seen.items():
                everyone[position].column += weight
        appended = accepted[: budget - len(head.rows)]
        head.rows.update({row.position: row for row in appended})
        new = accepted[len(appended) :]
        if new:
            victims = self.victims(self.policy, list(head.rows.values()), len(new), new[0].position)
            assert len(set(victims)) == len(new), "victims are distinct"
            for position in victims:
                del head.rows[position]
            head.rows.update({row.position: row for row in new})

    def step(self, plan: StepPlan, layer: int, q: Array, k: Array, v: Array, read: Read | None = None) -> Array:
        """[N, H, D]: every query over the committed rows and the pending ones up to itself.

        Args:
            read: (index of the sequence in the plan, KV head) -> what the slot holds; None where that is what was
                written.
        """
        out = np.empty_like(q)
        starts = plan.query_starts
        for index, slot in enumerate(plan.slots):
            tokens = range(starts[index], starts[index + 1])
            position = np.array([plan.positions[token] for token in tokens])
            for kv_head, head in enumerate(self.heads[layer][slot]):
                group = slice(kv_head * self.num_groups, (kv_head + 1) * self.num_groups)
                new = [Row(plan.positions[token], k[token, kv_head], v[token, kv_head]) for token in tokens]
                query = q[tokens.start : tokens.stop, group]
                if plan.is_prompt[index]:
                    head.rows.update({row.position: row for row in new})
                    out[tokens.start : tokens.stop, group], mass = self.attend(
                        list(head.rows.values()), query, position
                    )
                    for row, weight in zip(head.rows.values(), mass.sum(axis=0), strict=True):
                        row.column += float(weight)
                    continue
                head.pending = new
                if read is not None:
                    adopt([*head.rows.values(), *new], read(index, kv_head))
                for step, token in enumerate(tokens):
                    rows = [*head.rows.values(), *new[: step + 1]]
                    assert all(row.position <= plan.positions[token] for row in rows), "causality"
                    out[token, group], mass = self.attend_output(rows, query[step], position[step])
                    head.pending_mass.append({row.position: float(w) for row, w in zip(rows, mass, strict=True)})
            if plan.is_prompt[index]:
                queries = self.queries.setdefault((layer, slot), [])
                queries.extend(self.rotate(q[tokens.start : tokens.stop], position[:, None]))
            if plan.is_prompt_end[index]:
                self.end_prompt(layer, slot)
        return out

    def attend_output(self, rows: list[Row], query: Array, position: int) -> tuple[Array, Array]:
        """[G, D] of one query [G, D], and the mass [R] of its rows; by rank where positions are cache-relative."""
        if self.policy.key_space == "pre_rope":
            rank = {row.position: rank for rank, row in enumerate(sorted(rows, key=lambda row: row.position))}
            rows = [Row(rank[row.position], row.seen_key, row.seen_value) for row in rows]
            position = len(rows) - 1
        out, mass = self.attend(rows, query[None], np.array([position]))
        return out[0], mass[0]

    def attend(self, rows: list[Row], query: Array, position: Array) -> tuple[Array, Array]:
        """[n, G, D] of queries [n, G, D], and the mass [n, R] that each gives to each row."""
        row_position = np.array([row.position for row in rows])
        key = self.rotate(np.stack([row.seen_key for row in rows]), row_position)
        score = self.rotate(query, position[:, None]) @ key.T * self.scale
        score = np.where((row_position <= position[:, None])[:, None], score, -np.inf)
        weight = softmax(score)
        return weight @ np.stack([row.seen_value for row in rows]), weight.mean(axis=1)

    def end_prompt(self, layer: int, slot: int) -> None:
        heads, budget = self.heads[layer][slot], self.budgets[layer]
        query = np.stack(self.queries.pop((layer, slot)), axis=1)
        rows = [sorted(head.rows.values(), key=lambda row: row.position) for head in heads]
        num_tokens = len(rows[0])
        if num_tokens <= budget:
            return
        ended = Ended(
            key=self.rotate(np.array([[row.key for row in own] for own in rows]), np.arange(num_tokens)),
            value=np.stack([[row.value for row in own] for own in rows]),
            query=query,
            column=np.array([[row.column for row in own] for own in rows]),
            scale=self.scale,
        )
        for head, kept in zip(heads, self.select(self.policy, ended, budget), strict=True):
            assert len(set(kept)) == budget, "the budget is used, and each row is kept once"
            head.rows = {position: head.rows[position] for position in kept}


Select = Callable[[Any, Ended, int], list[list[int]]]
Victims = Callable[[Any, list[Row], int, int], list[int]]


def best(score: dict[int, float], count: int) -> list[int]:
    return sorted(score, key=lambda position: score[position], reverse=True)[:count]


def streaming_select(policy: Any, ended: Ended, budget: int) -> list[list[int]]:
    num_tokens, sinks = ended.key.shape[1], policy.num_sink_tokens
    kept = [*range(sinks), *range(num_tokens - (budget - sinks), num_tokens)]
    return [kept for _ in ended.key]


def streaming_victims(policy: Any, rows: list[Row], count: int, next_position: int) -> list[int]:
    return sorted(row.position for row in rows if row.position >= policy.num_sink_tokens)[:count]


def h2o_kept(policy: Any, column: dict[int, float], budget: int, num_tokens: int) -> tuple[list[int], list[int]]:
    """(protected, others from best to worst)."""
    recent = max(1, int(budget * policy.recent_fraction + 0.5))
    if policy.score_norm == "query_count":
        column = {position: mass / (num_tokens - position) for position, mass in column.items()}
    protected = [p for p in column if p < policy.num_sink_tokens or p >= num_tokens - recent]
    others = {p: mass for p, mass in column.items() if p not in protected}
    return protected, best(others, len(others))


def h2o_select(policy: Any, ended: Ended, budget: int) -> list[list[int]]:
    kept = []
    for column in ended.column:
        protected, others = h2o_kept(policy, dict(enumerate(column)), budget, len(column))
        kept.append(protected + others[: budget - len(protected)])
    return kept


def h2o_victims(policy: Any, rows: list[Row], count: int, next_position: int) -> list[int]:
    _, others = h2o_kept(policy, {row.position: row.column for row in rows}, len(rows), next_position + count)
    return others[::-1][:count]


def pyramid_select(policy: Any, ended: Ended, budget: int) -> list[list[int]]:
    num_kv_heads, num_tokens, _ = ended.key.shape
    num_groups, window = len(ended.query) // num_kv_heads, policy.window_tokens
    prefix, kept = num_tokens - window, []
    for kv_head in range(num_kv_heads):
        received = np.zeros(prefix)
        for head in range(kv_head * num_groups, (kv_head + 1) * num_groups):
            for token in range(prefix, num_tokens):
                seen = softmax(ended.key[kv_head, : token + 1] @ ended.query[head, token] * ended.scale)
                received += seen[:prefix] / (num_groups * window)
        half = policy.kernel_size // 2
        padded = np.pad(received, half)
        pooled = {p: float(padded[p : p + 2 * half + 1].mean()) for p in range(policy.num_sink_tokens, prefix)}
        always = [*range(policy.num_sink_tokens), *range(prefix, num_tokens)]
        kept.append(always + best(pooled, budget - len(always)))
    return kept


def pyramid_victims(policy: Any, rows: list[Row], count: int, next_position: int) -> list[int]:
    newest = sorted(row.position for row in rows)[-policy.window_tokens :]
    return newest[:count]


def ask_select(policy: KVPolicy, ended: Ended, budget: int) -> list[list[int]]:
    window = policy.window_tokens if policy.evidence == "window_queries" else 0
    prompt = Prompt(
        key=torch.from_numpy(ended.key),
        value=torch.from_numpy(ended.value),
        window_query=torch.from_numpy(ended.query[:, -window:]) if window else None,
        column_sums=torch.from_numpy(ended.column) if policy.evidence == "column_sums" else None,
        scale=ended.scale,
    )
    kept = policy.select(prompt, budget)
    assert (kept[:, 1:] > kept[:, :-1]).all(), "selected rows are ascending"
    return [[int(row) for row in own] for own in kept]


def ask_victims(policy: KVPolicy, rows: list[Row], count: int, next_position: int) -> list[int]:
    column = torch.tensor([[[row.column for row in rows]]], dtype=torch.float64)
    victims = policy.victims(
        Rows(
            position=torch.tensor([[[row.position for row in rows]]], dtype=torch.int32),
            column=column if policy.evidence == "column_sums" else None,
            next_position=torch.tensor([next_position]),
        ),
        count,
    )
    named = [rows[int(index)].position for index in victims[0, 0]]
    assert min(named) >= policy.num_sink_tokens, "sinks are never victims"
    assert max(named) < next_position, "new rows are never victims"
    return named


def unasked_select(policy: Any, ended: Ended, budget: int) -> list[list[int]]:
    raise AssertionError("a policy that keeps everything is never asked")


def unasked_victims(policy: Any, rows: list[Row], count: int, next_position: int) -> list[int]:
    raise AssertionError("a policy that keeps everything is never asked")


LAWS: dict[str, tuple[Select, Victims]] = {
    "full": (unasked_select, unasked_victims),
    "streaming_llm": (streaming_select, streaming_victims),
    "h2o": (h2o_select, h2o_victims),
    "pyramidkv": (pyramid_select, pyramid_victims),
}
