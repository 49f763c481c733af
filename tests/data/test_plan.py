"""Every record exactly once an epoch, in rows that hold it, whoever reads them."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxconv.data.batches import Share
from jaxconv.data.plan import plan, plan_counted, plan_once
from jaxconv.errors import Refused

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=60)


def assert_fits(placement, lengths):
    """No two examples share a cell, and none leaves its row."""
    p = placement.packing
    assert (p.length == np.asarray(lengths)[placement.records]).all()
    assert (p.start + p.length <= p.width).all() and (p.row < p.rows).all()
    taken = np.zeros((p.rows, p.width), int)
    for row, start, length in zip(p.row, p.start, p.length, strict=True):
        taken[row, start : start + length] += 1
    assert taken.max() <= 1


@given(LENGTHS, st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_every_epoch_has_every_example_once(lengths, rows, epochs, pack):
    placements = plan(lengths, rows=rows, width=20, seed=3, epochs=epochs, pack=pack)
    for placement in placements:
        assert_fits(placement, lengths)
    sequence = np.concatenate([p.records for p in placements])
    assert len(sequence) == epochs * len(lengths)
    for epoch in np.split(sequence, epochs):
        assert sorted(epoch) == list(range(len(lengths)))
    # An update begins where the one before has ended.
    ends = np.cumsum([0] + [len(p.records) for p in placements])
    assert [p.first for p in placements] == ends[:-1].tolist()


def test_orders_differ_by_epoch_and_seed_and_are_repeatable():
    lengths = [3] * 50
    make = lambda seed: np.concatenate(  # noqa: E731
        [p.records for p in plan(lengths, rows=4, width=20, seed=seed, epochs=2)]
    )
    one = make(0)
    np.testing.assert_array_equal(one, make(0))
    assert (one[:50] != one[50:]).any() and (one != make(1)).any()


def test_rows_are_full():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(2, 30, 5000), 10, 250).astype(int)
    placements = plan(lengths, rows=16, width=256, seed=0, steps=40)
    fill = np.mean([p.packing.length.sum() / (16 * 256) for p in placements])
    assert fill > 0.96


def test_without_packing_each_example_has_a_row():
    placements = plan([5] * 10, rows=4, width=20, seed=0, epochs=1, pack=False)
    assert [len(p.records) for p in placements] == [4, 4, 2]
    assert all(len(set(p.packing.row)) == len(p.records) for p in placements)


def test_rows_without_packing_are_as_wide_as_their_update_needs():
    lengths = [5] * 30 + [100] + [200]
    placements = plan(lengths, rows=4, width=192 + 20, seed=0, epochs=1, pack=False)
    for placement in placements:
        longest = max(lengths[i] for i in placement.records)
        assert placement.packing.width == {5: 64, 100: 128, 200: 192 + 20}[longest]
    assert len({p.packing.width for p in placements}) == 3


@given(LENGTHS)
def test_scoring_goes_through_all_in_order(lengths):
    placements = plan_once(lengths, rows=3, width=20)
    assert np.concatenate([p.records for p in placements]).tolist() == list(range(len(lengths)))
    for placement in placements:
        assert_fits(placement, lengths)


def test_counted_updates_take_so_many_examples_each():
    lengths = [7, 9, 3, 4, 20]
    placements = plan_counted(lengths, examples=4, rows_multiple=2, width=20, seed=0, steps=5)
    assert [len(p.records) for p in placements] == [4] * 5
    seen = collections.Counter(np.concatenate([p.records for p in placements]).tolist())
    assert set(seen.values()) == {4}  # 20 places, four epochs of five
    for placement in placements:
        assert_fits(placement, lengths)
        assert placement.packing.rows % 2 == 0


def test_refusals_name_what_is_wrong():
    with pytest.raises(Refused, match="0 examples"):
        plan([], rows=1, width=8, seed=0, steps=1)
    with pytest.raises(Refused, match="an example has 9 tokens; a row holds 8"):
        plan([3, 9], rows=1, width=8, seed=0, steps=1)
    with pytest.raises(Refused, match=r"config\.batch\.rows=4; .* processes, 3"):
        Share(4, 0, 3)


def test_a_share_may_be_any_rows():
    """As a mesh lays them out whose devices are not in the order of their processes."""
    placement = plan([3, 5, 4, 2, 5, 5, 3, 5], rows=8, width=5, seed=0, epochs=1)[0]
    seen = []
    for held in ([0, 3], [1, 2]):
        records, packing = Share(4, 0, 2, np.array(held)).of(placement)
        assert packing.rows == 4
        for record, row, start, length in zip(
            records, packing.row, packing.start, packing.length, strict=True
        ):
            batch, within = divmod(row, 2)
            at = list(placement.records).index(record)
            whole = placement.packing
            assert whole.row[at] == batch * 4 + held[within]
            assert (whole.start[at], whole.length[at]) == (start, length)
            seen.append(int(record))
    assert sorted(seen) == sorted(placement.records.tolist())


@given(LENGTHS, st.sampled_from([(1, 2), (2, 3), (3, 1), (6, 4)]), st.integers(0, 10))
def test_processes_share_the_rows_and_may_change_in_number(lengths, processes, after):
    """Some updates by a number of processes, the rest by another: every record once an epoch."""
    rows, microbatches = 12, 2
    placements = plan(lengths, rows=rows * microbatches, width=20, seed=1, epochs=2)
    taken = []
    for i, placement in enumerate(placements):
        count = processes[0] if i < after else processes[1]
        whole = placement.packing.scatter(
            [[r + 1] * n for r, n in zip(placement.records, placement.packing.length, strict=True)],
            np.int64,
        )
        parts = []
        for process in range(count):
            records, packing = Share(rows, process, count).of(placement)
            taken.append(records)
            cells = packing.scatter(
                [[r + 1] * n for r, n in zip(records, packing.length, strict=True)], np.int64
            )
            parts.append(cells.reshape(microbatches, rows // count, 20))
        # Together they hold the rows that one process would.
        np.testing.assert_array_equal(np.concatenate(parts, axis=1).reshape(-1, 20), whole)
    seen = collections.Counter(np.concatenate(taken).tolist())
    assert seen == dict.fromkeys(range(len(lengths)), 2)
