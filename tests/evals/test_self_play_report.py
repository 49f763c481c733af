"""Curves, transcripts, costs and the model card, also of models that say strange things."""

import json

import pytest

from jaxconv.evals import self_play_report
from jaxconv.evals.report import Report
from jaxconv.evals.statistics import Estimate
from jaxconv.train.config import load
from jaxconv.train.workdir import Workdir

HOSTILE = "<script>alert(1)</script> | a | b\n# Big *bold* [link](http://x) `code`\x1b[2J"


@pytest.fixture
def workdir(tmp_path):
    with Workdir(tmp_path / "run") as held:
        held.write_identity({"recipe": "omar"}, preset="tiny")
        yield held


@pytest.fixture
def config():
    return load("configs/omar.py").config


def records(workdir, *lines):
    workdir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))


def self_play_record(step, **more):
    timing = {
        "speed/sampled_tokens_per_s": 100.0 * step,
        "speed/trained_tokens_per_s": 10.0,
        "speed/slot_occupancy": 0.5,
        "time/rollout_s": 1.0,
        "time/train_s": 2.0,
    }
    return {"stage": "self_play", "step": step, **timing, **more}


def test_curves_are_drawn_and_speed_is_that_of_the_later_half(workdir):
    records(
        workdir,
        {"stage": "warm_start", "step": 1, "nll": 3.0},
        {"stage": "warm_start", "step": 2, "nll": 2.0, "held_out/nll": 2.5},
        *(
            self_play_record(i, **{"score/mean": 1.0, "dimension/goal": 2.0, "policy/kl_ref": None})
            for i in range(1, 6)
        ),
    )
    report = Report()
    self_play_report.add_training(report, workdir)
    assert report.plots == {"Learning curves": "curves.png"}
    assert (workdir.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert report.perf["speed/sampled_tokens_per_s"].value == 400.0  # of 3, 4, 5
    assert report.perf["time/train_s"].unit == "s/iteration"


def test_a_run_without_training_has_no_curves(workdir):
    report = Report()
    self_play_report.add_training(report, workdir)
    assert not report.plots and not report.perf


def test_hostile_words_stay_words(workdir, played):
    before = [played([1.0, 2.0], transcript=[(0, HOSTILE), (1, "ok")])] * 4
    after = [played([3.0, 4.0], deal=True, transcript=[(1, HOSTILE)])] * 4
    report = Report()
    self_play_report.add_transcripts(report, before, after)
    report.write(workdir)
    text = (workdir.path / "report.md").read_text()
    shown = text.partition("before and after self")[2].partition("\n## Versions")[0]
    assert "alert" in shown
    assert "<script" not in shown and "\n#" not in shown
    assert "\\](http" in shown and "](http" not in shown.replace("\\]", "")
    section = report.sections["Transcripts, before and after self-play"]
    tables = [line for line in section.splitlines() if line.startswith("|")]
    assert len(tables) == 3 * (2 + 2)  # three games: header, rule and the longer one's two turns
    bars = [line.replace("\\|", "").count("|") for line in tables]
    assert set(bars) == {3}
    assert "deal; score agent0 3.00, agent1 4.00" in section
    assert "limit; score agent0 1.00" in section


def test_a_cut_game_is_shown_as_cut(played):
    report = Report()
    self_play_report.add_transcripts(
        report, [played([None, None])], [played([None, None], transcript=[(0, "hm")])]
    )
    assert "cut; score" in next(iter(report.sections.values())).replace("\\", "")


def test_the_model_card_tells_what_was_measured(workdir, config):
    workdir.export.mkdir()
    config.model.path = "folder|<b>x</b>"
    report = Report(
        results={
            "gain/overall": Estimate(0.5, (0.25, 0.75), 512, "points"),
            "payoff": Estimate(9.0, (8.0, 9.5), 512, "points"),
        }
    )
    self_play_report.write_model_card(workdir, config, report)
    card = (workdir.export / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| gain/overall | 0.5 [0.25, 0.75] points (n=512) |" in card
    assert "| payoff" not in card and "model.generate(**inputs)" in card
    assert "<b>" not in card and "&lt;b&gt;" in card
    assert f"{config.self_play.iterations} iterations of\n  {config.self_play.games} games" in card
