"""Labels conversations with any task that a small file describes.

1. Conversations: a file or folder, or the embedded help desk.
2. A task: prompt, output and checks, from a YAML or Python file.
3. Every conversation is asked about once; each ends as a value or as an error with its cause.
4. The labels with where they come from, their counts, and how far they agree with right ones.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jaxconv.data.conversation import Conversation, PreferencePair
from jaxconv.data.quarantine import Quarantine
from jaxconv.data.readers import FORMATS
from jaxconv.data.sources import open_source
from jaxconv.data.synthetic import assistant
from jaxconv.errors import Refused
from jaxconv.evals.agreement import agreement
from jaxconv.evals.report import Report, escape, table
from jaxconv.evals.statistics import proportion
from jaxconv.llm import Result, section
from jaxconv.llm.conversations import ConversationInput
from jaxconv.llm.task_file import ConversationTask, load_task
from jaxconv.recipes.asking import add_quarantine, asking, dry_asking
from jaxconv.train import checks
from jaxconv.train.workdir import Workdir

REPORTED = ("label.field", "label.gold")
"""Fields that only the report depends on: with others it is written anew."""
MAY_CHANGE = (*section.MAY_CHANGE, *REPORTED)
_TASKS = Path(__file__).parent / "tasks"
_GOLD = "kind"  # in the meta of the embedded conversations
_SHOWN = 5  # examples and failures in the report


def check(config) -> None:
    """Refuses what cannot work, before any work is done."""
    section.check(config)
    checks.at_least(config, {"data.examples": 2})
    checks.one_of(config, {"data.format": ("auto", *FORMATS)})
    task = _task(config)
    if section.is_rules(config) and task.task.rules is None:
        raise Refused(
            f"task {task.task.name} has no rules; set config.llm.base_url or config.llm.model"
        )
    field = config.label.field
    if field and field not in task.label_fields:
        known = ", ".join(task.label_fields) or "nothing, the task has no label"
        raise Refused(f"config.label.field={field!r}; it may be {known}")
    if config.label.gold and not _field(config, task):
        raise Refused(
            f"config.label.gold={config.label.gold!r}: set config.label.field to one of "
            f"{', '.join(task.label_fields) or 'the labels, of which the task has none'}"
        )


def made_of(config) -> dict[str, str]:
    """The prompt and the file: with others a finished run is begun again."""
    return section.made_of([_task(config).task], config.data.path)


def run(config, workdir: Workdir, *, retry_failed: bool = False) -> Report:
    """Labels, writes `artifacts/labels.jsonl` and reports. `retry_failed` asks again for rows that
    were given up."""
    quarantine = Quarantine(workdir.artifacts / "quarantine.jsonl")
    with asking(config, workdir, retry_failed=retry_failed) as asked:
        talks, task = conversations(config, quarantine), _task(config)
        _refuse_no_gold(config, talks)
        results = asked.ask(task.task, _Inputs(task, talks))
        asked.write(workdir.artifacts / "labels.jsonl", task.task, results)
        report = report_of(config, task, asked.who, talks, results)
        asked.report(report)
    add_quarantine(report, quarantine, workdir)
    return report


def dry_run(config, path: Path) -> list[str]:
    """`--dry_run`: what a run in the workdir at `path` would take, a line a stage."""
    # An index of the rows is made, which the workdir does not get from a run that is none.
    with dry_asking(config, path) as (asked, folder):
        talks, task = conversations(config, Quarantine(folder / "quarantine.jsonl")), _task(config)
        _refuse_no_gold(config, talks)
        return [str(asked.plan(task.task, _Inputs(task, talks)))]


# ---------------------------------------------------------------- 1. conversations


def conversations(config, quarantine: Quarantine) -> Sequence[Conversation]:
    """Those at the config's path, or what users of the embedded help desk first say."""
    if config.data.path:
        source = checks.naming(
            "config.data.path: ",
            lambda: open_source(config.data.path, config.data.format, quarantine),
        )
        if isinstance(source[0], PreferencePair):
            raise Refused(
                f"config.data.path={config.data.path!r} holds preference pairs; it must hold "
                "conversations"
            )
        return source
    return [
        dataclasses.replace(
            talk,
            messages=tuple(m for m in talk.messages[:2] if m.role == "user"),
            meta={_GOLD: talk.meta["kinds"][0]},
        )
        for talk in assistant.conversations(config.seed << 32, config.data.examples)
    ]


# ---------------------------------------------------------------- 2. task


def _task(config) -> ConversationTask:
    own = "satisfaction.yaml" if config.data.path else "help_desk.yaml"
    return checks.naming(
        "config.label.task: ", lambda: load_task(config.label.task or _TASKS / own)
    )


def _field(config, task: ConversationTask) -> str:
    """The field of the output that is counted and compared, "" for none."""
    return config.label.field or (task.label_fields[0] if len(task.label_fields) == 1 else "")


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """(id, input) of each conversation, made one after the other and as often as it is gone
    through."""

    task: ConversationTask
    talks: Sequence[Conversation]

    def __iter__(self) -> Iterator[tuple[str, ConversationInput]]:
        return ((talk.id, self.task.make_input(talk)) for talk in self.talks)


def _refuse_no_gold(config, talks: Sequence[Conversation]) -> None:
    gold = config.label.gold
    if gold and not any(gold in talk.meta for talk in talks):
        raise Refused(f"config.label.gold={gold!r}: no conversation has it in its meta")


# ---------------------------------------------------------------- 4. labels and report


def report_of(
    config,
    task: ConversationTask,
    who: str,
    talks: Sequence[Conversation],
    results: Mapping[str, Result],
) -> Report:
    """Counts, examples of failures, and agreement where right labels are known."""
    values = [result for result in results.values() if result.ok]
    failed = [result for result in results.values() if not result.ok]
    report = Report(
        status="partial" if failed else "done",
        results={"labelled": proportion(len(values), len(results))},
        artifacts={"labels": "artifacts/labels.jsonl"},
    )
    report.notes.append(
        f"Task {task.task.name}, prompt {task.task.prompt.version}; answers of {who}."
    )
    if failed:
        rows = [[r.id, r.error.kind, r.error.message, (r.raw or "")[:200]] for r in failed[:_SHOWN]]
        report.notes.append("Each row without a value stands in labels.jsonl with its error.")
        report.sections["Failures"] = table(["id", "kind", "what", "answer"], rows)
    report.sections["Examples"] = table(
        ["id", "value"], [[r.id, r.value.model_dump_json()] for r in values[:_SHOWN]]
    )
    if field := _field(config, task):
        _add_labels(report, config, field, talks, results)
    return report


def _add_labels(
    report: Report, config, field: str, talks: Sequence[Conversation], results: Mapping[str, Result]
) -> None:
    given = {id: getattr(r.value, field) for id, r in results.items() if r.ok}
    if not given:
        return
    for label, count in sorted(collections.Counter(given.values()).items()):
        report.results[f"share/{label}"] = proportion(count, len(given))
    gold = config.label.gold or ("" if config.data.path or config.label.task else _GOLD)
    if not gold:
        return
    known = [(talk.id, str(talk.meta[gold])) for talk in talks if gold in talk.meta]
    compared = [given.get(id) for id, _ in known]
    if not any(label is not None for label in compared):
        report.results["coverage"] = proportion(0, len(known))
        report.notes.append(
            f"No agreement: none of the {len(known)} conversations with a right label got one."
        )
        return
    found = agreement(compared, [right for _, right in known], seed=config.seed)
    report.results |= {
        "coverage": found.coverage,
        "agreement/accuracy": found.accuracy,
        "agreement/kappa": found.kappa,
    }
    report.baselines["agreement/majority"] = found.majority
    rows = [[right, wrong, str(count)] for right, wrong, count in found.confusions[:10]]
    if rows:
        report.sections["Confusions"] = table(["right", escape(field), "rows"], rows)
