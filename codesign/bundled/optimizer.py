"""Muon for the hidden matrices and Adam for the rest, over flat fp32 buffers that several processes share.

Muon steps along the orthogonal matrix nearest to the momentum (Jordan, 2024,
https://kellerjordan.github.io/posts/muon/). Matrices of one shape are stacked, in bf16 only where the CPU multiplies
it in hardware: elsewhere torch.optim.Muon's bf16 is several times slower than fp32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codesign.bundled.model import training_dtype

MUON_MOMENTUM, ADAM_BETAS, ADAM_EPS = 0.95, (0.9, 0.95), 1e-10


def orthogonalise(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """[N, rows, columns] -> the same shape, singular values pushed to about 1 by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(training_dtype())
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    result: Tensor = (x.mT if is_tall else x).to(matrices.dtype)
    return result


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one parameter lies in the flat buffers, and how it is stepped."""

    start: int
    shape: torch.Size
    base_lr: float
    is_muon: bool

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.shape.numel()].view(self.shape)


def shared_zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that forked processes see and change together."""
    zeros: Tensor = torch.zeros(shape, dtype=dtype).share_memory_()  # type: ignore[no-untyped-call]
    return zeros


class FlatState:
    """Values, gradients (a row for each process), first and second moments of a model, in shared memory.

    The model's parameters become views of `values`, so a step made by one process is seen by all.
    """

    def __init__(self, model: nn.Module, base_lr: dict[str, float], muon_lr: float, num_processes: int) -> None:
        size = sum(weight.numel() for weight in model.parameters())
        self.values, self.first, self.second = (shared_zeros(size) for _ in range(3))
        self.gradients = shared_zeros(num_processes, size)
        self.slots: list[Slot] = []
        start = 0
        for name, weight in model.named_parameters():
            lrs = [lr for part, lr in base_lr.items() if part in name]
            slot = Slot(start=start, shape=weight.shape, base_lr=lrs[0] if lrs else muon_lr, is_muon=not lrs)
            slot.view(self.values).copy_(weight.data)
            weight.data = slot.view(self.values)
            self.slots.append(slot)
            start += weight.numel()

    def use_gradients_of(self, model: nn.Module, process: int) -> None:
        """The model's backward passes add to this process's row from now on."""
        for slot, weight in zip(self.slots, model.parameters(), strict=True):
            weight.grad = slot.view(self.gradients[process])

    @torch.no_grad()
    def step(self, slots: list[Slot], factor: float, step: int, *, weight_decay: float) -> None:
        """Updates `slots` with the sum of all gradient rows; `factor` scales learning rates, `step` counts from 0."""
        stacks: dict[torch.Size, list[Slot]] = {}
        for slot in slots:
            if slot.is_muon:
                stacks.setdefault(slot.shape, []).append(slot)
            else:
                self._adam(slot, factor * slot.base_lr, step)
        for shape, stack in stacks.items():
            directions = []
            for slot in stack:
                gradient, momentum = self._gradient(slot), slot.view(self.first)
                momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
                directions.append(gradient.lerp_(momentum, MUON_MOMENTUM))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for slot, direction in zip(stack, orthogonalise(torch.stack(directions)), strict=True):
                lr = factor * slot.base_lr
                slot.view(self.values).mul_(1 - lr * weight_decay).sub_(direction, alpha=lr * scale)

    def _gradient(self, slot: Slot) -> Tensor:
        return torch.stack([slot.view(row) for row in self.gradients]).sum(0)

    def _adam(self, slot: Slot, lr: float, step: int) -> None:
        gradient, first, second = self._gradient(slot), slot.view(self.first), slot.view(self.second)
        first.lerp_(gradient, 1 - ADAM_BETAS[0])
        second.lerp_(gradient.square_(), 1 - ADAM_BETAS[1])
        corrected = (second / (1 - ADAM_BETAS[1] ** (step + 1))).sqrt_().add_(ADAM_EPS)
        slot.view(self.values).addcdiv_(first, corrected, value=-lr / (1 - ADAM_BETAS[0] ** (step + 1)))
