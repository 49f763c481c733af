"""A person at the keyboard."""

import io

import pytest

from jaxconv.data.conversation import Message
from jaxconv.rollout.terminal import TerminalPlayer, printable


def test_the_person_reads_what_the_agent_hears_and_answers(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("  I offer two hats. \n"))
    player = TerminalPlayer().sit_down("Eve", "Say what you offer.")
    said = player.act(
        [Message("system", "You are Eve."), Message("user", "I want [bold]all[/].", "Bob")]
    )
    assert said == "I offer two hats."
    shown = capsys.readouterr().out
    assert (
        "You are Eve.\nSay what you offer." in shown
        and "Bob: I want [bold]all[/]." in shown
        and "Eve (you):" in shown
    )


def test_words_cannot_steer_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("fine\n"))
    TerminalPlayer().sit_down("Eve", "").act(
        [Message("user", "a\x1b[2Jb\x07c\rd\u202ee", "B\x1bob")]
    )
    shown = capsys.readouterr().out
    assert "a?[2Jb?c?d?e" in shown
    assert "\x1b[2J" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert "B\x1b" not in shown


def test_the_end_of_the_input_leaves(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(EOFError):
        TerminalPlayer().sit_down("Eve", "").act([Message("system", "brief")])


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain, ünïcode 字", "plain, ünïcode 字"), ("a\nb\tc", "a?b?c"), ("\x9b2J\x00", "?2J?")],
)
def test_printable(text, shown):
    assert printable(text) == shown
