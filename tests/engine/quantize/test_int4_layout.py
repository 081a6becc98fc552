import pytest
import torch

from codesign.engine.quantize import cpu, int4_layout


@pytest.mark.parametrize("num_out", [16, 32, 48, 64, 80, 96, 112, 128, 208])
@pytest.mark.parametrize("num_in", [32, 64, 896])
def test_unpacking_gives_back_what_aten_packed(num_out: int, num_in: int) -> None:
    codes = torch.randint(0, 16, (num_out, num_in), dtype=torch.uint8)

    packed, is_readable = int4_layout.pack(codes)

    assert is_readable
    assert packed.numel() * 2 == codes.numel()


def test_slices_agree_with_the_whole() -> None:
    codes = torch.randint(0, 16, (272, 64), dtype=torch.uint8)
    packed, _ = int4_layout.pack(codes)

    for start, stop in [(0, 64), (64, 192), (128, 272), (256, 272)]:
        out = torch.empty(64, stop - start)
        int4_layout.unpack(packed, start, stop, out)
        assert torch.equal(out.t() + 8, codes[start:stop].float())


def test_a_wrong_idea_of_the_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    other = "AVX512" if cpu.capability() != "AVX512" else "AVX2"
    codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8)
    monkeypatch.setattr(cpu, "capability", lambda: other)

    _, is_readable = int4_layout.pack(codes)

    assert not is_readable


def test_the_order_of_a_cpu_without_vectors_pairs_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """ATen's scalar code packs codes 2j and 2j + 1 of a block of 32 outputs into byte j of each input."""
    codes = torch.randint(0, 16, (64, 32), dtype=torch.uint8)
    blocks = codes.view(2, 32, 32).transpose(1, 2)  # [block, in, 32 outputs]
    packed = (blocks[..., 0::2] | blocks[..., 1::2] << 4).contiguous().view(64, 16)
    monkeypatch.setattr(cpu, "capability", lambda: "DEFAULT")
    out = torch.empty(32, 64)

    int4_layout.unpack(packed, 0, 64, out)

    assert torch.equal(out.t() + 8, codes.float())
