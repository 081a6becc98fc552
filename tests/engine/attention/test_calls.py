import random

import torch

from codesign.engine.attention.calls import Call, Span, cut

CPU = torch.device("cpu")


def spans(rows: list[int], *, num_queries: int = 1, slots: list[int] | None = None) -> list[Span]:
    slots = list(range(len(rows))) if slots is None else slots
    return [
        Span(slot, index * num_queries, num_queries, own - num_queries, False, False)
        for index, (slot, own) in enumerate(zip(slots, rows, strict=True))
    ]


def calls(parts: list[Span], *, num_groups: int = 2) -> tuple[Call, ...]:
    return cut(parts, num_groups=num_groups, dtype=torch.float32, device=CPU)


def test_one_long_and_seven_short_sequences_read_little_more_than_their_rows() -> None:
    rows = [2048] + [64] * 7
    for order in (rows, rows[::-1], [64] * 3 + [2048] + [64] * 4):
        work = sum(call.work for call in calls(spans(order)))

        assert work <= 1.3 * sum(rows)


def test_work_follows_the_sum_of_lengths_whatever_the_order() -> None:
    rng = random.Random(0)
    for _ in range(200):
        rows = [rng.choice((rng.randint(1, 2048), rng.randint(1, 64))) for _ in range(rng.randint(1, 32))]
        made = calls(spans(rows))

        assert sum(call.work for call in made) <= 1.2 * sum(rows) + 64 * len(made) + 1
        assert [span for call in made for span in call.spans] == spans(rows)


def test_equal_neighbours_share_one_call_without_a_mask() -> None:
    (call,) = calls(spans([100] * 8))

    assert call.mask is None and call.slots == slice(0, 8) and call.tokens == slice(0, 8)


def test_a_gap_between_slots_or_an_unsorted_batch_is_never_bridged() -> None:
    assert [call.slots for call in calls(spans([9] * 4, slots=[0, 1, 3, 2]))] == [
        slice(0, 2),
        slice(3, 4),
        slice(2, 3),
    ]


def test_mask_hides_padding_rows_and_later_drafts() -> None:
    (call,) = calls(spans([5, 7], num_queries=3), num_groups=2)

    assert call.mask is not None and call.mask.shape == (2, 1, 6, 7)
    seen = (call.mask == 0).sum(dim=-1).squeeze(1)
    assert seen.tolist() == [[3, 4, 5, 3, 4, 5], [5, 6, 7, 5, 6, 7]]


def test_a_first_chunk_is_causal_and_a_later_one_masked() -> None:
    first, later = calls([Span(0, 0, 4, 0, True, False), Span(1, 4, 4, 6, True, True)])

    assert first.is_causal and first.mask is None
    assert not later.is_causal and later.mask is not None
    assert (later.mask[0, 0] == 0).sum(dim=-1).tolist() == [7, 8, 9, 10]
