"""Rows of texts: every token of every text once, in few shapes that are nearly full."""

import numpy as np
import pytest

from jaxconv.data.text_rows import batches, row_widths
from jaxconv.errors import Refused


def texts_of(lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(1, 99, n).tolist() for n in lengths]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("longest", "most"), [(512, 400), (100, 100), (2000, 1500)])
def test_every_text_is_there_once(longest, most, streams):
    texts = texts_of(np.random.default_rng(1).integers(1, most + 1, 300))
    seen = []
    for batch in batches(texts, longest=longest, batch_tokens=1024, streams=streams):
        rows = batch.rows
        n = len(batch.records)
        if batch.is_stream:
            assert streams and rows.tokens.shape[0] == 1
            assert (np.diff(rows.length) <= 0).all()
            np.testing.assert_array_equal(rows.first[1:n], np.cumsum(rows.length[: n - 1]))
        else:
            assert rows.tokens.shape[1] in row_widths(longest)
            assert not streams or max(rows.length) <= 64
        assert (rows.length[n:] == 0).all()
        assert (rows.owner == len(rows.first)).sum() == rows.tokens.size - rows.length.sum()
        np.testing.assert_array_equal(rows.segment_ids == 0, rows.owner == len(rows.first))
        for place, i in enumerate(batch.records):
            inside = slice(rows.first[place], rows.first[place] + rows.length[place])
            assert rows.tokens.reshape(-1)[inside].tolist() == texts[i]
            assert (rows.owner.reshape(-1)[inside] == place).all()
            np.testing.assert_array_equal(
                rows.positions.reshape(-1)[inside], np.arange(len(texts[i]))
            )
            row = rows.first[place] // rows.tokens.shape[1]
            own = rows.owner[row][rows.segment_ids[row] == rows.segment_ids.reshape(-1)[inside][0]]
            assert (own == place).all()  # no other text of the row has its segment
        seen += batch.records.tolist()
    assert sorted(seen) == list(range(300))


def test_short_texts_fill_their_rows():
    texts = texts_of(np.random.default_rng(1).integers(5, 40, 2000))
    cells = sum(batch.rows.tokens.size for batch in batches(texts, longest=512))
    assert sum(map(len, texts)) / cells > 0.97


def test_long_texts_fill_their_streams():
    texts = texts_of(np.random.default_rng(1).integers(5, 401, 1000))
    found = list(batches(texts, longest=512, streams=True))
    assert sum(map(len, texts)) / sum(batch.rows.tokens.size for batch in found) > 0.98
    assert len({batch.rows.tokens.shape for batch in found}) <= 4


def test_a_single_text_takes_a_single_row():
    (batch,) = batches([[1, 2, 3]], longest=512)
    assert batch.rows.tokens.shape == (1, 64)
    (batch,) = batches([[1, 2, 3]], longest=10)
    assert batch.rows.tokens.shape == (1, 10)


@pytest.mark.parametrize("length", [0, 11])
def test_a_text_of_no_length_or_too_long_is_refused(length):
    with pytest.raises(Refused, match=f"text 1 has {length} tokens; it may have 1 to 10"):
        list(batches([[1], [1] * length], longest=10))
