"""Games shared out to processes: each game is one process's, and none is lost when others go on."""

import copy
import dataclasses
import json

import jax
import pytest

from jaxconv import processes
from jaxconv.errors import Stopped
from jaxconv.rollout.engine import Engine, EngineShape
from jaxconv.rollout.selfplay import Game, SelfPlay
from jaxconv.rollout.shared import SharedGames, share
from jaxconv.train import interrupt

SHAPE = EngineShape(
    slots=4, lengths=(160,), burst=4, leave=0.5, prefill_rows=(4,), prefill_tokens=(8, 32)
)
GAMES = [Game(id=10 + i, seed=i, cast=("model",)) for i in range(8)]


@pytest.fixture
def make_table(config, weights, template, make_counter, talk):
    def make() -> SelfPlay:
        engine = Engine(config, SHAPE, stop_ids=[template.end], key=jax.random.key(3))
        engine.weights = weights
        return SelfPlay(
            lambda: talk(2, 3),
            make_counter,
            template,
            {"model": [engine]},
            turn_budget=6,
            concurrent=8,
        )

    return make


def plain(played) -> list[dict]:
    return [dataclasses.asdict(p) for p in played]


def words(played) -> list:
    return [(p.game.id, p.transcript, p.rewards) for p in played]


def test_every_game_is_that_of_one_process(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 3)
    shares = []
    for index in range(3):
        monkeypatch.setattr(processes, "index", lambda index=index: index)
        shares.append(share(GAMES))
    assert sorted(game.id for part in shares for game in part) == [game.id for game in GAMES]
    assert [len(part) for part in shares] == [4, 2, 2]
    # Lanes are by the last bit of the id.
    assert all({game.id % 2 for game in part} == {0, 1} for part in shares)


def stopped(shared, monkeypatch, calls: int) -> dict:
    """What was saved when the run was asked to stop at a call of `noticed`."""
    saved = []
    asked = iter(range(1000))
    monkeypatch.setattr(interrupt, "noticed", lambda: next(asked) >= calls)
    with pytest.raises(Stopped, match="in the middle"):
        shared.play(GAMES, lambda: saved.append(shared.snapshot()), 1e9, "in the middle")
    monkeypatch.undo()
    return json.loads(json.dumps(saved[-1]))


def resumed(table, folder, host) -> list:
    shared = SharedGames(table, folder)
    shared.restore(host)
    played = shared.play(GAMES, lambda: None, 1e9, "")
    assert shared.snapshot()["tables"] is None
    shared.close()
    assert not folder.exists()
    return played


def test_games_go_on_bit_for_bit_where_they_were(make_table, tmp_path, monkeypatch, capsys):
    whole = plain(make_table().play(GAMES))
    folder = tmp_path / "games"
    host = stopped(SharedGames(make_table(), folder), monkeypatch, 12)
    [table] = host["tables"]
    assert table["live"] and [file.name for file in folder.iterdir()] == ["1.0"]
    assert plain(resumed(make_table(), folder, host)) == whole
    assert capsys.readouterr().out == ""


def test_games_whose_file_is_gone_are_played_again(make_table, tmp_path, monkeypatch, capsys):
    whole = words(make_table().play(GAMES))
    folder = tmp_path / "games"
    host = stopped(SharedGames(make_table(), folder), monkeypatch, 22)
    over = len(host["tables"][0]["finished"])
    assert 0 < over < len(GAMES)
    (folder / "1.0").unlink()
    assert words(resumed(make_table(), folder, host)) == whole
    assert capsys.readouterr().out == (
        f"conversations of 1 processes cannot go on here: of 8 games {over} were over and are "
        f"kept, {8 - over} are played from their start\n"
    )


def test_one_process_goes_on_for_two(make_table, tmp_path, monkeypatch, capsys):
    whole = words(make_table().play(GAMES))
    tables = []
    monkeypatch.setattr(processes, "count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(processes, "index", lambda index=index: index)
        table = make_table()
        table.start(share(GAMES))
        while len(table.finished) < 1 + index:
            table.advance()
        tables.append(copy.deepcopy(table.snapshot()[1]))
    monkeypatch.undo()
    over = sum(len(table["finished"]) for table in tables)
    host = json.loads(json.dumps({"number": 1, "tables": tables}))
    (tmp_path / "games").mkdir()
    assert words(resumed(make_table(), tmp_path / "games", host)) == whole
    assert f"of 8 games {over} were over and are kept" in capsys.readouterr().out


def test_only_the_last_two_saves_stay(make_table, tmp_path):
    shared, names = SharedGames(make_table(), tmp_path / "games"), []

    def save():
        shared.snapshot()
        names.append(sorted(file.name for file in (tmp_path / "games").iterdir()))

    shared.play(GAMES, save, 0.0, "")
    assert len(names) > 3
    assert names[:2] == [["1.0"], ["1.0", "2.0"]] and names[2] == ["2.0", "3.0"]
