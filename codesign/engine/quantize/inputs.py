"""InputStats: what a linear layer sees on calibration text; the evidence of gptq, awq, smoothquant and wanda."""

import torch
from torch import Tensor


class InputStats:
    """Sums over tokens, in fp32, added batch by batch.

    Args:
        num_in: inputs of the layer.
        keeps_hessian: whether the [in, in] second moment is wanted.
    """

    def __init__(self, num_in: int, *, keeps_hessian: bool = True, device: torch.device | None = None) -> None:
        self.num_tokens = 0
        self._moment = torch.zeros(num_in, num_in, device=device) if keeps_hessian else None
        self._square_sum = torch.zeros(num_in, device=device)
        self._abs_sum = torch.zeros(num_in, device=device)
        self._abs_max = torch.zeros(num_in, device=device)

    def add(self, x: Tensor) -> None:
        """x [N, in], of any float dtype."""
        if x.shape[0] == 0:
            return
        x = x.float()
        self.num_tokens += x.shape[0]
        if self._moment is not None:
            self._moment.addmm_(x.t(), x)
        self._square_sum += x.square().sum(0)
        size = x.abs()
        self._abs_sum += size.sum(0)
        self._abs_max = torch.maximum(self._abs_max, size.amax(0))

    @property
    def weakness(self) -> str:
        """Why this is poor evidence, or ""."""
        num_in = self._abs_max.numel()
        if not bool(self._abs_max.any()):
            return "no calibration input was ever other than 0"
        if self.num_tokens < num_in:
            return f"fewer calibration tokens ({self.num_tokens}) than inputs ({num_in})"
        return ""

    @property
    def hessian(self) -> Tensor:
        """[in, in]: (2 / tokens) sum of x xT, the second derivative of the squared output error."""
        if self._moment is None:
            raise ValueError("no second moment was kept")
        return self._moment * (2 / max(1, self.num_tokens))

    @property
    def norm(self) -> Tensor:
        """[in] root of the sum of squares over tokens."""
        return self._square_sum.sqrt()

    @property
    def mean_abs(self) -> Tensor:
        return self._abs_sum / max(1, self.num_tokens)

    @property
    def max_abs(self) -> Tensor:
        return self._abs_max
