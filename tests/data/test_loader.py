"""Batches from a store: the same whatever the process that asks, from any position on."""

import numpy as np
import pytest

from jaxconv.data import token_store
from jaxconv.data.batches import Assembler, Share
from jaxconv.data.examples import TokenExample
from jaxconv.data.loader import Loader
from jaxconv.data.plan import plan
from jaxconv.errors import Refused


def stream(i: int, n: int) -> TokenExample:
    mask = np.arange(n) >= n // 2
    mask[0] = False
    return TokenExample(np.full(n, i, np.int32), mask)


@pytest.fixture
def store(tmp_path):
    """23 pairs of streams whose tokens are 2i and 2i + 1."""
    rng = np.random.default_rng(0)
    examples = [
        (i, [stream(2 * i, int(rng.integers(2, 8))), stream(2 * i + 1, int(rng.integers(2, 8)))])
        for i in range(23)
    ]
    token_store.build(tmp_path / "pairs", iter(examples), {"whole": 23}, streams=2)
    return token_store.load(tmp_path / "pairs")


def test_a_store_gives_back_what_went_in(store, tmp_path):
    assert len(store) == 23 and store.counts == {"whole": 23}
    for i in range(23):
        for side, found in enumerate(store[i]):
            expected = stream(2 * i + side, len(found.tokens))
            np.testing.assert_array_equal(found.tokens, expected.tokens)
            np.testing.assert_array_equal(found.mask, expected.mask)
    assert store.lengths.tolist() == store.stream_lengths.sum(1).tolist()
    assert not list(tmp_path.glob(".*"))


def test_an_empty_store_can_be_read(tmp_path):
    token_store.build(tmp_path / "none", iter(()), {}, streams=1)
    assert len(token_store.load(tmp_path / "none")) == 0


def updates(store, share=None, reference=None):
    share = share or Share(4)
    placements = plan(store.lengths, rows=8, width=16, seed=5, epochs=2)
    return Loader(placements, Assembler(store, share, seed=1, reference=reference))


def test_both_sides_of_a_pair_are_neighbours_in_one_row(store):
    reference = np.arange(46, dtype=np.float32).reshape(23, 2)
    seen = []
    with updates(store, reference=reference) as loader:
        for update in loader:
            batch = update.batch
            for row in np.ndindex(batch.tokens.tokens.shape[:2]):
                ids, tokens = batch.tokens.segment_ids[row], batch.tokens.tokens[row]
                for segment in range(1, ids.max() + 1):
                    inside = tokens[ids == segment]
                    assert len(set(inside.tolist())) == 1
                    # Chosen streams have even numbers and lie in odd segments.
                    assert inside[0] % 2 == (segment + 1) % 2
                    if segment % 2 == 0:
                        assert inside[0] == tokens[ids == segment - 1][0] + 1
                    assert batch.reference[row][segment - 1] == inside[0]
                    seen.append(int(inside[0]))
    assert sorted(seen) == sorted([*range(46), *range(46)])


def test_a_loader_goes_on_from_its_position(store):
    with updates(store) as loader:
        whole = list(loader)
        assert loader.position == 46
    for stop in range(len(whole) + 1):
        with updates(store) as loader:
            for _ in range(stop):
                next(loader)
            position = loader.position
        with updates(store) as loader:
            loader.seek(position)
            rest = list(loader)
        assert len(rest) == len(whole) - stop
        for a, b in zip(rest, whole[stop:], strict=True):
            np.testing.assert_array_equal(a.batch.tokens.tokens, b.batch.tokens.tokens)
            np.testing.assert_array_equal(a.batch.dropout_seeds, b.batch.dropout_seeds)


def test_processes_hold_the_rows_that_one_would(store):
    with updates(store) as loader:
        whole = next(loader).batch
    parts = []
    for process in range(2):
        with updates(store, Share(4, process, 2)) as loader:
            parts.append(next(loader).batch)
    for name in ("tokens", "targets", "positions", "segment_ids", "mask"):
        joined = np.concatenate([getattr(p.tokens, name) for p in parts], axis=1)
        np.testing.assert_array_equal(joined, getattr(whole.tokens, name))
    joined = np.concatenate([p.dropout_seeds for p in parts], axis=1)
    np.testing.assert_array_equal(joined, whole.dropout_seeds)


def test_a_position_of_other_data_is_refused(store):
    with updates(store) as loader, pytest.raises(Refused, match="before example 1 of the sequence"):
        loader.seek(1)


def test_an_error_of_a_batch_is_raised_where_it_is_asked_for(store):
    def broken(placement):
        raise ValueError("torn record")

    placements = plan(store.lengths, rows=8, width=16, seed=5, epochs=1)
    with Loader(placements, broken) as loader, pytest.raises(ValueError, match="torn record"):
        next(loader)
