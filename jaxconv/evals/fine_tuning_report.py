"""Reports of fine-tuning on conversations and on preference pairs."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxconv.data.conversation import Message
from jaxconv.data.quarantine import Quarantine
from jaxconv.data.stores import Stores
from jaxconv.evals import performance, statistics
from jaxconv.evals.exam import Exam, Marks, wins
from jaxconv.evals.report import Report, escape, learning_curves, table
from jaxconv.evals.statistics import Estimate
from jaxconv.train import atomic, metrics
from jaxconv.train.workdir import Workdir

READING_SFT = """`nll` is the negative log-likelihood of the assistant's tokens in held-out
conversations. `choice` is the share of held-out prompts whose own reply the model finds likelier
than the reply of another conversation, `context` by how many nats on average: what a reply owes to
what was said before it. {correct}`gain/*` is how much better the trained model is than its start
(for `nll`: nats saved), `control/gain/*` the same gain of a model that was trained in the same way
on replies which belong to other conversations; it may learn how replies sound, but not when they
fit. Intervals are over conversations of one training run; other conversations, `validation`, picked
the weights.
"""
_CORRECT = "`correct` is the share of sampled replies whose facts are those of the conversation. "

READING_DPO = """`accuracy` is the share of held-out pairs whose chosen reply gained more
log-likelihood over the start than the rejected one (the implicit reward; a tie counts half, and the
start is all ties), `margin` by how many nats. `prefers` is the share of pairs whose chosen reply is
the likelier one, with no reference to the start. {style}`gain/*` is the trained model minus its
start. `control/*` is the mean of two models that were trained in the same way on the same pairs
with labels shuffled in opposite ways: `control/accuracy` and `control/margin` are measured as
`accuracy` and `margin` are, `control/gain/*` is that mean minus the start. Intervals are over
conversations (pairs and prompts that begin with the same message belong to one) of one training
run; other pairs, `validation`, picked the weights.
"""


def of_sft(
    config, exam: Exam, before: Marks, after: Marks, control: Sequence[Marks] = ()
) -> Report:
    """What fine-tuning changed on held-out conversations; `control`: runs on exchanged replies."""
    report = Report()
    seed = config.seed
    trained = [("", [after])] + ([("control/", control)] if control else [])

    # A conversation that was split is several examples, but one independent unit.
    _, unit = np.unique(_units(exam, "held_out"), return_inverse=True)

    def nats_a_token(nats: np.ndarray, tokens: np.ndarray) -> Estimate:
        nats, tokens = (np.bincount(unit, weights=x[:, 0]) for x in (nats, tokens))
        return statistics.ratio(nats, tokens, seed=seed, unit="nats a token")

    def nll(marks: Marks) -> Estimate:
        s = marks.scores["held_out"]
        return nats_a_token(-s.logprob, s.tokens)

    def choice(marks: Marks) -> np.ndarray:
        return wins(marks.scores["choice"].margin)

    report.results["nll"] = nll(after)
    report.baselines["nll/start"] = nll(before)
    units = _units(exam, "choice")
    report.results["choice"] = _rate(choice(after), units, seed)
    report.baselines["choice/start"] = _rate(choice(before), units, seed)
    for prefix, marks in trained:
        place = report.baselines if prefix else report.results
        b = before.scores["held_out"]
        saved = _mean(marks, lambda m: m.scores["held_out"].logprob) - b.logprob
        place[f"{prefix}gain/nll"] = nats_a_token(saved, b.tokens)
        place[f"{prefix}gain/choice"] = statistics.paired_difference(
            _mean(marks, choice), choice(before), seed=seed, unit="rate", clusters=units
        )
        place[f"{prefix}gain/context"] = statistics.paired_difference(
            _mean(marks, lambda m: m.scores["choice"].margin),
            before.scores["choice"].margin,
            seed=seed,
            unit="nats",
            clusters=units,
        )
    _add_judged(report, exam, before, after, control, seed)
    correct = _CORRECT if "correct" in exam.judges else ""
    report.sections["How to read these numbers"] = READING_SFT.format(correct=correct)
    _add_replies(report, exam, before, after)
    return report


def of_dpo(
    config, exam: Exam, before: Marks, after: Marks, control: Sequence[Marks] = ()
) -> Report:
    """What learning from preferences changed on held-out pairs; `control`: runs on shuffled
    labels, whose mean is taken pair by pair."""
    report = Report()
    seed = config.seed
    trained = [("", [after])] + ([("control/", control)] if control else [])

    def reward_margin(marks: Marks) -> np.ndarray:
        return marks.scores["pairs"].margin - before.scores["pairs"].margin

    def prefers(marks: Marks) -> np.ndarray:
        return wins(marks.scores["pairs"].margin)

    units = _units(exam, "pairs")
    report.results["prefers"] = _rate(prefers(after), units, seed)
    report.baselines["prefers/start"] = _rate(prefers(before), units, seed)
    for prefix, marks in trained:
        place = report.baselines if prefix else report.results
        gained = _mean(marks, lambda m: wins(reward_margin(m)))
        place[f"{prefix}accuracy"] = _rate(gained, units, seed)
        place[f"{prefix}margin"] = statistics.bootstrap_mean(
            _mean(marks, reward_margin), seed=seed, unit="nats", clusters=units
        )
        place[f"{prefix}gain/prefers"] = statistics.paired_difference(
            _mean(marks, prefers), prefers(before), seed=seed, unit="rate", clusters=units
        )
    _add_judged(report, exam, before, after, control, seed)
    style = "`style` is the share of sampled replies with the planted style. " + _CORRECT
    report.sections["How to read these numbers"] = READING_DPO.format(
        style=style if exam.judges else ""
    )
    _add_replies(report, exam, before, after)
    return report


def _units(exam: Exam, store: str) -> np.ndarray:
    """The unit that each example of a store belongs to."""
    return np.asarray(exam.units)[exam.stores[store].record]


def _rate(values: np.ndarray, units: np.ndarray, seed: int) -> Estimate:
    """The mean of ones and zeros (a half is a tie); an interval that holds near 0 and 1 where every
    value is a unit of its own."""
    if len(np.unique(units)) == len(units) and np.isin(values, (0, 1)).all():
        return statistics.proportion(int(values.sum()), len(values))
    return statistics.bootstrap_mean(values, seed=seed, unit="rate", clusters=units)


def _mean(marks: Sequence[Marks], of: Callable[[Marks], np.ndarray]) -> np.ndarray:
    """The mean over several runs, for each held-out example."""
    return np.mean([of(m) for m in marks], axis=0)


def _add_judged(
    report: Report, exam: Exam, before: Marks, after: Marks, control: Sequence[Marks], seed: int
) -> None:
    """Rates of properties of sampled replies, and how training changed them."""
    units = np.asarray(exam.units)[: len(exam.prompts)]
    for name in exam.judges:
        report.results[name] = _rate(after.judged[name], units, seed)
        report.baselines[f"{name}/start"] = _rate(before.judged[name], units, seed)
        for prefix, marks, place in (
            ("", [after], report.results),
            ("control/", control, report.baselines),
        ):
            if marks:
                place[f"{prefix}gain/{name}"] = statistics.paired_difference(
                    _mean(marks, lambda m, name=name: m.judged[name]),
                    before.judged[name].astype(float),
                    seed=seed,
                    unit="rate",
                    clusters=units,
                )


def _add_replies(report: Report, exam: Exam, before: Marks, after: Marks, count: int = 5) -> None:
    """The first prompts with what was said before and after training."""
    parts = []
    for prompt, one, two in list(zip(exam.prompts, before.said, after.said, strict=True))[:count]:
        told = "\n".join(f"- {message.role}: {escape(_told(message))}" for message in prompt)
        row = [text if text is not None else "(no room for a reply)" for text in (one, two)]
        parts.append(f"{told}\n\n{table(['before', 'after'], [row])}")
    report.sections["Replies, before and after"] = "\n".join(parts)


def _told(message: Message) -> str:
    calls = (f"{call.name}({call.arguments})" for call in message.tool_calls)
    return " ".join(filter(None, (message.content, *calls)))


def finish(
    report: Report,
    workdir: Workdir,
    stages: Mapping[str, str],
    stores: Stores,
    quarantine: Quarantine,
) -> None:
    """Adds learning curves of the stages (name: title), speed, where things are, and what became
    of the data; a run that had to leave out bad rows is done in part.

    A panel a metric that the stages share; only those that tell how training went.
    """
    panels: dict[str, dict[str, tuple[Sequence[float], Sequence[float]]]] = {}
    for stage, title in stages.items():
        records = metrics.read(workdir, stage)
        if not records:
            continue
        for panel, names in _PANELS.items():
            for name, label in names.items():
                points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
                if points:
                    lines = panels.setdefault(panel, {})
                    lines[f"{title}{label}"] = tuple(zip(*points, strict=True))
        report.perf |= performance.of_updates(records, stage)
    if panels and workdir.is_writer:
        learning_curves(workdir.path / "curves.png", panels)
        report.plots["Learning curves"] = "curves.png"
    report.artifacts |= {"export": "export", "metrics": "metrics.jsonl"}
    add_data(report, workdir, stores, quarantine)


def add_data(
    report: Report,
    workdir: Workdir,
    stores: Stores,
    quarantine: Quarantine,
    records: str = "records.json",
) -> None:
    """What became of the data; a run that had to leave out bad rows is done in part.

    `records` is the artifact that tells of the records which were cut or left out, if any were.
    """
    if outcomes := stores.outcomes():
        place = workdir.artifacts / records
        if workdir.is_writer:
            atomic.write_json(place, outcomes)
        report.artifacts["records"] = str(place.relative_to(workdir.path))
        report.notes += stores.notes(report.artifacts["records"])
    if len(quarantine):
        report.status = "partial"
        report.artifacts["quarantine"] = str(quarantine.path.relative_to(workdir.path))
        report.notes += quarantine.notes(report.artifacts["quarantine"])


_PANELS: Mapping[str, Mapping[str, str]] = {
    "nll, nats a token": {"nll": ", training", "held_out/nll": ", held out"},
    "pair accuracy": {"rewards/accuracy": ", training", "held_out/accuracy": ", held out"},
    "reward margin": {"rewards/margin": ", training", "held_out/margin": ", held out"},
    "reward": {"rewards/chosen": ", chosen", "rewards/rejected": ", rejected"},
    "gradient norm": {"gradient_norm": ""},
    "learning rate": {"learning_rate": ""},
}
