"""What can be done with a run that is over: look, evaluate again, talk; and what cannot."""

import json
import os
import pty
import select
import time


def test_the_same_command_prints_the_report_again(tiny, copy, capsys):
    before = (copy / "report.json").read_bytes()
    began = time.monotonic()
    assert tiny.main(tiny.arguments(copy)) == 0
    assert time.monotonic() - began < 10
    shown = capsys.readouterr().out
    assert "gain/overall" in shown and "report.md" in shown
    assert (copy / "report.json").read_bytes() == before


def test_another_config_is_refused(tiny, copy, capsys):
    assert tiny.main(tiny.arguments(copy, self_play__games=6)) == 2
    err = capsys.readouterr().err
    assert "config.self_play.games: 8 -> 6" in err and err.count("\n") == 1


def test_evaluating_again_finds_the_same(tiny, copy):
    again = tiny.run(copy, "--eval_only")
    assert again.returncode == 0, again.stderr
    report = json.loads((copy / "report.json").read_text())
    evaluation = json.loads((copy / "evaluation.json").read_text())
    assert evaluation["results"] == report["results"]
    assert evaluation["baselines"] == report["baselines"]
    assert evaluation["status"] == "done"
    # A model of seconds has not gained anything; nothing is said to differ from the training.
    assert evaluation["notes"] == [note for note in report["notes"] if note in evaluation["notes"]]


def test_nothing_to_evaluate_or_to_talk_to_yet(tiny, tmp_path, capsys):
    for flag in ("--eval_only", "--chat"):
        assert tiny.main([*tiny.arguments(tmp_path / "run"), flag]) == 2
        assert "holds no run yet" in capsys.readouterr().err


def test_a_run_without_its_export_is_refused(tiny, copy, capsys):
    (copy / "export" / "value_head.safetensors").unlink()
    assert tiny.main([*tiny.arguments(copy), "--chat"]) == 2
    assert "holds no export; train first" in capsys.readouterr().err


class Terminal:
    """A process at a terminal of its own."""

    def __init__(self, tiny, command):
        ours, theirs = pty.openpty()
        self.process = tiny.start(command, stdin=theirs, env={**os.environ, "COLUMNS": "300"})
        os.close(theirs)
        self._keyboard = ours
        self.shown, self._read = "", 0

    def wait_for(self, *texts: str) -> str:
        """The first of `texts` that appears in what is new."""
        out = self.process.stdout.fileno()
        while True:
            for text in texts:
                if text in self.shown[self._read :]:
                    self._read = self.shown.index(text, self._read) + len(text)
                    return text
            ready, _, _ = select.select([out], [], [], 200)
            new = os.read(out, 4096).decode() if ready else ""
            assert new, f"none of {texts} was shown: {self.shown}"
            self.shown += new

    def type(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def end(self) -> tuple[int, str]:
        out, err = self.process.communicate(timeout=60)
        os.close(self._keyboard)
        self.shown += out
        return self.process.returncode, err


def test_a_person_plays_a_game_and_leaves_in_the_next(tiny, finished):
    terminal = Terminal(tiny, ["-m", "jaxconv.launch", *tiny.arguments(finished), "--chat"])
    turns = 0
    while terminal.wait_for("(you):", "Again? [y/N]") == "(you):":
        turns += 1
        assert turns <= 5  # most turns of an agent
        terminal.type("I would like all the books.\n")
    assert turns >= 1
    assert "You are " in terminal.shown and "Secret limit" in terminal.shown
    assert "plain words like these" in terminal.shown.replace("\r\n", " ")
    assert "you scored" in terminal.shown and "believability" in terminal.shown
    terminal.type("y\n")
    terminal.wait_for("(you):")
    terminal.type("\x04")
    status, err = terminal.end()
    assert status == 0 and err == ""
