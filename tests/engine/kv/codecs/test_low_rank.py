import pytest
import torch
from torch import Tensor

from codesign.engine.attention.rope import Rope, rotate
from codesign.engine.kv.codecs.low_rank import LowRank
from codesign.engine.kv.encoded import EncodedShape, EncodedTokens
from codesign.errors import Unsupported

CPU = torch.device("cpu")
HEAD_DIM, NUM_TOKENS = 128, 512


def tables(attention_scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    rope = Rope(1 / 10000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM), attention_scaling)
    return rope.tables(NUM_TOKENS, CPU)


def room(codec: LowRank, attention_scaling: float = 1.0, *, dtype: torch.dtype = torch.float32) -> EncodedTokens:
    return codec.groups(
        EncodedShape(
            num_layers=1,
            num_slots=2,
            num_kv_heads=2,
            num_tokens=NUM_TOKENS,
            head_dim=HEAD_DIM,
            dtype=dtype,
            device=CPU,
            rope_tables=tables(attention_scaling),
        )
    )


def planted(rank: int, attention_scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Keys that span `rank` directions before RoPE, rotated, and values of that rank, [1, 2, T, D]."""
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.randn(2, 1, 2, NUM_TOKENS, rank, generator=generator)
    key, value = coordinates @ torch.randn(2, 1, 2, rank, HEAD_DIM, generator=generator)
    return rotate(key, *tables(attention_scaling)), value


def relative(error: Tensor, of: Tensor) -> float:
    return float(error.norm() / of.norm())


@pytest.mark.parametrize("attention_scaling", [1.0, 1.3])
def test_low_rank_before_rope_is_found_and_later_tokens_land_on_the_same_basis(attention_scaling: float) -> None:
    encoded = room(LowRank(rank=24, value_rank=24), attention_scaling)
    key, value = planted(24, attention_scaling)
    for part in (slice(0, 256), slice(256, 320), slice(320, 512)):
        encoded.encode(slice(None), 1, part.start, key[:, :, part], value[:, :, part])
    got_key, got_value = encoded.decode(0, slice(1, 2), slice(2), NUM_TOKENS)

    assert relative(got_key - key, key) < 1e-4
    assert relative(got_value - value, value) < 1e-4


def test_low_rank_before_rope_beats_after() -> None:
    """The same rank spent on rotated keys, by an SVD of exactly those keys, leaves most of them out."""
    key, value = planted(24)
    encoded = room(LowRank(rank=24, value_rank=24))
    encoded.encode(slice(None), 0, 0, key, value)
    before, _ = encoded.decode(0, slice(0, 1), slice(2), NUM_TOKENS)
    left, singular, right = torch.linalg.svd(key, full_matrices=False)
    after = (left[..., :24] * singular[..., None, :24]) @ right[..., :24, :]
    needed = int((singular.square().cumsum(-1) / singular.square().sum(-1, keepdim=True) < 0.99).sum(-1).max()) + 1

    assert relative(before - key, key) < 1e-4
    assert relative(after - key, key) > 0.4
    assert needed >= 96


def test_full_rank_loses_nothing_but_rounding() -> None:
    key, value = torch.randn(2, 1, 2, NUM_TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    encoded = room(LowRank(rank=1.0, value_rank=HEAD_DIM, group_size=128))
    encoded.encode(slice(None), 0, 0, key[:, :, :128], value[:, :, :128])
    encoded.encode(slice(None), 0, 128, key[:, :, 128:], value[:, :, 128:])
    got_key, got_value = encoded.decode(0, slice(0, 1), slice(2), NUM_TOKENS)

    assert relative(got_key - key, key) < 1e-5
    assert relative(got_value - value, value) < 1e-5


def test_half_precision_adds_only_its_own_rounding() -> None:
    key, value = planted(24)
    encoded = room(LowRank(rank=24, value_rank=24), dtype=torch.bfloat16)
    encoded.encode(slice(None), 0, 0, key.bfloat16(), value.bfloat16())
    got_key, got_value = encoded.decode(0, slice(0, 1), slice(2), NUM_TOKENS)

    assert relative(got_key.float() - key, key) < 0.01
    assert relative(got_value.float() - value, value) < 0.01


def test_bytes_follow_the_ranks() -> None:
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in room(LowRank(rank=0.25, value_rank=0.5)).tensors)

    assert num_bytes == 2 * 2 * (NUM_TOKENS + HEAD_DIM) * (32 + 64) * 4


def test_what_is_not_finite_is_not_hidden() -> None:
    key, value = planted(24)
    key[0, 0, 5, 3] = float("inf")
    encoded = room(LowRank())
    encoded.encode(slice(None), 0, 0, key, value)

    assert not encoded.decode(0, slice(0, 1), slice(1), NUM_TOKENS)[0].isfinite().all()


def test_knobs_are_checked() -> None:
    for wrong in (0, 1.5, True, -0.5):
        with pytest.raises(ValueError, match="rank must be a whole number of at least 1 or a fraction"):
            LowRank(rank=wrong)
    with pytest.raises(Unsupported, match=r"value_rank 0.75 is 96, .* 64 tokens of a group"):
        room(LowRank(rank=0.5, value_rank=0.75, group_size=64))
    with pytest.raises(Unsupported, match="rank 200 is 200, more than head_dim 128"):
        room(LowRank(rank=200, group_size=256))
