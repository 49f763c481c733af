"""The benchmark of `sample`, on a case that is too small to say anything."""

import json
import sys

import pytest


@pytest.fixture
def bench(load_bench):
    return load_bench("sampling")


def test_all_forms_agree_and_the_report_has_them(bench, monkeypatch, tmp_path, capsys):
    case = bench.Case(6, 300, "float32", "peaked", "mixed")
    monkeypatch.setattr(bench, "QUICK", [case])
    out = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["sampling.py", "--quick", "--rounds=1", f"--out={out}"])
    bench.main()
    assert "sort/ours" in capsys.readouterr().out
    report = json.loads(out.read_text())
    [found] = report["cases"]
    assert {"ours", "sort", "bisection"} <= set(found["seconds"])
    assert report["machine"]["copy_bytes_per_s"] > 0


def test_tokens_that_are_not_kept_stop_it(bench, monkeypatch):
    def least(x, keys, **parameters):
        return x.argmin(-1), x[:, 0], x[:, 0]

    monkeypatch.setattr(bench, "sort", least)
    with pytest.raises(SystemExit, match=r"sort draws tokens of .* that we do not keep"):
        bench.measure(bench.Case(6, 300, "float32", "peaked", "mixed"), 1, None)
