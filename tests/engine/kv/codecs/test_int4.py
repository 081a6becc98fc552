import math
from typing import Any

import pytest
import torch
from torch import Tensor

from codesign.engine.kv.codecs import int4
from codesign.engine.kv.codecs.int4 import Int4
from codesign.engine.kv.encoded import EncodedShape, EncodedTokens
from codesign.engine.kv.policies.full import Full
from codesign.engine.kv.store import DenseStore
from codesign.errors import Unsupported

CPU = torch.device("cpu")
NO_TABLES = (torch.empty(0), torch.empty(0))  # int4 keeps keys rotated


def room(codec: Int4, num_tokens: int, head_dim: int, *, num_layers: int = 2) -> EncodedTokens:
    shape = EncodedShape(
        num_layers=num_layers,
        num_slots=2,
        num_kv_heads=3,
        num_tokens=num_tokens,
        head_dim=head_dim,
        dtype=torch.float32,
        device=CPU,
        rope_tables=NO_TABLES,
    )
    return codec.groups(shape)


def round_trip(codec: Int4, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """key, value [2, 3, T, D] of two layers, through slot 1 in two parts."""
    num_tokens, half = key.shape[2], key.shape[2] // 2
    encoded = room(codec, num_tokens, key.shape[3])
    for part in (slice(half), slice(half, num_tokens)):
        encoded.encode(slice(None), 1, part.start or 0, key[:, :, part], value[:, :, part])
    decoded = [encoded.decode(layer, slice(1, 2), slice(3), num_tokens) for layer in range(2)]
    return torch.cat([key for key, _ in decoded]), torch.cat([value for _, value in decoded])


def nearest(x: Tensor, dim: int) -> Tensor:
    """The plain quantiser: each value to the nearest of sixteen between the least and the most along `dim`."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    levels = low[..., None] + (high - low)[..., None] * torch.arange(16) / 15
    return torch.gather(levels.expand(*x.shape, 16), -1, (levels - x[..., None]).abs().argmin(-1, keepdim=True))[..., 0]


@pytest.mark.parametrize(("group_size", "head_dim"), [(32, 64), (8, 16), (64, 80), (16, 8)])
def test_keys_are_rounded_along_tokens_and_values_along_channels(group_size: int, head_dim: int) -> None:
    key, value = torch.randn(2, 2, 3, 4 * group_size, head_dim, generator=torch.Generator().manual_seed(0))
    got_key, got_value = round_trip(Int4(group_size=group_size), key, value)
    channels = math.gcd(group_size, head_dim)
    want_key = nearest(key.reshape(2, 3, 4, group_size, head_dim), 3).view_as(key)
    want_value = nearest(value.reshape(2, 3, 4 * group_size, -1, channels), 4).view_as(value)

    # fp16 ranges move a level a little, and a value between two levels may take the other: half a step then
    assert ((got_key - want_key).abs() > 0.01).float().mean() < 0.01
    assert ((got_value - want_value).abs() > 0.01).float().mean() < 0.01
    assert (got_key - key).abs().max() < (key.max() - key.min()) / 28
    assert (got_value - value).abs().max() < (value.max() - value.min()) / 28


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT * key.shape[-1] ** -0.5).softmax(-1) @ value


def test_with_channel_outliers_these_axes_beat_keys_per_token() -> None:
    """Keys with a few channels that are large for every token, as models have them."""
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 2, 3, 256, 64, generator=generator)
    key[..., [5, 20, 40]] += torch.tensor([12.0, -9.0, 15.0])
    query = torch.randn(2, 3, 40, 64, generator=generator)
    right = attention(query, *round_trip(Int4(), key, value))
    value_rounded = round_trip(Int4(), key, value)[1]
    per_token = nearest(key.reshape(2, 3, 256, 2, 32), 4).view_as(key)
    wrong = attention(query, per_token, value_rounded)
    exact = attention(query, key, value)

    assert (right - exact).norm() < 0.6 * (wrong - exact).norm()
    assert (round_trip(Int4(), key, value)[0] - key).norm() < 0.3 * (per_token - key).norm()


def test_groups_of_equal_values_and_what_is_not_finite() -> None:
    key = torch.full((2, 3, 64, 16), 0.7)
    value = torch.zeros(2, 3, 64, 16)
    value[0, 0, 3, 4] = float("nan")
    got_key, got_value = round_trip(Int4(), key, value)

    torch.testing.assert_close(got_key, key, rtol=0, atol=4e-4)
    assert got_value[0, 0, 3].isnan().any()
    assert torch.equal(got_value[1], value[1])


def store_of(codec: Int4, *, max_model_len: int, max_query_len: int = 1, head_dim: int = 16) -> DenseStore:
    return DenseStore(
        num_layers=2,
        num_slots=2,
        num_kv_heads=3,
        head_dim=head_dim,
        max_model_len=max_model_len,
        max_query_len=max_query_len,
        policy=Full(),
        codec=codec,
        rope_tables=NO_TABLES,
        dtype=torch.float32,
        device=CPU,
    )


def test_each_group_is_encoded_exactly_once_and_only_when_it_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pending rows at a time, of which two are accepted; what is encoded is each group's tokens, in order."""
    codec = Int4(group_size=8, residual_tokens=4)
    store, seen = store_of(codec, max_model_len=64, max_query_len=3), []
    encode = int4._Int4Tokens.encode

    def spied(self: Any, layers: slice, slot: int, first: int, key: Tensor, value: Tensor) -> None:
        seen.append((slot, store.num_tokens[slot], first, key[0, 0, :, 0].tolist()))
        encode(self, layers, slot, first, key, value)

    monkeypatch.setattr(int4._Int4Tokens, "encode", spied)
    for first in range(0, 40, 2):
        rows = store.reserve([(1, 3)], [first], torch.arange(first, first + 3))
        new = torch.arange(first, first + 3.0)[:, None, None].expand(-1, 3, 16)
        for layer, own in zip(store.layer_order, rows, strict=True):
            store.write(layer, own, new, new)
        store.commit([(1, 2)])

    assert [(slot, first) for slot, _, first, _ in seen] == [(1, 0), (1, 8), (1, 16), (1, 24)]
    assert [tokens for *_, tokens in seen] == [[float(first + i) for i in range(8)] for first in (0, 8, 16, 24)]
    assert [num_tokens + 2 for _, num_tokens, _, _ in seen] == [12, 20, 28, 36]  # 8 tokens and 4 newer ones


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_long_cache_takes_five_bits_a_value(head_dim: int) -> None:
    store = store_of(Int4(), max_model_len=8192, head_dim=head_dim)
    values = 2 * 2 * 2 * 3 * 8192 * head_dim

    assert 5 * values / 8 < store.num_bytes < 5.3 * values / 8


def test_knobs_are_checked() -> None:
    with pytest.raises(ValueError, match="group_size must be a power of two, got 24"):
        Int4(group_size=24)
    with pytest.raises(ValueError, match="group_size must be a whole number of at least 8"):
        Int4(group_size=4)
    with pytest.raises(Unsupported, match="head_dim 5 is odd"):
        room(Int4(), 32, 5)
