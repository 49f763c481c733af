"""The benchmark of `decode_attention`, on a case that is too small to say anything."""

import json
import sys

import pytest


@pytest.fixture
def bench(load_bench):
    return load_bench("decode_attention")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_forms_agree_and_are_measured(bench, dtype, capsys):
    case = bench.Case(3, 24, 12, 4, 2, 8, dtype)
    result = bench.measure(case, rounds=1, implementation=None)
    assert list(result["seconds"])[:3] == ["ours", "xla", "dpa"]
    assert all(seconds > 0 for seconds in result["seconds"].values())
    bench.print_row(case, result, bandwidth=1e9)
    assert capsys.readouterr().out.split()[:5] == ["3", "24", "12", "4/2x8", dtype]


def test_forms_that_do_not_agree_are_not_measured(bench, monkeypatch):
    right = bench.by_lengths

    def wrong(*arrays, scale):
        return right(*arrays, scale=2 * scale)

    monkeypatch.setattr(bench, "by_lengths", wrong)
    with pytest.raises(SystemExit, match=r"dpa is .* away from ours"):
        bench.measure(bench.Case(3, 24, 12, 4, 2, 8, "float32"), rounds=1, implementation=None)


def test_a_report_is_written_and_a_form_without_room_is_told(bench, monkeypatch, tmp_path, capsys):
    def fails(*arrays, **options):
        raise MemoryError("RESOURCE_EXHAUSTED: too large")

    case = bench.Case(2, 16, 16, 2, 1, 8, "float32")
    monkeypatch.setattr(bench, "decode_attention", fails)
    monkeypatch.setattr(bench, "QUICK", [case])
    monkeypatch.setattr(bench, "copy_bandwidth", lambda rounds: 1e9)
    monkeypatch.setattr(sys, "argv", ["", "--quick", "--rounds=1", f"--out={tmp_path / 'out'}"])
    bench.main()
    assert "out of memory" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out").read_text())["cases"]
    assert row["filled"] == 16
    assert row["errors"] == {"ours": "out of memory", "xla": "out of memory"}


def test_bytes_of_the_filled_cache(bench):
    case = bench.Case(
        rows=8, keys=1024, filled=256, heads=14, kv_heads=2, width=64, dtype="bfloat16"
    )
    assert case.filled_bytes == 2 * 8 * 2 * 256 * 64 * 2
