"""How fast a run was, what its time went on, and what it took of a device's memory.

Speeds are medians over the later half of a stage's steps, of all attempts, out of `metrics.jsonl`.
"""

import resource
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxconv.evals.report import Quantity, Report
from jaxconv.train import clock, memory
from jaxconv.train.workdir import Workdir

_SPEEDS = {
    "time/step_s": "s",
    "speed/flops_per_s": "FLOP/s",
    "speed/mfu": "of the peak",
}
_PHASES = {
    "speed/sampled_tokens_per_s": "tokens/s",
    "speed/trained_tokens_per_s": "tokens/s",
    "speed/slot_occupancy": "fraction",
    "speed/rollout_flops_per_s": "FLOP/s",
    "speed/rollout_mfu": "of the peak",
    "speed/train_flops_per_s": "FLOP/s",
    "speed/train_mfu": "of the peak",
    "time/rollout_s": "s/iteration",
    "time/train_s": "s/iteration",
    "time/sync_s": "s/iteration",
}
_MIB = 1 << 20


def of_updates(records: Sequence[Mapping[str, Any]], stage: str) -> dict[str, Quantity]:
    """Speeds of a stage that trains on packed examples, out of its records.

    Steps that also evaluate, save or compile count without that: their time is their own.
    """
    late = [r for r in records[len(records) // 2 :] if "tokens" in r and "time/step_s" in r]
    out = {}
    if late:
        tokens = [r["tokens"] / r["time/step_s"] for r in late]
        cells = [r["tokens"] / r["fill"] / r["time/step_s"] for r in late]
        out["tokens_per_s"] = Quantity(float(np.median(tokens)), "tokens/s")
        out["padded_tokens_per_s"] = Quantity(float(np.median(cells)), "tokens/s, padding included")
    filled = [r["fill"] for r in records if "fill" in r]
    if filled:
        out["fill"] = Quantity(float(np.mean(filled)), "share of the cells")
    out |= _medians(records, {"speed/evaluated_tokens_per_s": "tokens/s"} | _SPEEDS)
    return {f"{stage}/{_last(name)}": quantity for name, quantity in out.items()}


def of_iterations(records: Sequence[Mapping[str, Any]]) -> dict[str, Quantity]:
    """Speeds of self-play, of an iteration and by its phases."""
    whole = {f"self_play/{_last(name)}": q for name, q in _medians(records, _SPEEDS).items()}
    return _medians(records, _PHASES) | whole


def _medians(records: Sequence[Mapping[str, Any]], units: Mapping[str, str]) -> dict[str, Quantity]:
    """Of the later half of the records that have a number."""
    out = {}
    for name, unit in units.items():
        values = [r[name] for r in records if r.get(name) is not None]
        if values:
            median = float(np.median(values[len(values) // 2 :]))
            out[name] = Quantity(median, unit)
    return out


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def add(report: Report, workdir: Workdir) -> None:
    """Adds what only the whole run knows to what its recipe has told of its stages: goodput, the
    time of all attempts by cause, and the peak of memory."""
    if (peak := memory.device_peak()) is not None:
        clock.note("memory", measured=peak)
    spent = clock.by_cause(workdir)
    wall = sum(spent.values())
    out = {}
    if wall > 0:
        out["goodput"] = Quantity(spent[clock.STEP] / wall, "productive share of the time")
        out |= {f"time/{c}_s": Quantity(round(seconds, 3), "s") for c, seconds in spent.items()}
    notes = clock.notes(workdir, "memory")
    measured, planned = ([n[kind] for n in notes if kind in n] for kind in ("measured", "planned"))
    if measured:
        out["memory/device_peak_mib"] = Quantity(max(measured) / _MIB, "MiB")
    elif planned:
        unit = "MiB in an update, by the compiler's plan"
        out["memory/device_planned_mib"] = Quantity(max(planned) / _MIB, unit)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    out["memory/host_peak_mib"] = Quantity(peak, "MiB in this process")
    for name, quantity in out.items():
        report.perf.setdefault(name, quantity)
