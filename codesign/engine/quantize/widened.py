"""Products with a weight that is unpacked a few rows at a time: the plain path beside every packed kernel.

    for rows of W that fit the cache:  buffer <- unpack(rows);  y[:, rows] <- x @ bufferᵀ

At large M the product dominates and the unpacking is read once, so this beats kernels that unpack again for every few
rows of x. The buffer is the engine's Workspace and never holds more than a slice of one layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from codesign.engine.quantize import cpu
from codesign.engine.quantize.linear import Workspace

# How much of the unpacked weight one slice takes: it should stay in the cache between unpacking and multiplying, but
# products with few outputs run slower, the more so the more rows x has. Zen 3, 512 KiB L2 and 32 MiB L3, 2026-11-23;
# other sizes in reports/LOG.md. Zen 4, 4096 x 4096 at M = 1024, 2026-11-25: 256 / 512 / 1024 / 2048 outputs take int8
# to 0.92 / 0.92 / 0.95 / 0.95 of native's speed, int4 to 0.87 / 0.87 / 0.89 / 0.89.
_SLICE_BYTES, _MIN_SLICE_ROWS, _MIN_SLICE_ROWS_FOR_MANY, _MANY_ROWS = 2 * 2**20, 512, 1024, 256

Unpack = Callable[[int, int, Tensor], None]
"""unpack(start, stop, out): writes rows start..stop of W into `out`, [in, stop - start] or [stop - start, in]."""


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What the product runs in: the activations' dtype where the device multiplies it natively, else fp32."""
    return dtype if device.type != "cpu" or cpu.multiplies_natively(dtype) else torch.float32


def multiply_unpacked(
    x: Tensor, unpack: Unpack, *, out_features: int, step: int, is_transposed: bool, workspace: Workspace
) -> Tensor:
    """x Wᵀ for a packed W.

    Args:
        x: [M, in], in the dtype of the product.
        step: slices start at multiples of this.
        is_transposed: whether `unpack` wants `out` as [in, rows].
    Returns:
        [M, out_features] in the dtype of x.
    """
    num_rows, num_in = x.shape
    least = _MIN_SLICE_ROWS if num_rows < _MANY_ROWS else _MIN_SLICE_ROWS_FOR_MANY
    wanted = max(_SLICE_BYTES // (num_in * x.itemsize), least)
    rows_per_slice = min(-(-wanted // step) * step, out_features)
    y = x.new_empty(x.shape[0], out_features)
    buffer = workspace.take((rows_per_slice * num_in,), x.dtype, x.device)
    for start in range(0, out_features, rows_per_slice):
        stop = min(start + rows_per_slice, out_features)
        flat = buffer[: (stop - start) * num_in]
        weight = flat.view(num_in, stop - start) if is_transposed else flat.view(stop - start, num_in)
        unpack(start, stop, weight)
        torch.mm(x, weight if is_transposed else weight.t(), out=y[:, start:stop])
    return y
