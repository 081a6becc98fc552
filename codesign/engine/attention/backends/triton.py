"""triton: output tokens by our split-K kernel, which reads K and V once for a query group and where they lie.

Weights for a policy that scores columns come out of the same pass, and of a prompt by two passes in O(n) memory.
Prompt chunks attend through SDPA, whose kernels are made for many queries. Runs on CUDA, or anywhere in Triton's
interpreter (TRITON_INTERPRET=1), which is for tests.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from codesign.engine.attention.backend import AttentionBackend
from codesign.engine.attention.backends.sdpa import Sdpa
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.triton import available

_PROMPTS = Sdpa()
_MAX_QUERIES = 128  # of a KV head; more are a prompt chunk, and worth a kernel that reuses rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Triton(AttentionBackend):
    column_kernel: ClassVar[str] = "triton::column_sums"

    @property
    def kernel(self) -> str:
        return f"triton::attend, prompts {_PROMPTS.kernel}"

    def missing(self, device: torch.device) -> Missing | None:
        return available.missing_attention(device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        if is_causal or query.shape[1] != key.shape[1] or query.shape[2] > _MAX_QUERIES:
            return _PROMPTS.attend(query, key, value, mask=mask, is_causal=is_causal, scale=scale)
        from codesign.engine.kernels.triton.attend import attend  # triton is there only where `missing` is None

        return attend(query, (key,), (value,), mask=mask, scale=scale)[0]

    def attend_columns(
        self, query: Tensor, key: Tensor, value: Tensor, *, num_tokens: int, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        from codesign.engine.kernels.triton.attend import attend

        out, columns = attend(query, (key,), (value,), num_tokens=num_tokens, mask=mask, scale=scale, want_columns=True)
        assert columns is not None
        return out, columns

    def column_sums(self, query: Tensor, key: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
        from codesign.engine.kernels.triton.column_sums import column_sums

        return column_sums(query, key, mask=mask, is_causal=is_causal, scale=scale)
