"""report.json keeps its schema, report.md shows conversations literally, plots are real PNGs."""

import json
import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxconv.evals import report
from jaxconv.evals.report import Quantity, Report
from jaxconv.evals.statistics import Estimate
from jaxconv.train.workdir import Workdir


@pytest.fixture
def workdir(tmp_path):
    with Workdir(tmp_path / "run") as held:
        held.write_identity({"recipe": "omar", "seed": 0}, preset="tiny")
        yield held


def test_report_json_has_the_schema(workdir):
    (workdir.path / "export").mkdir()
    written = Report(
        status="partial",
        results={"gain/overall": Estimate(0.5, (0.25, 0.75), 500, "score")},
        baselines={"frozen": Estimate(3, None, 500, "score")},
        artifacts={"export": "export"},
        cost={"wall_s": 12.5},
        perf={"rollout": Quantity(5000.0, "tokens/s")},
        compile={"compile_s": Quantity(3.5, "s")},
        kernels={"attention": "splash"},
        notes=["two rows failed"],
    ).write(workdir)
    content = json.loads(workdir.report.read_text())
    assert content == written == report.read(workdir)
    versions = content.pop("versions")
    assert {"jax", "jaxconv", "python"} <= versions.keys()
    assert content == {
        "recipe": "omar",
        "preset": "tiny",
        "config_sha": workdir.read_identity()["config_sha"],
        "status": "partial",
        "results": {
            "gain/overall": {"value": 0.5, "ci95": [0.25, 0.75], "n": 500, "unit": "score"}
        },
        "baselines": {"frozen": {"value": 3, "ci95": None, "n": 500, "unit": "score"}},
        "artifacts": {"export": "export"},
        "cost": {"wall_s": 12.5},
        "devices": {"cpu": len(jax.devices())},
        "perf": {"rollout": {"value": 5000.0, "unit": "tokens/s"}},
        "compile": {"compile_s": {"value": 3.5, "unit": "s"}},
        "kernels": {"attention": "splash"},
        "notes": ["two rows failed"],
    }


def test_report_md_says_the_same(workdir):
    report.learning_curves(workdir.path / "curves.png", {"reward": {"mean": ([1, 2], [0.1, 0.2])}})
    Report(
        results={"gain/overall": Estimate(0.5, (0.25, 0.75), 500, "score")},
        plots={"Learning curves": "curves.png"},
        kernels={"attention": "splash"},
        sections={"Transcripts": report.side_by_side(["before"], [[("Ann", "5 please")]])},
    ).write(workdir)
    text = (workdir.path / "report.md").read_text()
    assert "# omar (tiny)" in text and "Status: **done**" in text
    assert "| gain/overall | 0.5 | 0.25 … 0.75 | 500 | score |" in text
    assert "![Learning curves](curves.png)" in text
    assert "| kernels/attention | splash |" in text
    assert "## Transcripts\n\n| before |\n| --- |\n| **Ann**: 5 please |" in text


@pytest.mark.parametrize(
    "broken",
    [
        Report(results={"gain": Estimate(math.nan, None, 1, "")}),
        Report(results={"gain": Estimate(1.0, (0.0, math.inf), 1, "")}),
        Report(perf={"speed": Quantity(math.inf, "tokens/s")}),
        Report(artifacts={"export": "nowhere"}),
        Report(artifacts={"export": "/etc"}),
        Report(plots={"curves": "missing.png"}),
        Report(status="finished"),
    ],
)
def test_what_would_be_a_false_report_is_not_written(workdir, broken):
    with pytest.raises(ValueError):
        broken.write(workdir)
    assert not workdir.report.exists() and not (workdir.path / "report.md").exists()


def test_only_the_writer_writes(workdir):
    content = Report().write(Workdir(workdir.path, writer=False))
    assert content["recipe"] == "omar" and not workdir.report.exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("| a | b", "\\| a \\| b"),
        ("# not a heading", "\\# not a heading"),
        ("[x](http://a)", "\\[x\\](http://a)"),
        ("two\nlines", "two<br>lines"),
        ("gain/side_0 is 0.5 [-0.1, 1.1]", "gain/side_0 is 0.5 \\[-0.1, 1.1\\]"),
        ("_not_ __emphasis__", "\\_not\\_ \\_\\_emphasis\\_\\_"),
        ("1. no list", "1\\. no list"),
        ("- no list - here", "\\- no list - here"),
        ("a &amp; b", "a &amp;amp; b"),
    ],
)
def test_escape(text, shown):
    assert report.escape(text) == shown


@given(st.lists(st.lists(st.tuples(st.text(), st.text()), max_size=3), min_size=1, max_size=3))
def test_no_conversation_breaks_the_table(transcripts):
    header = [f"model {i}" for i in range(len(transcripts))]
    lines = report.side_by_side(header, transcripts).splitlines()
    assert len(lines) == 2 + max(map(len, transcripts))
    for line in lines:
        unescaped_bars = line.replace("\\\\", "").replace("\\|", "").count("|")
        assert unescaped_bars == len(transcripts) + 1
        assert "<" not in line.replace("<br>", "")


def test_ragged_tables_are_refused():
    with pytest.raises(ValueError, match="must have 2 cells"):
        report.table(["a", "b"], [["1"]])


def test_learning_curves_draw_what_they_are_given(tmp_path):
    path = tmp_path / "curves.png"
    curve = ([1, 2, 3], [0.1, float("nan"), 0.3])
    report.learning_curves(path, {f"panel {i}": {"a": curve, "b": curve} for i in range(4)})
    drawn = path.read_bytes()
    assert drawn.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(drawn[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (int(4.2 * 3 * 120), 3 * 2 * 120)
    report.learning_curves(path, {"panel": {"a": ([1, 2], [5.0, 9.0])}})
    assert path.read_bytes() != drawn
    with pytest.raises(ValueError, match="at least one panel"):
        report.learning_curves(path, {})


def test_the_summary_shows_numbers_with_their_intervals(workdir, capsys):
    content = Report(
        results={"gain/[overall]": Estimate(0.5, (0.25, 0.75), 500, "score")},
        notes=["[bold]as written[/bold]"],
    ).write(workdir)
    report.print_summary(content, workdir)
    out = capsys.readouterr().out
    assert "gain/[overall]" in out and "0.25 … 0.75" in out and "500" in out
    assert "- [bold]as written[/bold]" in out and str(workdir.path / "report.md") in out
