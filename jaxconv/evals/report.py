"""The report of a run: `report.json` for programs, `report.md` with plots for people."""

import html
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxconv.evals.statistics import Estimate
from jaxconv.train import atomic
from jaxconv.train.workdir import Workdir

Status = Literal["done", "failed", "partial", "stopped"]
STATUSES: tuple[Status, ...] = ("done", "failed", "partial", "stopped")


@dataclass(frozen=True)
class Quantity:
    """A measured number without an interval: speed, memory, seconds."""

    value: float
    unit: str


@dataclass
class Report:
    """What a run found, and what it cost.

    Attributes:
        status: `done`; `partial` when some rows failed and `notes` say which; `failed`; `stopped`.
        results: numbers of the trained thing, by name, each with its interval and n.
        baselines: the same numbers of what it is compared with.
        artifacts: what the run made, by name, as paths inside the workdir.
        cost: `wall_s`, `device_s`, `llm_calls`, `llm_tokens`, `usd`, as far as they apply.
        perf: speed and memory.
        compile: what compiling took, apart from `perf`.
        kernels: which form of an operation ran, by the operation's name.
        notes: sentences that a reader of the numbers has to know.
        plots: PNG files in the workdir, by caption; in `report.md` only.
        sections: Markdown by heading; in `report.md` only. Text out of conversations belongs
            through `escape` first.
    """

    status: Status = "done"
    results: dict[str, Estimate] = field(default_factory=dict)
    baselines: dict[str, Estimate] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    perf: dict[str, Quantity] = field(default_factory=dict)
    compile: dict[str, Quantity] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    plots: dict[str, str] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)

    def write(self, workdir: Workdir, *, name: str = "report") -> dict[str, Any]:
        """Writes `<name>.json` and `<name>.md` and returns what stands in the first.

        Recipe, preset, config and versions come from the workdir's `config.json`.

        Raises:
            ValueError: a number that is not finite, an unknown status, or an artifact or plot that
                is not there.
        """
        content = self._content(workdir)
        if workdir.is_writer:
            atomic.write_text(workdir.path / f"{name}.md", self._markdown(content))
            # Last: its presence says that the rest is there.
            atomic.write_json(workdir.path / f"{name}.json", content)
        return content

    def _content(self, workdir: Workdir) -> dict[str, Any]:
        if self.status not in STATUSES:
            raise ValueError(f"report status {self.status!r}; it may be {', '.join(STATUSES)}")
        identity = workdir.read_identity() or {}
        for kind, paths in (("artifact", self.artifacts), ("plot", self.plots)):
            for name, path in paths.items():
                # The copy that a reader has of a workdir in a bucket lacks the export.
                missing = workdir.is_writer and not (workdir.path / path).exists()
                if os.path.isabs(path) or missing:
                    raise ValueError(f"{kind} {name}: {path} is not a path inside {workdir.path}")
        return {
            "recipe": identity.get("recipe", ""),
            "preset": identity.get("preset", ""),
            "config_sha": identity.get("config_sha", ""),
            "status": self.status,
            "results": {name: _estimate(name, e) for name, e in self.results.items()},
            "baselines": {name: _estimate(name, e) for name, e in self.baselines.items()},
            "artifacts": dict(self.artifacts),
            "cost": {name: _finite(name, value) for name, value in self.cost.items()},
            "versions": identity.get("versions", {}),
            "devices": identity.get("devices", {}),
            "perf": {name: _quantity(name, q) for name, q in self.perf.items()},
            "compile": {name: _quantity(name, q) for name, q in self.compile.items()},
            "kernels": dict(self.kernels),
            "notes": list(self.notes),
        }

    def _markdown(self, content: Mapping[str, Any]) -> str:
        title = f"{content['recipe']} ({content['preset']})"
        parts = [
            f"# {escape(title)}\n\nStatus: **{content['status']}**. "
            f"Config {content['config_sha']}.\n"
        ]
        if self.notes:
            parts.append("\n".join(f"- {escape(note)}" for note in self.notes) + "\n")
        for heading, numbers in (("Results", self.results), ("Baselines", self.baselines)):
            if numbers:
                parts.append(f"## {heading}\n\n" + _estimates_table(numbers))
        for caption, path in self.plots.items():
            parts.append(f"![{escape(caption)}]({path})\n")
        parts += [f"## {escape(name)}\n\n{text.rstrip()}\n" for name, text in self.sections.items()]
        measured = {
            **self.perf,
            **{f"compile: {name}": quantity for name, quantity in self.compile.items()},
            **{f"cost: {name}": Quantity(v, "") for name, v in self.cost.items()},
        }
        if measured:
            rows = [[name, f"{q.value:,.4g}", q.unit] for name, q in measured.items()]
            parts.append("## Speed and cost\n\n" + table(["", "value", "unit"], rows))
        if self.artifacts:
            rows = [[name, f"[{path}]({path})"] for name, path in self.artifacts.items()]
            parts.append("## Artifacts\n\n" + table(["name", "path"], rows, escaped=True))
        rows = [[name, version] for name, version in content["versions"].items()]
        rows += [[f"device: {kind}", str(count)] for kind, count in content["devices"].items()]
        rows += [[f"kernels/{name}", form] for name, form in self.kernels.items()]
        if rows:
            parts.append("## Versions\n\n" + table(["", ""], rows))
        return "\n".join(parts)


def cell(estimate: Estimate | None, *, with_n: bool = False) -> str:
    """A number with an interval as a cell of a table, with how many things it is of if asked for;
    nothing where there is none."""
    if estimate is None:
        return ""
    low, high = estimate.ci95
    return f"{estimate.value:.3f} [{low:.3f}, {high:.3f}]" + (
        f" ({estimate.n:,})" if with_n else ""
    )


def print_summary(content: Mapping[str, Any], workdir: Workdir, *, name: str = "report") -> None:
    """Prints what `<name>.json` holds as a short table, and where the rest is."""
    if not workdir.is_writer:
        return
    from rich.console import Console
    from rich.markup import escape as escape_markup
    from rich.table import Table

    console = Console()
    summary = Table(title=f"{content['recipe']} ({content['preset']}): {content['status']}")
    for heading, justify in (("", "left"), ("value", "right"), ("95 %", "right"), ("n", "right")):
        summary.add_column(heading, justify=justify)
    for group in ("results", "baselines"):
        for what, number in content[group].items():
            interval = number["ci95"]
            summary.add_row(
                escape_markup(what if group == "results" else f"{what} (baseline)"),
                escape_markup(f"{number['value']:.4g} {number['unit']}".strip()),
                f"{interval[0]:.4g} … {interval[1]:.4g}" if interval else "",
                str(number["n"]),
            )
    if summary.row_count:
        console.print(summary)
    else:
        console.print(f"{content['recipe']} ({content['preset']}): {content['status']}")
    for note in content["notes"]:
        console.print(f"- {note}", markup=False)
    console.print(f"{name}: {workdir}/{name}.md", markup=False, soft_wrap=True)


def read(workdir: Workdir) -> dict[str, Any] | None:
    """What stands in `report.json`, None when there is none yet."""
    return json.loads(workdir.report.read_text()) if workdir.report.exists() else None


def learning_curves(
    path: Path, panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]
) -> None:
    """Draws one PNG with a panel a title.

    Args:
        path: the PNG; replaced atomically.
        panels: title -> label of a line -> (steps, values). Values that are not finite leave a gap.
    """
    if not panels:
        raise ValueError("learning_curves needs at least one panel")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for label, (steps, values) in lines.items():
            axis.plot(steps, values, label=label, linewidth=1.5)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize="small")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    atomic.write_bytes(Path(path), drawn.getvalue())


def escape(text: str) -> str:
    """`text` so that Markdown shows it literally: no markup, no HTML, no broken table cell.

    Line ends become `<br>`, so that a text of several lines stays in its cell. What has a meaning
    only at the beginning of a block (lists, headings, rules) is left alone elsewhere, so that
    numbers stay readable in the source.
    """
    literal = html.escape(text, quote=False)
    literal = re.sub(r"([\\`*_\[\]|~])", r"\\\1", literal)
    literal = re.sub(r"(?<=[^\W_])\\_(?=[^\W_])", "_", literal)  # no emphasis inside a word
    literal = re.sub(r"^(\s*)((?:[+-]|#{1,6})(?=\s|$)|--)", r"\1\\\2", literal)
    literal = re.sub(r"^(\s*\d+)([.)])(?=\s|$)", r"\1\\\2", literal)
    return re.sub(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", "<br>", literal)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, escaped: bool = False) -> str:
    """A Markdown table. Cells are escaped here unless they are already (`escaped`)."""
    if any(len(row) != len(header) for row in rows):
        raise ValueError(f"every row must have {len(header)} cells, as the header has")
    clean = (lambda cell: cell) if escaped else escape
    lines = [list(map(clean, header)), ["---"] * len(header), *(list(map(clean, r)) for r in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def side_by_side(header: Sequence[str], transcripts: Sequence[Sequence[tuple[str, str]]]) -> str:
    """A Markdown table of conversations next to each other, a row a turn.

    Args:
        header: one heading a conversation, such as `("before", "after")`.
        transcripts: the conversations, as (speaker, text) turns; shorter ones end in empty cells.
    """
    length = max((len(turns) for turns in transcripts), default=0)
    rows = [
        [
            f"**{escape(turns[i][0])}**: {escape(turns[i][1])}" if i < len(turns) else ""
            for turns in transcripts
        ]
        for i in range(length)
    ]
    return table([escape(heading) for heading in header], rows, escaped=True)


def _estimates_table(numbers: Mapping[str, Estimate]) -> str:
    rows = []
    for name, e in numbers.items():
        interval = f"{e.ci95[0]:.4g} … {e.ci95[1]:.4g}" if e.ci95 is not None else ""
        rows.append([name, f"{e.value:.4g}", interval, str(e.n), e.unit])
    return table(["", "value", "95 % interval", "n", "unit"], rows)


def _estimate(name: str, e: Estimate) -> dict[str, Any]:
    interval = None if e.ci95 is None else [_finite(name, bound) for bound in e.ci95]
    return {"value": _finite(name, e.value), "ci95": interval, "n": int(e.n), "unit": e.unit}


def _quantity(name: str, quantity: Quantity) -> dict[str, Any]:
    return asdict(quantity) | {"value": _finite(name, quantity.value)}


def _finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"report: {name} is {value}; it must be finite")
    return value if isinstance(value, int) else float(value)
