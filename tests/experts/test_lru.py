"""The bookkeeping of slots, by hand."""

from __future__ import annotations

import random

from ragmoe.experts.lru import Counters, SlotTable


def bring(table: SlotTable, expert: int, keep: tuple[int, ...] = ()) -> int | None:
    """Use an expert, in a slot of its own if it has none; who had to leave."""
    if expert in table:
        table.use(expert)
        return None
    slot, leaving = table.free(keep)
    table.fill(expert, slot)
    return leaving


def test_the_least_recently_used_leaves() -> None:
    table = SlotTable(3)
    assert [bring(table, expert) for expert in (7, 8, 9)] == [None, None, None]
    assert table.experts() == [7, 8, 9]
    assert bring(table, 7) is None and table.experts() == [8, 9, 7]
    assert bring(table, 1) == 8 and table.experts() == [9, 7, 1]
    assert bring(table, 2, keep=(9, 1)) == 7 and table.experts() == [9, 1, 2]
    assert 8 not in table and 9 in table
    assert sorted(table.use(expert) for expert in (9, 1, 2)) == [0, 1, 2]


def test_against_an_obvious_list() -> None:
    table, want, draw = SlotTable(4), [], random.Random(3)
    for _ in range(300):
        expert = draw.randrange(9)
        left = bring(table, expert)
        if expert in want:
            want.remove(expert)
            assert left is None
        elif len(want) == 4:
            assert left == want.pop(0)
        want.append(expert)
        assert table.experts() == want
        assert sorted(table.use(one) for one in list(want)) == list(range(len(want)))


def test_counters() -> None:
    both = Counters(hits=3, misses=1, bytes_read=8) + Counters(hits=1, prefetched=2, prefetched_used=1, evictions=4)
    assert both == Counters(4, 1, 2, 1, 4, 8)
    assert both.hit_rate == 0.8 and Counters().hit_rate is None
