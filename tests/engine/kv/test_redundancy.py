import pytest
import torch

from codesign.engine.kv import redundancy
from codesign.engine.kv.redundancy import key_redundancy


def found(key: list[list[float]], position: list[int], threshold: float = 0.5) -> torch.Tensor:
    return key_redundancy(torch.tensor([[key]]), torch.tensor([[position]], dtype=torch.int32), threshold=threshold)[
        0, 0
    ]


def test_only_the_newest_of_three_duplicates_is_spared() -> None:
    """Rows 0, 1, 2 are one direction, row 3 another. Cosines: 0 is blamed by 1 and 2, 1 by 0 and 2, and 2 by nobody but
    itself: for 0 and 1 it is the newest that resembles them. Row 1 is the newest that resembles 2, so 2 spares it."""
    key = [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]

    blame = torch.tensor([2 / 4, 1 / 4, 0.0, 0.0])

    torch.testing.assert_close(found(key, [0, 1, 2, 3]), blame.softmax(0))


def test_newest_means_position_and_not_row() -> None:
    key = [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]

    moved = found([key[2], key[3], key[0], key[1]], [9, 30, 4, 7])

    torch.testing.assert_close(moved, found(key, [4, 7, 9, 30])[[2, 3, 0, 1]])


def test_length_of_a_key_says_nothing() -> None:
    key = torch.randn(1, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    position = torch.arange(20, dtype=torch.int32).expand(1, 2, -1)

    longer = key_redundancy(key * torch.arange(1.0, 21.0)[:, None], position, threshold=0.5)

    torch.testing.assert_close(longer, key_redundancy(key, position, threshold=0.5))


def test_tiles_change_nothing_but_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    key = torch.randn(2, 2, 50, 4, generator=torch.Generator().manual_seed(0))
    position = torch.arange(50, dtype=torch.int32).flip(0).expand(2, 2, -1)
    whole = key_redundancy(key, position, threshold=0.3)
    monkeypatch.setattr(redundancy, "_TILE_SCORES", 2 * 2 * 50 * 7)

    torch.testing.assert_close(key_redundancy(key, position, threshold=0.3), whole)


def test_a_key_of_zeros_resembles_nothing() -> None:
    assert found([[0.0, 0.0], [1.0, 0.0]], [0, 1]).tolist() == [0.5, 0.5]
