"""offload: rows outside the memory of the device: capacity, not speed.

    cuda   pinned host memory; two layers at a time on the device, the next one copied while one computes
    cpu    a file on a disk, mapped: the kernel keeps in memory what is used, and can write the rest out

A step on CUDA reads every row of its sequences over PCIe: 32k tokens of an 8B model with GQA are 4 GiB, about 170 ms at
25 GB/s. No codec of groups and no policy that scores all layers' keys at once goes with it there. On a CPU everything
does, and nothing is slower until memory is short.

None of it is free: pinned memory is host memory, and pages of the file are resident like any other until the kernel
takes them. Both count in the process's resident memory; `kv_place` in the facts says what lies where.
"""

import dataclasses

import torch
from torch import Tensor

from codesign.engine.kv.cuda_lanes import cuda_lanes
from codesign.engine.kv.mapped import file_memory, pinned_memory
from codesign.engine.kv.place import KVPlace
from codesign.engine.kv.stream import Lanes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offload(KVPlace):
    def zeros(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape)
        num_bytes = size.numel() * dtype.itemsize
        if not num_bytes:
            return torch.zeros(size, dtype=dtype)
        memory = file_memory(num_bytes) if device.type == "cpu" else pinned_memory(num_bytes)
        return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(size)

    def memory(self, device: torch.device) -> str:
        return "mapped file" if device.type == "cpu" else "pinned host memory"

    def lanes(self, device: torch.device) -> Lanes | None:
        return None if device.type == "cpu" else cuda_lanes(device)
