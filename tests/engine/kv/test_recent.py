import torch

from codesign.engine.kv.recent import RecentQueries, VictimQueue

CPU = torch.device("cpu")


def test_rejected_queries_are_never_in_the_window() -> None:
    """Window 3, up to 2 pending: 5 and 6 are written, 6 is rejected and comes again."""
    recent = RecentQueries(1, 2, 1, 1, window_tokens=3, max_query_len=2, scale=1.0, dtype=torch.float32, device=CPU)
    slot = torch.tensor([1])

    def write(*positions: int, value: float = 0.0) -> None:
        query = torch.tensor([[[position + value]] for position in positions])
        recent.write(0, recent.rows(1, torch.tensor(positions)), query)

    write(2, 3, 4)
    write(5, 6, value=0.5)
    assert recent.before(slot, torch.tensor([5])).flatten().tolist() == [2, 3, 4]
    assert recent.before(slot, torch.tensor([6])).flatten().tolist() == [3, 4, 5.5]
    write(6, 7)
    assert recent.before(slot, torch.tensor([8])).flatten().tolist() == [5.5, 6, 7]


def test_named_victims_are_taken_in_order_and_slots_do_not_mix() -> None:
    queue = VictimQueue(2, 3, 1, 4, torch.int16, CPU)
    named = torch.arange(16).view(2, 2, 1, 4)

    assert queue.needs(0, 1)
    queue.fill([2, 0], named)
    assert queue.take([2], 1).flatten().tolist() == [0, 8]
    assert queue.take([0, 2], 2).flatten(1).tolist() == [[4, 5, 1, 2], [12, 13, 9, 10]]
    assert not queue.needs(2, 1) and queue.needs(2, 2)
    queue.clear(0)
    assert queue.needs(0, 1) and not queue.needs(2, 1)
