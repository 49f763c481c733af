"""What a person sees of a stage: a live bar in a terminal, elsewhere a line now and then."""

import time
from collections.abc import Mapping

from jaxconv.train.workdir import Workdir


class Progress:
    """Progress of one stage.

    Args:
        workdir: only its writer process shows anything.
        stage: its name.
        total: steps of the whole stage.
        start: steps done before (a resumed run).
        every_s: seconds between plain lines where standard output is no terminal.
    """

    def __init__(
        self, workdir: Workdir, stage: str, total: int, *, start: int = 0, every_s: float = 10.0
    ):
        self._stage = stage
        self._total = total
        self._shown = workdir.is_writer
        self._every_s = every_s
        self._printed = time.monotonic()
        # Speed is counted from the end of the first step, which compiles.
        self._first: tuple[int, float] | None = None
        self._tokens = 0
        self._live = None
        if not self._shown:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        console = Console()
        if console.is_terminal:
            self._live = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[headline]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=console,
            )
            self._task = self._live.add_task(stage, total=total, completed=start, headline="")
            self._live.start()

    def update(self, step: int, headline: Mapping[str, float], *, tokens: int = 0) -> None:
        """Shows that `step` steps are done.

        Args:
            step: steps done, those before a resume included; the last one is `total`.
            headline: the one or two numbers to watch, such as `{"reward": 4.1}`.
            tokens: tokens that this step processed or generated.
        """
        if not self._shown:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        else:
            self._tokens += tokens
        first_step, began = self._first
        text = "  ".join(f"{name} {value:.4g}" for name, value in headline.items())
        if self._tokens:
            text += f"  {self._tokens / max(now - began, 1e-9):,.0f} tokens/s"
        if self._live is not None:
            self._live.update(self._task, completed=step, headline=text)
        elif now - self._printed >= self._every_s or step >= self._total:
            self._printed = now
            if step > first_step:
                left = (now - began) / (step - first_step) * (self._total - step)
                text += f"  ETA {_duration(left)}"
            print(f"{self._stage} {step}/{self._total}  {text}", flush=True)

    def close(self) -> None:
        """Ends the live display."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
