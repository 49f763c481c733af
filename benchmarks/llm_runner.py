"""The runner of language-model tasks at full size, against the fault server of the tests.

    python benchmarks/llm_runner.py [faults] [steady] [ceiling] [--rows=N]

faults    5,000 rows with each of eleven faults on 5 % of them: undisturbed, then killed three times
          at a random moment and resumed. The files must be the same bytes, and no finished row may
          be asked again.
steady    10,000 calls of 1 s at concurrency 256, journal on disk: calls a second in each fifth of
          the run, as a share of concurrency ÷ latency, and memory.
ceiling   calls a second of one process with a server that answers at once, by transport,
          interleaved; and the processor time of a call, which depends less on what else runs.

Needs the extra `llm`. All processes share the machine's cores.
"""

import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "llm")]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])

from disturbance import kill_and_resume  # noqa: E402
from served import Served  # noqa: E402
from small_task import TASK, Row, endpoint  # noqa: E402

from jaxconv.llm import Journal, Settings, run_tasks  # noqa: E402


def faults(folder: Path, rows: int) -> None:
    began, servers = time.monotonic(), []

    def serve(**options) -> Served:
        servers.append(Served.start(folder / f"log{len(servers)}", **options))
        return servers[-1]

    counts = kill_and_resume(serve, folder, n=rows, rate=0.05, timeout=5.0, kills=3, seed=0)
    for server in servers:
        server.stop()
    print(
        f"faults: {rows:,} rows, 3 kills: same bytes, no finished row asked again; requests "
        f"{counts['undisturbed']:,} undisturbed, {counts['killed']:,} with kills; "
        f"{time.monotonic() - began:.0f} s for both"
    )


def steady(folder: Path, rows: int) -> None:
    server = Served.start(folder / "steady.log", latency=1.0)
    at: list[float] = []
    memory: list[float] = []

    def note(result) -> None:
        assert result.ok, result.error
        at.append(time.monotonic())
        if len(at) % (rows // 5) == 0:
            memory.append(_resident_mib())

    concurrency, model = 256, endpoint(server.url)  # which imports the client
    with Journal(folder / "steady.sqlite") as journal:
        spent, began = time.process_time(), time.monotonic()
        run_tasks(
            TASK,
            ((f"row-{i}", Row(text=f"text {i}")) for i in range(rows)),
            model,
            journal=journal,
            settings=Settings(concurrency=concurrency, timeout_s=60.0),
            on_result=note,
        )
        spent, seconds = time.process_time() - spent, time.monotonic() - began
    server.stop()
    fifth = rows // 5
    ends = [began, *(at[(k + 1) * fifth - 1] for k in range(5))]
    shares = [fifth / (b - a) / concurrency for a, b in itertools.pairwise(ends)]
    print(
        f"steady: {rows:,} calls in {seconds:.1f} s, {rows / seconds:.0f}/s = "
        f"{rows / seconds / concurrency:.1%} of concurrency / latency; by fifths "
        f"{' '.join(f'{share:.1%}' for share in shares)}; memory after each fifth, MiB: "
        f"{' '.join(f'{m:.0f}' for m in memory)}; {1e3 * spent / rows:.2f} ms of processor a call"
    )


_CEILING = """
import sys, time
from small_task import TASK, Row, endpoint
from jaxconv.llm import Journal, Settings, run_tasks
from jaxconv.llm.backends import openai
url, n, transport, journal = sys.argv[1:]
if transport == "default":
    def missing(**options):
        raise RuntimeError
    import openai as client
    client.DefaultAioHttpClient = missing
rows = ((str(i), Row(text=f"text {i}")) for i in range(int(n)))
model = endpoint(url)
with Journal(journal) as kept:
    spent, began = time.process_time(), time.monotonic()
    results = run_tasks(TASK, rows, model, journal=kept, settings=Settings(concurrency=64))
    print(time.monotonic() - began, time.process_time() - spent)
assert all(result.ok for result in results.values())
"""


def ceiling(folder: Path, rows: int) -> None:
    found: dict[str, list[tuple[float, float]]] = {"default": [], "aiohttp": []}
    for repeat in range(3):
        for transport, times in found.items():
            server = Served.start(folder / f"{transport}{repeat}.log")
            journal = folder / f"{transport}{repeat}.sqlite"
            out = subprocess.run(
                [sys.executable, "-c", _CEILING, server.url, str(rows), transport, str(journal)],
                check=True,
                capture_output=True,
                text=True,
            )
            times.append(tuple(map(float, out.stdout.split())))
            server.stop()
    for transport, times in found.items():
        seconds, spent = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"ceiling: {transport} transport: {rows / seconds:.0f} calls/s, "
            f"{1e3 * spent / rows:.2f} ms of processor a call (so at most {rows / spent:.0f}/s)"
        )


def _resident_mib() -> float:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / (1 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parts = {"faults": (faults, 5000), "steady": (steady, 10_000), "ceiling": (ceiling, 2000)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all without any")
    parser.add_argument("--rows", type=int, default=0)
    options = parser.parse_args()
    for name in options.parts or parts:
        measure, rows = parts[name]
        with tempfile.TemporaryDirectory() as folder:
            load = os.getloadavg()[0]
            measure(Path(folder), options.rows or rows)
            print(f"  ({os.cpu_count()} cores; load before {load:.1f})", flush=True)


if __name__ == "__main__":
    main()
