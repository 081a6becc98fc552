"""int4: keys per channel over groups of tokens, values per token over groups of channels, the newest tokens native.

    key    low, step [tokens / g, D]      over each channel of g consecutive tokens
    value  low, step [tokens, D / g]      over each g channels of one token
    step = (max - low) / 15 and low in fp16        code = round((x - low) / step)        x' = low + code · step

Keys have a few channels that are large for every token: a range per token would be theirs, and the other channels would
lose their bits. Five bits a value with both numbers of a range, at g = 32. A group is encoded once, when its last token
is committed (or admitted with its prompt) and `residual_tokens` newer ones are there; rows cannot be evicted.

KIVI (Liu et al., 2024), https://arxiv.org/abs/2402.02750. Departs from the paper: values wait for their group like the
keys, so that a token is native or encoded as a whole; a residual that slides by groups instead of emptying at once.
Cost: encoding g tokens of all layers every g steps; reading in registers where there is a kernel.
"""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from codesign.engine.kernels import kv_attention
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import KVAttention, Queries
from codesign.engine.kv.budget import check_tokens
from codesign.engine.kv.codec import KVCodec
from codesign.engine.kv.encoded import EncodedShape, EncodedTokens
from codesign.engine.kv.group import LayerGroup
from codesign.errors import Unsupported

_LARGEST = 15
_TINY = 1e-30  # groups of equal values have step 0; nothing is divided by it
Ranges = tuple[Tensor, Tensor, Tensor]  # codes, step, low


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4(KVCodec):
    """Args:
    group_size: tokens of a group of keys; channels of a group of values are its largest divisor of head_dim in common.
    residual_tokens: newest tokens that stay native, beside those that do not fill a group yet.
    """

    rows_mutable: ClassVar[bool] = False

    group_size: int = 32
    residual_tokens: int = 32

    def __post_init__(self) -> None:
        check_tokens("residual_tokens", self.residual_tokens)
        check_tokens("group_size", self.group_size, least=8)
        if self.group_size & (self.group_size - 1):
            raise ValueError(f"group_size must be a power of two, got {self.group_size}")

    def groups(self, shape: EncodedShape) -> EncodedTokens:
        if shape.head_dim % 2:
            raise Unsupported(f"kv.codec 'int4' packs two channels into a byte; head_dim {shape.head_dim} is odd")
        return _Int4Tokens(shape, self.group_size)

    def kernel(self, *, head_dim: int, device: torch.device) -> KVAttention | Missing:
        if head_dim % 16:
            return Missing(f"written for heads of a multiple of 16, not {head_dim}")
        return kv_attention.usable(head_dim=head_dim, device=device)

    def attend(self, kernel: KVAttention, queries: Queries, group: LayerGroup, index: int, slots: slice) -> None:
        assert isinstance(group.encoded, _Int4Tokens)
        (key,), (value,) = group.stored(index, slots)
        encoded = [part[index, slots] for part in group.encoded.tensors]
        kernel.int4(queries, group.encoded_tokens(slots), encoded, key, value, group_size=self.group_size)


class _Int4Tokens(EncodedTokens):
    """Codes [L, S, H_kv, T, D / 2]: channel d in the low half of byte d, channel d + D / 2 in its high half."""

    def __init__(self, shape: EncodedShape, group_size: int) -> None:
        tokens, dim = shape.num_tokens, shape.head_dim
        self._group_size, self._channels, self._dtype = group_size, math.gcd(group_size, dim), shape.dtype
        self._key_code, self._value_code = (shape.zeros(tokens, dim // 2, dtype=torch.uint8) for _ in range(2))
        self._key_range = [shape.zeros(tokens // group_size, dim, dtype=torch.float16) for _ in range(2)]
        self._value_range = [shape.zeros(tokens, dim // self._channels, dtype=torch.float16) for _ in range(2)]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, steps and lows of the keys, then of the values."""
        return (self._key_code, *self._key_range, self._value_code, *self._value_range)

    def encode(self, layers: slice, slot: int, first: int, key: Tensor, value: Tensor) -> None:
        num_tokens = key.shape[2]
        tokens = (layers, slot, slice(None), slice(first, first + num_tokens))
        groups = (layers, slot, slice(None), slice(first // self._group_size, (first + num_tokens) // self._group_size))
        planes, dim = key.shape[:2], key.shape[3]
        code, step, low = _quantize(key.reshape(*planes, -1, self._group_size, dim), dim=3)
        self._key_code[tokens] = _pack(code.flatten(2, 3))
        self._key_range[0][groups], self._key_range[1][groups] = step.squeeze(3), low.squeeze(3)
        code, step, low = _quantize(value.reshape(*planes, num_tokens, -1, self._channels), dim=4)
        self._value_code[tokens] = _pack(code.flatten(3, 4))
        self._value_range[0][tokens], self._value_range[1][tokens] = step.squeeze(4), low.squeeze(4)

    def decode(self, index: int, slots: slice, heads: slice, num_tokens: int) -> tuple[Tensor, Tensor]:
        num_groups = num_tokens // self._group_size
        tokens, groups = (index, slots, heads, slice(num_tokens)), (index, slots, heads, slice(num_groups))
        code = _unpack(self._key_code[tokens])
        planes, dim = code.shape[:2], code.shape[3]
        step, low = (part[groups].float().unsqueeze(3) for part in self._key_range)
        key = torch.addcmul(low, code.view(*planes, num_groups, self._group_size, dim), step).flatten(2, 3)
        step, low = (part[tokens].float().unsqueeze(4) for part in self._value_range)
        code = _unpack(self._value_code[tokens]).view(*planes, num_tokens, dim // self._channels, self._channels)
        value = torch.addcmul(low, code, step).flatten(3, 4)
        return key.to(self._dtype), value.to(self._dtype)


def _quantize(x: Tensor, *, dim: int) -> Ranges:
    """Codes 0..15 as uint8, step and low in fp16, over `dim`; codes fit step and low as they are stored."""
    x = x.float()
    low = x.amin(dim=dim, keepdim=True).half()
    step = ((x.amax(dim=dim, keepdim=True) - low.float()) / _LARGEST).half()
    code = ((x - low.float()) / step.float().clamp_min(_TINY)).round_().clamp_(0, _LARGEST)
    return code.to(torch.uint8), step, low


def _pack(code: Tensor) -> Tensor:
    low, high = code.chunk(2, dim=-1)
    return low | (high << 4)


def _unpack(packed: Tensor) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=-1).float()
