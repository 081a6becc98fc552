"""native: rows as the model computed them, in the engine's dtype. The neutral codec."""

import dataclasses
from typing import ClassVar

from torch import Tensor

from codesign.engine.kernels.kv_attention import KVAttention, Queries
from codesign.engine.kv.codec import KVCodec, Parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Native(KVCodec):
    is_native: ClassVar[bool] = True

    def attend_blocks(self, kernel: KVAttention, queries: Queries, table: Tensor, key: Parts, value: Parts) -> None:
        kernel.paged(queries, table, key[0], value[0])
