"""Staging: a prompt that is still coming in, in native precision, until its policy has seen all of it.

One StagedPrompt per (layer, slot), for layers that cannot hold every row. It grows with the chunks and is dropped,
layer by layer, as soon as the layer's rows have been admitted.
"""

import torch
from torch import Tensor

from codesign.engine.kv.policy import KVPolicy, Prompt


class StagedPrompt:
    """key, value [H_kv, T, D]; the last `window_tokens` queries; column sums [H_kv, T] where asked."""

    def __init__(self, policy: KVPolicy, *, max_model_len: int) -> None:
        self._policy = policy
        self._max_model_len = max_model_len
        self._rows: Tensor | None = None  # [2, H_kv, capacity, D]
        self._num_tokens = 0
        self._window: Tensor | None = None
        self._column: Tensor | None = None

    def append(self, key: Tensor, value: Tensor, query: Tensor, *, is_last: bool) -> tuple[Tensor, Tensor]:
        """One chunk: key, value [H_kv, n, D], query [H, n, D], all rotated. Returns key and value so far."""
        total = self._num_tokens + key.shape[1]
        if self._rows is None or self._rows.shape[2] < total:
            self._grow(total if is_last else min(self._max_model_len, total + total // 2), key)
        assert self._rows is not None
        self._rows[0, :, self._num_tokens : total] = key
        self._rows[1, :, self._num_tokens : total] = value
        self._num_tokens = total
        if self._policy.evidence == "window_queries":
            seen = query if self._window is None else torch.cat((self._window, query), dim=1)
            self._window = seen[:, -self._policy.window_tokens :].clone()
        return self._rows[0, :, :total], self._rows[1, :, :total]

    def _grow(self, capacity: int, like: Tensor) -> None:
        rows = like.new_empty(2, like.shape[0], capacity, like.shape[2])
        if self._rows is not None:
            rows[:, :, : self._num_tokens] = self._rows[:, :, : self._num_tokens]
        self._rows = rows

    def add_column_sums(self, sums: Tensor) -> None:
        """sums [H_kv, T]: attention mass that the newest chunk gave to every row so far."""
        if self._column is not None:
            num_before = self._column.shape[1]
            sums[:, :num_before] += self._column * self._policy.column_decay ** (sums.shape[1] - num_before)
        self._column = sums

    def finish(self, scale: float) -> Prompt:
        assert self._rows is not None
        return Prompt(
            key=self._rows[0, :, : self._num_tokens],
            value=self._rows[1, :, : self._num_tokens],
            window_query=self._window,
            column_sums=self._column,
            scale=scale,
        )

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self._rows, self._window, self._column) if tensor is not None]
