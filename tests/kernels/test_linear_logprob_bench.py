"""The benchmark of `linear_logprob`, on a case that is too small to say anything."""

import pytest


@pytest.fixture
def bench(load_bench):
    return load_bench("linear_logprob")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_forms_agree_and_are_measured(bench, dtype, capsys):
    case = bench.Case(32, 8, 50, dtype)
    rows = bench.measure(case, rounds=1)
    assert [row["form"] for row in rows][:3] == ["naive", "ours", "optax"]
    assert all(row["forward_s"] > 0 and row["step_s"] > 0 for row in rows)
    bench.print_table(case, rows)
    assert "ours" in capsys.readouterr().out


def test_forms_that_do_not_agree_are_not_measured(bench, monkeypatch):
    monkeypatch.setattr(bench, "ours", lambda *arrays: 1.1 * bench.naive(*arrays))
    with pytest.raises(SystemExit, match="ours gives"):
        bench.measure(bench.Case(32, 8, 50, "float32"), rounds=1)


def test_a_form_without_room_is_told_and_the_others_are_measured(bench, monkeypatch, capsys):
    def fails(*arrays):
        raise MemoryError("RESOURCE_EXHAUSTED: too large")

    monkeypatch.setattr(bench, "naive", fails)
    case = bench.Case(32, 8, 50, "float32")
    rows = bench.measure(case, rounds=1)
    assert rows[-1] == {"form": "naive", "error": "out of memory"}
    bench.print_table(case, rows)
    assert "out of memory" in capsys.readouterr().out
