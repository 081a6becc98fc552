import pytest
import torch

from codesign.engine.kernels import kv_attention
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import Queries
from codesign.engine.kv.codecs.fp8 import Fp8
from codesign.engine.kv.codecs.int8 import Int8


def error(codec: Fp8 | Int8, rows: torch.Tensor) -> float:
    return float((codec.decode(codec.encode(rows), torch.float32) - rows).norm() / rows.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_value_is_off_by_more_than_half_of_its_last_bit(dtype: torch.dtype) -> None:
    rows = torch.randn(4, 50, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    codec = Fp8()
    off = (codec.decode(codec.encode(rows), torch.float32) - rows.float()).abs()

    smallest = 2**-10 / 448 * rows.float().abs().amax(dim=-1, keepdim=True)  # half a step of the subnormals
    assert (off <= torch.maximum(rows.float().abs() * (2**-4 + 2**-8), 1.01 * smallest)).all()


def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden() -> None:
    rows = torch.zeros(3, 8)
    rows[0, 2], rows[1, 3] = float("nan"), float("inf")
    codec = Fp8()
    decoded = codec.decode(codec.encode(rows), torch.float32)

    assert not decoded[0].isfinite().all()
    assert not decoded[1].isfinite().all()
    assert torch.equal(decoded[2], rows[2])


def test_fp8_beats_int8_on_rows_with_a_huge_value_and_loses_on_even_ones() -> None:
    even = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    spiky = even.clone()
    spiky[:, 7] = 300.0
    rest = [index for index in range(64) if index != 7]

    def error_of_the_rest(codec: Fp8 | Int8) -> float:
        decoded = codec.decode(codec.encode(spiky), torch.float32)
        return float((decoded - spiky)[:, rest].norm())

    assert error_of_the_rest(Fp8()) < 0.2 * error_of_the_rest(Int8())
    assert error(Int8(), even) < 0.5 * error(Fp8(), even)


@pytest.mark.skipif(isinstance(kv_attention.load(), Missing), reason=str(kv_attention.load()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_reads_every_finite_code_as_torch_does(dtype: torch.dtype) -> None:
    """One row per code and a query that sees one row only: what it finds is that row."""
    kernel = kv_attention.load()
    assert not isinstance(kernel, Missing)
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    value = codes[:, None, None, None].expand(-1, 1, 1, 32).contiguous()
    scale = torch.ones(len(codes), 1, 1, 1, dtype=torch.bfloat16)
    query, past = torch.zeros(len(codes), 1, 32, dtype=dtype), [0] * len(codes)
    queries = Queries(query, past, num_kv_heads=1, num_tokens=1, num_rows=1, scale=1.0, want_columns=False)
    kernel.rows("fp8", queries, (value, scale), (value, scale))

    out = queries.out.view(len(codes), 32).float()

    assert torch.equal(out, codes.view(torch.float8_e4m3fn).float()[:, None].expand(-1, 32))
