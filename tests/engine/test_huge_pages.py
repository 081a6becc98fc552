"""Zeros in memory of their own: as many bytes as asked for, writable, given back, refused where there is none."""

import gc
import sys
from pathlib import Path

import pytest
import torch

from codesign.engine.huge_pages import HUGE_PAGE_BYTES, huge_zeros


@pytest.mark.parametrize("num_rows", [0, 1, HUGE_PAGE_BYTES // 256 - 1, HUGE_PAGE_BYTES // 256, 3 * 8192 + 5])
def test_rows_are_zeros_that_can_be_written_and_no_byte_more(num_rows: int) -> None:
    rows = huge_zeros((num_rows, 128), dtype=torch.bfloat16)

    assert rows.shape == (num_rows, 128) and rows.is_contiguous()
    assert not rows.any()
    assert rows.untyped_storage().nbytes() == rows.nbytes == num_rows * 256
    assert torch.equal(rows.fill_(1.5), torch.full((num_rows, 128), 1.5, dtype=torch.bfloat16))


def test_rows_of_several_huge_pages_start_on_a_line_of_the_cache() -> None:
    assert huge_zeros((5, HUGE_PAGE_BYTES), dtype=torch.int8).data_ptr() % 64 == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_given_back_with_the_last_tensor() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    rows = huge_zeros((32, HUGE_PAGE_BYTES), dtype=torch.int8)
    view, held = rows[3:], resident()
    del rows
    assert held - resident() < HUGE_PAGE_BYTES

    del view
    gc.collect()
    assert held - resident() > 24 * HUGE_PAGE_BYTES


def test_more_than_there_is_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="no memory"):
        huge_zeros((1 << 46, 128), dtype=torch.bfloat16)
