"""Compiles presets for TPU topologies, and writes docs/topologies.md of what the compiler planned.

    python benchmarks/topologies.py --compile      # what is missing or of another config: hours
    python benchmarks/topologies.py                # the page again, of what is there

The numbers are kept in benchmarks/results/topologies.json. Needs libtpu (extra tpu-aot), no TPU.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxconv.perf.chips import Topology, topology
from jaxconv.perf.collectives import Collective
from jaxconv.perf.memory import size
from jaxconv.perf.roofline import collective_seconds
from jaxconv.train import config as configs
from jaxconv.train.workdir import config_sha

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "topologies.json"
PAGE = ROOT / "docs" / "topologies.md"
RUNS = (
    ("sft", "qwen3_4b", "v5e:4x4"),
    ("sft", "qwen2.5_7b", "v5e:4x8"),
    ("sft", "llama3.1_8b", "v6e:4x4"),
    ("sft", "llama3.1_70b", "v5p:4x4x4"),
    ("dpo", "qwen3_4b", "v5e:4x4"),
    ("dpo", "qwen2.5_7b", "v5e:4x8"),
    ("dpo", "llama3.1_8b", "v6e:4x4"),
    ("dpo", "llama3.1_70b", "v5p:4x4x4"),
    ("omar", "bargaining_qwen3_4b", "v6e:4x4"),
    ("omar", "bargaining_qwen2.5_7b", "v6e:4x4"),
    ("omar", "bargaining_llama3.1_8b", "v6e:4x4"),
    ("omar", "bargaining_llama3.1_70b", "v5p:4x4x8"),
)
SCALED = ("qwen2.5_7b", "bargaining_qwen2.5_7b", "llama3.1_70b", "bargaining_llama3.1_70b")
SLICES = {
    "v5e": ("4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="compile what is missing")
    parser.add_argument("--runs", default="runs/topologies", help="folder of the reports")
    options = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for run in RUNS:
        folder = Path(options.runs) / "-".join((run[0], run[1], run[2].replace(":", "-")))
        if name_of(run) in known and known[name_of(run)]["config_sha"] != sha_of(run):
            print(f"{name_of(run)} was compiled of another config")
            del known[name_of(run)]
        if options.compile and name_of(run) not in known:
            subprocess.run([sys.executable, "-m", *command(run), f"--workdir={folder}"], cwd=ROOT)
        report = folder / "report.json"
        if report.exists() and json.loads(report.read_text())["config_sha"] == sha_of(run):
            known[name_of(run)] = kept(json.loads(report.read_text()))
            RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(known))


def name_of(run: tuple[str, str, str]) -> str:
    return "{}:{} {}".format(*run)


def sha_of(run: tuple[str, str, str]) -> str:
    """What `--compile_for` puts into the report of this very config."""
    recipe, preset, chips = run
    config = configs.load(f"{ROOT}/configs/{recipe}.py:{preset}").config
    return config_sha(configs.resolved(config) | {"compile_for": topology(chips).name})


def command(run: tuple[str, str, str]) -> tuple[str, ...]:
    recipe, preset, chips = run
    return ("jaxconv.launch", f"--config=configs/{recipe}.py:{preset}", f"--compile_for={chips}")


def kept(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the page is made of."""
    programs = {}
    for name, program in report["compile_for"]["programs"].items():
        fields = ("fits", "memory", "mesh", "flops", "bytes", "estimate", "compile_seconds")
        programs[name] = {field: program[field] for field in fields}
        programs[name]["collectives"] = [
            {k: c[k] for k in ("kind", "bytes", "devices", "axes", "times", "asynchronous")}
            for c in program["collectives"]
            if c["bytes"] >= 1 << 20
        ]
    return {"versions": report["versions"], "config_sha": report["config_sha"]} | {
        "topology": report["compile_for"]["topology"],
        "usable_bytes": report["compile_for"]["usable_bytes"],
        "programs": programs,
    }


# ---------------------------------------------------------------- the page

HEAD = """# Presets on TPU slices

This page is written by `benchmarks/topologies.py`. Every row is a preset compiled, from its config
alone and with no weights, by libtpu for the topology named, on a machine without a TPU:

    pip install -e '.[tpu-aot]'
    python -m jaxconv.launch --config=configs/sft.py:qwen2.5_7b --compile_for=v5e:4x8

A topology is `CHIP:SHAPE` with a chip of v4, v5e, v5p, v6e and tpu7x. What the command prints also
stands in `report.json` of `--workdir` (`runs/<config>-<preset>-<topology>` if not given). Its exit
status is 0 when all programs fit, 1 when one does not, with the largest buffers and one thing to
change, and 2 for a topology that there is not or without libtpu. `--suggest` also tries strategies,
remat and micro-batches for the train step, and prints the overrides of the fastest that fits.

libtpu is told what a run tells it (`jaxconv/perf/libtpu.py`): weights are gathered while something
is computed. On 4x4, 4x4x4 and 4x4x8 it adds up whole gradients and keeps a part of the sum, over
the links of all dimensions at once, where on 4x8 it sends parts along one ring.

Arguments and outputs are exact. **Temporaries are the compiler's plan and times are a roofline
estimate: no TPU has confirmed either.** A real step is slower: published runs reach 50 to 70 % of
the peak where this says nearly 100 %. *Peak* is what one device holds while the program runs, with
what the run keeps beside it (for self-play: the reference, the rollout's weights and caches, or the
training state). *MFU* counts causal attention and no recomputation. Rates are those of all devices.
"""


def page(known: Mapping[str, Any]) -> str:
    parts = [HEAD]
    missing = [run for run in RUNS if name_of(run) not in known]
    for recipe, title in (("sft", "Supervised"), ("dpo", "Preferences"), ("omar", "Self-play")):
        rows = [r for run in RUNS if run[0] == recipe for r in rows_of(run, known)]
        if rows:
            parts.append(f"## {title}\n\n{table(COLUMNS, rows)}")
    tables = [scaling(run, known) for run in RUNS if run[1] in SCALED and name_of(run) in known]
    if tables:
        parts.append(SCALING_HEAD + "\n" + "\n".join(tables))
    if missing:
        lines = "\n".join(f"- `{' '.join(('python -m', *command(run)))}`" for run in missing)
        parts.append(f"## Not compiled yet\n\n{lines}\n")
    versions = {
        f"{k} {v['versions'][k]}"
        for v in known.values()
        for k in ("jax", "libtpu")
        if k in v["versions"]
    }
    parts.append(f"Compiled with {', '.join(sorted(versions))}.\n")
    return "\n".join(parts)


COLUMNS = (
    "preset",
    "topology",
    "program",
    "arguments",
    "temporaries",
    "beside",
    "peak of HBM",
    "step",
    "limit",
    "MFU",
    "tokens/s",
)


def rows_of(run: tuple[str, str, str], known: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    if name_of(run) not in known:
        return
    result = known[name_of(run)]
    for name, program in result["programs"].items():
        memory, time = program["memory"], program["estimate"]
        peak = memory.get("peak_of_run", memory["peak"])
        fits = "" if program["fits"] else ", does not fit"
        yield (
            f"`{run[1]}`",
            run[2],
            name,
            size(memory["arguments"]),
            size(memory["temporaries"]),
            size(sum(memory.get("beside", {}).values())),
            f"{size(peak)} of {size(result['usable_bytes'])}{fits}",
            f"{time['seconds']:.3g} s",
            time["limit"],
            "" if time["mfu"] is None else f"{time['mfu']:.0%}",
            "" if time["tokens_per_second"] is None else f"{time['tokens_per_second']:,.0f}",
        )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# ---------------------------------------------------------------- scaling on paper

SCALING_HEAD = """## Scaling on paper

The same train step on other slices, with as many rows a device as the one that was compiled (in
bold): a device then does the same work, gathers the same weights and adds up the same gradients,
and only what its collectives take differs. So the other rows are computed, not compiled. `fsdp`
goes over all chips, of several slices over the data-center network (DCN) too. Runs over several
slices are on paper alone: a run's mesh lies in one slice so far. *Peak* is what the compiler
planned for the one in bold, with the share of the training state that a device has in the other;
slices where that is too much are left out.
"""


def scaling(run: tuple[str, str, str], known: Mapping[str, Any]) -> str:
    step = known[name_of(run)]["programs"]["train step"]
    base = topology(run[2])
    time = step["estimate"]
    _, beside, between = waiting(step, base, base)
    # The instructions of a device: what is not spent on collectives that nothing hides.
    work = time["seconds"] - between
    if work < beside:
        raise ValueError(f"{name_of(run)}: hidden collectives take longer than the work")
    rows, memory = [], step["memory"]
    shared = memory["arguments"] + memory.get("beside", {}).get("reference", 0)
    peak = memory.get("peak_of_run", memory["peak"])
    kind = run[2].partition(":")[0]
    slices = [f"{kind}:{shape}" for shape in SLICES[kind]]
    for name in (*slices, f"2x{slices[-1]}", f"4x{slices[-1]}"):
        other = topology(name)
        held = peak + shared * (base.devices / other.devices - 1)
        if held > known[name_of(run)]["usable_bytes"]:
            continue
        (ici, dcn), beside, between = waiting(step, base, other)
        terms = {"compute": time["compute"], "HBM": time["hbm"], "ICI": ici, "DCN": dcn}
        seconds = max(work, beside) + between
        tokens = time["tokens_per_second"] * time["seconds"] * other.devices / base.devices
        mfu = time["mfu"] * time["seconds"] / seconds
        cells = (
            name,
            str(other.devices),
            f"{seconds:.3g} s",
            *(f"{terms[term]:.3g} s" for term in terms),
            max(terms, key=terms.get),
            f"{mfu:.0%}",
            f"{tokens / seconds:,.0f}",
            size(round(held)),
        )
        rows.append([f"**{c}**" for c in cells] if name == run[2] else cells)
    header = ("topology", "devices", "step", "compute", "HBM", "ICI", "DCN", "limit", "MFU")
    return f"`configs/{run[0]}.py:{run[1]}`\n\n{table((*header, 'tokens/s', 'peak'), rows)}"


def waiting(
    step: Mapping[str, Any], base: Topology, other: Topology
) -> tuple[tuple[float, float], float, float]:
    """((seconds on ICI, on DCN), those hidden behind work, those that are not) on `other`."""
    places = [
        (part, *coordinates)
        for part in range(other.slices)
        for coordinates in itertools.product(*map(range, other.shape))
        for _ in range(other.chip.devices)
    ]
    ici = dcn = beside = between = 0.0
    for c in step["collectives"]:
        if c["devices"] != base.devices:
            raise ValueError(f"a collective over {c['devices']} of {base.devices} devices")
        collective = Collective(c["kind"], "", "", c["bytes"], tuple(range(len(places))))
        near, far = collective_seconds(collective, other, places)
        ici, dcn = ici + c["times"] * near, dcn + c["times"] * far
        if c["asynchronous"]:
            beside += c["times"] * (near + far)
        else:
            between += c["times"] * (near + far)
    return (ici, dcn), beside, between


if __name__ == "__main__":
    main()
