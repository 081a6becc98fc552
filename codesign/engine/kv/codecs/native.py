"""native: rows as the model computed them, in the engine's dtype. The neutral codec."""

import dataclasses
from typing import ClassVar

from codesign.engine.kv.codec import KVCodec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Native(KVCodec):
    is_native: ClassVar[bool] = True
