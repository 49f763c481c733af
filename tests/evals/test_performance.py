"""The `perf` section: speeds by hand, goodput over all attempts, memory measured or planned."""

import json
from types import SimpleNamespace

import jax
import pytest

from jaxconv.evals import performance
from jaxconv.evals.report import Report
from jaxconv.train import clock, memory
from jaxconv.train.workdir import Workdir


def update(step, *, tokens, fill, seconds, **more):
    return {"step": step, "tokens": tokens, "fill": fill, "time/step_s": seconds, **more}


RECORDS = [
    {"step": 0, "speed/evaluated_tokens_per_s": 50.0},
    update(1, tokens=100, fill=0.25, seconds=50.0),
    update(2, tokens=100, fill=0.5, seconds=1.0, **{"speed/flops_per_s": 5.0}),
    update(3, tokens=100, fill=0.5, seconds=2.0, **{"speed/flops_per_s": 7.0}),
    update(4, tokens=60, fill=0.75, seconds=2.0, **{"speed/evaluated_tokens_per_s": 70.0}),
]


def values(perf):
    return {name: quantity.value for name, quantity in perf.items()}


def test_speeds_of_updates_are_medians_of_the_later_half():
    found = performance.of_updates(RECORDS, "sft")
    assert values(found) == {
        "sft/tokens_per_s": 50.0,  # of 100, 50 and 30
        "sft/padded_tokens_per_s": 100.0,  # of 200, 100 and 40
        "sft/fill": 0.5,
        "sft/evaluated_tokens_per_s": 70.0,
        "sft/step_s": 2.0,
        "sft/flops_per_s": 7.0,
    }
    assert performance.of_updates([], "sft") == {}


def test_speeds_of_iterations_are_told_by_phase():
    records = [
        {
            "speed/sampled_tokens_per_s": 10.0,
            "speed/trained_tokens_per_s": 20.0,
            "speed/slot_occupancy": 0.5,
            "speed/train_mfu": 0.4,
            "speed/mfu": 0.2,
            "time/sync_s": 0.1,
            "time/step_s": 3.0,
            "reward/mean": 1.0,
        }
    ]
    assert values(performance.of_iterations(records)) == {
        "speed/sampled_tokens_per_s": 10.0,
        "speed/trained_tokens_per_s": 20.0,
        "speed/slot_occupancy": 0.5,
        "speed/train_mfu": 0.4,
        "time/sync_s": 0.1,
        "self_play/step_s": 3.0,
        "self_play/mfu": 0.2,
    }


@pytest.fixture
def workdir(tmp_path):
    with Workdir(tmp_path / "run") as held:
        yield held
    clock.end()


def lines(workdir, *records):
    path = workdir.path / "clock.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_goodput_is_the_productive_share_of_all_attempts(workdir):
    lines(
        workdir,
        {"attempt": 1},
        {"attempt": 1, "stage": "sft", "done": 1, "spent": {"step": 30, "compile": 10}},
        {"attempt": 1, "stage": "sft", "done": 2, "spent": {"step": 20}},
        {"attempt": 2},
        {"attempt": 2, "stage": "sft", "restored": 1, "spent": {"restart": 5, "other": 5}},
        {"attempt": 2, "stage": "sft", "done": 2, "spent": {"step": 20, "data": 10}},
    )
    report = Report()
    performance.add(report, workdir)
    found = values(report.perf)
    assert found["goodput"] == 0.5
    assert {name: x for name, x in found.items() if name.startswith("time/") and x} == {
        "time/step_s": 50, "time/compile_s": 10, "time/lost_s": 20, "time/restart_s": 10,
        "time/data_s": 10,
    }  # fmt: skip


def test_memory_is_the_compilers_plan_where_the_runtime_measures_none(workdir):
    clock.begin(workdir)
    clock.note("memory", planned=3 << 20)
    clock.note("memory", planned=2 << 20)
    report = Report()
    performance.add(report, workdir)
    planned = report.perf["memory/device_planned_mib"]
    assert planned.value == 3 and "compiler's plan" in planned.unit
    assert "memory/device_peak_mib" not in report.perf


def test_memory_that_the_runtime_measured_goes_before_the_plan(workdir, monkeypatch):
    """That of an earlier attempt counts too."""
    for peak in (7 << 20, 5 << 20):
        monkeypatch.setattr(memory, "device_peak", lambda peak=peak: peak)
        clock.begin(workdir)
        clock.note("memory", planned=90 << 20)
        report = Report()
        performance.add(report, workdir)
    assert report.perf["memory/device_peak_mib"].value == 7
    assert "memory/device_planned_mib" not in report.perf


def test_the_peak_is_that_of_the_fullest_device(monkeypatch):
    assert memory.device_peak() is None  # a CPU keeps no account
    devices = [
        SimpleNamespace(memory_stats=lambda n=n: n and {"peak_bytes_in_use": n}) for n in (3, 8)
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory.device_peak() == 8
