"""Labelling from the command line: embedded, with an endpoint, in part, again, stopped, dry."""

import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxconv import launch
from jaxconv.data.conversation import Conversation, Message, write_jsonl
from jaxconv.llm import Failure, run_tasks
from jaxconv.recipes import asking

ROOT = Path(__file__).resolve().parents[2]
CONFIG = f"--config={ROOT / 'configs' / 'label.py'}"
SERVER = ROOT / "tests" / "llm" / "fault_server.py"
TASK = """
name: letters
prompt: |
  # User
  {{ transcript(turns) }}
output:
  label: {type: label, labels: [a, b, c, d]}
  score: {type: integer}
max_tokens: 64
"""


THANKS = (Message("user", "thanks"), Message("assistant", "you are welcome"))


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def url(request):
    """Of a server with every fault on 3 % of the rows; more options as the fixture's parameter."""
    command = [sys.executable, str(SERVER), "--rate=0.03", "--latency=0.02", "--log=asked"]
    command += getattr(request, "param", [])
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield f"http://127.0.0.1:{server.stdout.readline().split()[1]}/v1"
    server.stdin.close()
    server.kill()
    server.wait()
    server.stdout.close()


def arguments(url: str, n: int, *more: str) -> list[str]:
    Path("letters.yaml").write_text(TASK)
    talks = [
        Conversation(
            f"talk-{i}",
            (Message("user", f"talk {i}"), Message("assistant", "yes")),
            {"right": "abcd"[i % 4]},
        )
        for i in range(n)
    ]
    write_jsonl(Path("talks.jsonl"), talks)
    return [
        CONFIG,
        "--workdir=run",
        "--config.data.path=talks.jsonl",
        "--config.label.task=letters.yaml",
        "--config.label.gold=right",
        f"--config.llm.base_url={url}",
        "--config.llm.max_attempts=2",
        "--config.llm.timeout_s=1.5",
        *more,
    ]


def asked() -> int:
    return len(Path("asked").read_text().splitlines()) if Path("asked").exists() else 0


def report() -> dict:
    return json.loads(Path("run/report.json").read_text())


def labels() -> list[dict]:
    return [
        json.loads(line) for line in Path("run/artifacts/labels.jsonl").read_text().splitlines()
    ]


def test_the_embedded_default_labels_by_rules(capsys):
    assert launch.main([CONFIG, "--workdir=run", "--config.data.examples=60"]) == 0
    found = report()
    assert found["status"] == "done" and found["results"]["labelled"]["value"] == 1
    kappa = found["results"]["agreement/kappa"]
    assert kappa["ci95"][0] > 0.2 and kappa["n"] == 60
    majority = found["baselines"]["agreement/majority"]["value"]
    assert found["results"]["agreement/accuracy"]["ci95"][0] > majority
    assert found["cost"]["llm_calls"] == found["cost"]["usd"] == 0
    assert any("no model was asked" in note for note in found["notes"])
    rows = labels()
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows) and len(rows) == 60
    assert rows[0]["model"] == "rules"


def test_conversations_without_a_task_are_asked_about_satisfaction():
    talks = [
        Conversation(name, (Message("user", "a poem"), Message("assistant", "roses"), reaction))
        for name, reaction in (
            ("glad", Message("user", "thanks, that is great")),
            ("cross", Message("user", "that is wrong, I repeat the request")),
        )
    ]
    write_jsonl(Path("talks.jsonl"), talks)
    assert launch.main([CONFIG, "--workdir=run", "--config.data.path=talks.jsonl"]) == 0
    given = {row["id"]: row["value"]["satisfaction"] for row in labels()}
    assert given == {"glad": "satisfied", "cross": "dissatisfied"}


def rated(*ids: str, file: str = "talks.jsonl") -> list[str]:
    """A command that labels conversations by rules, each of which has a right label."""
    write_jsonl(Path(file), [Conversation(id, THANKS, {"mood": "x"}) for id in ids])
    return [CONFIG, "--workdir=run", f"--config.data.path={file}"]


def test_right_labels_may_be_named_later_and_the_report_is_written_anew():
    command = rated("a", "b")
    assert launch.main(command) == 0 and "coverage" not in report()["results"]
    assert launch.main([*command, "--config.label.gold=mood"]) == 0
    assert report()["results"]["coverage"]["value"] == 1
    assert launch.main([*command, "--config.label.gold=moood"]) == 2
    # The command that is right is taken all the same.
    assert launch.main([*command, "--config.label.gold=mood"]) == 0
    assert report()["results"]["agreement/accuracy"]["value"] == 0


@pytest.mark.parametrize(
    ("ids", "argument", "line"),
    [
        (("a", "b"), "--config.label.gold=moood", "'moood': no conversation has it in its meta"),
        (("a", "b", "a"), "--config.label.gold=mood", "two inputs have the id 'a'"),
    ],
)
def test_what_would_be_refused_at_the_end_is_refused_before_anybody_is_asked(
    ids, argument, line, capsys, monkeypatch
):
    asked = []
    monkeypatch.setattr(asking, "run_tasks", lambda *given, **options: asked.append(1))
    for flags in ([], ["--dry_run"]):
        assert launch.main([*rated(*ids), argument, *flags]) == 2
        assert line in capsys.readouterr().err
    assert not asked and not Path("run").exists()


def test_rows_with_right_labels_that_all_failed_are_no_agreement(monkeypatch):
    talks = [
        Conversation("a", THANKS, {"mood": "x"}),
        Conversation("b", THANKS),
    ]
    write_jsonl(Path("talks.jsonl"), talks)

    def but_a(*given, **options):
        results = run_tasks(*given, **options)
        failure = Failure("invalid_json", "there is no JSON object in the answer", "no")
        return results | {"a": dataclasses.replace(results["a"], value=None, error=failure)}

    monkeypatch.setattr(asking, "run_tasks", but_a)
    command = [CONFIG, "--workdir=run", "--config.data.path=talks.jsonl"]
    assert launch.main([*command, "--config.label.gold=mood"]) == 3
    found = report()
    assert found["results"]["coverage"] | {"ci95": None} == {
        "value": 0.0, "ci95": None, "n": 1, "unit": "rate"
    }  # fmt: skip
    assert any("none of the 1 conversations with a right label" in n for n in found["notes"])


def test_failed_rows_make_a_run_partial_and_are_asked_again_when_told_to(url, capsys):
    command = arguments(url, 40)
    assert launch.main([*command, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "letters with faulty: 40 rows, 0 answered before, 40 calls" in said
    assert "price unknown" in said and not Path("run").exists() and asked() == 0
    assert launch.main(command) == 3
    first = report()
    rows = labels()
    failed = [row["id"] for row in rows if "error" in row]
    assert 0 < len(failed) < 40 and first["results"]["labelled"]["n"] == 40
    assert any(
        note.startswith(f"{len(failed)} of 40 rows of letters have no value")
        for note in first["notes"]
    )
    assert first["results"]["coverage"]["value"] == pytest.approx(1 - len(failed) / 40)
    assert first["cost"]["llm_calls"] == asked()
    # A run that is done in part tells so again and asks for nothing.
    at = asked()
    assert launch.main(command) == 3 and asked() == at
    assert launch.main([*command, "--dry_run"]) == 0
    assert "40 answered before, 0 calls" in capsys.readouterr().out
    assert launch.main([*command, "--retry_failed"]) == 3
    again = labels()
    still = [row["id"] for row in again if "error" in row]
    assert set(still) < set(failed)  # of those that two attempts were too few for
    assert len(failed) <= asked() - at <= 2 * len(failed)


KEY = "sk-test-0123456789abcdefghij"


@pytest.mark.parametrize("url", [[f"--key={KEY}", "--rate=0"]], indirect=True)
def test_a_key_reaches_no_file_of_a_run(url, capfd, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    command = [CONFIG, "--workdir=run", f"--config.llm.base_url={url}", "--config.data.examples=4"]
    # The server's labels are not those of the help desk.
    assert launch.main([*command, "--config.llm.max_attempts=1"]) == 3
    written = [path for path in Path("run").rglob("*") if path.is_file()]
    assert {"config.json", "journal.sqlite", "report.json"} <= {path.name for path in written}
    assert not [path for path in written if KEY.encode() in path.read_bytes()]
    said = capfd.readouterr()
    assert KEY not in said.out + said.err
    found = report()
    assert found["cost"]["llm_calls"] == 4 and found["cost"]["llm_tokens"] == 4 * 60
    assert any(
        note.startswith("4 of 4 rows of help_desk have no value: wrong_schema 4")
        for note in found["notes"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("url", [["--rate=0"]], indirect=True)
def test_workers_on_ray_write_the_labels_that_one_process_writes(url, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert launch.main(arguments(url, 60)) == 0
    alone = Path("run/artifacts/labels.jsonl").read_bytes()
    on_ray = ["--workdir=on_ray", "--config.llm.executor=ray", "--config.llm.workers=2"]
    assert launch.main([*arguments(url, 60), *on_ray]) == 0
    assert Path("on_ray/artifacts/labels.jsonl").read_bytes() == alone
    at = asked()
    assert launch.main([*arguments(url, 60), "--workdir=on_ray"]) == 0 and asked() == at


def test_a_budget_that_ran_out_may_be_raised_and_other_fields_may_not(url, capsys):
    command = arguments(url, 12, "--config.llm.budget_tokens=1300")
    assert launch.main(command) == 3
    assert any("budget" in note for note in report()["notes"])
    tokens = report()["cost"]["llm_tokens"]
    assert 0 < tokens <= 1300
    assert launch.main([*command, "--config.llm.budget_tokens=0", "--config.seed=1"]) == 2
    assert "config.seed: 0 -> 1" in capsys.readouterr().err
    assert launch.main([*command, "--config.llm.budget_tokens=0"]) in (0, 3)
    assert not any("budget" in note for note in report()["notes"])
    assert launch.main([*command, "--config.llm.budget_tokens=10", "--workdir=poor"]) == 2
    assert "the budget is not enough for one call" in capsys.readouterr().err
    assert not Path("poor").exists()


@pytest.mark.parametrize("url", [["--revoke_after=5"]], indirect=True)
def test_answers_are_kept_when_the_key_is_refused_later(url, capsys):
    command = arguments(url, 30, "--config.llm.concurrency=1")
    assert launch.main(command) == 2
    assert "the endpoint does not take the API key" in capsys.readouterr().err
    db = sqlite3.connect("run/journal.sqlite")
    answered = db.execute("SELECT count(*) FROM calls WHERE raw IS NOT NULL").fetchone()[0]
    db.close()
    assert 0 < answered <= 5
    assert launch.main([*command, "--dry_run"]) == 0
    assert "30 rows, 0 answered before" not in capsys.readouterr().out


def test_a_stopped_run_is_resumed_and_asks_for_nothing_twice(url):
    command = [sys.executable, "-m", "jaxconv.launch", *arguments(url, 80)]
    command.append("--config.llm.concurrency=2")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while asked() < 15:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 4 and "every answer is in the journal" in error
    at = asked()
    assert 15 <= at < 70
    assert launch.main([*arguments(url, 80), "--config.llm.concurrency=16"]) == 3
    results = report()
    assert results["results"]["labelled"]["n"] == 80
    assert results["cost"]["llm_calls"] == asked()  # none was interrupted, none asked for twice


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config.data.path=x.jsonl"], "config.data.path: x.jsonl is not there"),
        (["--config.label.task=none.yaml"], "config.label.task: task file none.yaml: no such"),
        (
            ["--config.llm.backend=none"],
            "it may be auto, openai, openai_batch, local, rules, replay",
        ),
        (["--config.llm.backend=replay"], "replay needs a journal"),
        (
            ["--config.llm.executor=ray"],
            "executor='ray' with config.llm.backend='auto'; it takes an",
        ),
        (["--config.llm.concurrency=0"], "config.llm.concurrency=0; it must be at least 1"),
        (["--config.llm.base_url=ftp://x"], "llm.base_url='ftp://x'"),
        (["--config.llm.model=gpt-4o"], "OPENAI_API_KEY is not set"),
        (["--config.label.field=colour"], "config.label.field='colour'; it may be kind"),
        (["--dry_run", "--overwrite"], "--dry_run excludes --overwrite"),
    ],
)
def test_what_cannot_work_is_refused(arguments, line, capsys):
    assert launch.main([CONFIG, "--workdir=run", *arguments]) == 2
    assert line in capsys.readouterr().err
    assert not Path("run").exists()


def test_other_recipes_have_neither_flag(capsys):
    omar = f"--config={ROOT / 'configs' / 'omar.py'}"
    for flag in ("--dry_run", "--retry_failed"):
        assert launch.main([omar, flag, "--workdir=run"]) == 2
        assert f"{flag}: recipe 'omar' does not have it" in capsys.readouterr().err
