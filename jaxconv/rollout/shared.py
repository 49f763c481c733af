"""Games that the processes of a run share out: each plays its own on its own engines, and all get
what everybody has played.

A stream's text depends on the run's key, its id and its position alone, so who plays a game changes
no word of it. What is learned from games is a matter of all of them (moments, denominators, rows
of a micro-batch), so every process gets all: they are ids and floats, megabytes where the weights
have gigabytes.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from jaxconv import processes, storage
from jaxconv.errors import Stopped
from jaxconv.rollout.selfplay import Game, Played, SelfPlay, as_played
from jaxconv.train import interrupt, local_arrays


def share(games: Sequence[Game]) -> list[Game]:
    """Those that this process plays.

    Two neighbouring episodes stay together: every second game starts in other lanes of the engines.
    """
    return [g for g in games if g.seed // 2 % processes.count() == processes.index()]


def collect(games: Sequence[Game], table: SelfPlay) -> list[Played]:
    """What all processes have played on their tables, in the order of `games`."""
    everybody = processes.gather("played games", table.finished)
    by_id = {played.game.id: played for part in everybody for played in part}
    return [by_id[game.id] for game in games]


def play(games: Sequence[Game], table: SelfPlay) -> list[Played]:
    """Plays all games; each process gets all of them, in the order of `games`."""
    table.play(share(games))
    return collect(games, table)


class SharedGames:
    """Plays batches of games and can be saved in the middle of one.

    Every process keeps the state of its engines in a file of its own, and as many processes go on
    where they were, bit for bit. Another number of them, or one whose file is gone, keeps the games
    that were over and plays the others from their start, which gives the same words.

    Args:
        table: of this process.
        folder: of these files.
    """

    def __init__(self, table: SelfPlay, folder: PurePath):
        self._table, self._folder = table, folder
        self._playing = False
        self._number = 0  # of the last save; a checkpoint names the one that belongs to it
        self._resumed: list[dict] | None = None  # tables as they were saved, by process

    def play(
        self, games: Sequence[Game], save: Callable[[], None], every: float, stopped: str
    ) -> list[Played]:
        """Plays all games, or goes on with those that were restored.

        Args:
            games: of all processes.
            save: called by all processes at once, every so many seconds and before a stop.
            every: seconds.
            stopped: what to say when the run is.

        Raises:
            Stopped: the run was asked to stop; it is saved.
        """
        self._begin(games)
        self._playing = True
        last_save = time.monotonic()
        while True:
            going, stop = self._meet(last_save + every)
            if not going:
                self._playing = False
                return collect(games, self._table)
            save()
            if stop:
                raise Stopped(stopped)
            last_save = time.monotonic()

    def _meet(self, deadline: float) -> tuple[bool, bool]:
        """Plays own games until they are over, the run shall stop or time is up, and waits for the
        others: (whether anybody's go on, whether anybody was asked to stop)."""
        while going := self._table.advance():
            if interrupt.noticed() or time.monotonic() > deadline:
                break
        met = processes.gather("games under way", (going, interrupt.noticed()))
        return any(going for going, _ in met), any(stop for _, stop in met)

    def _begin(self, games: Sequence[Game]) -> None:
        tables, self._resumed = self._resumed, None
        if tables is None:
            self._table.start(share(games))
        elif all(processes.gather("who can go on", self._fits(tables))):
            own = tables[processes.index()]
            arrays = local_arrays.load(self._file(processes.index()), self._table.like(own))
            self._table.restore(arrays, own)
        else:
            self._begin_again(games, tables)

    def _fits(self, tables: list[dict]) -> bool:
        """Whether this process can go on where one was."""
        if len(tables) != processes.count():
            return False
        like = self._table.like(tables[processes.index()])
        return local_arrays.fits(self._file(processes.index()), like)

    def _begin_again(self, games: Sequence[Game], tables: list[dict]) -> None:
        over = {p.game.id: p for table in tables for p in map(as_played, table["finished"])}
        left = [game for game in games if game.id not in over]
        self._table.start(share(left))
        self._table.finished = [over[g.id] for g in share(games) if g.id in over]
        processes.say(
            f"conversations of {len(tables)} processes cannot go on here: of {len(games)} games "
            f"{len(over)} were over and are kept, {len(left)} are played from their start"
        )

    def snapshot(self) -> dict[str, Any]:
        """JSON-able; of all processes. What it does not hold is on disk when it returns."""
        tables = None
        if self._playing:
            self._number += 1
            arrays, host = self._table.snapshot()
            local_arrays.save(self._file(processes.index()), arrays)
            tables = processes.gather("tables", host)
            self._remove_old()
        return {"number": self._number, "tables": tables}

    def restore(self, host: dict[str, Any]) -> None:
        """Goes back to a snapshot, when `play` is called for the games that were under way."""
        self._number, self._resumed = host["number"], host["tables"]

    def close(self) -> None:
        """Removes the files: no checkpoint names one any more."""
        if processes.index() == 0:
            if storage.is_url(self._folder):
                storage.remove(str(self._folder))
            else:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, process: int) -> PurePath:
        return self._folder / f"{self._number}.{process}"

    def _remove_old(self) -> None:
        """All files but those of this save and of the one before it."""
        for file in list(self._folder.iterdir()) if processes.index() == 0 else ():
            number = file.name.partition(".")[0]
            if number and int(number) < self._number - 1:
                file.unlink()
