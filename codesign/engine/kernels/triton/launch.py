"""One launch of a weight kernel, with a second one that adds the splits where there are any."""

from typing import Any

import torch
import triton
from torch import Tensor

from codesign.engine.kernels.triton.configs import Config
from codesign.engine.kernels.triton.tile import add_splits

ADDED_OUTPUTS = 256  # a program of `add_splits`


def launch(
    kernel: Any, x: Tensor, weight: tuple[Tensor, ...], num_out: int, config: Config, **constants: Any
) -> Tensor:
    """[M, num_out] in the dtype of x.

    Args:
        kernel: takes x, the tensors of `weight`, y, M, N, K and then constants.
        x: [M, K], M >= 1.
    """
    x = x.contiguous()
    num_rows, num_in = x.shape
    y = x.new_empty(num_rows, num_out)
    sums = y if config.split_k == 1 else x.new_empty(config.split_k, num_rows, num_out, dtype=torch.float32)
    grid = (triton.cdiv(num_out, config.block_n), triton.cdiv(num_rows, config.block_m), config.split_k)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # triton launches on the current device, whatever the tensors say
        kernel[grid](x, *weight, sums, num_rows, num_out, num_in, **constants, **config.constants(), **config.options())
        if config.split_k > 1:
            add_splits[triton.cdiv(num_out, ADDED_OUTPUTS), num_rows](
                sums, y, num_rows, num_out, SPLIT_K=config.split_k, BLOCK=ADDED_OUTPUTS
            )
    return y
