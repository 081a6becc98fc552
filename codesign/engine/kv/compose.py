"""Which policies, codecs and places go together in one store; what does not is refused by name, with what does."""

import torch

from codesign.engine.kv.codec import KVCodec
from codesign.engine.kv.place import KVPlace
from codesign.engine.kv.policy import KVPolicy
from codesign.errors import Unsupported


def check(policy: KVPolicy, codec: KVCodec, place: KVPlace, *, is_bounded: bool, device: torch.device) -> None:
    """Raises Unsupported.

    Args:
        is_bounded: whether the policy ever evicts, with its budget.
        device: that computes.
    """
    if is_bounded and not codec.rows_mutable:
        raise Unsupported(
            f"kv.codec {_name(codec)!r} encodes groups of {codec.group_size} tokens, of which kv.policy "
            f"{_name(policy)!r} cannot evict single ones; use kv.policy 'full', or kv.codec 'int8' or 'fp8'"
        )
    if place.lanes(device) is None:
        return
    where = f"kv.place {_name(place)!r} on {device.type} brings one layer's rows at a time to the device"
    if codec.group_size:
        raise Unsupported(
            f"{where}; kv.codec {_name(codec)!r} encodes groups of tokens of all layers at once; use kv.codec "
            "'native', 'int8' or 'fp8', or kv.place 'device'"
        )
    if is_bounded and policy.needs_keys:
        raise Unsupported(
            f"{where}; kv.policy {_name(policy)!r} scores the keys of all layers at once; use another kv.policy, or "
            "kv.place 'device'"
        )


def _name(member: KVCodec | KVPolicy | KVPlace) -> str:
    return type(member).__module__.rpartition(".")[2]
