"""KVCodec: how rows are encoded in a slot. One file below `codecs/` per codec.

`native` stores rows as they are. Groups are encoded exactly once, at commit or at admit; `rows_mutable` says whether a
single row may be overwritten in place (decode-time eviction needs that).
"""

from typing import ClassVar


class KVCodec:
    """The protocol starts with what the dense store needs today; a codec that encodes adds encode and decode."""

    rows_mutable: ClassVar[bool] = True
