"""What has a name is whole and on disk, whenever the process was killed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxconv import durable
from jaxconv.data import token_store
from jaxconv.data.examples import TokenExample
from jaxconv.errors import Refused

WRITE = """
import os, sys
from pathlib import Path
from jaxconv.durable import whole_folder

folder, name, call, when = sys.argv[1:]
left = int(call)

def killing(function):
    def counted(*args):
        global left
        left -= 1
        if not left and when == "before":
            os._exit(9)
        result = function(*args)
        if not left:
            os._exit(9)
        return result
    return counted

setattr(Path, name, killing(getattr(Path, name)))
with whole_folder(Path(folder)) as partial:
    (partial / "config.json").write_text("new")
    (partial / "weights").write_text("new")
"""


def fill(folder: Path, text: str) -> None:
    with durable.whole_folder(folder) as partial:
        for name in ("config.json", "weights"):
            (partial / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


OLD, NEW, NEWER = ({"config.json": text, "weights": text} for text in ("old", "new", "newer"))


@pytest.mark.parametrize(
    ("call", "when", "found"),
    [(1, "before", OLD), (1, "after", OLD), (2, "before", OLD), (2, "after", NEW)],
)
def test_a_kill_at_any_rename_leaves_a_whole_folder(call, when, found, tmp_path):
    folder = tmp_path / "model"
    fill(folder, "old")
    command = [sys.executable, "-c", WRITE, str(folder), "rename", str(call), when]
    assert subprocess.run(command, timeout=60).returncode == 9
    assert contents(durable.standing(folder)) == found
    fill(folder, "newer")
    assert durable.standing(folder) == folder and contents(folder) == NEWER
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_after_a_kill_the_older_folder_survives_a_writer_that_fails(tmp_path):
    folder = tmp_path / "model"
    fill(folder, "old")
    folder.rename(tmp_path / ".model.old")  # as a kill between the two renames leaves it
    with pytest.raises(RuntimeError), durable.whole_folder(folder):
        raise RuntimeError
    assert contents(folder) == OLD


def test_a_folder_that_never_was_stands_where_it_should_be(tmp_path):
    assert durable.standing(tmp_path / "model") == tmp_path / "model"


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "letters").write_text("mine")
    with pytest.raises(Refused, match="holds something other than a checkpoint"):
        fill(tmp_path, "new")
    assert contents(tmp_path) == {"letters": "mine"}


@pytest.fixture
def order(monkeypatch):
    """What was told to go to disk, and what got its name, in this order."""
    seen: list[tuple[str, str]] = []
    replace = Path.replace

    def recorded(path, target):
        seen.append(("named", target.name))
        return replace(path, target)

    monkeypatch.setattr(durable, "sync", lambda path: seen.append(("on disk", path.name)))
    monkeypatch.setattr(Path, "replace", recorded)
    return seen


def test_a_file_is_on_disk_before_it_has_its_name_and_its_name_after(order, tmp_path):
    (tmp_path / "partial").write_text("x")
    durable.publish(tmp_path / "partial", tmp_path / "whole")
    assert order == [("on disk", "partial"), ("named", "whole"), ("on disk", tmp_path.name)]


def test_a_token_store_is_on_disk_before_it_has_its_name(order, tmp_path):
    example = TokenExample(np.arange(3), np.ones(3, bool))
    token_store.build(tmp_path / "train", [(0, [example])], {"whole": 1}, streams=1)
    named = order.index(("named", "train"))
    before = {name for what, name in order[:named]}
    assert before == {path.name for path in (tmp_path / "train").iterdir()} | {".train.partial"}
    assert order[named + 1 :] == [("on disk", tmp_path.name)]
