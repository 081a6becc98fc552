"""The small operations of a layer in one launch each; `kernels/plain.py` is the reference.

fp32 inside and rounded to the dtype where the plain operations round, so that results differ from theirs only by what
sums in another order and the device's exponential and square root leave: at most one last place in 16 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_GATES = 1024  # of a program


@triton.jit
def norm_kernel(
    x_ptr, change_ptr, weight_ptr, sum_ptr, y_ptr, size, eps, HAS_CHANGE: tl.constexpr, BLOCK: tl.constexpr
):
    """One row a program: sum = x + change, y = norm(sum); without a change y = norm(x)."""
    i = tl.arange(0, BLOCK)
    mask = i < size
    row = tl.program_id(0).to(tl.int64) * size
    x = tl.load(x_ptr + row + i, mask=mask, other=0.0)
    if HAS_CHANGE:
        change = tl.load(change_ptr + row + i, mask=mask, other=0.0)
        x = (x.to(tl.float32) + change.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + row + i, x, mask=mask)
    y = _normed(x, tl.load(weight_ptr + i, mask=mask, other=0.0), size, eps)
    tl.store(y_ptr + row + i, y, mask=mask)


@triton.jit
def norm_heads_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, y_ptr, q_stride, k_stride, num_q, size, eps, BLOCK: tl.constexpr
):
    """One head of one token a program."""
    i = tl.arange(0, BLOCK)
    mask = i < size
    x = tl.load(_head(q_ptr, k_ptr, q_stride, k_stride, num_q, size) + i, mask=mask, other=0.0)
    weight_ptr = q_weight_ptr if tl.program_id(1) < num_q else k_weight_ptr
    y = _normed(x, tl.load(weight_ptr + i, mask=mask, other=0.0), size, eps)
    tl.store(_own(y_ptr, size) + i, y, mask=mask)


@triton.jit
def silu_mul_kernel(gate_up_ptr, y_ptr, size, BLOCK: tl.constexpr):
    """BLOCK gates of one row a program."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    row = tl.program_id(0).to(tl.int64) * size
    gate = tl.load(gate_up_ptr + 2 * row + i, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + 2 * row + size + i, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    open_by = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(y_ptr + row + i, (open_by.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=mask)


@triton.jit
def rotate_kernel(q_ptr, k_ptr, cos_ptr, sin_ptr, y_ptr, q_stride, k_stride, num_q, size, BLOCK: tl.constexpr):
    """One head of one token a program; both halves of the pairs, BLOCK of each."""
    half = size // 2
    i = tl.arange(0, BLOCK)
    mask = i < half
    from_ptr = _head(q_ptr, k_ptr, q_stride, k_stride, num_q, size)
    low = tl.load(from_ptr + i, mask=mask, other=0.0)
    high = tl.load(from_ptr + half + i, mask=mask, other=0.0)
    table = tl.program_id(0).to(tl.int64) * size
    y_ptr = _own(y_ptr, size)
    for side in tl.static_range(2):
        own, other = (high, low) if side else (low, high)
        at = table + side * half + i
        cos = tl.load(cos_ptr + at, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + at, mask=mask, other=0.0)
        turned = own.to(tl.float32) * cos + other.to(tl.float32) * sin
        tl.store(y_ptr + side * half + i, turned.to(low.dtype), mask=mask)


@triton.jit
def rotate_into_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    y_ptr,
    key_ptr,
    value_ptr,
    rows_ptr,
    q_stride,
    k_stride,
    v_stride,
    num_q,
    size,
    BLOCK: tl.constexpr,
):
    """As `rotate_kernel`, but a head of k goes into its row of the cache, and so does that of v."""
    half = size // 2
    i = tl.arange(0, BLOCK)
    mask = i < half
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    from_ptr = _head(q_ptr, k_ptr, q_stride, k_stride, num_q, size)
    low = tl.load(from_ptr + i, mask=mask, other=0.0)
    high = tl.load(from_ptr + half + i, mask=mask, other=0.0)
    to_ptr = y_ptr + (token * num_q + head) * size
    if head >= num_q:
        row = tl.load(rows_ptr + token * (tl.num_programs(1) - num_q) + head - num_q)
        to_ptr = key_ptr + row * size
        v_from = v_ptr + token * v_stride + (head - num_q) * size
        for side in tl.static_range(2):
            at = side * half + i
            tl.store(value_ptr + row * size + at, tl.load(v_from + at, mask=mask, other=0.0), mask=mask)
    for side in tl.static_range(2):
        own, other = (high, low) if side else (low, high)
        at = token * size + side * half + i
        cos = tl.load(cos_ptr + at, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + at, mask=mask, other=0.0)
        turned = own.to(tl.float32) * cos + other.to(tl.float32) * sin
        tl.store(to_ptr + side * half + i, turned.to(low.dtype), mask=mask)


@triton.jit
def _normed(x, weight, size, eps):
    """Of values with zeros beyond `size`."""
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    return ((wide * scale).to(x.dtype).to(tl.float32) * weight.to(tl.float32)).to(x.dtype)


@triton.jit
def _head(q_ptr, k_ptr, q_stride, k_stride, num_q, size):
    """Where this program's head starts, in q or in k."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own_q_ptr = q_ptr + token * q_stride + head * size
    own_k_ptr = k_ptr + token * k_stride + (head - num_q) * size
    return own_q_ptr if head < num_q else own_k_ptr


@triton.jit
def _own(y_ptr, size):
    """Where this program's head goes, in y [tokens, heads, size]."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    return y_ptr + (token * tl.num_programs(1) + head) * size


class TritonFused:
    """Every tensor is on one device and of one dtype, but for cosines and sines, which are fp32."""

    kernel = "triton::fused"

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        _launch_norm(x, None, weight, None, y, eps)
        return y

    def add_norm(self, x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, change = x.contiguous(), change.contiguous()
        total, y = torch.empty_like(x), torch.empty_like(x)
        _launch_norm(x, change, weight, total, y, eps)
        return total, y

    def norm_heads(self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        q, k = _whole_heads(q), _whole_heads(k)
        y, sizes = _both(q, k)
        if y.numel():
            block = triton.next_power_of_2(q.shape[2])
            with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
                norm_heads_kernel[y.shape[:2]](q, k, q_weight, k_weight, y, *sizes, eps, BLOCK=block, num_warps=1)
        return y[:, : q.shape[1]], y[:, q.shape[1] :]

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(rows, size)
        if rows:
            block = min(triton.next_power_of_2(size), MAX_GATES)
            with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
                silu_mul_kernel[rows, triton.cdiv(size, block)](gate_up, y, size, BLOCK=block)
        return y

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, signed_sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k, cos, signed_sin = _whole_heads(q), _whole_heads(k), cos.contiguous(), signed_sin.contiguous()
        y, sizes = _both(q, k)
        if y.numel():
            block = triton.next_power_of_2(q.shape[2] // 2)
            with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
                rotate_kernel[y.shape[:2]](q, k, cos, signed_sin, y, *sizes, BLOCK=block, num_warps=1)
        return y[:, : q.shape[1]], y[:, q.shape[1] :]

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
        q, k, v, cos, signed_sin = *map(_whole_heads, (q, k, v)), cos.contiguous(), signed_sin.contiguous()
        tokens, num_q, size = q.shape
        y = q.new_empty(tokens, num_q, size)
        if y.numel():
            block = triton.next_power_of_2(size // 2)
            strides = (q.stride(0), k.stride(0), v.stride(0))
            with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
                rotate_into_kernel[tokens, num_q + k.shape[1]](
                    q, k, v, cos, signed_sin, y, key, value, rows, *strides, num_q, size, BLOCK=block, num_warps=1
                )
        return y

    def rotate_rows(self, k: Tensor, cos: Tensor, signed_sin: Tensor, *, key: Tensor, rows: Tensor) -> None:
        turned, _ = self.rotate(k, k[:, :0], cos, signed_sin)
        key.index_copy_(0, rows, turned.flatten(0, 1))


def norm_options(size: int) -> dict[str, int]:
    """Block and warps for rows of `size`: all of a row at once, at most 32 values a thread."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(max(block // 1024, 1), 16)}


def _launch_norm(x: Tensor, change: Tensor | None, weight: Tensor, total: Tensor | None, y: Tensor, eps: float) -> None:
    size = x.shape[-1]
    if x.numel():
        rest = (x if change is None else change, weight, y if total is None else total, y, size, eps)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # triton launches on the current device
            norm_kernel[(x.numel() // size,)](x, *rest, HAS_CHANGE=change is not None, **norm_options(size))


def _whole_heads(x: Tensor) -> Tensor:
    """[N, H, D] with the values of a token's heads one after the other; tokens may lie apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _both(q: Tensor, k: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Room for all heads of q and k [N, H + H_kv, D], and strides and sizes as kernels take them."""
    y = q.new_empty(q.shape[0], q.shape[1] + k.shape[1], q.shape[2])
    return y, (q.stride(0), k.stride(0), q.shape[1], q.shape[2])
