"""pyramidkv: snapkv with larger budgets in lower layers.

Inside a layer rows are chosen and replaced as in SnapKV. Across layers, an arithmetic series: with window w and
c = kv_budget - w,

    k_l = w + c + (c - c/beta) · (1 - 2 l/(m - 1)),   l = 0 .. m - 1       top layer w + c/beta, mean kv_budget

clamped to [w + sinks + 1, max_model_len], the clamped mass given to the other layers, rounded so that
Σ k_l = m · kv_budget exactly. beta = 1 is flat and equals snapkv.

PyramidKV (Cai et al., 2024), https://arxiv.org/abs/2406.02069. Departs from the paper as snapkv does; and the sum of
the budgets is exact, without a fallback to equal budgets.
"""

import dataclasses

from codesign.engine.kv.budget import check_room, exact_budgets
from codesign.engine.kv.policies.snapkv import SnapKV
from codesign.spec.kv_budget import kv_budget_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Args:
    kv_budget: tokens kept per head, mean over the layers, or a fraction of max_model_len.
    beta: steepness, at least 1; the top layer keeps 1/beta of the mean beside its protected rows.
    """

    beta: int | float = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.beta, int | float) or isinstance(self.beta, bool) or not 1 <= self.beta < float("inf"):
            raise ValueError(f"beta must be a number of at least 1, got {self.beta!r}")

    def budgets(self, *, num_layers: int, max_model_len: int) -> tuple[int, ...]:
        mean = kv_budget_tokens(self.kv_budget, max_model_len)
        check_room("pyramidkv", self.kv_budget, mean, self.num_protected, max_model_len)
        if mean == max_model_len:
            return (max_model_len,) * num_layers
        rest = mean - self.window_tokens
        slope = rest - rest / self.beta
        wanted = [mean + slope * (1 - 2 * layer / max(1, num_layers - 1)) for layer in range(num_layers)]
        if num_layers == 1:
            wanted = [float(mean)]
        return exact_budgets(wanted, total=mean * num_layers, least=self.num_protected + 1, most=max_model_len)
