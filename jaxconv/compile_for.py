"""`--compile_for=TOPOLOGY`: what a run would take of chips that need not be there.

The programs of the very config are compiled for the topology by libtpu, on a CPU and with shapes
alone, and what the compiler planned is printed and written to `report.json`.
"""

import importlib.metadata
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from jaxconv.errors import Refused
from jaxconv.perf import chips, libtpu
from jaxconv.train import atomic
from jaxconv.train.config import Loaded
from jaxconv.train.workdir import Workdir, config_sha, versions

if TYPE_CHECKING:
    from jaxconv.perf.planned import Planned
    from jaxconv.perf.suggest import Layout
    from jaxconv.perf.table import Program

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # Outside Google's cloud nobody answers questions about the machine.
    "TPU_SKIP_MDS_QUERY": "1",
    # libtpu complains of a machine without these; the topology overrules them.
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # libtpu is not locked by one process that only compiles.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
UNVERIFIED = (
    "Temporaries and times are the compiler's plan and an estimate: no device has confirmed them. "
    "Arguments and outputs are exact."
)


def prepare(topology: str) -> chips.Topology:
    """Reads the topology, and tells jax and libtpu what to do; before jax is imported."""
    os.environ.update(_ENVIRONMENT)
    libtpu.tell()
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    try:
        found = chips.topology(topology)
    except Refused as error:
        raise Refused(f"--compile_for: {error}") from None
    if found.slices > 1:
        raise Refused(f"--compile_for={topology}: a run's mesh lies in one slice; it may be 1")
    return found


def run(
    recipe: Any,
    loaded: Loaded,
    resolved: dict[str, Any],
    topology: chips.Topology,
    workdir: str | None,
    *,
    suggest: bool = False,
) -> bool:
    """Compiles, prints and writes; returns whether everything fits.

    With `suggest` it also searches for the fastest layout of the train step that fits.

    Raises:
        Refused: the recipe has no programs to compile, the topology is none of libtpu's, or libtpu
            is missing.
    """
    from jaxconv.perf.planned import compile_all
    from jaxconv.perf.table import render, to_dict

    began = time.monotonic()
    if not hasattr(recipe, "planned"):
        raise Refused(f"--compile_for: recipe {loaded.config.recipe!r} does not have it")
    config = as_on_tpu(loaded.config)
    devices = chips.describe(topology).devices
    identity = resolved | {"compile_for": topology.name}
    default = f"runs/{loaded.name}-{loaded.preset}-{topology.name.replace(':', '-')}"
    with _workdir(workdir or default) as folder:
        planned = recipe.planned(config, devices)
        programs = compile_all(planned, topology)
        advice = _advice(planned, programs, topology)
        text = "\n".join([render(programs, topology), *advice, UNVERIFIED])
        folder.write_identity(identity, preset=loaded.preset)
        content = {
            "recipe": config.recipe,
            "preset": loaded.preset,
            "config_sha": config_sha(identity),
            "status": "failed" if advice else "done",
            "results": {},
            "baselines": {},
            "artifacts": {},
            "cost": {"wall_s": round(time.monotonic() - began, 3)},
            "versions": versions() | {"libtpu": importlib.metadata.version("libtpu")},
            "libtpu_options": libtpu.tell(),
            "devices": {devices[0].device_kind: len(devices)},
            "compile_for": to_dict(programs, topology),
            "notes": [*advice, UNVERIFIED],
        }
        atomic.write_text(folder.path / "report.md", f"```\n{text}\n```\n")
        atomic.write_json(folder.report, content)
        folder.push()
        print(f"{text}\nreport: {folder}/{folder.report.name}")
        if suggest:
            _suggest(recipe, config, devices, topology)
    return not advice


def as_on_tpu(config: ConfigDict) -> ConfigDict:
    """The config with the kernels that it would choose on a TPU, which this process is not on."""
    kernels = config.model.kernels
    if kernels not in ("auto", "xla", "tpu"):
        raise Refused(
            f"config.model.kernels={kernels!r}; with --compile_for it may be 'auto', 'xla' or 'tpu'"
        )
    config = config.copy_and_resolve_references()
    config.model.kernels = "tpu" if kernels == "auto" else kernels
    return config


def _workdir(path: str) -> Workdir:
    """A new folder, or that of an earlier compilation: never that of a run."""
    workdir = Workdir(path)
    identity = workdir.read_identity()
    if identity is not None and "compile_for" not in identity["config"]:
        workdir.close()
        raise Refused(f"--workdir={workdir} holds a run; give another one to --compile_for")
    return workdir


def _advice(
    planned: Sequence["Planned"], programs: Sequence["Program"], topology: chips.Topology
) -> list[str]:
    """Of the program that lacks most, what to change; nothing where all fit."""
    from jaxconv.perf.table import fits

    available = topology.chip.usable_bytes
    short = [pair for pair in zip(planned, programs, strict=True) if not fits(pair[1], topology)]
    if not short:
        return []
    plan, program = max(short, key=lambda pair: pair[1].peak)
    return [f"{plan.name} does not fit: {plan.relief(program.resident, available)}"]


def _suggest(recipe: Any, config: ConfigDict, devices: Sequence[Any], topology: Any) -> None:
    """Prints what was tried as it comes, and the overrides of the fastest that fits."""
    from jaxconv.perf.suggest import search

    section = "batch" if "batch" in config else "minibatching"
    # What self-play learns from is filled up to whole micro-batches, of any number of rows.
    rows = config[section].rows * config[section].get("microbatches", 16)

    def changed(layout: "Layout") -> dict[str, Any]:
        together = layout.rows_in_all(topology.devices)
        fields = {
            "mesh.strategy": layout.strategy,
            "mesh.tensor": layout.tensor,
            "mesh.data": 1,
            "model.remat": layout.remat,
            f"{section}.rows": together,
        }
        if "microbatches" in config[section]:
            fields["batch.microbatches"] = rows // together
        return fields

    def plan(layout: "Layout") -> "Planned":
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(changed(layout))
        return recipe.planned(other, devices)[0]

    print("\ntrying layouts of the train step, rows of a micro-batch a device:", flush=True)
    best = None
    for tried in search(plan, topology, rows):
        rate = "" if tried.rate is None else f"{tried.rate:,.0f} tokens/s, "
        print(f"  {tried.layout}: {rate}{tried.why}", flush=True)
        if tried.rate is not None and (best is None or tried.rate > best.rate):
            best = tried
    if best is None:
        print(f"none fits: use a larger topology, or other rows of an update than {rows}")
        return
    fields = changed(best.layout).items()
    print("fastest: " + " ".join(f"--config.{field}={value}" for field, value in fields))
