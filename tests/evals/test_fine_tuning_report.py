"""The arithmetic of fine-tuning's reports, and what they show of texts."""

import json
import types

import numpy as np
import pytest

from jaxconv.data import token_store
from jaxconv.data.conversation import Invalid, Message
from jaxconv.data.examples import TokenExample
from jaxconv.data.quarantine import Quarantine
from jaxconv.evals import fine_tuning_report
from jaxconv.evals.exam import Exam, Marks, Scores
from jaxconv.train.metrics import MetricsWriter
from jaxconv.train.workdir import Workdir

CONFIG = types.SimpleNamespace(seed=0)
N = 12


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def store(folder, records, streams):
    example = TokenExample(np.arange(4, dtype=np.int32), np.arange(4) > 1)
    token_store.build(folder, ((r, [example] * streams) for r in records), {}, streams=streams)
    return token_store.load(folder)


def exam(folder, streams_by_name, judges=(), records=range(N), prompts=None, units=range(N)):
    prompts = prompts or [(Message("user", f"question {i}"),) for i in range(N)]
    return Exam(
        stores={name: store(folder / name, records, n) for name, n in streams_by_name.items()},
        units=[f"talk {i}" for i in units],
        prompts=prompts,
        judges=dict.fromkeys(judges),
        template=None,
        scorer=None,
        length=0,
        max_tokens=0,
        temperature=0.0,
        seed=0,
    )


def scores(nats, tokens=5):
    nats = np.asarray(nats, float)
    return Scores(nats, np.full(nats.shape, tokens))


def talked(nll, margin, correct=None, said=None, n=N):
    """Marks of a model with so many nats a token, a given margin of choice, correct replies."""
    nll, margin = np.broadcast_to(nll, n), np.broadcast_to(margin, n)
    choice = np.stack([margin - 20, np.full(n, -20.0)], 1)
    judged = {} if correct is None else {"correct": np.arange(N) < correct}
    held_out = scores(-5 * nll[:, None])
    return Marks({"held_out": held_out, "choice": scores(choice)}, said or ["ok"] * N, judged)


def compared(margin, styled=0):
    """Marks of a model that finds the chosen reply so many nats likelier."""
    nats = np.stack([np.asarray(margin, float) - 20, np.full(N, -20.0)], 1)
    return Marks({"pairs": scores(nats)}, ["ok"] * N, {"style": np.arange(N) < styled})


def assert_intervals(report):
    for estimates in (report.results, report.baselines):
        for name, e in estimates.items():
            assert e.ci95 is not None and e.ci95[0] <= e.value <= e.ci95[1], name
            assert e.n == N, name


# ---------------------------------------------------------------- conversations


def test_gains_of_conversations_are_above_zero_when_the_model_got_better(tmp_path, rng):
    start = talked(3.0 + rng.normal(0, 0.1, N), rng.normal(-1, 0.5, N), correct=2)
    after = talked(2.0 + rng.normal(0, 0.1, N), rng.normal(4, 0.5, N), correct=9)
    worse = talked(3.5, rng.normal(-3, 0.5, N), correct=0)
    sat = exam(tmp_path, {"held_out": 1, "choice": 2}, ["correct"])
    report = fine_tuning_report.of_sft(CONFIG, sat, start, after, [worse])
    r, b = report.results, report.baselines

    def nll(marks):
        s = marks.scores["held_out"]
        return -s.logprob.sum() / s.tokens.sum()

    assert r["nll"].value == pytest.approx(nll(after))
    assert b["nll/start"].value == pytest.approx(nll(start))
    assert r["gain/nll"].value == pytest.approx(nll(start) - nll(after))  # nats saved
    assert b["control/gain/nll"].value == pytest.approx(nll(start) - nll(worse)) and r["nll"].n == N
    margins = [m.scores["choice"].margin for m in (start, after, worse)]
    assert r["gain/context"].value == pytest.approx((margins[1] - margins[0]).mean())
    assert b["control/gain/context"].value == pytest.approx((margins[2] - margins[0]).mean())
    assert r["gain/context"].value > 0 > b["control/gain/context"].value
    wins = [(m > 0).mean() for m in margins]
    assert r["choice"].value == wins[1] and b["choice/start"].value == wins[0]
    assert r["gain/choice"].value == pytest.approx(wins[1] - wins[0])
    assert r["correct"].value == 9 / N and b["correct/start"].value == 2 / N
    assert r["gain/correct"].value == pytest.approx(7 / N)
    assert b["control/gain/correct"].value == pytest.approx(-2 / N)
    assert r["gain/nll"].ci95[0] > 0 > b["control/gain/nll"].ci95[1]
    assert_intervals(report)
    assert "`correct` is the share" in report.sections["How to read these numbers"]


def test_a_token_counts_the_same_in_a_long_and_a_short_conversation(tmp_path):
    after, start = talked(1.0, 0.0), talked(1.0, 0.0)
    tokens = np.full((N, 1), 2)
    tokens[0] = 100
    nats = -1.0 * tokens
    nats[0] = -300.0
    after.scores["held_out"] = Scores(nats, tokens)
    sat = exam(tmp_path, {"held_out": 1, "choice": 2})
    report = fine_tuning_report.of_sft(CONFIG, sat, start, after)
    assert report.results["nll"].value == pytest.approx((300 + 22) / 122)


def test_parts_of_one_conversation_are_one_unit(tmp_path, rng):
    """What was split into three rises and falls together: the interval is as of whole ones."""
    nll = rng.normal(2, 0.5, N)
    whole, parts = talked(nll, 1.0), talked(np.repeat(nll, 3), 1.0, n=3 * N)
    start = talked(3.0, 1.0), talked(3.0, 1.0, n=3 * N)
    found = []
    for marks, before, records in ((whole, start[0], range(N)), (parts, start[1], None)):
        records = np.repeat(np.arange(N), 3) if records is None else records
        folder = tmp_path / str(len(records))
        sat = exam(folder, {"held_out": 1, "choice": 2}, records=records)
        report = fine_tuning_report.of_sft(CONFIG, sat, before, marks)
        found.append((report.results["nll"], report.results["gain/nll"]))
    for one, other in zip(*found, strict=True):
        assert one.n == other.n == N
        assert one.value == pytest.approx(other.value)
        assert one.ci95 == pytest.approx(other.ci95)


def test_pairs_of_one_talk_are_one_unit(tmp_path, rng):
    before, after = (compared(rng.normal(m, 1, N), styled=m) for m in (0, 2))
    talks = np.arange(N) // 3
    sat = exam(tmp_path / "talks", {"pairs": 2}, ["style"], units=talks)
    report = fine_tuning_report.of_dpo(CONFIG, sat, before, after)
    apart = exam(tmp_path / "apart", {"pairs": 2}, ["style"])
    other = fine_tuning_report.of_dpo(CONFIG, apart, before, after)
    for name, estimate in report.results.items():
        assert estimate.n == N // 3
        assert estimate.value == pytest.approx(other.results[name].value)


def test_a_rate_of_all_is_not_certain(tmp_path):
    """Twelve of twelve is no proof of always; a bootstrap would have no width."""
    start, after = compared(np.full(N, -1.0)), compared(np.full(N, 1.0), styled=N)
    sat = exam(tmp_path, {"pairs": 2}, ["style"])
    report = fine_tuning_report.of_dpo(CONFIG, sat, start, after)
    for name in ("accuracy", "prefers", "style"):
        assert report.results[name].value == 1 and report.results[name].ci95[0] < 0.8
    assert report.baselines["prefers/start"].ci95[1] > 0.2


def test_without_judges_and_control_nothing_is_said_of_them(tmp_path):
    sat = exam(tmp_path, {"held_out": 1, "choice": 2})
    report = fine_tuning_report.of_sft(CONFIG, sat, talked(3, 0), talked(2, 1))
    assert not any("control" in name for name in [*report.results, *report.baselines])
    assert not any("correct" in name for name in report.results)
    assert "correct" not in report.sections["How to read these numbers"]


# ---------------------------------------------------------------- pairs


def test_gains_of_pairs_are_measured_from_the_start(tmp_path, rng):
    start = rng.normal(-2, 1, N)
    gained = np.where(np.arange(N) < 9, 3.0, -1.0)
    gained[11] = 0.0  # a tie
    lost = -np.abs(rng.normal(1, 0.1, N))  # of one control; the other gains half of it
    report = fine_tuning_report.of_dpo(
        CONFIG,
        exam(tmp_path, {"pairs": 2}, ["style"]),
        compared(start, styled=1),
        compared(start + gained, styled=10),
        [compared(start + lost, styled=0), compared(start - lost / 2, styled=4)],
    )
    r, b = report.results, report.baselines
    assert r["accuracy"].value == pytest.approx(9.5 / N)
    assert r["margin"].value == pytest.approx(gained.mean())
    assert b["control/accuracy"].value == 0.5  # the mean of never and always
    assert b["control/margin"].value == pytest.approx(lost.mean() / 4)
    assert r["margin"].value > 0 > b["control/margin"].value
    after = (start, start + gained, start + lost, start - lost / 2)
    prefers = [(m > 0).mean() for m in after]
    assert b["prefers/start"].value == prefers[0] and r["prefers"].value == prefers[1]
    assert r["gain/prefers"].value == pytest.approx(prefers[1] - prefers[0])
    assert prefers[1] > prefers[0]
    mean = (prefers[2] + prefers[3]) / 2
    assert b["control/gain/prefers"].value == pytest.approx(mean - prefers[0])
    assert r["style"].value == 10 / N and r["gain/style"].value == pytest.approx(9 / N)
    assert b["control/gain/style"].value == pytest.approx(1 / N)  # (0 + 4) / 2 - 1
    assert_intervals(report)


def test_a_model_that_is_its_start_has_gained_nothing(tmp_path, rng):
    same = compared(rng.normal(0, 1, N), styled=3)
    report = fine_tuning_report.of_dpo(CONFIG, exam(tmp_path, {"pairs": 2}, ["style"]), same, same)
    assert report.results["accuracy"].value == 0.5
    for name in ("margin", "gain/prefers", "gain/style"):
        assert report.results[name].value == 0


# ---------------------------------------------------------------- texts


def test_texts_stay_texts(tmp_path):
    evil = "# Title\n| a | b |\n<script>alert(1)</script> **bold** [x](javascript:1) `tick`"
    prompts = [(Message("system", evil), Message("user", evil))] * N
    sat = exam(tmp_path, {"held_out": 1, "choice": 2}, prompts=prompts)
    said = [evil, None, *["fine"] * (N - 2)]
    report = fine_tuning_report.of_sft(
        CONFIG, sat, talked(3, 0, said=["<b>"] * N), talked(2, 0, said=said)
    )
    text = report.sections["Replies, before and after"]
    assert text.count("| before | after |") == 5
    assert "(no room for a reply)" in text
    for markup in ("<script>", "<b>", "**bold**", "[x](", "`tick`", "\n# Title", " a | b "):
        assert markup not in text, markup
    assert "&lt;script&gt;" in text and "&lt;b&gt;" in text
    # Every table has two columns and three lines; every message is one line.
    lines = [line for line in text.splitlines() if line]
    assert len(lines) == 5 * (2 + 3)
    for line in lines:
        bars = line.replace("\\|", "").count("|")
        assert bars == (0 if line.startswith("- ") else 3), line


# ---------------------------------------------------------------- the end of a run


@pytest.fixture
def workdir(tmp_path):
    with Workdir(tmp_path / "run") as held:
        held.write_identity({"recipe": "sft"}, preset="tiny")
        held.export.mkdir()
        for stage, steps in (("sft", 6), ("control", 2)):
            with MetricsWriter(held, stage) as writer:
                for step in range(1, steps + 1):
                    writer.write(step, {"nll": 3 / step, "tokens": 100, "fill": 0.5 + step / 100})
        yield held


def finished(workdir, quarantine, outcomes=None):
    report = fine_tuning_report.Report()
    kept = types.SimpleNamespace(
        outcomes=lambda: outcomes or {}, notes=lambda place: [f"Left out, see {place}."]
    )
    fine_tuning_report.finish(
        report, workdir, {"sft": "sft", "control": "control"}, kept, quarantine
    )
    return report


def test_curves_and_what_became_of_the_data(workdir):
    quarantine = Quarantine(workdir.artifacts / "quarantine.jsonl")
    outcomes = {"left_out": {"why": "too long", "stores": {"train": {"count": 1}}}}
    report = finished(workdir, quarantine, outcomes)
    assert report.status == "done" and "quarantine" not in report.artifacts
    assert report.notes == ["Left out, see artifacts/records.json."]
    kept = workdir.path / report.artifacts["records"]
    assert json.loads(kept.read_text()) == outcomes
    assert (workdir.path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert report.perf["sft/fill"].value == pytest.approx(
        np.mean([0.5 + i / 100 for i in range(1, 7)])
    )
    assert json.loads(json.dumps(report.write(workdir)))["status"] == "done"


def test_bad_rows_make_a_run_partial(workdir):
    quarantine = Quarantine(workdir.artifacts / "quarantine.jsonl")
    for line in (3, 5):
        quarantine.add(workdir.path / "data.jsonl", line, b"{", Invalid("", "invalid_json", "torn"))
    quarantine.add(workdir.path / "data.jsonl", 7, b"{}", Invalid("messages", "missing", "none"))
    report = finished(workdir, quarantine)
    content = report.write(workdir)
    assert content["status"] == "partial"
    assert content["artifacts"]["quarantine"] == "artifacts/quarantine.jsonl"
    assert content["notes"] == [
        "3 rows could not be read, see artifacts/quarantine.jsonl: invalid json 2, missing 1."
    ]
    assert "records" not in content["artifacts"]  # all of them are whole
    assert len((workdir.path / content["artifacts"]["quarantine"]).read_text().splitlines()) == 3
