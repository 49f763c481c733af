"""The comparison of training with its peers, at a tiny size: both sides learn the same."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import train_cases
import train_vs_peers

TINY = train_cases.llama(64, 16, 1, 32)
PADDINGS = ["one width", "unpacked", "packed"]


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="parity extra is not installed")
def test_both_sides_learn_the_same_and_the_table_says_how_each_pads(tmp_path):
    stores = train_cases.long_tailed(tmp_path, TINY.vocab_size, 16)
    cases = [
        train_cases.Case("tiny", "long-tailed", method, TINY, store, 4, 4)
        for method, store in zip(("sft", "dpo"), stores, strict=True)
    ]
    rows = list(train_vs_peers.compare(cases, tmp_path, rounds=1))
    assert [(row["method"], row["padding"]) for row in rows] == [
        (method, padding) for method in ("sft", "dpo") for padding in PADDINGS
    ]
    for row in rows:
        assert row["apart"]["first_loss"] <= train_vs_peers.SAME_START
        assert row["apart"]["loss_after_3"] <= train_vs_peers.SAME_AFTER_3
        assert len(row["ours"]["all_seconds"]) == len(row["peer"]["all_seconds"]) == 1
        assert len(train_vs_peers.line(row)) == len(train_vs_peers.HEAD)
        json.dumps(row)
    for one_width, unpacked, packed in (rows[:3], rows[3:]):
        assert unpacked["ours"] == one_width["ours"]
        assert unpacked["ours"]["fill"] < packed["ours"]["fill"] <= 1
        assert one_width["peer"]["fill"] <= unpacked["peer"]["fill"] < packed["ours"]["fill"]


def test_sides_that_part_are_not_timed():
    ours = [(2.0, 1.0), (1.9, 1.0), (1.8, 1.0), (1.7, 1.0)]
    peers = [(2.00005, 1.0001), (0.0, 0.0), (0.0, 0.0), (1.7005, 0.0)]
    found = train_vs_peers.agreement(ours, peers)
    assert found["first_loss"] == pytest.approx(5e-5)
    assert found["loss_after_3"] == pytest.approx(5e-4)
    for at, changed in (
        (0, (2.001, 1.0)),
        (0, (2.0, 1.01)),
        (3, (1.71, 1.0)),
        (3, (float("nan"), 1.0)),
    ):
        with pytest.raises(train_vs_peers.Disagreement, match="differs by"):
            train_vs_peers.agreement(ours, [*peers[:at], changed, *peers[at + 1 :]])


@pytest.mark.parametrize("pack", [False, True])
def test_streams_fit_and_the_cases_keep_their_updates(tmp_path, pack):
    stores = train_cases.long_tailed(tmp_path, TINY.vocab_size, 40)
    for method, store in zip(("sft", "dpo"), stores, strict=True):
        case = train_cases.Case("tiny", "long-tailed", method, TINY, store, 16, 5)
        placements = case.placements(pack)
        assert len(placements) == 5
        counts = [len(placement.records) for placement in placements]
        if pack:
            assert sum(counts) / 5 == pytest.approx(16, rel=0.4)
        else:
            assert counts == [16] * 5
