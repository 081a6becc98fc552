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
    named: list[int] = dataclasses.field(default_factory=list)  # victims named ahead, next first
    capacity: int | None = None  # rows it may hold; None: the layer's budget


@dataclasses.dataclass
class Full:
    """A head that has no room, for a policy that names victims.

    rows are the committed ones; key [R, D] of each and query [G, W, D] of the last W accepted tokens before
    next_position, both rotated, only where the policy looks at them.
    """

    rows: list[Row]
    next_position: int
    key: Array | None = None
    query: Array | None = None
    scale: float | None = None


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
        max_query_len: int,
    ) -> None:
        self.policy, self.scale, self.inv_freq = policy, scale, inv_freq
        self.decay = getattr(policy, "decay", 1.0)
        self.budgets = policy.budgets(num_layers=num_layers, max_model_len=max_model_len)
        self.select, self.victims = LAWS.get(name, (ask_select, ask_victims))
        self.lookahead = [
            max(policy.lookahead(budget), max_query_len)
            if budget < max_model_len and policy.lookahead(budget) > 1
            else 0
            for budget in self.budgets
        ]
        self.num_groups, self.num_kv_heads = num_heads // num_kv_heads, num_kv_heads
        self.heads = [[[Head() for _ in range(num_kv_heads)] for _ in range(num_slots)] for _ in range(num_layers)]
        self.queries: dict[tuple[int, int], dict[int, Array]] = {}  # (layer, slot) -> position -> [H, D] rotated

    def rotate(self, x: Array, position: Array) -> Array:
        """x [..., D], position broadcasts against x without D."""
        half = x.shape[-1] // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position[..., None] * self.inv_freq)
        return np.concatenate((turned.real, turned.imag), axis=-1)

    def begin(self, plan: StepPlan) -> None:
        for layer, slots in enumerate(self.heads):
            for slot, count in plan.commits:
                for kv_head in range(self.num_kv_heads):
                    self.commit(layer, slot, kv_head, count)
            for slot in plan.frees:
                slots[slot] = [Head() for _ in range(self.num_kv_heads)]
                self.queries.pop((layer, slot), None)

    def commit(self, layer: int, slot: int, kv_head: int, count: int) -> None:
        head = self.heads[layer][slot][kv_head]
        accepted, mass = head.pending[:count], head.pending_mass[:count]
        head.pending, head.pending_mass = [], []
        everyone = {**head.rows, **{row.position: row for row in accepted}}
        for seen in mass:
            for row in everyone.values():
                row.column = row.column * self.decay + seen.get(row.position, 0.0)
        appended = accepted[: (head.capacity or self.budgets[layer]) - len(head.rows)]
        head.rows.update({row.position: row for row in appended})
        new = accepted[len(appended) :]
        if new:
            if len(head.named) < len(new):
                full = self.full(layer, slot, kv_head, new[0].position)
                head.named = self.victims(self.policy, full, self.lookahead[layer] or len(new))
            victims, head.named = head.named[: len(new)], head.named[len(new) :]
            assert len(set(victims)) == len(new), "victims are distinct"
            for position in victims:
                del head.rows[position]
            head.rows.update({row.position: row for row in new})

    def full(self, layer: int, slot: int, kv_head: int, next_position: int) -> Full:
        rows = list(self.heads[layer][slot][kv_head].rows.values())
        if not self.policy.needs_keys:
            return Full(rows, next_position)
        group = slice(kv_head * self.num_groups, (kv_head + 1) * self.num_groups)
        window = range(next_position - self.policy.window_tokens, next_position)
        return Full(
            rows,
            next_position,
            key=self.rotate(np.stack([row.seen_key for row in rows]), np.array([row.position for row in rows])),
            query=np.stack([self.queries[layer, slot][position][group] for position in window], axis=1),
            scale=self.scale,
        )

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
                    for weights in mass:
                        for row, weight in zip(head.rows.values(), weights, strict=True):
                            row.column = row.column * self.decay + float(weight)
                    continue
                head.pending = new
                if read is not None:
                    adopt([*head.rows.values(), *new], read(index, kv_head))
                for step, token in enumerate(tokens):
                    rows = [*head.rows.values(), *new[: step + 1]]
                    assert all(row.position <= plan.positions[token] for row in rows), "causality"
                    out[token, group], mass = self.attend_output(rows, query[step], position[step])
                    head.pending_mass.append({row.position: float(w) for row, w in zip(rows, mass, strict=True)})
            queries = self.queries.setdefault((layer, slot), {})
            queries.update(zip(position, self.rotate(q[tokens.start : tokens.stop], position[:, None]), strict=True))
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
        rows = [sorted(head.rows.values(), key=lambda row: row.position) for head in heads]
        num_tokens = len(rows[0])
        if num_tokens <= budget:
            return
        ended = Ended(
            key=self.rotate(np.array([[row.key for row in own] for own in rows]), np.arange(num_tokens)),
            value=np.stack([[row.value for row in own] for own in rows]),
            query=np.stack([self.queries[layer, slot][position] for position in range(num_tokens)], axis=1),
            column=np.array([[row.column for row in own] for own in rows]),
            scale=self.scale,
        )
        selected = self.select(self.policy, ended, budget)
        assert sum(len(kept) for kept in selected) == budget * self.num_kv_heads, "the budget is used"
        for head, kept in zip(heads, selected, strict=True):
            assert len(set(kept)) == len(kept), "each row is kept once"
            assert len(kept) == budget or self.policy.head_budgets == "ragged"
            head.rows = {position: head.rows[position] for position in kept}
            head.capacity = len(kept)


Select = Callable[[Any, Ended, int], list[list[int]]]
Victims = Callable[[Any, Full, int], list[int]]


def best(score: dict[int, float], count: int) -> list[int]:
    return sorted(score, key=lambda position: score[position], reverse=True)[:count]


def streaming_select(policy: Any, ended: Ended, budget: int) -> list[list[int]]:
    num_tokens, sinks = ended.key.shape[1], policy.num_sink_tokens
    kept = [*range(sinks), *range(num_tokens - (budget - sinks), num_tokens)]
    return [kept for _ in ended.key]


def streaming_victims(policy: Any, full: Full, count: int) -> list[int]:
    return sorted(row.position for row in full.rows if row.position >= policy.num_sink_tokens)[:count]


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


def h2o_victims(policy: Any, full: Full, count: int) -> list[int]:
    column = {row.position: row.column for row in full.rows}
    _, others = h2o_kept(policy, column, len(column), full.next_position + count)
    return others[::-1][:count]


def snapkv_pooled(policy: Any, ended: Ended) -> tuple[list[int], list[dict[int, float]]]:
    """(positions that always stay, score of each other position head by head)."""
    num_kv_heads, num_tokens, _ = ended.key.shape
    num_groups, window = len(ended.query) // num_kv_heads, policy.window_tokens
    prefix, scores = num_tokens - window, []
    for kv_head in range(num_kv_heads):
        received = np.zeros(prefix)
        for head in range(kv_head * num_groups, (kv_head + 1) * num_groups):
            for token in range(prefix, num_tokens):
                seen = softmax(ended.key[kv_head, : token + 1] @ ended.query[head, token] * ended.scale)
                received += seen[:prefix] / (num_groups * window)
        half = policy.kernel_size // 2
        padded = np.pad(received, half)
        scores.append({p: float(padded[p : p + 2 * half + 1].mean()) for p in range(policy.num_sink_tokens, prefix)})
    return [*range(policy.num_sink_tokens), *range(prefix, num_tokens)], scores


def snapkv_select(policy: Any, ended: Ended, budget: int) -> list[list[int]]:
    always, scores = snapkv_pooled(policy, ended)
    return [always + best(score, budget - len(always)) for score in scores]


def ada_kv_select(policy: Any, ended: Ended, budget: int) -> list[list[int]]:
    always, scores = snapkv_pooled(policy, ended)
    floor = int(policy.floor_fraction * (budget - len(always)))
    kept = [always + best(score, floor) for score in scores]
    rest = sorted(
        ((value, head, p) for head, score in enumerate(scores) for p, value in score.items() if p not in kept[head]),
        reverse=True,
    )
    for _, head, p in rest[: len(kept) * budget - sum(len(own) for own in kept)]:
        kept[head].append(p)
    return kept


def snapkv_victims(policy: Any, full: Full, count: int) -> list[int]:
    newest = sorted(row.position for row in full.rows)[-policy.window_tokens :]
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
    if policy.head_budgets == "ragged":
        assert (kept[1:] > kept[:-1]).all(), "selected rows are ascending"
        num_heads, num_tokens, _ = ended.key.shape
        return [[int(row) % num_tokens for row in kept if row // num_tokens == head] for head in range(num_heads)]
    assert (kept[:, 1:] > kept[:, :-1]).all(), "selected rows are ascending"
    return [[int(row) for row in own] for own in kept]


def ask_victims(policy: KVPolicy, full: Full, count: int) -> list[int]:
    column = torch.tensor([[[row.column for row in full.rows]]], dtype=torch.float64)
    victims = policy.victims(
        Rows(
            position=torch.tensor([[[row.position for row in full.rows]]], dtype=torch.int32),
            column=column if policy.evidence == "column_sums" else None,
            next_position=torch.tensor([full.next_position]),
            key=None if full.key is None else torch.from_numpy(full.key)[None, None],
            window_query=None if full.query is None else torch.from_numpy(full.query)[None],
            scale=full.scale,
        ),
        count,
    )
    named = [full.rows[int(index)].position for index in victims[0, 0]]
    assert min(named) >= policy.num_sink_tokens, "sinks are never victims"
    assert max(named) < full.next_position, "new rows are never victims"
    return named


def r_kv_order(policy: Any, position: list[int], key: Array, query: Array, newest: int, scale: float) -> list[int]:
    """Positions that may go, best first; key [R, D] of each, query [G, W, D] of the last W tokens up to newest."""
    unit = key / np.linalg.norm(key, axis=-1, keepdims=True)
    count, window = len(position), policy.window_tokens
    outside = sorted((p, row) for row, p in enumerate(position) if p <= newest - window)
    mean = np.zeros(len(outside))
    for step in range(window):
        logit = np.array([max(query[:, step] @ key[row]) * scale for _, row in outside])
        mean += softmax(logit) / window
    half, importance = policy.kernel_size // 2, {}
    for rank, (p, _) in enumerate(outside):
        importance[p] = max(mean[max(0, rank - half) : rank + half + 1])
    blame = np.zeros(count)
    for i in range(count):
        cosine = {j: float(unit[i] @ unit[j]) for j in range(count) if j != i}
        alike = [j for j in cosine if cosine[j] > policy.similarity_threshold]
        spared = max(alike, key=lambda j: position[j], default=None)
        for j, value in cosine.items():
            blame[j] += 0.0 if j == spared else value / count
    redundancy = softmax(blame)
    weight = policy.importance_weight
    score = {
        p: weight * importance[p] - (1 - weight) * float(redundancy[row])
        for p, row in outside
        if p >= policy.num_sink_tokens
    }
    return best(score, len(score))


def r_kv_select(policy: Any, ended: Ended, budget: int) -> list[list[int]]:
    num_kv_heads, num_tokens, _ = ended.key.shape
    num_groups, kept = len(ended.query) // num_kv_heads, []
    for kv_head in range(num_kv_heads):
        query = ended.query[kv_head * num_groups : (kv_head + 1) * num_groups, -policy.window_tokens :]
        positions = list(range(num_tokens))
        others = r_kv_order(policy, positions, ended.key[kv_head], query, num_tokens - 1, ended.scale)
        always = [p for p in positions if p not in others]
        kept.append(always + others[: budget - len(always)])
    return kept


def r_kv_victims(policy: Any, full: Full, count: int) -> list[int]:
    assert full.key is not None and full.query is not None and full.scale is not None
    positions = [row.position for row in full.rows]
    return r_kv_order(policy, positions, full.key, full.query, full.next_position - 1, full.scale)[::-1][:count]


def unasked_select(policy: Any, ended: Ended, budget: int) -> list[list[int]]:
    raise AssertionError("a policy that keeps everything is never asked")


def unasked_victims(policy: Any, full: Full, count: int) -> list[int]:
    raise AssertionError("a policy that keeps everything is never asked")


LAWS: dict[str, tuple[Select, Victims]] = {
    "full": (unasked_select, unasked_victims),
    "streaming_llm": (streaming_select, streaming_victims),
    "h2o": (h2o_select, h2o_victims),
    "snapkv": (snapkv_select, snapkv_victims),
    "pyramidkv": (snapkv_select, snapkv_victims),
    "ada_kv": (ada_kv_select, snapkv_victims),
    "r_kv": (r_kv_select, r_kv_victims),
}
