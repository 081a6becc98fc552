"""Pieces: the small operations of a layer between its products, plain or fused, and which of them an engine runs.

    add_norm     x + change, and the RMSNorm of the sum: 6 operations of torch on a CPU, 1 fused
    norm_heads   RMSNorm of each head of q and k:        10
    silu_mul     SiLU(gate) * up:                        3
    rotate       rotary positions of q and k:            5
    rotate_into  the same, k and v written to the cache: 7
    rotate_rows  of keys alone, written to the cache:    4

At batch 1 each operation costs microseconds whatever its size, and these are most of what a layer costs beside its
products. `plain.py` is the reference; `fused.py` (C) and `triton/fused.py` do the same in one pass each.
"""

from typing import Protocol

import torch
from torch import Tensor

from codesign.engine.kernels import fused
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.plain import PLAIN, Plain
from codesign.engine.kernels.triton import available


class Pieces(Protocol):
    """Results are new tensors, in the dtype of what comes in; N and M may be 0.

    Attributes:
        kernel: whose they are, for a record: "none" where nothing is fused, with the reason if something should be.
    """

    @property
    def kernel(self) -> str: ...

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last dimension: [..., D] from x [..., D] and weight [D]."""

    def add_norm(self, x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x + change and its RMSNorm, both [M, D], from x and change [M, D]."""

    def norm_heads(self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMSNorm of each head: q [N, H, D] and k [N, H_kv, D] with weights [D]."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """SiLU(gate) * up [M, D] from both beside each other, [M, 2 D]."""

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, signed_sin: Tensor) -> tuple[Tensor, Tensor]:
        """q [N, H, D] and k [N, H_kv, D] turned by rows [N, 1, D] of `Rope.tables`."""

    def rotate_into(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        signed_sin: Tensor,
        *,
        key: Tensor,
        value: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """q turned; k turned and v [N, H_kv, D] go into rows [N * H_kv] int64 of key and value [R, D]."""

    def rotate_rows(self, k: Tensor, cos: Tensor, signed_sin: Tensor, *, key: Tensor, rows: Tensor) -> None:
        """k [N, H_kv, D] turned goes into rows [N * H_kv] int64 of key [R, D]."""


def choose(is_fused: bool, *, dtype: torch.dtype, device: torch.device) -> Pieces:
    """The plain pieces, or the fused ones of this device and dtype; plain with the reason where there are none."""
    if not is_fused:
        return PLAIN
    if available.is_target(device):
        if (missing := available.missing(device)) is not None:
            return Plain(missing.reason)
        from codesign.engine.kernels.triton.fused import TritonFused  # needs triton, which not every machine has

        return TritonFused()
    found = fused.load(dtype)
    return Plain(found.reason) if isinstance(found, Missing) else found


def describe(pieces: Pieces, *, has_qk_norm: bool) -> str:
    """For a record: "none", or "codesign::fused (residual + RMSNorm, SiLU * up, RoPE)"."""
    if isinstance(pieces, Plain):
        return pieces.kernel
    names = ("residual + RMSNorm", *(("q/k-norm",) if has_qk_norm else ()), "SiLU * up", "RoPE + cache write")
    return f"{pieces.kernel} ({', '.join(names)})"
